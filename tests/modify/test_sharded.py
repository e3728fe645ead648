"""Models sharded by FSDP2: everything but training, which ``test_many.py`` compares."""

from __future__ import annotations

from pathlib import Path

from tests.modify.torchrun import torchrun


def test_what_a_sharded_model_keeps(tmp_path: Path) -> None:
    """The checks run in the processes themselves; what one prints last has passed."""
    torchrun(Path(__file__).with_name("sharded_worker.py"), str(tmp_path))
