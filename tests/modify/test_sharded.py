"""Models sharded by FSDP2: everything but training, which ``test_many.py`` compares."""

from __future__ import annotations

from pathlib import Path

from tests.modify.sharded_worker import check_all
from tests.processes import in_two_processes


def test_what_a_sharded_model_keeps(tmp_path: Path) -> None:
    """The checks run in the processes themselves; what one prints last has passed."""
    in_two_processes(check_all, tmp_path)
