"""Second moments accumulated over training (Peng et al. 2023, arXiv 2309.03004, "v1").

Nets of four residual layers ``x + ReLU(W·LN(x))`` of several widths p are trained by plain SGD with
several weight decays, arms ``p{width}-decay{wd}``. The second moments of the features LN(x) and of
the gradients at W's output are summed as weight decay sums W's updates. v1 argues by random
matrices that W's eigenvalues stay concentrated: what these sums are made of would be close to
random. Widths and decays are read from the arms' names.

Of v1 only the abstract and the authors' program were at hand, so the bars are ours. Anisotropy A is
``√p ‖αC − I‖_F``, at most ``√(p(p − 1))``; it is compared with that of Gaussian rows, not with a
power of width: that of random gradients grows faster than width, a single direction's as fast.
Accepted fits do not show that anything is random, and weights that follow the law may still be
those of the start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from actsparse_lab.analysis.effects import (
    Arms,
    Effects,
    Reader,
    by_seed,
    combined,
    difference,
    final,
    mean_of,
    number,
)
from actsparse_lab.analysis.findings import Asked
from actsparse_lab.records import Entry, Run

SEEN = ("feature", "gradient")
MIDDLE = 0.1  # a weight decay of both forms
TWICE = math.log(2)
ARM = re.compile(r"p(\d+)-decay([\d.e-]+)")

Runs = dict[int, Run]  # by seed
Line = dict[float, float]  # of one seed or of the mean: across → up


def grid(arms: Mapping[str, Runs]) -> dict[tuple[int, float], Runs]:
    """The runs by width and weight decay, ascending, as the arms' names say.

    >>> list(grid({"p64-decay0": {}, "p16-decay0.1": {}, "vanilla": {}}))
    [(16, 0.1), (64, 0.0)]
    """
    named = [(found, runs) for arm, runs in arms.items() if (found := ARM.fullmatch(arm))]
    cells = {(int(found[1]), float(found[2])): runs for found, runs in named}
    return {cell: cells[cell] for cell in sorted(cells)}


# -- one number of a run ----------------------------------------------------------------------


def layers_of(entry: Entry) -> list[Entry]:
    """The measures of each layer of a line."""
    return list((entry["measures"] or {}).get("layers") or [])


def at_end(run: Run) -> list[Entry]:
    """The layers of the line of the last step; none where there is no such line."""
    entry = final(run, "measured")
    return [] if entry is None else layers_of(entry)


def mean_log(layers: Sequence[Entry], key: str) -> float | None:
    """The mean of ln over layers; None where a layer has no number above 0."""
    known = [value for layer in layers if (value := number(layer, key)) and value > 0]
    return fmean(map(math.log, known)) if known and len(known) == len(layers) else None


def anisotropy(run: Run) -> float | None:
    """The mean over layers of ln A of accumulated gradients at the end."""
    return mean_log(at_end(run), "gradient_anisotropy")


def over(key: str, other: str) -> Reader:
    """Reads the mean over layers of ln (``key`` / ``other``) at the end."""

    def read(run: Run) -> float | None:
        own, others = (mean_log(at_end(run), each) for each in (key, other))
        return None if own is None or others is None else own - others

    return read


def concentration_peak(run: Run) -> float | None:
    """The largest, over the lines, of the mean over layers of ln (concentration / the first)."""
    means = [mean_log(layers_of(entry), "concentration") for entry in run.measured]
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means) or len(means) < 2 or not at_end(run):
        return None
    return max(known) - known[0]


# -- effects ----------------------------------------------------------------------------------


def _mean(cells: Sequence[Runs], read: Reader) -> Effects:
    """The mean over cells, for the seeds that have a number in every one."""
    return mean_of([by_seed(cell, read) for cell in cells])


def _at(decay: float, read: Reader) -> Callable[[Arms], Effects]:
    """The mean over widths, at one weight decay."""
    return lambda arms: _mean([r for (_, d), r in grid(arms).items() if d == decay], read)


def _by_decay(arms: Arms) -> Effects:
    cells = grid(arms)
    most = max((decay for _, decay in cells), default=0.0)
    both = [
        (runs, cells[w, 0.0]) for (w, d), runs in cells.items() if d == most and (w, 0) in cells
    ]
    if not both or most == 0:
        return {}
    own, without = (_mean(each, anisotropy) for each in zip(*both, strict=True))
    return combined(own, without, difference)


def _as_random(of: str) -> Asked:
    effect = (
        f"ln of the anisotropy A of accumulated {of}s over that of as many Gaussian rows of the "
        "same rank; mean over layers and widths; no weight decay, last step"
    )
    found = _at(0.0, over(f"{of}_anisotropy", f"{of}_random_anisotropy"))
    return Asked("falls", found, effect, "log", -TWICE)


def _follows(key: str, of: str, decay: float = 0.0) -> Asked:
    effect = (
        f"ln of the Kolmogorov–Smirnov distance of the eigenvalues of {of} from Marchenko and "
        f"Pastur’s law over the largest that 99 of 100 random matrices have; mean over layers and "
        f"widths; weight decay {decay:g}, last step"
    )
    return Asked("falls", _at(decay, over(f"{key}_ks", f"{key}_ks_limit")), effect, "log")


_PERSISTS = (
    "mean over layers of ln (W Wᵀ’s largest over its smallest non-zero eigenvalue), the most that "
    "it is at a measured step minus the first, after step 1; mean over widths"
)
_LESS = (
    "ln of the anisotropy A of accumulated gradients, largest weight decay over none; mean over "
    "layers and widths, last step"
)
QUESTIONS = {
    **{f"{of}-random": _as_random(of) for of in SEEN},
    **{
        f"{of}-law": _follows(f"{of}_equal", f"the accumulated second moment of {of}s")
        for of in SEEN
    },
    "concentration": Asked("falls", _at(0.0, concentration_peak), _PERSISTS, "log", -TWICE),
    "concentration-decay": Asked(
        "falls", _at(MIDDLE, concentration_peak), _PERSISTS, "log", -TWICE
    ),
    "decay": Asked("falls", _by_decay, _LESS, "log"),
    "weights-law": _follows("weight", "W Wᵀ"),
    "weights-law-decay": _follows("weight", "W Wᵀ", MIDDLE),
}
