"""The site's pages: their examples run, their commands parse, and every public name is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import actsparse
from tests.test_docs import parsed

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", *sorted((DOCS / "tutorials").glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
SHELL = [line for text in TEXTS.values() for line in "".join(
    re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()]  # fmt: skip
COMMANDS = [line.partition("#")[0].strip() for line in SHELL if re.search(r"\bactsparse \w", line)]


@pytest.mark.parametrize("name", TEXTS)
def test_the_examples_of_a_page_run_in_order(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "finetune":
        pytest.importorskip("peft")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", TEXTS[name], re.DOTALL)
    names: dict[str, Any] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{name}.md, block {number}", "exec"), names)
    assert code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_parse(command: str) -> None:
    verb = parsed(re.sub(r"^torchrun .* -m ", "", command))[0]
    assert verb in command


@pytest.mark.parametrize("name", TEXTS)
def test_a_tutorial_is_short(name: str) -> None:
    assert len(TEXTS[name].splitlines()) <= 120


def test_every_name_of_the_package_is_in_the_list_of_names() -> None:
    said = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    for name in actsparse.__all__:
        assert re.search(rf"\[`{name}`\]\[actsparse\.\w+\.{name}\]", said), name


def test_every_room_has_a_page_with_its_constants() -> None:
    for path in (ROOT / "actsparse").glob("*/__init__.py"):
        room = importlib.import_module(f"actsparse.{path.parent.name}")
        for name in getattr(room, "__all__", ()):
            page = (DOCS / "api" / f"{path.parent.name}.md").read_text(encoding="utf-8")
            value = getattr(room, name)  # mkdocstrings shows classes and functions
            assert callable(value) or f"`{name}`" in page, name


def test_a_page_of_the_site_links_each_example() -> None:
    files = {path.name for path in (ROOT / "examples").glob("*.py")}
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert files == set(re.findall(r"\]\((\w+\.py)\)", table))
    assert "](../examples/README.md)" in TEXTS["index"]
    for text in TEXTS.values():
        for name in re.findall(r"\]\((?:\.\./)+examples/([^)]+)\)", text):
            assert (ROOT / "examples" / name).is_file(), name
