"""How long work shows itself: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from actsparse_lab.campaigns.compare import Event
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.folder import Config
from actsparse_lab.records import Entry, Run, read_run, run_path, write_whole


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


def called() -> str:
    """The command as it was typed."""
    return shlex.join(["actsparse", *sys.argv[1:]])


@contextmanager
def stoppable(command: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM inside: says how to go on, and exits with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What is finished is kept; to go on: {command}", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def following(config: RunConfig, console: Console) -> Iterator[Callable[[int], None]]:
    """A run in this process: what it gives is to be called with the steps done."""
    live = console.is_terminal
    columns = (TextColumn("{task.completed:.0f}/{task.total:.0f} steps"), BarColumn())
    bar = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not live
    )
    with bar:
        task = bar.add_task("steps", total=config.steps)

        def tell(step: int) -> None:
            bar.update(task, completed=step)
            if not live and step * 10 // config.steps > (step - 1) * 10 // config.steps:
                _say(console, f"{step} of {config.steps} steps")

        yield tell


def keep_card(run: Run) -> None:
    """Write a finished run's model card, README.md, into its folder."""
    if not run.path.exists():  # packed: there is no folder for it
        return
    with suppress(ModuleNotFoundError):  # without the extra "report" there is none
        from actsparse_lab.report import model_card

        write_whole(run.path.with_name("README.md"), model_card(run).encode())


def outcome(result: Entry, before: bool) -> str:
    """Quality, density and time of a finished run in a line; ``before``: it was done already."""
    said = f"{result['quality_name']} {result['quality']:.4g}"
    if result["inference"] is not None:
        said += f", inference density {result['inference']['density']:.3f}"
    return said + (", done before" if before else f", {result['time']['seconds']:.0f} s")


def _outcome(config: Config, out: str, kind: str) -> str:
    run = read_run(run_path(out, config.arm, config.seed))
    return outcome(run.result or {}, before=kind == "skipped")


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
