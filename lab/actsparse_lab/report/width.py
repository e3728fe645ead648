"""One size up: what the frontier's width tasks say over width and tokens, and what they predict."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from actsparse_lab.analysis.comparison import BEST, CONTROL, HALVES, REFERENCE, SUBJECT, WHOLE
from actsparse_lab.analysis.effects import INFERENCE, LIVING, TRAINING, Arms, Reader, number
from actsparse_lab.analysis.intervals import t_interval
from actsparse_lab.analysis.manifest import FRONTIER, read_checked
from actsparse_lab.analysis.numbers import NONE, amount, counted, decimal, percent
from actsparse_lab.analysis.tables import Cell, Column, Table
from actsparse_lab.analysis.verdicts import every
from actsparse_lab.analysis.width_fit import Fits, Span, fits
from actsparse_lab.records import Entry, Run, read_runs, write_whole
from actsparse_lab.report.frontier import Board, board, frontiers_in

FITTED = (WHOLE, REFERENCE, SUBJECT, BEST)
SHARES = (1 / 8, 1 / 4, 1 / 2, 1)
PREDICTED = 384
PREDICTION = "prediction.json"
NUMBERS: dict[str, Reader] = {"inference": INFERENCE, "training": TRAINING, "living": LIVING}
WORDS = {"yes": "holds", "no": "does not hold here", "undecided": "undecided"}
T5_BASE = (768, 24, 100_000 * 256 * 512)  # D, blocks, tokens: arXiv 2309.03004, see tasks/t5.py


@dataclass(frozen=True)
class Width:
    """The runs of one width D, and what the frontier's rules say of them."""

    d: int
    board: Board
    runs: list[Run]

    @property
    def arms(self) -> Arms:
        """The finished runs by arm and seed."""
        return Arms(self.runs)


def widths_in(folder: str | Path) -> list[Width]:
    """The frontier tasks ``width-D`` in ``folder`` that have a finished run, by D.

    Raises:
        RecordError: as `board`.
    """
    found = []
    for place in frontiers_in(folder):
        named = re.fullmatch(r"width-(\d+)", str((FRONTIER.read(place) or {}).get("task")))
        runs = read_runs(place) if named else []
        if named and (judged := board(place, runs)):
            found.append(Width(int(named[1]), judged, runs))
    return sorted(found, key=lambda width: width.d)


# -- the fit, and what it predicts ----------------------------------------------------------------


def fits_of(widths: Sequence[Width], read: Reader) -> Fits | None:
    """Density over width and tokens, of the runs below `PREDICTED`.

    Runs of half the steps have half the tokens, and a schedule of their own.
    """
    halves = {whole: half for half, whole in HALVES.items()}
    names = {arm: {arm: 1.0, halves.get(arm, arm): 0.5 if arm in halves else 1.0} for arm in FITTED}
    below = {width.d: width.arms for width in widths if width.d < PREDICTED}
    return fits(below, names, read, PREDICTED) if below else None


def write_prediction(folder: str | Path) -> Path | None:
    """Write what the fit predicts at `PREDICTED`, unless runs of that width have begun.

    Returns:
        The file's path; None where nothing was written.
    """
    path = Path(folder) / PREDICTION
    widths = widths_in(folder)
    begun = (Path(folder) / f"width-{PREDICTED}").exists()
    found = {name: fits_of(widths, read) for name, read in NUMBERS.items()}
    if begun or found["inference"] is None:
        return None
    fewer = {
        name: asdict(each.fewer(BEST, WHOLE))
        for name, each in found.items()
        if each is not None and {BEST, WHOLE} <= {*each.draws}
    }
    densities = {
        name: {arm: asdict(each.of(arm).predicted) for arm in each.draws}
        for name, each in found.items()
        if each is not None
    }
    runs = {width.d: {arm: len(seeds) for arm, seeds in width.arms.items()} for width in widths}
    said = {"at": PREDICTED, "runs": runs, "densities": densities, "fewer": fewer}
    write_whole(path, (json.dumps(said, indent=2, allow_nan=False) + "\n").encode())
    return path


def read_prediction(folder: str | Path) -> Entry | None:
    """What `write_prediction` wrote; None where there is none."""
    shape = {"at": int, "runs": dict, "densities": dict, "fewer": dict}
    return read_checked(Path(folder) / PREDICTION, shape)


# -- tables --------------------------------------------------------------------------------------


