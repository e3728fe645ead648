"""The house's map: who may import whom, and what `import actsparse` may cost."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "actsparse"
LABORATORY = ROOT / "lab" / "actsparse_lab"

# room → the rooms it may import from, besides itself. `__init__` is the public names.
MATHS = {"blocks", "activations"}
OUTSIDE = {"values", "untrusted"}  # what comes from outside is checked and read
TOOLS = {"modify", "observe", "kernels"} | MATHS
LIBRARY: dict[str, set[str]] = {
    "activations": set(),
    "blocks": {"activations", "html"},
    "html": set(),
    "files": set(),
    "environment": set(),
    "values": set(),
    "untrusted": {"values"},
    "terminal": {"values"},
    "extras": set(),
    "time_left": set(),
    "modify": MATHS | OUTSIDE | {"extras", "files", "html"},
    "observe": MATHS | OUTSIDE | {"extras", "html"},
    "kernels": MATHS | {"files", "html"},
    "__init__": TOOLS,
    "train": TOOLS | {"extras"},
    "convert": TOOLS | OUTSIDE | {"__init__", "environment", "extras", "files", "time_left"},
    "bench": TOOLS | {"__init__", "time_left"},
    "cli": TOOLS
    | OUTSIDE
    | {"__init__", "bench", "convert", "environment", "extras", "files", "terminal", "time_left"},
    "__main__": {"cli"},
}
# The laboratory may use all of the library but its commands, which its own extend.
LIBRARY_ROOMS = set(LIBRARY) - {"cli", "__main__"}
RECORDS = {"records", "record_schema", "packed"}
ENGINE = RECORDS | {"data", "engine"}
IN_LABORATORY: dict[str, set[str]] = {
    "__init__": set(),
    "data": set(),
    "record_schema": set(),
    "packed": {"record_schema"},
    "records": {"record_schema", "packed"},
    "engine": ENGINE,
    "tasks": ENGINE,
    "campaigns": ENGINE | {"tasks", "analysis"},
    "bench": set(),
    "analysis": RECORDS,
    "papers": RECORDS | {"analysis"},
    "report": RECORDS | {"analysis", "papers"},
    "runs": ENGINE | {"tasks", "papers"},
    "cli": ENGINE | {"tasks", "campaigns", "bench", "analysis", "papers", "report", "runs"},
}
# room → third-party packages it must do without.
NO_TORCH = {"torch", "transformers", "accelerate", "datasets", "peft"}
MAY_NOT_IMPORT = dict.fromkeys(
    ("files", "values", "untrusted", "environment", *RECORDS, "analysis", "papers", "report"),
    NO_TORCH,
)
HEAVY = ["transformers", "matplotlib", "scipy", "sklearn", "datasets", "peft", "accelerate"]
NO_ROOM = {"utils.py", "helpers.py", "common.py", "misc.py"}


def room_of(path: Path, package: Path = PACKAGE) -> str:
    return room_in([part.removesuffix(".py") for part in path.relative_to(package).parts])


def room_in(parts: Sequence[str]) -> str:
    """The papers' runs, which need torch, are a room beside their claims and plots."""
    if parts[0] == "papers" and "runs" in parts:
        return "runs"
    return parts[0]


