"""Finetune a GELU checkpoint with LoRA so that it becomes sparse, save it, load it, merge it.

python examples/finetune_lora.py
"""

from __future__ import annotations

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from actsparse import observe, sparsify
from actsparse.modify import load_adapter, lora_config, merge_adapter, save_adapter


def density(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """The share of MLP neurons that are not exactly zero, in inference."""
    model.eval()
    with observe(model, inputs={"input_ids": ids}) as seen, torch.inference_mode():
        model(input_ids=ids)
    return seen.summary("inference")["density"]


def main(steps: int = 60, out: str = "runs/examples/adapter") -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    base = GPT2LMHeadModel(config)  # yours: GPT2LMHeadModel.from_pretrained(...)
    base.save_pretrained(f"{out}-base")
    ids = torch.arange(32).repeat(8, 1)
    batch = {"input_ids": ids}
    print(f"the checkpoint: density {density(base, ids):.3f}")

    model = peft.get_peft_model(base, lora_config(base, batch, r=8))  # peft first
    handle = sparsify(model, "paper-finetune", inputs=batch)  # then sparsify
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    handle.attach(optimizer, steps=steps)  # the activation is mixed in over the first third
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss + handle.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"finetuned: density {density(model, ids):.3f}, loss {loss:.3f}")

    save_adapter(model, out)
    again = load_adapter(GPT2LMHeadModel.from_pretrained(f"{out}-base"), out)
    print(f"loaded: density {density(again, ids):.3f}")
    merged = merge_adapter(again)
    print(f"merged: {type(merged).__name__}, density {density(merged, ids):.3f}")


if __name__ == "__main__":
    main()