def width_table(widths: Sequence[Width]) -> Table:
    """Loss and densities of every arm at every width, when training ended."""
    heads = (
        "arm", "D", "loss", "change", "within noise", "inference density", "living density",
        "dead units", "training density", "fewer active, inference", "fewer active, training",
        "seeds",
    )  # fmt: skip
    rows = [
        (
            row.name,
            str(width.d),
            decimal(row.loss),
            decimal(row.change, signed=True),
            row.within_noise or NONE,
            decimal(row.inference_density, 4),
            decimal(row.living_density, 4),
            percent(row.dead_share),
            decimal(row.training_density, 4),
            percent(row.inference_improvement),
            percent(row.training_improvement),
            str(len(row.seeds)),
        )
        for arm in (WHOLE, REFERENCE, SUBJECT, BEST, CONTROL, *HALVES)
        for width in widths
        if (row := width.board.row(arm)) is not None
    ]
    return Table("over-width-table", "Over width", tuple(map(Column, heads)), tuple(rows))


def block_table(widths: Sequence[Width]) -> Table:
    """Inference density of each block, with that of its living units and the share of dead ones."""
    rows: list[tuple[Cell | str, ...]] = []
    most = 0
    for arm in FITTED:
        for width in widths:
            runs = [run for run in width.arms[arm].values() if run.result["inference"]]  # type: ignore[index]
            if not runs:
                continue
            blocks = zip(*(run.result["inference"]["blocks"] for run in runs), strict=True)  # type: ignore[index]
            cells = [_block(each) for each in blocks]
            most = max(most, len(cells))
            rows.append((arm, str(width.d), *cells))
    columns = ("arm", "D", *(f"block {at + 1}" for at in range(most)))
    whole = tuple((*row, *[NONE] * (len(columns) - len(row))) for row in rows)
    return Table("by-block-table", "By block", tuple(map(Column, columns)), whole)


def _block(seeds: Sequence[Entry]) -> Cell:
    density = t_interval(each["density"] for each in seeds)
    living = t_interval(each["living_density"] for each in seeds)
    dead = t_interval(each["dead"] / each["units"] for each in seeds)
    return Cell(
        decimal(density, 4), lines=(f"living {decimal(living, 4)}", f"{percent(dead)} dead")
    )


def tokens_table(widths: Sequence[Width]) -> Table:
    """Loss and densities on the way, at `SHARES` of the tokens, on validation rows."""
    heads = (
        "arm", "D", "tokens", "loss", "inference density", "living density", "dead units",
        "training density",
    )  # fmt: skip
    rows: list[tuple[Cell | str, ...]] = []
    for arm in FITTED:
        for width in widths:
            runs = list(width.arms[arm].values())
            tokens = next((read for run in runs if (read := tokens_of(run))), None)
            for share in SHARES:
                seen = [each for run in runs if (each := _at_share(run, "evals", share))]
                trained = [each for run in runs if (each := _at_share(run, "train", share))]
                if seen:
                    told = f"{share:g} of all" if tokens is None else amount(share * tokens)
                    rows.append((arm, str(width.d), told, *_on_the_way(seen, trained)))
    return Table("over-tokens-table", "Over tokens", tuple(map(Column, heads)), tuple(rows))


def _on_the_way(seen: Sequence[Entry], trained: Sequence[Entry]) -> list[str]:
    """What validation lines say, and the density of the training lines at the same step."""
    measures = [each["measures"] for each in seen if each["measures"]]
    return [
        decimal(t_interval(each["loss"] for each in seen)),
        decimal(t_interval(each["density"] for each in measures), 4),
        decimal(t_interval(each["living_density"] for each in measures), 4),
        percent(t_interval(each["dead"] / each["units"] for each in measures)),
        decimal(t_interval(number(each, "measures", "density") for each in trained), 4),
    ]


def _at_share(run: Run, lines: str, share: float) -> Entry | None:
    """The line that a run wrote after that share of its steps."""
    step = share * (run.result or {}).get("step", 0)
    entries: list[Entry] = getattr(run, lines)
    return next((each for each in entries if each["step"] == step > 0), None)


def tokens_of(run: Run) -> int | None:
    """How many tokens a run has read when it ends; None where its record does not say."""
    config = run.header["config"]
    keys = (("steps",), ("batch_size",), ("data", "length"))
    found = [number(config, *each) for each in keys]
    return None if None in found else int(math.prod(found))  # type: ignore[arg-type]


