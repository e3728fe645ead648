"""The version is one everywhere, and the citation can be read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

import actsparse

ROOT = Path(__file__).parents[1]


def test_every_file_has_the_same_version() -> None:
    versions = {
        str(tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["version"])
        for folder in (".", "lab")
    }
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert versions | {citation["version"]} == {actsparse.__version__}
    assert f"\n## [{actsparse.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_citation_names_both_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    numbers = [paper["identifiers"][0]["value"] for paper in citation["references"]]
    assert numbers == ["arXiv:2309.03004", "arXiv:2605.25612"]
    assert citation["authors"] == [{"name": "The actsparse developers"}]
