"""How often a certificate of ``actsparse convert`` is wrong, on splits of real documents.

Each document is the first window of one of a text; the mean excess of all of them is taken for the
truth. A split draws some of them anew, and certifies budgets on them. A certificate is wrong where
the truth is above its budget: at the truth itself (the hardest case) that may be a share δ.

    python benchmarks/convert/certificate.py CHECKPOINT --text web.jsonl.xz --out FILE
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from actsparse import DropSmall, sparsify
from actsparse.convert import calibrate, certify, document_losses, read_documents, windows_of
from actsparse.convert.checkpoint import around_of, encoder, in_dtype, load_checkpoint
from actsparse.convert.pipeline import CALIBRATE
from actsparse.convert.text import Windows
from actsparse.environment import environment
from actsparse.files import write

SPLITS, DELTA = 200, 0.1
DRAWN = (50, 100, 200)  # documents of a split
BUDGETS = (0.8, 1.0, 1.25, 1.5, 2.0)  # times the truth


def main() -> None:
    """Measure the documents once, then split."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.3125)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = load_checkpoint(given.checkpoint)
    encode, ends = encoder(tokenizer), around_of(tokenizer, encodes=False)
    whole = windows_of(read_documents([given.text]), encode, given.window, None, *ends)
    first = {number: ids for ids, number in reversed(list(zip(*whole, strict=True)))}
    numbers = sorted(first)
    seen = numbers[-(CALIBRATE // given.window) :]  # to calibrate on: they are not judged
    judged = numbers[: given.documents]
    sparsify(model, DropSmall(), inputs=first[judged[0]][None])
    found = calibrate(model, [first[number][None] for number in seen])
    in_dtype(model, torch.bfloat16)
    windows = Windows([first[number] for number in judged], judged)
    dense = document_losses([model], windows)
    found.put(given.share)
    sparse = document_losses([model], windows)
    excess = (sparse.sums[0] - dense.sums[0]) / sparse.counts
    truth = float(excess.mean())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for drawn in DRAWN:
        picks = torch.randint(len(excess), (SPLITS, drawn), generator=generator)
        for times in BUDGETS:
            held = [certify(excess[pick], times * truth, DELTA).holds for pick in picks]
            rows.append({"documents": drawn, "budget": times, "certified": sum(held) / SPLITS})
            print(rows[-1], flush=True)
    record = {
        "kind": "certificates", "share": given.share, "splits": SPLITS, "delta": DELTA,
        "truth": truth, "deviation": float(excess.std()), "population": len(excess),
        "tokens": int(sparse.counts.sum()), "rows": rows,
    }  # fmt: skip
    record |= environment(torch.get_num_threads())
    write(given.out, json.dumps(record, indent=1).encode())


if __name__ == "__main__":
    main()
