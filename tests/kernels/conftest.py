"""The ways a sparse MLP can run on this machine, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from actsparse.kernels import backends, build

BEST = torch.ops.actsparse_cpu.level(-1) if build.load() else -1
WAYS = [*build.LEVELS[: BEST + 1], "reference"]  # the last: PyTorch's own operators


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "reference":
        monkeypatch.setattr(backends, "_load", lambda: False)
    else:
        torch.ops.actsparse_cpu.level(build.LEVELS.index(request.param))
    yield request.param
    torch.set_num_threads(1)
    if BEST >= 0:
        torch.ops.actsparse_cpu.level(BEST)
