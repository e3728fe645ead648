"""The releases that `make test` and `make demo` install are those that pyproject.toml admits."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def asked() -> list[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("requirement", asked(), ids=str)
def test_each_distribution_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    version = pinned()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement} and {version}: make lock"


def test_a_constraint_names_a_release_and_no_place() -> None:
    """Neither a build for one machine nor a path or address."""
    assert pinned()["torch"] == "2.13.0"
    for name, version in pinned().items():
        assert not set(name + version) & set("+/@ :"), (name, version)
