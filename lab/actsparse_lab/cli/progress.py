"""How long work shows itself: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import typer
from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from actsparse.cli.progress import bar
from actsparse.time_left import TimeLeft
from actsparse_lab.campaigns.compare import Event
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.engine.folder import Config
from actsparse_lab.records import Entry, Run, read_run, run_path, write_whole


def show(
    events: Iterable[Event], configs: Sequence[Config], out: str, console: Console
) -> list[Event]:
    """Follow the events of `compare` to their end; returns those that failed."""
    failed: list[Event] = []
    total, done, left = len(configs), 0, TimeLeft()
    steps = dict.fromkeys(map(_key, configs), 0)  # done, of each run
    weights = {_key(config): config.steps for config in configs}
    bars: dict[tuple[str, int], TaskID] = {}
    with bar(console) as progress:
        overall = progress.add_task("runs", total=total)
        for event in events:
            config = event.config
            key, name = _key(config), f"{config.arm} seed {config.seed}"
            if event.kind == "started":
                bars[key] = progress.add_task(f"  {name}", total=config.steps)
                _line(console, f"{name}: started")
            elif event.kind == "step":
                steps[key] = event.step
                progress.update(bars[key], completed=event.step)
            else:
                done += 1
                if key in bars:
                    progress.remove_task(bars.pop(key))
                if event.kind == "skipped":
                    del steps[key], weights[key]
                else:
                    steps[key] = weights[key]
                if event.kind == "failed":
                    failed.append(event)
                    said, style = f"failed, {event.reason}", "red"
                else:
                    said, style = _outcome(config, out, event.kind), ""
                about = left(sum(steps.values()) / max(1, sum(weights.values())))
                _say(console, f"[{done}/{total}] {name}: {said}{about}", style)
            share = sum(steps.values()) / max(1, sum(weights.values()))
            known = total - len(weights)  # done before
            progress.update(overall, completed=known + share * len(weights))
    return failed


def _key(config: Config) -> tuple[str, int]:
    return config.arm, config.seed


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
    left = TimeLeft()
    with bar(console, transient=False) as progress:
        task = progress.add_task("steps", total=config.steps)

        def tell(step: int) -> None:
            progress.update(task, completed=step)
            if step * 10 // config.steps > (step - 1) * 10 // config.steps:
                about = left(step / config.steps)
                _line(console, f"{step} of {config.steps} steps{about}")

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


def _line(console: Console, line: str) -> None:
    """What a terminal shows as a bar."""
    if not console.is_terminal:
        _say(console, line)


def _say(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
