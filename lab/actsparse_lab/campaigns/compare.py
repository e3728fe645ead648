"""Arms × seeds side by side: worker processes, each of one thread, that take a run at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from actsparse import files
from actsparse_lab.engine.folder import Config, check_folder, finished_run
from actsparse_lab.engine.run_gradient_noise import GradientNoiseConfig, run_gradient_noise
from actsparse_lab.records import RecordError, run_path

# A fork of this process would inherit torch's threads, half alive. On Linux workers are forked from
# a process that has done nothing but import what all of them need, once for all.
_PROCESSES: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_NEEDED = ["torch", "transformers", "actsparse_lab.engine.run"]


@dataclass(frozen=True)
class Event:
    """What happened to a run; ``step`` counts optimizer steps, ``reason`` says why it failed.

    ``skipped``: it was finished before.
    """

    kind: Literal["skipped", "started", "step", "finished", "failed"]
    config: Config
    step: int = 0
    reason: str = ""


def compare(
    configs: Sequence[Config],
    out: str | Path,
    *,
    workers: int | None = None,
    threads: int = 1,
    command: str | None = None,
) -> Iterator[Event]:
    """Do the runs that are not done yet, ``workers`` at a time, and tell of each as it happens.

    By default one worker for each core, each of ``threads`` threads. A run that fails does not stop
    the others; a worker that dies (killed for memory, say) fails its run and is replaced. Closing
    the iterator, or Ctrl-C, stops the workers, each with a checkpoint of what it was at, from which
    it goes on next time.

    Raises, before any run starts, `ValueError` for a run named twice or finished with another
    config; `RecordError` for a folder that cannot be written.

    ``for event in compare([run_config("digits", "paper", seed) for seed in range(3)], "out"): ...``
    """
    if not configs:
        raise ValueError("no runs to do: give at least one arm and one seed")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: expected a whole number, 1 or more")
    places = [run_path(out, config.arm, config.seed) for config in configs]
    twice = {place for place in places if places.count(place) > 1}
    if twice:
        raise ValueError(f"the same arm and seed twice: {', '.join(sorted(map(str, twice)))}")
    done = [finished_run(config, out) is not None for config in configs]
    if not all(done):
        check_folder(out)
    return _events(configs, done, Path(out), workers or cores(), threads, command)


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _events(
    configs: Sequence[Config],
    done: list[bool],
    out: Path,
    workers: int,
    threads: int,
    command: str | None,
) -> Iterator[Event]:
    todo = [config for config, finished in zip(configs, done, strict=True) if not finished]
    for config, finished in zip(configs, done, strict=True):
        if finished:
            yield Event("skipped", config)
    # Seed by seed rather than arm by arm, so that a stop leaves arms that compare.
    todo.sort(key=lambda config: config.seed)
    crew: list[_Worker] = []
    try:
        while todo or crew:
            while todo and len(crew) < workers:
                worker = _Worker(out, threads, command)
                crew.append(worker)
                yield worker.give(todo.pop(0))
            ready = wait([worker.pipe for worker in crew])
            for worker in [worker for worker in crew if worker.pipe in ready]:
                event = worker.event()
                yield event
                if event.kind == "step":
                    continue
                if todo and worker.process.is_alive():
                    yield worker.give(todo.pop(0))
                else:
                    crew.remove(worker)
                    worker.stop()
    finally:
        for worker in crew:
            worker.process.terminate()
        for worker in crew:  # also one that was past its last step, and would wait for more
            worker.stop()


class _Worker:
    """A process and the pipe to it; ``config`` is what it is at."""

    def __init__(self, out: Path, threads: int, command: str | None) -> None:
        self.pipe, other = _PROCESSES.Pipe()
        self.config: Config | None = None
        self.process: BaseProcess = _PROCESSES.Process(
            target=_work, args=(other, dict(os.environ), out, threads, command)
        )
        forked = _PROCESSES.get_start_method() == "forkserver"
        with _interrupts_ignored():  # inherited: Ctrl-C is the parent's to answer
            if forked:
                _PROCESSES.set_forkserver_preload(_NEEDED)
                forkserver.ensure_running()  # does not wait for the imports, unlike the next start
            else:
                self.process.start()
        if forked:
            self.process.start()
        other.close()

    def give(self, config: Config) -> Event:
        self.config = config
        with suppress(BrokenPipeError):  # it died; event() will tell
            self.pipe.send(config)
        return Event("started", config)

    def event(self) -> Event:
        """The next news; blocks. A process that is gone is news too."""
        assert self.config is not None
        try:
            kind, step, reason = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            return Event("failed", self.config, reason=f"its process ended {how}")
        return Event(kind, self.config, step, reason)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join()
        self.pipe.close()


def _work(
    pipe: Connection, environ: dict[str, str], out: Path, threads: int, command: str | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()  # of the process that forked this one, as it was then
    os.environ.update(environ)
    import torch
    import transformers

    from actsparse.train.loss import TrainingFailed
    from actsparse_lab.engine.interrupt import Interrupted
    from actsparse_lab.engine.run import run

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()  # it remarks on configs that were made up
    while (config := pipe.recv()) is not None:
        every = max(1, config.steps // 100)

        def tell(step: int, every: int = every) -> None:
            if step % every == 0:
                try:
                    pipe.send(("step", step, ""))
                except BrokenPipeError:  # nobody is there to stop this process
                    signal.raise_signal(signal.SIGTERM)

        try:
            if isinstance(config, GradientNoiseConfig):
                run_gradient_noise(config, out, command=command, on_step=tell)
            else:
                run(config, out, command=command, on_step=tell)
        except Interrupted:
            return
        except (TrainingFailed, RecordError, ValueError) as error:
            pipe.send(("failed", 0, str(error)))
        except Exception as error:  # a bug: say where, and let the others go on
            log = run_path(out, config.arm, config.seed).with_name("error.txt")
            with suppress(OSError):
                files.write(log, traceback.format_exc().encode())
            pipe.send(("failed", 0, f"{type(error).__name__}: {error} (see {log})"))
        else:
            pipe.send(("finished", config.steps, ""))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
