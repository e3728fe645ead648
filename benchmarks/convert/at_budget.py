"""What the weights of a distillation of ``actsparse convert`` allow at another budget or form.

The state is a copy of ``OUT.distilling``, made before the conversion that trained it ended. Text
and window must be that conversion's.

    python benchmarks/convert/at_budget.py CHECKPOINT --state FOLDER --text a.jsonl --text b.txt \\
        --also wiki.txt --budget 0.03 --out FILE [--folder MODEL] [--form both]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file

from actsparse import DropSmall, sparsify
from actsparse.convert import (
    Distillation,
    calibrate,
    choose,
    judge,
    mean_loss,
    read_documents,
    windows_of,
)
from actsparse.convert.card import card_of
from actsparse.convert.certificate import certify
from actsparse.convert.checkpoint import (
    around_of,
    encoder,
    in_dtype,
    load_checkpoint,
    write_checkpoint,
)
from actsparse.convert.pipeline import CALIBRATE, Conversion, Split
from actsparse.convert.scores import Calibration, Form
from actsparse.convert.share import nats
from actsparse.environment import environment
from actsparse.files import write


def main() -> None:
    """Choose, judge, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--also", type=Path, action="append", default=[])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--form", default="gate", choices=get_args(Form))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    state = json.loads((given.state / "distil.json").read_text())
    how = Distillation(**state["how"])
    model, tokenizer = load_checkpoint(given.checkpoint)
    dense = in_dtype(load_checkpoint(given.checkpoint)[0], torch.bfloat16)
    encode, ends = encoder(tokenizer), around_of(tokenizer, encodes=False)
    split = Split.of(windows_of(read_documents(given.text), encode, given.window, None, *ends))
    texts = {"test": split.test}
    for file in given.also:
        made = windows_of(read_documents([file]), encode, given.window, 100_000, *ends)
        texts[file.name.split(".")[0]] = made
    weights = load_file(given.state / "distil.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    del weights
    sparsify(model, DropSmall(given.form), inputs=split.train.ids[0][None])
    batches = [ids[None] for ids in split.train.ids[: CALIBRATE // given.window]]
    found = calibrate(model, batches)
    found.put(how.share)
    found = calibrate(model, batches, dense=False)  # its weights expect thresholds
    trained = state["step"] * how.batch
    in_dtype(model, torch.bfloat16)
    allowed, loss = nats(given.budget), mean_loss(dense, split.validation)

    def loss_at(share: float) -> float:
        Calibration(model, found.blocks).put(share)
        lost = mean_loss(model, split.validation)
        print(f"{share:.4f}: {lost - loss:+.4f}", flush=True)
        return lost

    choice = choose(loss_at, loss, allowed, (how.share, how.share - 0.15, how.share - 0.3, 0.0))
    assert choice is not None
    found.put(choice.share)
    judged = [judge(model, windows, name, dense) for name, windows in texts.items()]
    certificate = certify(judged[0][1], allowed)
    done = Conversion(
        model, given.budget, given.form, choice, None, choice.seen, how, trained,
        [each for each, _ in judged], certificate, split.pieces,
    )  # fmt: skip
    done.extra = {
        "source": given.checkpoint.name,
        "text": {name: [w.documents, w.tokens] for name, w in texts.items()},
        "window": given.window,
        **environment(torch.get_num_threads()),
    }
    record = done.to_json()
    write(given.out, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    if given.folder:
        card = card_of(done, given.checkpoint.name)
        write_checkpoint(given.folder, done.model, tokenizer, record, card)


if __name__ == "__main__":
    main()
