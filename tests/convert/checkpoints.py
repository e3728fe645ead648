"""Small causal language models of bytes, trained for seconds, saved as Hugging Face does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from actsparse_lab.data.text import load_documents


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def plain(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gelu":
        config = GPT2Config(vocab_size=257, n_positions=128, n_embd=48, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config)
    llama = LlamaConfig(
        vocab_size=257, hidden_size=48, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    return LlamaForCausalLM(llama)


def write_text(folder: Path, documents: int = 60, length: int = 800) -> Path:
    """Documents of the embedded text, as lines of JSON."""
    texts = [text.decode() for text in load_documents()["train"].values()]
    long = [text[:length] for text in texts if len(text) > 300][:documents]
    file = folder / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in long), encoding="utf-8")
    return file


def trained(kind: str, folder: Path, steps: int = 150) -> Path:
    """A checkpoint that knows a little of the text that :func:`write_text` writes."""
    model, tokens = plain(kind), tokenizer()
    lines = write_text(folder).read_text(encoding="utf-8").splitlines()
    ids = torch.tensor(tokens("".join(json.loads(line)["text"] for line in lines))["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (16,), generator=generator)]
        logits = model(batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / kind)
    tokens.save_pretrained(folder / kind)
    return folder / kind