def imported_names(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands."""
    here = (package.name, *path.relative_to(package).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield node.lineno, alias.name
            case ast.ImportFrom():
                above = here[: len(here) - node.level + 1] if node.level else ()
                base = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield node.lineno, f"{base}.{alias.name}"
            case ast.Call(args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                node.func
            ).endswith(("import_module", "__import__")):
                yield node.lineno, name


def violations(package: Path = PACKAGE) -> list[str]:
    """One line for each import that goes up or sideways, and for each file without a room."""
    found = []
    rooms = LIBRARY if package.name == "actsparse" else IN_LABORATORY
    for path in sorted(package.rglob("*.py")):
        room, where = room_of(path, package), path.relative_to(package.parent)
        if room not in rooms:
            found.append(f"{where}: {room!r} is no room of the map in tests/test_imports.py")
            continue
        for line, name in imported_names(path, package):
            top, *rest = name.split(".")
            if top in MAY_NOT_IMPORT.get(room, ()):
                found.append(f"{where}:{line}: {room} must do without {top}")
            if top == package.name:
                known, allowed = rooms, rooms[room] | {room}
            elif top == "actsparse":
                known, allowed = LIBRARY, LIBRARY_ROOMS | ({"cli"} if room == "cli" else set())
            elif top == "actsparse_lab":
                found.append(f"{where}:{line}: the library must not import the laboratory ({name})")
                continue
            else:
                continue
            target = room_in(rest) if rest and rest[0] in known else "__init__"
            if target not in allowed:
                found.append(f"{where}:{line}: {room} must not import {target} ({name})")
    return found


def test_imports_go_down_only() -> None:
    assert violations(PACKAGE) == []
    assert violations(LABORATORY) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("blocks/site.py", "from actsparse.modify import decay", "blocks must not import modify"),
        ("modify/penalty.py", "from ..observe import density", "modify must not import observe"),
        ("observe/x.py", "def f():\n    import actsparse.kernels", "must not import kernels"),
        ("bench/x.py", "if TYPE_CHECKING:\n    from actsparse import train", "not import train"),
        ("train/x.py", "from actsparse_lab.tasks.a import b", "must not import the laboratory"),
        ("kernels/x.py", "import_module('actsparse.observe')", "must not import observe"),
        ("modify/x.py", "from actsparse import density", "modify must not import __init__"),
        ("lab/report/page.py", "import torch.nn as nn", "report must do without torch"),
        ("lab/records.py", "from transformers import Trainer", "must do without transformers"),
        ("lab/report/page.py", "from ..engine import run", "report must not import engine"),
        ("lab/analysis/x.py", "from ..papers import questions", "analysis must not import papers"),
        ("lab/papers/a/claims.py", "from . import runs", "papers must not import runs"),
        ("lab/report/x.py", "from ..papers.runs import Form", "report must not import runs"),
        ("lab/engine/run.py", "from actsparse.cli import bench", "engine must not import cli"),
        ("extra.py", "", "'extra' is no room of the map"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    laboratory, file = file.startswith("lab/"), file.removeprefix("lab/")
    package = tmp_path / ("actsparse_lab" if laboratory else "actsparse")
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(line)
    (found,) = violations(package)
    assert complaint in found


def test_imports_going_down_are_not_complained_about(tmp_path: Path) -> None:
    for name, text in (
        ("actsparse", "import torch\nfrom .. import kernels\nfrom actsparse import __version__\n"),
        ("actsparse_lab", "from ..report import page\nfrom actsparse.cli import main\n"),
    ):
        package = tmp_path / name
        (package / "cli").mkdir(parents=True)
        (package / "cli" / "main.py").write_text(text)
        assert violations(package) == []


@pytest.mark.parametrize("package", [PACKAGE, LABORATORY], ids=lambda path: path.name)
def test_no_module_imports_itself_through_others(package: Path) -> None:
    paths = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
        if path.stem != "__init__"
    }
    above = {}
    for name, path in paths.items():
        wanted = [each for _, each in imported_names(path, package)]
        above[name] = {
            module
            for each in wanted
            for module in (each, each.rpartition(".")[0])
            if module in paths
        }
    while lowest := [name for name, wanted in above.items() if not wanted & set(above)]:
        for name in lowest:
            del above[name]
    assert sorted(above) == []  # what is left imports itself, or what does


def test_files_are_short_and_say_what_they_are_for() -> None:
    files = [path for top in ("actsparse", "lab", "tests") for path in (ROOT / top).rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {
        str(path): length
        for path, length in lengths.items()
        if length > (450 if path.is_relative_to(ROOT / "tests") else 400)
    } == {}
    assert [str(path) for path in files if path.name in NO_ROOM] == []


def test_import_is_light() -> None:
    """Beyond torch's own imports, `import actsparse` loads nothing heavy and takes under 1 s."""
    script = (
        "import os, time, sys, torch\n"
        "before = set(sys.modules)\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        start = time.perf_counter()\n"
        "        import actsparse\n"
        "        print(time.perf_counter() - start)\n"
        "        print(*{name.partition('.')[0] for name in set(sys.modules) - before})\n"
        "        sys.exit()\n"
        "    assert os.wait()[1] == 0\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    seconds = [float(line) for line in lines[::2]]
    assert len(seconds) == 3
    for modules in lines[1::2]:
        assert set(modules.split()).isdisjoint(HEAVY), modules
    assert statistics.median(seconds) < 1.0, f"import actsparse took {seconds} s beyond torch"


def test_the_commands_help_needs_no_torch() -> None:
    script = "import sys; from actsparse.cli.main import app; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
    assert said.stdout.split() == [b"False"]


def test_every_public_name_is_there_and_no_room_hides_one() -> None:
    import actsparse
    import actsparse.observe.density

    for name in actsparse.__all__:
        assert callable(getattr(actsparse, name)), name
    assert set(actsparse.__all__) <= set(dir(actsparse))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        actsparse.nothing  # noqa: B018


def test_no_function_hides_a_module() -> None:
    for package in (PACKAGE, LABORATORY):
        for path in package.rglob("*.py"):
            room = importlib.import_module(".".join(path.parent.relative_to(package.parent).parts))
            found = vars(room).get(path.stem)
            assert found is None or path.stem == "__init__" or isinstance(found, ModuleType), path
