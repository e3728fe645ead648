"""What `actsparse bench mlp` and `bench model` measured, as numbers: read, checked and named.

A record is one JSON object; ``benchmark`` says of which of the two. What older programs did not
write (memory, break-even) may be absent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from actsparse.untrusted import read_json
from actsparse.values import Above0, Count, Name, Rule, Share, check
from actsparse_lab.analysis.effects import number
from actsparse_lab.record_schema import SCHEMA, Entry, RecordError

KINDS = ("forward", "training")
PHASES = ("inference", "training")  # what was timed of a trained model, which ran as it is
OURS = ("sparse", "screened")
PROGRAMS = (*OURS, "compiled", "bfloat16")  # the last is dense
FAST, CUT, HALF = "accelerated", "without MLPs", "bfloat16"
MEMORY = Annotated[
    dict[str, Above0],
    Rule("an object of numbers above 0, 'dense' among them", lambda value: "dense" in value),
]
BREAK_EVEN = Annotated[
    dict[str, Above0 | None],
    Rule(
        "an object of densities above 0, or null, by T",
        lambda value: all(map(str.isdecimal, value)),
    ),
]
RATIO = {"of": Literal["dense"], "to": Name, "value": Above0, "low": Above0, "high": Above0}
TIMED = {
    "seconds": {"dense": Above0},
    "ratios": [RATIO],
    "best_dense?": (Name, None),
    "gflops?": (Above0, None),
}
WHERE = {key: SCHEMA["run"][key] for key in ("versions", "hardware", "git")}
WHOLE = {
    "density": Share,
    **TIMED,
    "memory?": ({"dense": {"peak_mib": Above0}, FAST: {"peak_mib": Above0}}, None),
    "mlps?": ([dict], None),
    "mlp_ratio?": (Above0, None),
    "kept?": ({"dense": Above0, FAST: Above0}, None),
}
SHAPES: dict[str, dict[str, Any]] = {
    "mlp": {
        **WHERE,
        "sizes": dict,
        "threads": Count,
        "rows": [
            {
                "tokens": Count,
                "density": Share,
                "forward": TIMED,
                "training?": (TIMED, None),
                "memory?": (MEMORY, None),
            }
        ],
        "break_even?": ({f"{kind}?": BREAK_EVEN for kind in KINDS}, None),
    },
    "model": {
        **WHERE,
        "model": Name,
        "threads": Count,
        **{f"{phase}?": (WHOLE, None) for phase in PHASES},
    },
}


@dataclass(frozen=True)
class Ratio:
    """Dense time ÷ a program's, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One MLP at T tokens and a density.

    ``dense`` is in seconds, ``best_dense`` says which program that was and its GFLOP/s, and
    ``ratios`` are of dense to each program, all by kind: forward, training. ``memory`` is what
    each program keeps for backward, dense = 1; empty if unknown.
    """

    tokens: int
    density: float
    dense: dict[str, float]
    best_dense: dict[str, str]
    ratios: dict[str, dict[str, Ratio]]
    memory: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """A record of one MLP. ``label`` tells it from the others on the page; "" if it is the only.

    ``break_even``: by kind and T the density above which dense is faster, None where that was not
    among the densities measured.
    """

    label: str
    rows: tuple[Row, ...]
    break_even: dict[str, dict[int, float | None]]


@dataclass(frozen=True)
class Whole:
    """A whole model at a density.

    ``dense`` is in seconds, ``ratio`` dense ÷ accelerated, ``limit`` dense ÷ the model without
    its MLPs, ``half`` dense ÷ dense under bfloat16 autocast, ``amdahl`` what ``mlp_ratio``, the
    ratio of one MLP alone, makes of the whole, and ``reached`` ratio ÷ amdahl. ``memory`` is the
    accelerated model's peak and ``kept`` what it keeps for backward, dense = 1; ``error`` the
    largest difference of a logit over the largest logit. None where not measured.
    """

    label: str
    density: float
    dense: float
    ratio: Ratio
    limit: Ratio
    half: Ratio | None
    mlp_ratio: float | None
    amdahl: float | None
    reached: float | None
    memory: float | None
    kept: float | None
    error: float | None


@dataclass(frozen=True)
class Source:
    """A record's file, the settings it ran with, and where: versions, hardware, git."""

    name: str
    settings: str
    where: Entry


