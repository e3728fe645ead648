"""Hugging Face's Trainer: one callback, and curves of density in TensorBoard and its like.

python examples/trainer.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from actsparse import decay_groups, load, sparsify
from actsparse.train import SparsityCallback


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Counting: each token is the one before plus the row's step, modulo 50."""
    starts, steps = torch.randint(50, (2, count, 1))
    ids = (starts + steps * torch.arange(32)) % 50
    return [{"input_ids": row, "labels": row} for row in ids]


def main(steps: int = 200, out: str = "runs/examples/trainer", report_to: str = "none") -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    handle = sparsify(model, "best", inputs={"input_ids": rows(2)[0]["input_ids"][None]})
    args = TrainingArguments(
        out, max_steps=steps, per_device_train_batch_size=32, logging_steps=max(1, steps // 4),
        eval_strategy="steps", eval_steps=max(1, steps // 2), report_to=report_to,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    # Trainer's own optimizer spares norms and biases from decay too; here it is said.
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1, exclude=("norm", "bias")), lr=2e-3)
    trainer = Trainer(
        model, args, train_dataset=rows(4096), eval_dataset=rows(128),
        optimizers=(optimizer, None), callbacks=[SparsityCallback(handle)],
    )  # fmt: skip
    trainer.train()  # its lines have density and eval_density, and so have trackers
    last = max(Path(out).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    print(f"{last} loads with its recipe: {type(load(last)).__name__}")


if __name__ == "__main__":
    main()
