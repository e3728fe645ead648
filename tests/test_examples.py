"""Every example runs as it stands, with fewer steps, and says what it should in few lines."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# name → what main gets in the test, and what a line of the output must look like
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "accelerate_loop": ({"steps": 8}, r"step 2: density 0\.\d+"),
    "finetune_lora": ({"steps": 6}, r"finetuned: density 0\.\d+, loss \d"),
    "own_measure": ({}, r"silent tokens"),
    "plain_loop": ({"steps": 5}, r"step 5: loss \d.*% of the neurons are active"),
    "serve_threads": ({"requests": 8}, r"8 requests by 4 threads: .* s dense, .* s now"),
    "timm_vit": ({"steps": 3}, r"inference +all +\d+\.\d+%"),
    "torch_encoder": ({"steps": 3}, r"largest difference \d\.\de-0[6-9]"),
    "trainer": ({"steps": 4}, r"'eval_density': '0\.\d+'"),
}


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Examples write into runs/ of the folder they are called in, and one sets the threads."""
    from actsparse.observe.registry import MEASURES

    monkeypatch.chdir(tmp_path)
    threads, measures = torch.get_num_threads(), dict(MEASURES)
    yield
    torch.set_num_threads(threads)
    MEASURES.clear()
    MEASURES.update(measures)


@pytest.mark.parametrize("name", RUNS)
def test_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings, expected = RUNS[name]
    for package in {"accelerate_loop": ["accelerate"], "finetune_lora": ["peft"]}.get(name, []):
        pytest.importorskip(package)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](**settings)
    said = capsys.readouterr().out
    assert re.search(expected, said), said
    assert len(said.splitlines()) <= 10, said


def test_there_are_no_others_and_all_are_short_and_listed() -> None:
    files = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert files.keys() == RUNS.keys()
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert max(lengths.values()) <= 80, lengths
    table = (EXAMPLES / "README.md").read_text()
    assert [name for name in (*files, "first_look") if f"[{name}." not in table] == []


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((EXAMPLES / "first_look.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "outputs are not committed"
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS = 150", "STEPS = 3")
            *body, last = ast.parse(source).body
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):  # as a notebook shows it
                value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
                shown += [value._repr_html_()] if hasattr(value, "_repr_html_") else []
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), names)
    assert len(shown) == 4  # blocks, session, handle, acceleration
    assert all(each.startswith("<table>") for each in shown)
    assert names["axes"].get_title() == "density of each block"
