"""Two processes that talk over gloo, forked from one that has imported torch and transformers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """``function(*arguments)`` in each of two processes of a thread, to its end.

    Raises:
        ProcessRaisedException: it failed in one of them; with the traceback.
    """
    with tempfile.TemporaryDirectory() as meet:
        torch.multiprocessing.start_processes(
            _process, (function, arguments, meet), nprocs=2, start_method="forkserver"
        )


def _process(rank: int, function: Callable[..., None], arguments: Any, meet: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meet}/file", rank=rank, world_size=2,
        timeout=timedelta(minutes=2),
    )  # fmt: skip
    function(*arguments)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads outlive the group and may abort an interpreter that ends first
