"""What thresholds without training cost, by form, beside a CATS-like baseline; one record.

The forms are those of ``actsparse convert``; ``product`` is a TEAL-like rule, one threshold for
|φ(z)·u| in each block. ``cats`` has one threshold for |φ(z)| in each block, without the units'
scales. Points are kept as they come: the same command goes on with those that are left.

    python benchmarks/convert/frontier.py CHECKPOINT --text web.jsonl.xz --also wiki.txt --out FILE
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import torch

from actsparse import DropSmall, observe, sparsify
from actsparse.convert import calibrate, document_losses, read_documents, windows_of
from actsparse.convert.checkpoint import around_of, encoder, in_dtype, load_checkpoint
from actsparse.convert.judgement import Passed, bytes_read, excess_interval
from actsparse.convert.pipeline import CALIBRATE, Split
from actsparse.environment import environment
from actsparse.files import write

POINTS = (
    ("gate", 0.3), ("product", 0.5), ("both", 0.5), ("cats", 0.2),
    ("gate", 0.5), ("product", 0.6), ("both", 0.6), ("cats", 0.3),
)  # fmt: skip


def main() -> None:
    """Measure each point that the record has not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--also", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    record = json.loads(given.out.read_text()) if given.out.exists() else {"points": []}
    done = {(row["form"], row["share"], row["text"]) for row in record["points"]}
    model, tokenizer = load_checkpoint(given.checkpoint)
    encode, ends = encoder(tokenizer), around_of(tokenizer, encodes=False)
    split = Split.of(windows_of(read_documents([given.text]), encode, given.window, None, *ends))
    also = windows_of(read_documents([given.also]), encode, given.window, 100_000, *ends)
    texts = {given.text.name.split(".")[0]: split.test, given.also.name.split(".")[0]: also}
    batches = [ids[None] for ids in split.train.ids[: CALIBRATE // given.window]]
    in_dtype(model, torch.bfloat16)
    dense = {name: document_losses([model], windows) for name, windows in texts.items()}
    for form, share in POINTS:
        wanted = [text for text in texts if (form, share, text) not in done]
        if not wanted:
            continue
        rule = DropSmall("gate" if form == "cats" else form)
        handle = sparsify(model.float(), rule, inputs=batches[0])
        found = calibrate(model, batches, by_unit=form != "cats")
        in_dtype(model, torch.bfloat16)
        found.put(share)
        for text in wanted:
            passed = [Passed(block) for block in handle.blocks]
            with observe(model, blocks=handle.blocks) as seen, contextlib.ExitStack() as taps:
                for each in passed:
                    each.begin(taps)
                losses = document_losses([model], texts[text])
            density, counts = seen.summary("inference")["density"], losses.counts
            through = sum(each.share(density) for each in passed) / len(passed)
            more = losses.sums[0] - dense[text].sums[0]
            row = {
                "form": form, "share": share, "text": text, "documents": len(counts),
                "tokens": int(counts.sum()), "excess": float(more.sum() / counts.sum()),
                "interval": excess_interval(more, counts), "density": density,
                "bytes_read": bytes_read(density, True, through),
            }  # fmt: skip
            record["points"].append(row)
            record |= {"kind": "frontier", **environment(torch.get_num_threads())}
            write(given.out, json.dumps(record, indent=1).encode())
            print(row, flush=True)
        handle.remove()


if __name__ == "__main__":
    main()
