"""The finetuning's plot: density and accuracy before and after."""

from __future__ import annotations

from actsparse_lab.papers.finetune.claims import FROM_SPARED, HOYER, PLAIN, RECIPE
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.papers.rows_plot import rows_plot

ROWS = (
    ("plain", PLAIN),
    ("plain,\nno 1-D decay", f"{PLAIN}{SPARED}"),
    ("papers’ recipe", RECIPE),
    ("papers’,\nno 1-D decay", f"{RECIPE}{SPARED}"),
    ("Hoyer penalty", HOYER),
)
BASES = (("trained with 1-D decay", ""), ("without", FROM_SPARED))

PLOTS = {"before-after": rows_plot(ROWS, BASES, aside=HOYER)}
