"""How long work shows itself: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from actsparse.experiments.compare import Event
from actsparse.records import read_run, run_path
from actsparse.train.config import RunConfig


def show(events: Iterable[Event], total: int, out: str, console: Console) -> list[Event]:
    """Follow the events of `compare` to their end; returns those that failed."""
    failed: list[Event] = []
    done = 0
    bars: dict[tuple[str, int], TaskID] = {}
    live = console.is_terminal
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
        disable=not live,
        transient=True,
    )
    with progress:
        overall = progress.add_task("runs", total=total)
        for event in events:
            config = event.config
            key, name = (config.arm, config.seed), f"{config.arm} seed {config.seed}"
            if event.kind == "started":
                bars[key] = progress.add_task(f"  {name}", total=config.steps)
                if not live:
                    _say(console, f"{name}: started")
                continue
            if event.kind == "step":
                progress.update(bars[key], completed=event.step)
                continue
            done += 1
            progress.advance(overall)
            if key in bars:
                progress.remove_task(bars.pop(key))
            if event.kind == "failed":
                failed.append(event)
                _say(console, f"[{done}/{total}] {name}: failed, {event.reason}", "red")
            else:
                _say(console, f"[{done}/{total}] {name}: {_outcome(config, out, event.kind)}")
    return failed


def _outcome(config: RunConfig, out: str, kind: str) -> str:
    result = read_run(run_path(out, config.arm, config.seed)).result or {}
    said = f"{result['quality_name']} {result['quality']:.4g}"
    if result["inference"] is not None:
        said += f", inference density {result['inference']['density']:.3f}"
    return said + (", done before" if kind == "skipped" else f", {result['seconds']:.0f} s")


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
