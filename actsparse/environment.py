"""The environment that a result depends on: versions, hardware, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("actsparse", "torch", "transformers", "accelerate", "peft", "datasets", "numpy")


def environment(threads: int | None = None, gpu: str | None = None) -> dict[str, Any]:
    """What a result depends on besides its config: ``versions``, ``hardware``, ``git``.

    ``threads`` and ``gpu`` come from the caller, who has torch. ``memory_gib`` is in GiB, null
    where the system does not say. ``git`` is of the checkout this package runs from, null if it
    is installed.

    >>> sorted(environment(threads=2)["hardware"])
    ['cores', 'cpu', 'gpu', 'memory_gib', 'threads']
    """
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    hardware = {
        "cpu": _cpu(),
        "cores": getattr(os, "process_cpu_count", os.cpu_count)(),  # Python 3.13 knows affinity
        "threads": threads,
        "memory_gib": _memory_gib(),
        "gpu": gpu,
    }
    return {"versions": versions, "hardware": hardware, "git": _git(Path(__file__))}


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not POSIX
        return None


def _git(file: Path) -> dict[str, Any] | None:
    # Inside a git hook GIT_DIR points at the hook's repository, whichever that is.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def ask(*words: str) -> str:
        command = ["git", "-C", str(file.parent), *words]
        done = subprocess.run(command, capture_output=True, check=True, timeout=20, env=plain)
        return done.stdout.decode(errors="replace").strip()

    try:
        ask("ls-files", "--error-unmatch", file.name)  # a venv inside someone else's checkout
        commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": changes != ""}
