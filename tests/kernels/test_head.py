"""The certified top k of a head: what float64 gives of all rows, whatever the rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from actsparse.kernels import CertifiedDecoding, CertifiedHead

SMALL = {
    "vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def wanted(weight: Tensor, bias: Tensor | None, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By all rows, each summed alone."""
    logits = torch.stack([(row.double() * x.double()).sum() for row in weight])
    if bias is not None:
        logits = logits + bias.double()
    order = logits.argsort(descending=True, stable=True)[:k]
    return logits[order].float(), order


def check(weight: Tensor, bias: Tensor | None, hidden: Tensor, k: int) -> None:
    values, tokens = CertifiedHead(weight, bias).topk(hidden, k)
    for x, value, token in zip(hidden, values, tokens, strict=True):
        expected = wanted(weight, bias, x, k)
        assert torch.equal(token, expected[1])
        torch.testing.assert_close(value, expected[0], rtol=0, atol=0, equal_nan=True)


KINDS = (
    "plain", "equal rows", "zeros", "nearly equal", "huge", "tiny", "one large row", "nan",
    "inf", "negative",
)  # fmt: skip


def drawn(kind: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    weight, x = torch.randn(rows, width), torch.randn(3, width)
    if kind == "equal rows":
        weight = weight[torch.randint(1 + rows // 8, (rows,))]
    elif kind == "zeros":
        weight[torch.rand(rows) < 0.9] = 0
        x[1] = 0
    elif kind == "nearly equal":
        weight = torch.ones(rows, width) + 1e-6 * weight
    elif kind in ("huge", "tiny"):
        weight = weight * (1e18 if kind == "huge" else 1e-30)
        x[1] *= 1e15 if kind == "huge" else 1e-25
    elif kind == "one large row":
        weight[rows // 2] *= 1000
    elif kind in ("nan", "inf"):
        some = torch.randint(weight.numel(), (3,))
        weight.view(-1)[some] = torch.nan if kind == "nan" else torch.inf
        x[2, 0] = torch.nan if kind == "nan" else -torch.inf
    elif kind == "negative":
        weight, x = -weight.abs(), x.abs()
    return weight, x


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), rows=st.integers(1, 700), width=st.integers(1, 70),
    share=st.floats(0, 1), bias=st.booleans(), narrow=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_it_is_what_float64_gives_of_all_rows(
    kind: str, rows: int, width: int, share: float, bias: bool, narrow: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = drawn(kind, rows, width)
    dtype = torch.bfloat16 if narrow else torch.float32
    plus = torch.randn(rows).to(dtype) if bias else None
    k = max(1, int(rows * share**4))
    check(weight.to(dtype), plus, x.to(dtype), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_swallows_the_products_leaves_no_row_out(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x, bias = 1e-30 * torch.randn(300, 64), torch.randn(8, 64), 100 * torch.randn(300)
    for plus in (bias, bias.round(), torch.full_like(bias, 3)):
        check(weight.to(dtype), plus.to(dtype), x.to(dtype), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_read(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(8192, 96).to(dtype), torch.randn(96).to(dtype)
    head = CertifiedHead(weight)
    for k in (1, 20):
        assert torch.equal(head.topk(x, k)[1], wanted(weight, None, x, k)[1])
        assert head.read < 0.25 * len(weight)


def test_a_weight_that_changes_is_noticed() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(900, 32), torch.randn(32)
    head = CertifiedHead(weight)
    for change in (weight.mul_, weight.data.mul_):
        first = head.topk(x)[1]
        change(-1)
        assert torch.equal(head.topk(x, 3)[1], wanted(weight, None, x, 3)[1])
        assert not torch.equal(head.topk(x)[1], first)
    with torch.inference_mode():
        other = weight.clone()
        assert torch.equal(CertifiedHead(other).topk(x, 3)[1], wanted(other, None, x, 3)[1])


def test_shapes_and_what_does_not_fit() -> None:
    head = CertifiedHead(torch.randn(9, 4))
    values, tokens = head.topk(torch.randn(2, 3, 4), 2)
    assert values.shape == tokens.shape == (2, 3, 2)
    assert head.topk(torch.randn(0, 4), 2)[1].shape == (0, 2)
    for hidden, k, message in (
        (torch.randn(5), 1, r"expected torch.float32 \[..., 4\]"),
        (torch.randn(4).double(), 1, "hidden is torch.float64"),
        (torch.randn(4), 0, "expected 1 to 9"),
        (torch.randn(4), 10, "expected 1 to 9"),
    ):
        with pytest.raises(ValueError, match=message):
            head.topk(hidden, k)
    for weight in (torch.randn(4), torch.randn(9, 4).half(), torch.randn(9, 4).to_sparse()):
        with pytest.raises(ValueError, match="expected a plain"):
            CertifiedHead(weight)
    with pytest.raises(ValueError, match=r"bias has shape \[4\]"):
        CertifiedHead(torch.randn(9, 4), torch.randn(4))


def test_heads_of_models() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 600, (1, 6))
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)).eval()
        head: Any = CertifiedHead.of(model, ids)
        with torch.no_grad():
            hidden, logits = model.model(ids).last_hidden_state, model(ids).logits
        assert torch.equal(head.topk(hidden)[1][..., 0], logits.argmax(-1))
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)).eval()
    with pytest.raises(ValueError, match="are not what its head gives"):
        CertifiedHead.of(capped, ids)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="the head of this LlamaForCausalLM is a Sequential"):
        CertifiedHead.of(model, ids)


def llama() -> Any:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=7)).eval()


@pytest.mark.parametrize("cache", [True, False])
def test_decoding_gives_the_tokens_of_greedy_search(cache: bool) -> None:
    model, ids = llama(), torch.randint(8, 600, (3, 5))
    with torch.no_grad():
        model.lm_head.weight[7] = 3 * model.lm_head.weight[8:].mean(0)  # ends come up, some early
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    decoding = CertifiedDecoding(CertifiedHead.of(model, ids))
    how = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "use_cache": cache}
    for extra in ({}, {"eos_token_id": [7, 11]}, {"eos_token_id": None}):
        more = {**how, **extra, "pad_token_id": 0}
        expected = model.generate(ids, **more)
        assert torch.equal(model.generate(ids, custom_generate=decoding, **more), expected)


def test_what_needs_logits_is_refused() -> None:
    model, ids = llama(), torch.randint(8, 600, (1, 5))
    decoding = CertifiedDecoding(CertifiedHead.of(model, ids))
    for extra, message in (
        ({"repetition_penalty": 1.5}, "RepetitionPenaltyLogitsProcessor needs all logits"),
        ({"do_sample": True, "top_k": 0}, "do_sample=True"),
        ({"output_scores": True, "return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"num_beams": 2}, "without beams"),
    ):
        how = {"max_new_tokens": 2, "do_sample": False, **extra}
        with pytest.raises(ValueError, match=message):
            model.generate(ids, custom_generate=decoding, **how)
    with pytest.raises(ValueError, match="is not that of this LlamaForCausalLM"):
        llama().generate(ids, custom_generate=decoding, max_new_tokens=2)
