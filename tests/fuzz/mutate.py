"""Inputs made wrong at random, from a seed: plain values, and bytes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
# What readers stumble over; a string in it may name code, an address, markup or a place.
VALUES: list[Any] = json.loads((CORPUS / "values.json").read_text(encoding="utf-8"))
HEADS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x1f\x8b\x08\x00", b"\xfd7zXZ\x00",
    b"PK\x03\x04", b"\x80\x04\x95", b"\x89PNG\r\n\x1a\n", b"GIF89a\xff\xff\xff\xff", b"RIFF",
    b"\xff" * 8, b"\0" * 8, b"[" * 5000, b'{"a":' * 5000, (2**62).to_bytes(8, "little"),
]  # fmt: skip


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of everything inside."""
    found, queue = [], [value]
    while queue:
        each = queue.pop()
        if isinstance(each, dict | list):
            keys = list(each) if isinstance(each, dict) else list(range(len(each)))
            found += [(each, key) for key in keys]
            queue += [each[key] for key in keys]
    return found


def _deep(random: Random) -> Any:
    value: Any = random.choice(VALUES)
    for _ in range(random.choice((3, 40, 150))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def plain(value: Any, random: Random) -> Any:
    """Plain values with one to three of them changed, dropped, doubled, renamed or moved."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        nodes = _nodes(value)
        if not nodes or random.random() < 0.02:
            return copy.deepcopy(random.choice(VALUES))
        where, key = random.choice(nodes)
        what = random.random()
        if what < 0.6:
            where[key] = copy.deepcopy(random.choice(VALUES))
        elif what < 0.65:
            where[key] = _deep(random)
        elif what < 0.75:
            del where[key]
        elif what < 0.85:
            other, at = random.choice(nodes)
            if at in other if isinstance(other, dict) else at < len(other):
                where[key] = copy.deepcopy(other[at])
        elif what < 0.9 and isinstance(where[key], int | float):
            where[key] = where[key] * random.choice((-1, 10, 1000, 10**6, 10**9, 0.5))
        elif isinstance(where, dict):
            where[random.choice([*where, "x", "", "\x1b[31m", *filter(_text, VALUES)])] = where.pop(
                key
            )
        else:
            where.append(copy.deepcopy(where[key]))
    return value


def _text(value: Any) -> bool:
    return isinstance(value, str)


def text(value: Any, random: Random) -> bytes:
    """Wrong JSON of plain values, now and then torn as well."""
    made = json.dumps(plain(value, random)).encode()
    return content(made, random) if random.random() < 0.1 else made


def content(value: bytes, random: Random) -> bytes:
    """Bytes with some of them changed, cut out, cut off, doubled or exchanged."""
    made = bytearray(value)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at, length = random.randrange(len(made) + 1), random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(7):
            case 0:
                made[at : at + length] = random.randbytes(length)
            case 1:
                del made[at : at + length]
            case 2:
                del made[at:]
            case 3:
                made[at:at] = made[: length * 8]
            case 4:
                head = random.choice(HEADS)
                made[: len(head)] = head
            case 5:
                head = random.choice(HEADS)
                made[at : at + len(head)] = head
            case _:
                if at < len(made):
                    made[at] ^= 1 << random.randrange(8)
    return bytes(made)
