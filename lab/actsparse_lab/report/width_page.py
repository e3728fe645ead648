"""The page of one size up: its sections, in HTML and in Markdown."""

from __future__ import annotations

from pathlib import Path

from actsparse_lab.analysis.comparison import BEST, WHOLE
from actsparse_lab.analysis.numbers import counted, percent
from actsparse_lab.analysis.prose import sections as words_of
from actsparse_lab.analysis.tables import markdown
from actsparse_lab.analysis.width_fit import Span
from actsparse_lab.report.frontier_page import Section, counts_text
from actsparse_lab.report.width import (
    PREDICTED,
    Width,
    block_table,
    claims_table,
    cost_table,
    fit_table,
    read_prediction,
    tokens_table,
    width_table,
    widths_in,
)
from actsparse_lab.report.width_plots import WIDTH_PICTURES

ABOUT = (
    "# One size up: density over width and tokens\n\n"
    "Made from records by `actsparse report benchmarks/width --markdown`; do not edit. "
    "[Training](training.md#one-size-up) has the commands that do the runs."
)


def width_sections(folder: str | Path) -> list[Section]:
    """What a page shows of the width tasks in ``folder``; nothing for fewer than two widths."""
    widths = widths_in(folder)
    if len(widths) < 2:
        return []
    rule = words_of("report/rules.md")["One size up"]
    by_width, by_tokens = WIDTH_PICTURES
    tables = (
        ("Claims at each width", " ".join(counts_text(each.board) for each in widths),
         claims_table(widths), None),
        (by_width.title, "", width_table(widths), by_width),
        ("Density by block", _seeds_text(widths), block_table(widths), None),
        (by_tokens.title, "", tokens_table(widths), by_tokens),
        ("A power law, and a prediction", _prediction_text(folder),
         fit_table(widths, folder), None),
        ("What it would take at the papers’ size", "Measured hours of a run, and those of a "
         "training of T5-Base on C4 for 100,000 steps at the same rate.",
         cost_table(widths), None),
    )  # fmt: skip
    last = len(tables) - 1
    return [
        Section(
            table.name.removesuffix("-table"),
            title,
            text,
            table,
            picture,
            (widths,) if picture else (),
            rule=rule if at == last else "",
        )
        for at, (title, text, table, picture) in enumerate(tables)
    ]


def markdown_widths(folder: str | Path, link: str = "") -> str | None:
    """The page in Markdown; ``link`` leads to the folder. None for fewer than two widths."""
    lines = [ABOUT, "", words_of("report/rules.md")["One size up"]]
    parts = width_sections(folder)
    for each in parts:
        text = each.text if each.picture is None else each.picture.caption
        lines += ["", f"## {markdown(each.title)}", "", markdown(text)]
        if each.picture is not None:
            lines += ["", f"![{markdown(each.title)}]({link}plots/{each.picture.name}.png)"]
        lines += ["", each.table.markdown().rstrip("\n")]
    return "\n".join(lines) + "\n" if parts else None


def _seeds_text(widths: list[Width]) -> str:
    seeds = (f"{counted(len(each.arms[WHOLE]), 'seed')} at D = {each.d}" for each in widths)
    return f"Inference density of each block when training ended, test split: {', '.join(seeds)}."


def _prediction_text(folder: str | Path) -> str:
    said = read_prediction(folder)
    fewer = (said or {}).get("fewer", {}).get("inference")
    if fewer is None:
        return ""
    span = Span(**fewer)
    ends = f" ({percent(span.low)} to {percent(span.high)})" if span.low is not None else ""
    return (
        f"At D = {PREDICTED} {BEST} is predicted to have {percent(span.mean)}{ends} fewer active "
        f"neurons in inference than {WHOLE}."
    )
