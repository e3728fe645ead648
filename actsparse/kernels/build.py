"""Load the C++ kernels: those that the wheel brings, or those that this machine's compiler makes.

They use PyTorch's stable ABI alone, so one compiled library also runs under later torch releases.
``make wheel`` puts one into the wheel; :func:`load` takes it if it is whole and can be loaded here.

Otherwise the kernels are compiled once, by ``python -m actsparse.kernels`` or at first use. The
library then lies in a folder of the user's cache named after the sources, the torch version and the
C++ ABI, so that a change of any of them builds anew; it appears whole or not at all. Its last 32
bytes are the SHA-256 of what is before them: a library that was cut or changed on disk is built
anew. One that others could have put there is refused. Without a compiler everything runs on
PyTorch's own operators, and one line says so.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import threading
import warnings
from pathlib import Path

import torch

from actsparse import files

SOURCES = Path(__file__).parent / "cpu"
SHIPPED = Path(__file__).with_name("compiled.so")  # in a wheel made by `make wheel`
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")
_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-w", "-fno-math-errno", "-fno-strict-aliasing"]
_FLAGS += ["-fvisibility=hidden"]
_SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
_SANITIZED += ["-fno-omit-frame-pointer", "-O1", "-g"]
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
_AVX512 += ["-mprefer-vector-width=512"]
_TARGETS = {
    "baseline": [],
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": [*_AVX512, "-mavx512bf16"],
    "bind": ["-DTORCH_TARGET_VERSION=0x020B000000000000"],  # torch 2.11's stable ABI
}


def flags() -> list[str]:
    """The compiler's; with ACTSPARSE_SANITIZE=1, which ``make sanitize`` sets, also its checks."""
    return [*_FLAGS, *(_SANITIZED if os.environ.get("ACTSPARSE_SANITIZE") == "1" else [])]


def library(folder: Path | None = None) -> Path:
    """Where the compiled kernels of this torch and these sources are or will be.

    ``folder`` None: $ACTSPARSE_CACHE, else $XDG_CACHE_HOME/actsparse, else ~/.cache/actsparse.
    """
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(os.environ.get("ACTSPARSE_CACHE") or Path(cache) / "actsparse")
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    abi = int(torch.compiled_with_cxx11_abi())
    built = repr((flags(), _TARGETS, torch.__version__, abi, platform.machine()))
    digest.update(built.encode())
    return folder / f"kernels-{digest.hexdigest()[:16]}.so"


def compiler() -> str | None:
    """$CXX, or g++, c++ or clang++, whichever there is."""
    names = [os.environ.get("CXX"), "g++", "c++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def build(folder: Path | None = None) -> Path:
    """Compile what is not compiled yet, and return the library's path.

    Processes and threads may build at once: each does so in a folder of its own.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message ends with what it said. Or
            others than this user and root can write what would be loaded, or own it.
        OSError: the folder cannot be written.
    """
    target = library(folder)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _trust(target.parent)
    if target.exists():
        _trust(target)
        if _whole(target):
            return target
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler found (g++, c++, clang++, or the one $CXX names)")
    root = Path(torch.__file__).parent
    x86 = platform.machine() in ("x86_64", "AMD64")
    parts = [part for part in _TARGETS if x86 or not part.startswith("avx")]
    with files.beside(target) as work:
        running = []
        for part in parts:
            source, into = str(SOURCES / f"{part}.cpp"), str(work / f"{part}.o")
            command = [cxx, *flags(), *_TARGETS[part], f"-I{root / 'include'}"]
            command += ["-c", source, "-o", into]
            running.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        said = [process.communicate()[0] for process in running]
        for process, text in zip(running, said, strict=True):
            _succeed(process.returncode, text)
        objects = [str(work / f"{part}.o") for part in parts]
        libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        linked = subprocess.run(
            [cxx, *flags(), "-shared", *objects, *libraries, "-o", str(work / "all.so")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        _succeed(linked.returncode, linked.stdout)
        code = (work / "all.so").read_bytes()
        (work / "all.so").write_bytes(code + hashlib.sha256(code).digest())
        (work / "all.so").chmod(0o700)
        files.put(work / "all.so", target)
    return target


def _whole(path: Path) -> bool:
    """Whether the library is what the linker wrote."""
    sealed = path.read_bytes()
    return hashlib.sha256(sealed[:-32]).digest() == sealed[-32:]


def _trust(path: Path) -> None:
    """Refuse a file or folder that others could have filled: it would run as this user."""
    if not hasattr(os, "getuid"):
        return
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise RuntimeError(
            f"{path} belongs to another user; set $ACTSPARSE_CACHE to a folder of yours"
        )
    if status.st_mode & 0o022:
        raise RuntimeError(
            f"others can write {path}; check the files there, then run chmod go-w {path}"
        )


def _succeed(code: int, said: str) -> None:
    if code:
        why = next((line for line in said.splitlines() if "error" in line), "it gave no reason")
        raise RuntimeError(f"the C++ compiler failed: {why}\n{said[-2000:]}")


_loading = threading.Lock()


@functools.cache
def load() -> bool:
    """Whether the compiled kernels are there; builds and loads them on the first call.

    $ACTSPARSE_CPU names the instruction set (one of :data:`LEVELS`; the best one by default), or
    ``reference`` for PyTorch's own operators.
    """
    wanted = os.environ.get("ACTSPARSE_CPU", "")
    if wanted not in ("", "reference", *LEVELS):
        known = ", ".join(["reference", *LEVELS])
        raise ValueError(f"ACTSPARSE_CPU is {wanted!r}; it can be {known}, or unset")
    if wanted == "reference":
        return False
    try:
        with _loading:  # a library that registers its operators twice ends the process
            if not hasattr(torch.ops.actsparse_cpu, "level"):
                _load()
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        message = f"sparse kernels run on PyTorch's own operators, slowly: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return False
    if wanted:
        torch.ops.actsparse_cpu.level(LEVELS.index(wanted))
    return True


def _load() -> None:
    """Load the wheel's library, or build one and load that."""
    refused = ""
    if SHIPPED.exists() and os.environ.get("ACTSPARSE_SANITIZE") != "1":
        try:
            if _whole(SHIPPED):
                return torch.ops.load_library(str(SHIPPED))
            refused = f"{SHIPPED} was cut or changed, and "
        except OSError as error:  # made for another system
            refused = f"{str(error.__cause__ or error).splitlines()[0]}, and "
    try:
        library = build()
    except (RuntimeError, OSError) as error:
        raise RuntimeError(f"{refused}{error}") from error
    return torch.ops.load_library(str(library))


def level() -> str:
    """The instruction set in use: one of :data:`LEVELS`, or ``reference``."""
    return LEVELS[torch.ops.actsparse_cpu.level(-1)] if load() else "reference"
