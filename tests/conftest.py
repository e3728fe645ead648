"""Every test starts from the same seeds, offline and without a display."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# a pool of compilers imports torch once more
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # tests marked gpu need it to be 0

os.environ.pop("COLUMNS", None)  # of pytest-xdist's workers: it would narrow every table

import numpy as np
import pytest
import torch
from hypothesis import settings

# The same examples on every machine, and no time limit that a busy machine would miss.
settings.register_profile("actsparse", deadline=None, derandomize=True, database=None)
settings.load_profile("actsparse")

# At these sizes a second thread costs more than it brings, and CI's cores are shared.
torch.set_num_threads(1)


# Processes that tests start are forked from one that has imported what takes seconds.
multiprocessing.set_forkserver_preload(["torch", "transformers", "actsparse_lab.engine.run"])


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Python's garbage collector passes over what was collected: it stays, and is much to visit."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """What is left is freed at the end, or libraries would say that it leaked."""
    gc.unfreeze()


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Numbers drawn while a module is imported: torch begins each process at a seed of its own."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pixel() -> bytes:
    """A PNG."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(b"\0\0")}
    png = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*parts.items(), (b"IEND", b"")):
        check = zlib.crc32(kind + data)
        png += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    return png


@pytest.fixture
def undrawn(pixel: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plot is made as ever but saved as one pixel: for tests that read a page's words."""

    def save(figure: Any, file: Any, **_: Any) -> None:
        file.write(pixel)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
