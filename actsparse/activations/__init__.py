"""Activation functions by name, each with its value φ(z) and its derivative φ′(z).

>>> import torch
>>> jsrelu = named("jsrelu")
>>> jsrelu.value(torch.tensor([-1.0, 0.0, 2.0]))
tensor([0., 0., 4.])
>>> jsrelu.derivative(torch.tensor([-1.0, 0.0, 2.0]))
tensor([0., 0., 3.])
>>> identify(torch.nn.GELU())
'gelu'
"""

from __future__ import annotations

from actsparse.activations.formulas import ACTIVATIONS, ActivationFunction, jsrelu
from actsparse.activations.names import (
    SShape,
    known_as,
    named,
    numbers_of,
    s_shape_of,
    shifted_s_shape,
    thresholded,
    with_numbers,
)
from actsparse.activations.recognise import derivative_of, identify, works_in_place

__all__ = [
    "ACTIVATIONS",
    "ActivationFunction",
    "SShape",
    "derivative_of",
    "identify",
    "jsrelu",
    "known_as",
    "named",
    "numbers_of",
    "s_shape_of",
    "shifted_s_shape",
    "thresholded",
    "with_numbers",
    "works_in_place",
]
