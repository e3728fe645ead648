"""The ablation's plots: the eight combinations, and floors and places of the bias."""

from __future__ import annotations

from actsparse_lab.papers.questions import SPARED
from actsparse_lab.papers.rows_plot import rows_plot

DECAY = (("1-D parameters decay", ""), ("they do not", SPARED))
COMBINATIONS = (
    ("vanilla", "vanilla"),
    ("bias", "bias"),
    ("floor", "floor"),
    ("JSReLU", "jsrelu"),
    ("bias, floor", "bias+floor"),
    ("bias, JSReLU", "bias+jsrelu"),
    ("floor, JSReLU", "floor+jsrelu"),
    ("all three", "paper"),
)
VARIANTS = (
    ("vanilla", "vanilla"),
    ("floor 1", "floor"),
    ("floor 2", "floor-2"),
    ("floor 4", "floor-4"),
    ("bias at input", "bias"),
    ("bias at output", "bias-at-output"),
    ("no MLPs", "no-mlp"),
)

PLOTS = {"combinations": rows_plot(COMBINATIONS, DECAY), "variants": rows_plot(VARIANTS, DECAY)}
