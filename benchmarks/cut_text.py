"""Cut texts into short pieces and mix them, so that one pass over them is long and even.

    python benchmarks/cut_text.py OUT.jsonl.xz SHARD...

Pieces end at the end of a paragraph, have about 4000 characters, and come in the order of a hash.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Iterator

from actsparse_lab.data.shards import texts

LONG = 4000  # characters after which a piece ends with its paragraph


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of whole paragraphs, each as long as `LONG` or a little longer."""
    piece = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= LONG:
            yield piece.strip()
            piece = ""
    if piece.strip():
        yield piece.strip()


if __name__ == "__main__":
    out, *shards = sys.argv[1:]
    cut = {piece for shard in shards for _, text in texts(shard) for piece in pieces(text)}
    mixed = sorted(cut, key=lambda piece: hashlib.sha256(piece.encode()).digest())
    with lzma.open(out, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": piece}) + "\n" for piece in mixed)
    print(f"{out}: {len(mixed)} pieces, {sum(len(piece.encode()) for piece in mixed):,} bytes")
