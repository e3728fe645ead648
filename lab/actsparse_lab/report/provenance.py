"""What ran, when and on what: facts out of records' headers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from actsparse_lab.analysis.comparison import Comparison
from actsparse_lab.analysis.numbers import decimal
from actsparse_lab.records import Entry, Run
from actsparse_lab.report.benchmarks import Benchmarks


def what_ran(runs: list[Run], benchmarks: Benchmarks | None = None) -> list[tuple[str, str]]:
    """What ran, when, on what: every value the records had, most have one."""
    sources = benchmarks.sources if benchmarks else ()
    headers = [*(run.header for run in runs), *(source.where for source in sources)]

    def each(read: Callable[[Entry], Any]) -> str:
        return "; ".join(dict.fromkeys(str(read(header)) for header in headers if read(header)))

    def versions(header: Entry) -> str:
        return ", ".join(f"{name} {version}" for name, version in header["versions"].items())

    def hardware(header: Entry) -> str:
        has = header["hardware"]
        units = {"cores": "cores: {}", "threads": "threads: {}", "memory_gib": "{} GiB"}
        said = [units.get(k, "{}").format(v) for k, v in has.items() if v is not None]
        several = header.get("processes", 1) > 1  # benchmarks do not say
        return ", ".join([*said, *([f"processes: {header['processes']}"] if several else [])])

    def git(header: Entry) -> str:
        state = header["git"]
        if not state:
            return "not from a git checkout"
        return str(state.get("commit"))[:12] + (", with changes" if state.get("dirty") else "")

    rows = []
    if runs:
        started = sorted(str(run.header["time"]["started"]).replace("T", " ") for run in runs)
        seconds = math.fsum(run.result["time"]["seconds"] for run in runs if run.result)
        span = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
        rows += [
            ("runs", f"{len(runs)}, of which {sum(run.finished for run in runs)} finished"),
            ("started", span),
            ("time in all", decimal(seconds / 60, 1, unit=" min")),
        ]
    rows += [
        ("benchmarks", "; ".join(f"{source.name}: {source.settings}" for source in sources)),
        ("hardware", each(hardware)),
        ("versions", each(versions)),
        ("git", each(git)),
        ("command", each(lambda header: header.get("command"))),
    ]
    return [(name, value) for name, value in rows if value]


def differences(table: Comparison, runs: list[Run]) -> list[tuple[str, str]]:
    """For each arm the settings in which its config differs from the reference's."""
    flat = {run.arm: dict(_flat(run.header["config"])) for run in reversed(runs)}
    base = flat.get(table.reference, {})
    found = []
    for arm in table.arms:
        own = flat[arm.name]
        keys = [key for key in own | base if own.get(key) != base.get(key) and key != "seed"]
        if keys and arm.name != table.reference:
            found.append((arm.name, ", ".join(f"{key} = {own.get(key)}" for key in keys)))
    return found


def _flat(config: Entry, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
