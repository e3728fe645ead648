"""The synthetic runs of the report's tests."""

from __future__ import annotations

from tests.report.conftest import add_run, measured, theory_runs

__all__ = ["add_run", "measured", "theory_runs"]