@dataclass(frozen=True)
class Benchmarks:
    """All records together."""

    layers: tuple[Layer, ...]
    wholes: tuple[Whole, ...]
    sources: tuple[Source, ...]


def benchmarks_of(paths: Iterable[Path]) -> Benchmarks | None:
    """What the records at ``paths`` say; None for no path.

    Raises `RecordError` as `read_benchmark` does.
    """
    entries = {path: read_benchmark(path) for path in paths}
    if not entries:
        return None
    layers: list[Layer] = []
    wholes: list[Whole] = []
    alike: dict[str, dict[Path, Entry]] = defaultdict(dict)
    for path, entry in entries.items():
        alike[_subject(entry)][path] = entry
    for subject, group in alike.items():
        for path, label in _labels(group).items():
            entry = group[path]
            if entry["benchmark"] == "mlp":
                layers.append(_layer(entry, label))
            else:
                wholes += _wholes(entry, ", ".join(filter(None, [subject, label])))
    sources = tuple(
        Source(
            path.name,
            ", ".join(filter(None, [_subject(entry), *_settings(entry).values()])),
            {key: entry[key] for key in WHERE},
        )
        for path, entry in entries.items()
    )
    return Benchmarks(tuple(layers), tuple(wholes), sources)


def benchmark_files(folder: Path) -> list[Path]:
    """The records in a folder; other JSON files there are passed over.

    Raises `RecordError` for one that is torn.
    """
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if isinstance(entry := _read(path), dict) and entry.get("benchmark") in SHAPES
    ]


def read_benchmark(path: Path) -> Entry:
    """Read one record.

    Raises `RecordError`, naming the file, for one that cannot be read, is torn, is no record of
    the two benchmarks or holds something else where numbers should be.
    """
    entry = _read(path)
    name = entry.get("benchmark") if isinstance(entry, dict) else None
    known = " or ".join(f"`actsparse bench {each} --out`" for each in SHAPES)
    if name is None:
        raise RecordError(f"{path}: names no benchmark; give a record that {known} wrote")
    if not isinstance(name, str) or name not in SHAPES:
        raise RecordError(
            f"{path}: benchmark {name!r} has no charts here; give a record that {known} wrote"
        )
    where = f"{path}: {name}"
    check(where, entry, SHAPES[name])
    if name == "model" and not any(map(entry.get, PHASES)):
        check(where, entry, {"rows": [WHOLE]})
    timed = _timed(entry)
    if not timed:
        raise RecordError(f"{where} has no rows; run the benchmark again")
    for at, row in timed.items():
        for to in (FAST, CUT) if name == "model" else ():
            if to not in _ratios(row):
                raise RecordError(f"{where}.{at}.ratios lacks the one of dense to {to!r}")
    return dict(entry)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise RecordError(
            f"cannot read {path}: {error.strerror}; give a folder of runs or a record of "
            f"`actsparse bench`"
        ) from error


def _layer(entry: Entry, label: str) -> Layer:
    rows = []
    for row in entry["rows"]:
        timed = {kind: row[kind] for kind in KINDS if row.get(kind)}
        memory = row.get("memory") or {}
        rows.append(
            Row(
                tokens=row["tokens"],
                density=row["density"],
                dense={kind: each["seconds"]["dense"] for kind, each in timed.items()},
                best_dense={
                    kind: f"{each['best_dense']}, {each['gflops']:.0f} GFLOP/s"
                    for kind, each in timed.items()
                    if each.get("best_dense") and each.get("gflops")
                },
                ratios={kind: _ratios(each) for kind, each in timed.items()},
                memory={
                    program: kept / memory["dense"]
                    for program, kept in memory.items()
                    if program != "dense"
                },
            )
        )
    found = entry.get("break_even") or {}
    break_even = {
        kind: {int(tokens): density for tokens, density in found[kind].items()}
        for kind in KINDS
        if kind in found
    }
    return Layer(label, tuple(rows), break_even)


