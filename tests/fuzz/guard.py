"""Watches what an input makes this process do: time, memory, and calls that nobody asked for."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Starting a program, asking the network, unpickling, or reading code of the corpus (module evil).
_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "socket.getaddrinfo", "socket.gethostbyname", "pickle.find_class",
)  # fmt: skip
WAIT = 10.0  # seconds


class TookTooLong(BaseException):
    """No handler of `Exception` may swallow it."""


@dataclass
class Outcome:
    """What came of one input: "taken", "refused", or what is wrong."""

    word: str
    seconds: float
    mib: float
    said: str = ""
    called: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        return self.word not in ("taken", "refused") or bool(self.called)


_called: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    evil = event == "import" and str(arguments[0]).split(".")[0] == "evil"
    if evil or event in _FORBIDDEN:
        _called.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_hook)


def watched(action: Callable[[], Any], refusals: tuple[type[Exception], ...]) -> Outcome:
    """Do it; only ``refusals`` with words in them may come of it."""
    global _watching
    _called.clear()
    before = _memory()
    start = _clock()
    word, said = "taken", ""
    with _alarm():
        _watching = True
        try:
            action()
        except TookTooLong:
            word = "too long"
        except refusals as error:
            word, said = "refused" if str(error) else "said nothing", str(error)
        except BaseException as error:
            word, said = f"{type(error).__name__} {_place(error.__traceback__)}", str(error)
        finally:
            _watching = False
    seconds = _clock() - start
    mib = max(0.0, _peak() - before)
    if word in ("taken", "refused") and seconds > WAIT:
        word = "too long"
    return Outcome(word, seconds, mib, said[:300], tuple(_called))


def _place(trace: types.TracebackType | None) -> str:
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if "actsparse" in code.co_filename or not place:
            place = f"{Path(code.co_filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _clock() -> float:
    """Seconds, without those in which this thread could have run and others had the cores."""
    queued = 0
    with contextlib.suppress(OSError):
        queued = int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1])
    return time.monotonic() - queued / 1e9


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    start = _clock()

    def ring(*_: Any) -> None:
        if _clock() - start > WAIT:
            raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, WAIT + 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _memory() -> float:
    """MiB held now; the peak is counted from here."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(key: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    return 0.0
