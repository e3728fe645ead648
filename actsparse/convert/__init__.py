"""Convert a dense checkpoint into a sparse one: calibrate, distil, judge, save."""

from __future__ import annotations

from actsparse.convert.scores import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