def _wholes(entry: Entry, label: str) -> Iterator[Whole]:
    """One of each row, or of a trained model's two phases."""
    for at, row in _timed(entry).items():
        what = at if at in PHASES else _task(row)
        ratios, memory, kept = _ratios(row), row.get("memory"), row.get("kept")
        yield Whole(
            label=", ".join(filter(None, [label, what])),
            density=row["density"],
            dense=row["seconds"]["dense"],
            ratio=ratios[FAST],
            limit=ratios[CUT],
            half=ratios.get(HALF),
            mlp_ratio=number(row, "mlp_ratio"),
            amdahl=number(row, "amdahl"),
            reached=number(row, "reached"),
            memory=memory[FAST]["peak_mib"] / memory["dense"]["peak_mib"] if memory else None,
            kept=kept[FAST] / kept["dense"] if kept else None,
            error=number(row, "error", "logits"),
        )


def _timed(entry: Entry) -> dict[str, Entry]:
    """What was timed, by where it stands in the record: phases of a trained model, or rows."""
    phases = PHASES if entry["benchmark"] == "model" else ()
    found = {phase: entry[phase] for phase in phases if entry.get(phase)}
    return found or {f"rows[{at}]": row for at, row in enumerate(entry.get("rows") or [])}


def _task(row: Entry) -> str:
    """What was timed: of a model that trained, its MLPs alone were timed in training too."""
    mlps = row.get("mlps")
    if not mlps:
        return ""
    return "training step" if any("training" in mlp for mlp in mlps) else "decoding"


def _ratios(timed: Entry) -> dict[str, Ratio]:
    return {r["to"]: Ratio(r["value"], r["low"], r["high"]) for r in timed["ratios"]}


def _subject(entry: Entry) -> str:
    if entry["benchmark"] == "mlp":
        return ""
    if "task" in entry:
        return f"{entry['task']}, {entry.get('arm')}, seed {entry.get('seed')}"
    return str(entry["model"])


def _settings(entry: Entry) -> dict[str, str]:
    """What a record ran with, as text; what decides about its times first."""
    threads = entry["threads"]
    found = {"threads": f"{threads} thread{'' if threads == 1 else 's'}"}
    sizes = dict(entry.get("sizes") or {})
    if entry["benchmark"] == "mlp":  # older records were all of even densities
        found |= {"d": f"D = {sizes.pop('d', None)}", "h": f"H = {sizes.pop('h', None)}"}
        found |= {"activation": str(sizes.pop("activation", "relu"))}
        found |= {"pattern": f"{sizes.pop('pattern', 'even')} densities"}
    found |= {"dtype": str(sizes.pop("dtype"))} if "dtype" in sizes else {}
    found |= {key: f"{key} = {value}" for key, value in sizes.items()}
    found |= {
        "kernels": f"kernels: {entry.get('kernels')}",
        "cpu": str(entry["hardware"].get("cpu")),
    }
    return found


def _labels(group: dict[Path, Entry]) -> dict[Path, str]:
    """What tells records of one subject apart: the settings they differ in, else their files."""
    if len(group) == 1:
        return dict.fromkeys(group, "")
    settings = {path: _settings(entry) for path, entry in group.items()}
    keys = dict.fromkeys(key for own in settings.values() for key in own if key != "rounds")
    differing = [key for key in keys if len({own.get(key) for own in settings.values()}) > 1]
    labels = {
        path: ", ".join(own[key] for key in differing if key in own)
        for path, own in settings.items()
    }
    unique = len(set(labels.values())) == len(labels)
    return labels if unique else {path: path.stem for path in group}
