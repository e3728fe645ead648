"""Getting the kernels: from the wheel or built once, and a clear line where neither can be done."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actsparse.kernels import build

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from actsparse.kernels import build, sparse_mlp
x, up, down = torch.ones(1, 2, requires_grad=True), torch.ones(3, 2), torch.ones(2, 3)
y = sparse_mlp(x, up, None, down, screen=True)
y.sum().backward()
print(build.level(), y.tolist(), x.grad.tolist())
"""


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_pytorch_does_it_and_one_line_says_so(tmp_path: Path) -> None:
    result = run(SCRIPT, PATH="", CXX="", ACTSPARSE_CPU="", ACTSPARSE_CACHE=str(tmp_path))
    assert result.stdout == "reference [[6.0, 6.0]] [[6.0, 6.0]]\n", result.stderr
    said = [line for line in result.stderr.splitlines() if "no C++ compiler found" in line]
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "false")
        with pytest.raises(RuntimeError, match="the C\\+\\+ compiler failed"):
            build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    best = build.level()
    fresh = build.load.__wrapped__
    monkeypatch.setenv("ACTSPARSE_CPU", "reference")
    assert fresh() is False
    if best != "reference":
        for name in ("baseline", best):
            monkeypatch.setenv("ACTSPARSE_CPU", name)
            assert fresh() is True
            assert build.level() == name
    monkeypatch.setenv("ACTSPARSE_CPU", "avx3")
    with pytest.raises(ValueError, match="'avx3'; it can be reference, baseline, avx2, avx512"):
        fresh()


def test_the_kernels_use_nothing_of_torch_but_its_stable_abi() -> None:
    sources = "".join(path.read_text() for path in build.SOURCES.iterdir())
    included = re.findall(r"#include <((?:torch|ATen|c10)/.*)>", sources)
    stable = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/shim.h")
    assert included
    assert [name for name in included if not name.startswith(stable)] == []


def shipped(script: str, library: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    """The script where a wheel brought ``library`` and there is no compiler."""
    put = "from actsparse.kernels import build; from pathlib import Path\n"
    put += f"build.SHIPPED = Path({str(library)!r})\n"
    environment = {"PATH": "", "CXX": "", "ACTSPARSE_CPU": "", "ACTSPARSE_SANITIZE": ""}
    return run(put + script, ACTSPARSE_CACHE=str(cache), **environment)


@pytest.mark.skipif(build.level() == "reference", reason="no compiled kernels here")
def test_the_library_of_a_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    library, cache = tmp_path / "compiled.so", tmp_path / "cache"
    shutil.copy(build.build(), library)
    result = shipped(SCRIPT, library, cache)
    assert result.stdout == f"{build.level()} [[6.0, 6.0]] [[6.0, 6.0]]\n"
    assert result.stderr == ""
    assert not cache.exists()


@pytest.mark.parametrize(
    ("sealed", "reason"), [(False, "was cut or changed, and"), (True, "file too short, and")]
)
def test_a_library_of_a_wheel_that_cannot_run_is_named(
    tmp_path: Path, sealed: bool, reason: str
) -> None:
    library, code = tmp_path / "compiled.so", b"code"
    library.write_bytes(code + (hashlib.sha256(code).digest() if sealed else b"x" * 32))
    result = shipped(SCRIPT, library, tmp_path / "cache")
    assert result.stdout.startswith("reference ")
    assert f"compiled.so{':' if sealed else ''} {reason} no C++ compiler found" in result.stderr


def test_where_the_library_of_a_wheel_cannot_run_one_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, loaded = tmp_path / "compiled.so", []
    library.write_bytes(b"x" * 40)
    monkeypatch.setattr(build, "SHIPPED", library)
    monkeypatch.setattr(build, "build", lambda: tmp_path / "built.so")
    monkeypatch.setattr(build.torch.ops, "load_library", loaded.append)
    build._load()
    assert loaded == [str(tmp_path / "built.so")]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes one word to the file after -o, and a dot to a file of its own."""
    script, count = tmp_path / "compiler", tmp_path / "count"
    script.write_text(
        f'#!/bin/sh\nprintf . >>{count}\nwhile [ "$1" != -o ]; do shift; done\necho code >"$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return count


def test_a_library_that_is_there_is_not_built_again(tmp_path: Path, compiler: Path) -> None:
    target = build.build(tmp_path / "cache")
    once = compiler.read_text()
    assert build.build(tmp_path / "cache") == target
    assert compiler.read_text() == once


@pytest.mark.parametrize("harm", ["empty", "cut", "longer", "changed"])
@pytest.mark.usefixtures("compiler")
def test_a_library_that_was_harmed_on_disk_is_built_again(tmp_path: Path, harm: str) -> None:
    target = build.build(tmp_path / "cache")
    whole = target.read_bytes()
    harmed = {
        "empty": b"",
        "cut": whole[:-1],
        "longer": whole + b"x",
        "changed": bytes([whole[0] ^ 1]) + whole[1:],
    }
    target.write_bytes(harmed[harm])
    assert build.build(tmp_path / "cache") == target
    assert target.read_bytes() == whole


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
@pytest.mark.parametrize("which", ["folder", "library"])
@pytest.mark.usefixtures("compiler")
def test_code_that_others_can_write_is_refused(tmp_path: Path, which: str, mode: int) -> None:
    target = build.build(tmp_path / "cache")
    path = target if which == "library" else target.parent
    path.chmod(mode)
    with pytest.raises(RuntimeError, match=f"others can write {path};"):
        build.build(tmp_path / "cache")
    path.chmod(0o700)
    assert build.build(tmp_path / "cache") == target


@pytest.mark.parametrize("which", ["folder", "library"])
@pytest.mark.skipif(os.getuid() != 0, reason="root alone gives files away")
@pytest.mark.usefixtures("compiler")
def test_code_of_another_user_is_refused(tmp_path: Path, which: str) -> None:
    target = build.build(tmp_path / "cache")
    path = target if which == "library" else target.parent
    os.chown(path, 12345, 12345)
    with pytest.raises(RuntimeError, match=f"{path} belongs to another user"):
        build.build(tmp_path / "cache")


@pytest.mark.usefixtures("compiler")
def test_others_cannot_write_what_is_built_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        target = build.build(tmp_path / "cache")
    finally:
        os.umask(before)
    assert build.build(tmp_path / "cache") == target


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_threads_and_processes_may_build_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    script = "from pathlib import Path; from actsparse.kernels import build\n"
    script += f"print(build.build(Path({str(folder)!r})))"
    command = [sys.executable, "-c", script]
    others = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    with ThreadPoolExecutor(8) as threads:
        targets = set(threads.map(lambda _: build.build(folder), range(8)))
    assert targets == {build.library(folder)}
    for other in others:
        said, _ = other.communicate()
        assert said.decode().strip() == str(build.library(folder))
    assert [path.name for path in folder.iterdir()] == [build.library(folder).name]


def test_threads_load_one_library_once() -> None:
    script = """
from concurrent.futures import ThreadPoolExecutor
from actsparse.kernels import build
with ThreadPoolExecutor(8) as threads:
    print(set(threads.map(lambda _: build.load(), range(8))))
"""
    result = run(script, ACTSPARSE_CPU="")
    assert result.stdout == f"{{{build.load()}}}\n", result.stderr


@pytest.mark.slow
def test_builds_in_an_empty_folder(tmp_path: Path) -> None:
    if build.compiler() is None:
        pytest.skip("no compiler here")
    target = build.build(tmp_path / "new")
    assert [path.name for path in target.parent.iterdir()] == [target.name]
