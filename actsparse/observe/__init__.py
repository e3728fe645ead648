"""Reads a model while it runs, and never changes it: one file, one measure."""

from __future__ import annotations

from actsparse.observe.session import Seen, observe
from actsparse.observe.skippable import skippable

__all__ = ["Seen", "observe", "skippable"]
