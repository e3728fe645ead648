"""The theory's measures in words and tables: the identity, curvature, density and its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actsparse_lab.analysis.effects import number
from actsparse_lab.analysis.intervals import Estimate, t_interval
from actsparse_lab.analysis.measures import Drawn, Identity, Measured, Theory, read_measures
from actsparse_lab.analysis.numbers import amount
from actsparse_lab.analysis.tables import Cell, Column, Table
from actsparse_lab.records import Entry, Run

ROUNDING = 2**-8  # bfloat16 rounds by up to 2⁻⁹, a square by twice that


def identity_text(identity: Identity) -> str:
    """How far the identity held, and whether rounding explains it."""
    said = (
        f"The two sides are measured apart. Over {identity.count} pairs, in all lines and blocks "
        f"of all runs, they differ by at most {amount(identity.gap)} of the density "
        f"({identity.where})."
    )
    if identity.gap > ROUNDING:
        said += (
            " That is more than rounding: the two have not seen the same passes, or one is wrong."
        )
    if identity.skipped:
        said += (
            f" {identity.skipped} more are not compared: gradients that were not finite are left "
            f"out of AF, and their passes not of density."
        )
    return said


def curvature_table(theory: Theory) -> Table:
    """Traces and the largest eigenvalue of each arm that has any of them."""
    columns: list[tuple[str, Callable[[Measured], Drawn | Estimate | None]]] = [
        ("Gauss–Newton trace", lambda arm: arm.gauss_newton),
        ("Hessian trace", lambda arm: arm.hessian),
        ("token-copied trace", lambda arm: arm.token_copies),
        ("AF of all MLP layers", lambda arm: arm.flatness),
        ("largest eigenvalue", lambda arm: arm.top_eigenvalue),
    ]
    arms = [arm for arm in theory.arms if arm.curved]
    shown = [(head, read) for head, read in columns if any(read(arm) for arm in arms)]
    return Table(
        "curvature-table",
        "curvature",
        tuple(map(Column, ("arm", *(head for head, _ in shown), "seeds"))),
        tuple(
            (arm.arm, *(_estimated(read(arm)) for _, read in shown), str(arm.seeds)) for arm in arms
        ),
    )


def _estimated(value: Drawn | Estimate | None) -> Cell | str:
    if isinstance(value, Drawn):
        error = value.standard_error
        lines = () if error is None else (f"SE {amount(error)}",)
        return Cell(amount(value.over_seeds), lines)
    return amount(value)


def how_text(theory: Theory) -> str:
    """On what the trained models were measured, and whether all in one way."""
    ways = [
        ", ".join(f"{key}: {_plain(value)}" for key, value in how.items()).replace("_", " ")
        for how in theory.how
    ]
    if len(ways) < 2:
        return "".join(f"How: {way}." for way in ways)
    return f"Measured in {len(ways)} ways, which do not compare like with like: {'; '.join(ways)}."


def _plain(value: Any) -> str:
    return amount(value) if isinstance(value, int | float) else str(value)


def markdown_theory(runs: list[Run]) -> str:
    """Density beside what it is made of, at three steps, for a lab log; "" without any.

    Means over seeds with 95 % t-intervals, over training batches since the line before. Curvature
    is of the rows that the run was measured on; a last row has what `actsparse measure` found.
    """
    told = [run for run in runs if run.train and number(run.train[-1], "measures", "flatness")]
    if not told:
        return ""
    passive = {"density": "density", "AF": "flatness", "c": "coefficient", "‖x‖²": "input_norm",
               "η², active": "effective_gradient"}  # fmt: skip
    traces = {"Gauss–Newton": "gauss_newton", "token copies": "token_copies"}
    rows = []
    logged = {entry["step"] for entry in told[0].train}
    steps = [entry["step"] for entry in told[0].measured if entry["step"] in logged]
    steps = steps or sorted(logged)
    for arm in dict.fromkeys(run.arm for run in told):
        own = [run for run in told if run.arm == arm]
        by_step = {
            str(step): [(_at(run.train, step), _at(run.measured, step)) for run in own]
            for step in (steps[0], steps[(len(steps) - 1) // 2], steps[-1])
        }
        later = [entry for run in own if (entry := read_measures(run)) is not None]
        if later:
            split = later[0]["how"].get("split", "measured")
            by_step[f"end, {split} rows"] = [(entry, entry) for entry in later]
        for name, found in by_step.items():
            cells = [arm, name]
            cells += (
                amount(t_interval(number(entry, "measures", key) for entry, _ in found))
                for key in passive.values()
            )
            cells += (
                amount(t_interval(number(entry, "curvature", key, "value") for _, entry in found))
                for key in traces.values()
            )
            rows.append(tuple(cells))
    columns = tuple(map(Column, ("arm", "step", *passive, *traces)))
    return Table("theory-table", "theory", columns, tuple(rows)).markdown()


def _at(entries: list[Entry], step: int) -> Entry | None:
    return next((entry for entry in entries if entry["step"] == step), None)
