"""Stages of runs in a folder, as a command does them: what is done is not repeated."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from actsparse_lab.analysis.manifest import Manifest
from actsparse_lab.campaigns.compare import compare
from actsparse_lab.cli.progress import called, show, stoppable
from actsparse_lab.engine.folder import Config, finished_run
from actsparse_lab.engine.run_gradient_noise import GradientNoiseConfig, splits_of
from actsparse_lab.engine.tasks import task_of
from actsparse_lab.packed import record_paths


@dataclass(frozen=True)
class Campaign:
    """Runs in a folder, and the file there that says what they are of.

    ``about`` begins that file; a folder whose file begins in another way, or whose ``steps``
    differ, is refused. ``again`` is the command that does the runs, without where they lie and
    without what is as usual: ``seeds`` of them, as many ``steps`` as their own. Without
    ``manifest`` nothing is written, and no folder is refused.
    """

    name: str
    place: Path
    stages: Mapping[str, Sequence[Config]]  # done in turn, each in a folder under ``place``
    manifest: Manifest | None = None
    about: dict[str, Any] = field(default_factory=dict)
    again: tuple[str, ...] = ()
    seeds: int = 5
    steps: int | None = None

    def check(self) -> None:
        """Refuse a folder that holds something else, and data that cannot be read."""
        if self.manifest is not None:
            found, own = self.manifest.read(self.place), {**self.about, "steps": self.steps}
            if found is not None and own != {key: found[key] for key in own}:
                told = f"{self.place} holds runs of `{found['command']}`; choose another --out"
                raise ValueError(told)
            if found is None and record_paths(self.place):
                raise ValueError(
                    f"{self.place} holds other runs, without {self.manifest.file}; choose another "
                    f"--out"
                )
        for folder, configs in self.stages.items():
            compare(configs, self.place / folder)  # refuses; no run starts before it is iterated
        first = next(iter(self._missing()), None)
        if isinstance(first, GradientNoiseConfig):
            splits_of(first)
        elif first is not None and first.data:
            task_of(first.task).splits(first)

    def run(self, console: Console, *, workers: int | None = None, threads: int = 1) -> int:
        """Do what is not done yet; returns how many runs failed.

        A stage may begin from what the one before has made, so none begins after a failure.
        Ctrl-C and SIGTERM say how to go on, and exit with 130.
        """
        total, command = sum(map(len, self.stages.values())), called()
        say = f"{self.name}: {total} runs, into {self.place}"
        console.print(say, highlight=False, soft_wrap=True)
        with stoppable(command), self._noted():
            for folder, configs in self.stages.items():
                place = self.place / folder
                if len(self.stages) > 1:
                    console.print(f"{len(configs)} runs, into {place}", highlight=False)
                events = compare(configs, place, workers=workers, threads=threads, command=command)
                if failed := show(events, configs, str(place), console):
                    return len(failed)
        return 0

    def _missing(self) -> list[Config]:
        return [
            config
            for folder, configs in self.stages.items()
            for config in configs
            if finished_run(config, self.place / folder) is None
        ]

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """The manifest before and after; its time is that of all calls that had something to do."""
        manifest = self.manifest
        if manifest is None or not self._missing():
            yield
            return
        begun = any(record_paths(self.place / folder) for folder in self.stages)
        earlier = manifest.read(self.place) if begun else None
        seeds = len({config.seed for configs in self.stages.values() for config in configs})
        seeds = max(seeds, earlier["seeds"] if earlier else 0)  # none is dropped
        again = ["actsparse", *self.again]
        again += [] if seeds == self.seeds else ["--seeds", str(seeds)]
        again += [] if self.steps is None else ["--steps", str(self.steps)]
        fields = {"seeds": seeds, "steps": self.steps, "command": shlex.join(again)}
        began = time.perf_counter() - (earlier["time"]["seconds"] if earlier else 0)

        def note() -> None:
            seconds = round(time.perf_counter() - began, 1)
            manifest.write(self.place, **self.about, **fields, time={"seconds": seconds})

        note()
        try:
            yield
        finally:
            note()


def exit_if(failed: int) -> None:
    """Exit with 1, and say how to try again, where runs failed."""
    if failed:
        typer.echo(f"{failed} runs failed; to try them again: {called()}", err=True)
        raise typer.Exit(1)
