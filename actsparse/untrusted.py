"""Read files from untrusted sources, within limits, without running anything."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from actsparse.values import BadValue, shown

MIB = 2**20
JSON_LIMIT = 64 * MIB
_NESTS = 2_000_000  # lists and objects in one JSON text: each takes up to 33 times its bytes
_BLANK = 1_000_000
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; whoever waits at a FIFO waits for ever.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device, a socket or a folder.

    >>> open_regular("/dev/null")
    Traceback (most recent call last):
    ...
    OSError: [Errno 22] is a device, not a regular file: '/dev/null'
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {what}, not a regular file", os.fspath(path))
    return open(descriptor, "rb")


def check_regular(path: str | os.PathLike[str]) -> None:
    """As `open_regular`, for a file that a library opens by its name."""
    open_regular(path).close()


def read_bytes(path: str | os.PathLike[str], limit: int = JSON_LIMIT) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or holds more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        said = f"is larger than {limit // MIB} MiB, the most that is read"
        raise OSError(errno.EFBIG, said, os.fspath(path))
    return content


def read_json(path: str | os.PathLike[str]) -> Any:
    """The plain values in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        BadValue: it cannot be read, or is no JSON (NaN and Infinity are none).

    >>> read_json("/dev/null")
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: cannot read /dev/null: is a device, not a regular file
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BadValue(f"cannot read {path}: {error.strerror or error}") from error
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> Any:
    """Plain values out of JSON; what is no JSON is a `BadValue` that says ``where``.

    >>> parse_json(b"[NaN]", "a.json")
    Traceback (most recent call last):
    ...
    actsparse.values.BadValue: a.json: not whole JSON: NaN is no JSON number
    """
    if content.count(b"{") + content.count(b"[") > _NESTS:
        raise BadValue(f"{where}: more than {_NESTS:,} lists and objects")
    try:
        return json.loads(content.decode(), parse_constant=no_constant)
    except RecursionError as error:
        raise BadValue(f"{where}: not whole JSON: it is nested too deep") from error
    except ValueError as error:
        raise BadValue(f"{where}: not whole JSON: {error}") from error


def no_constant(name: str) -> NoReturn:
    """``parse_constant`` of json: NaN and Infinity are no numbers."""
    raise ValueError(f"{name} is no JSON number")


def lines(stream: Any, line: int = 64 * MIB, total: int = 64 * 1024 * MIB) -> Iterator[bytes]:
    r"""Lines of a stream, each with its newline, within limits: a packed file may hold anything.

    Args:
        stream: a binary file, packed or not.
        line: the most bytes that a line may have.
        total: the most bytes of all lines.

    Raises:
        OSError: a line, or all of them, are longer.

    >>> import io
    >>> list(lines(io.BytesIO(b"a\nb")))
    [b'a\n', b'b']
    >>> list(lines(io.BytesIO(b"0123456789\n"), line=4))
    Traceback (most recent call last):
    ...
    OSError: [Errno 27] a line is longer than 4 bytes, the most that is read
    """
    left, blank = total, 0
    while piece := stream.readline(line + 1):
        left -= len(piece)
        if len(piece) > line:
            raise OSError(errno.EFBIG, f"a line is longer than {line} bytes, the most that is read")
        blank = blank + 1 if len(piece) < 3 else 0
        if blank > _BLANK:
            said = f"more than {_BLANK:,} empty lines in a row, the most that is read"
            raise OSError(errno.EFBIG, said)
        if left < 0:
            said = f"it holds more than {total} bytes unpacked, the most that is read"
            raise OSError(errno.EFBIG, said)
        yield piece


_WIDTHS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def safetensors_shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors in a safetensors file, by its header alone.

    Raises:
        BadValue: it is no safetensors file, or its header says what the file cannot hold.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            (length,) = struct.unpack("<Q", head) if len(head) == 8 else (size,)
            if length > min(size - 8, JSON_LIMIT):
                raise BadValue(f"{path} is no safetensors file: its header is cut off or too long")
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise BadValue(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise BadValue(f"{path} is no safetensors file: its header is {shown(header)}")
    shapes = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = _shape(entry, size - 8 - length)
        if shape is None:
            raise BadValue(
                f"{path}: its header says of {shown(name)} what the file does not hold: "
                f"{shown(entry)}"
            )
        shapes[name] = shape
    return shapes


def _shape(entry: Any, room: int) -> tuple[int, ...] | None:
    """A tensor's shape, if its bytes are there."""
    try:
        begin, end = entry["data_offsets"]
        shape, width = tuple(entry["shape"]), _WIDTHS.get(entry["dtype"])
        whole = all(type(each) is int and each >= 0 for each in (begin, end, *shape))
    except (TypeError, KeyError, ValueError):
        return None
    if not whole or len(shape) > 64 or not begin <= end <= room:
        return None
    elements = 1
    for each in shape:
        elements *= each
    return shape if width is None or elements * width == end - begin else None
