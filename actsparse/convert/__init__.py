"""Convert a dense checkpoint into a sparse one: calibrate, distil, choose, judge, save."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from actsparse.convert.certificate import Certificate, certify, largest_certified
from actsparse.convert.distillation import Distillation, distil
from actsparse.convert.judgement import Judgement, judge
from actsparse.convert.losses import document_losses, mean_loss
from actsparse.convert.pipeline import Conversion, Split, convert
from actsparse.convert.scores import Calibration, calibrate
from actsparse.convert.share import Choice, choose
from actsparse.convert.text import Windows, read_documents, windows_of
from actsparse.extras import needed

if TYPE_CHECKING:
    from actsparse.convert.callback import DistillationCallback

__all__ = [
    "Calibration",
    "Certificate",
    "Choice",
    "Conversion",
    "Distillation",
    "DistillationCallback",
    "Judgement",
    "Split",
    "Windows",
    "calibrate",
    "certify",
    "choose",
    "convert",
    "distil",
    "document_losses",
    "judge",
    "largest_certified",
    "mean_loss",
    "read_documents",
    "windows_of",
]


def __getattr__(name: str) -> Any:
    if name != "DistillationCallback":  # transformers takes seconds to import
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    needed("transformers", "actsparse.convert.DistillationCallback")
    return importlib.import_module("actsparse.convert.callback").DistillationCallback