def claims_table(widths: Sequence[Width]) -> Table:
    """The papers' claim and ours at each width, by the frontier's rules."""
    heads = (
        "D", "claim", "inference", "training", "change of the loss", "verdict", "knee", "seeds",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for width in widths:
        of = width.board
        knee, seeds = of.at_knee, [len(row.seeds) for row in of.rows if row.name in FITTED]
        few = f"shown, not judged: {counted(min(seeds, default=0), 'seed')}" if of.few else ""
        if (claim := of.claim) is not None:
            text = "paper, against vanilla: at least 36 % and 50 % fewer"
            rows.append(
                (str(width.d), text, percent(claim.inference), percent(claim.training),
                 decimal(claim.change, signed=True), few or WORDS[claim.holds], knee, str(of.seeds))
            )  # fmt: skip
        if (best := of.row(BEST)) is not None and best.fewer and best.within_noise:
            text = f"best, against {of.best}: at least 60 % fewer"
            word = WORDS[every(best.fewer, best.within_noise)]
            rows.append(
                (str(width.d), text, percent(best.inference_improvement),
                 percent(best.training_improvement), decimal(best.change, signed=True),
                 few or word, knee, str(of.seeds))
            )  # fmt: skip
    columns = tuple(Column(head, prose=head == "claim") for head in heads)
    return Table("width-claims-table", "Claims", columns, tuple(rows))


def fit_table(widths: Sequence[Width], folder: str | Path) -> Table:
    """The exponents of width and tokens, and the prediction beside what was found."""
    heads = (
        "density", "arm", f"at D = {min((w.d for w in widths), default=0)}", "exponent of D",
        "exponent of tokens", f"predicted at D = {PREDICTED}", "found there",
    )  # fmt: skip
    said = read_prediction(folder) or {"densities": {}}
    there = next((width.arms for width in widths if width.d == PREDICTED), Arms([]))
    rows = []
    for name, read in NUMBERS.items():
        found = fits_of(widths, read)
        for arm in found.draws if found else ():
            fit = found.of(arm)  # type: ignore[union-attr]
            written = said["densities"].get(name, {}).get(arm)
            rows.append(
                (name, arm, _spanned(fit.at_first), _spanned(fit.width), _spanned(fit.tokens),
                 _spanned(Span(**written) if written else fit.predicted),
                 decimal(t_interval(map(read, there[arm].values())), 4))
            )  # fmt: skip
    return Table("width-fit-table", "A power law", tuple(map(Column, heads)), tuple(rows))


def _spanned(span: Span | None) -> str:
    if span is None:
        return NONE
    ends = "" if span.low is None else f" ({decimal(span.low)} to {decimal(span.high)})"
    return f"{decimal(span.mean)}{ends}"


def cost_table(widths: Sequence[Width]) -> Table:
    """Measured seconds of runs; what T5-Base on C4 would take at the largest width's rate."""
    heads = ("D", "arm", "parameters of the blocks", "tokens", "hours", "operations a second")
    rows: list[tuple[str, ...]] = []
    rate = 0.0
    for width in widths:
        for arm in (*FITTED, CONTROL):
            own = [run for run in width.arms[arm].values() if _uninterrupted(run)]
            seconds = [run.result["time"]["seconds"] for run in own]  # type: ignore[index]
            tokens = next((found for run in own if (found := tokens_of(run))), None)
            layers = number(own[0].header["config"], "model", "n_layer") if own else None
            if not tokens or layers is None:
                continue
            took = median(seconds)
            size = (4 if arm == CONTROL else 12) * layers * width.d**2
            rate = 6 * size * tokens / took if arm == WHOLE else rate
            rows.append(
                (str(width.d), arm, amount(size), amount(float(tokens)), decimal(took / 3600, 2),
                 amount(6 * size * tokens / took))
            )  # fmt: skip
    if rate:
        d, blocks, tokens = T5_BASE
        size = 12 * blocks * d**2
        hours = 6 * size * tokens / rate / 3600
        rows.append((str(d), "T5-Base on C4", amount(size), amount(float(tokens)), amount(hours),
                     amount(rate)))  # fmt: skip
    return Table("width-cost-table", "Cost", tuple(map(Column, heads)), tuple(rows))


def _uninterrupted(run: Run) -> bool:
    return run.result is not None and run.result["time"].get("resumed_at") is None
