"""The certified head of a checkpoint beside dense ones: the same tokens, and its time; one record.

States are what enters the head on windows of a text. The reference multiplies by all rows: in
float32, and in float64 those that may be the largest then.

    python benchmarks/head.py CHECKPOINT --text FILE --out RECORD [--states 100000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from actsparse.bench.timing import interleaved, ratio
from actsparse.convert import read_documents, windows_of
from actsparse.convert.checkpoint import encoder, in_dtype, load_checkpoint
from actsparse.environment import environment
from actsparse.files import write
from actsparse.kernels import CertifiedDecoding, CertifiedHead, backends
from actsparse.kernels.dense import by_rows

WINDOW = 1024


def by_all_rows(head: CertifiedHead, states: Tensor) -> Tensor:
    """The token of the largest logit of each state [N, D], lowest first."""
    logits = states.float() @ head.weight.float().T
    error = 2.0**-14 * head.weight.float().norm(dim=1).max() * states.float().norm(dim=1)
    near = logits >= (logits.amax(1) - 2 * error)[:, None]
    found = []
    for x, row in zip(states, near, strict=True):
        tokens = row.nonzero()[:, 0]
        exact = (head.weight[tokens].double() * x.double()).sum(-1)
        found.append(tokens[exact == exact.max()][0])
    return torch.stack(found)


@torch.no_grad()
def main() -> None:
    """Compare and time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument("--generate", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = load_checkpoint(given.checkpoint)
    in_dtype(model, torch.bfloat16)
    ids = windows_of(read_documents([given.text]), encoder(tokenizer), WINDOW, given.states).ids
    head = CertifiedHead.of(model, ids[0][None, :8])
    weight = head.weight
    backends.loaded()
    few = model.base_model(ids[0][None]).last_hidden_state[0, -20:].contiguous()
    plain = torch.nn.Linear(weight.shape[1], len(weight), bias=False)
    plain.weight.copy_(weight)
    codes = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(plain))
    programs = {
        "int8, dynamic": lambda: [codes(x.float()[None]).argmax() for x in few],
        "bfloat16": lambda: [F.linear(x, weight).argmax() for x in few],
        "bfloat16, by rows": lambda: [by_rows(x[None], weight, None).argmax() for x in few],
        "certified, 1": lambda: [head.topk(x) for x in few],
        "certified, 50": lambda: [head.topk(x, 50) for x in few],
    }
    times = interleaved(programs, given.rounds)
    dense = min(list(programs)[1:3], key=lambda name: statistics.median(times[name]))
    rows = [
        {
            "program": name, "milliseconds": 1000 * statistics.median(seconds) / len(few),
            "best_dense_over_it": asdict(ratio(times, dense, name)),
        }
        for name, seconds in times.items()
    ]  # fmt: skip
    print(json.dumps(rows, indent=1), flush=True)
    seen = differ = 0
    read: list[int] = []
    began = time.monotonic()
    for piece in ids:
        states = model.base_model(piece[None]).last_hidden_state[0]
        found = torch.cat([head.topk(x)[1] for x in states if read.append(head.read) is None])
        differ += int((found != by_all_rows(head, states)).sum())
        seen += len(states)
        left = (time.monotonic() - began) * (given.states / seen - 1)
        print(f"{seen} states, {differ} differ, about {left / 60:.0f} min left", flush=True)
    prompt = ids[0][None, :32]
    how = {"max_new_tokens": given.generate, "do_sample": False, "eos_token_id": None}
    made = model.generate(prompt, custom_generate=CertifiedDecoding(head), **how)[0]
    head._look = lambda: False  # type: ignore[method-assign]  # all rows
    whole = model.generate(prompt, custom_generate=CertifiedDecoding(head), **how)[0]
    record = {
        "kind": "head", "source": given.checkpoint.name, "rows": len(weight),
        "dense": dense, "programs": rows, "states": seen, "states_that_differ": differ,
        "rows_read_median": statistics.median(read), "generated": given.generate,
        "generated_that_differ": int((made != whole).sum()),
        **environment(torch.get_num_threads()),
    }  # fmt: skip
    write(given.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
