"""The parts of a conversion, each by brute force or by its law."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from actsparse import DropSmall, observe, sparsify
from actsparse.convert import (
    Distillation,
    Split,
    Windows,
    calibrate,
    certify,
    choose,
    distil,
    document_losses,
    largest_certified,
    read_documents,
    windows_of,
)
from actsparse.convert.checkpoint import around_of
from actsparse.convert.distillation_loss import _Divergence, loss_of
from actsparse.convert.judgement import judge
from tests.convert.checkpoints import plain, tokenizer


def some_windows(count: int = 12, documents: int = 5) -> Windows:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 250, (5 + 3 * (i % 4),), generator=generator) for i in range(count)]
    return Windows(ids, [i % documents for i in range(count)])


def test_losses_are_those_of_each_window_alone() -> None:
    model, windows = plain("swiglu").double().eval(), some_windows()
    (sums,), counts, _ = document_losses([model], windows, size=40)
    expected = torch.zeros(5, dtype=torch.float64)
    tokens = torch.zeros(5, dtype=torch.float64)
    for ids, number in zip(*windows, strict=True):
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        expected[number] += F.cross_entropy(logits, ids[1:], reduction="sum").double()
        tokens[number] += len(ids) - 1
    assert torch.equal(counts, tokens)
    assert torch.allclose(sums, expected, rtol=1e-6)
    assert windows.tokens == int(counts.sum())


def test_density_counts_the_tokens_of_the_text_alone() -> None:
    model, windows = plain("swiglu").eval(), some_windows()
    handle = sparsify(model, DropSmall(), inputs=windows.ids[0][None])
    calibrate(model, [ids[None] for ids in windows.ids]).put(0.5)
    kept: list[Tensor] = []
    for block in handle.blocks:
        block.down.module.register_forward_pre_hook(
            lambda module, args: kept.append((args[0] != 0).flatten())
        )
    judgement, _ = judge(model, windows, "x")
    together = judgement.density
    kept.clear()
    with torch.no_grad():
        for ids in windows.ids:
            model(ids[None])
    assert together == pytest.approx(float(torch.cat(kept).double().mean()), abs=1e-12)


def test_losses_refuse_ids_beyond_the_vocabulary_and_nan() -> None:
    model = plain("gelu").eval()

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids: Tensor) -> Tensor:
            return self.weight.expand(*ids.shape, 8)

    with pytest.raises(ValueError, match="beyond the model's vocabulary of 8"):
        document_losses([Short()], some_windows())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        document_losses([model], some_windows())


@pytest.mark.parametrize("form", ["gate", "product", "both"])
def test_a_share_is_what_is_dropped_where_it_was_calibrated(form: str) -> None:
    model, windows = plain("swiglu").eval(), some_windows(40)
    handle = sparsify(model, DropSmall(form), inputs=windows.ids[0][None])  # type: ignore[arg-type]
    batches = [ids[None] for ids in windows.ids]
    calibration = calibrate(model, batches)
    first = handle.blocks[0]  # the input of others changes with its thresholds
    for share in (0.0, 0.2, 0.5, 0.9):
        calibration.put(share)
        with observe(model, blocks=[first]) as seen, torch.no_grad():
            for batch in batches:
                model(batch)
        density = seen.summary("inference")["density"]
        assert density == pytest.approx(1 - share, abs=0.02)


def test_scores_weigh_units_by_the_size_of_what_they_multiply() -> None:
    model, windows = plain("swiglu").eval(), some_windows(40)
    handle = sparsify(model, DropSmall(), inputs=windows.ids[0][None])
    up = handle.blocks[0].up.module
    with torch.no_grad():
        up.weight[:64] *= 10
    calibration = calibrate(model, [ids[None] for ids in windows.ids])
    calibration.put(0.5)
    t = up.activation_threshold
    assert 8 < float(t[64:].median() / t[:64].median()) < 12.5


@given(st.lists(st.floats(-0.1, 0.1), min_size=1, max_size=60), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_certificate_never_speaks_against_the_data_and_improves_with_them(
    excess: list[float], seed: int
) -> None:
    found = certify(torch.tensor(excess), 0.03)
    assert 0 < found.p_value <= 1
    if all(value >= 0.03 for value in excess):
        assert found.p_value == 1
    lower = certify(torch.tensor(excess) - 0.02, 0.03)
    assert lower.mean <= found.mean


@pytest.mark.parametrize("spread", [0.01, 0.05])
def test_certificates_are_wrong_no_more_often_than_delta(spread: float) -> None:
    """At the boundary, where the mean over all documents is the budget itself."""
    generator = torch.Generator().manual_seed(0)
    delta, trials = 0.1, 400
    wrong = 0
    for _ in range(trials):
        # skewed: most documents below the budget, a few far above
        excess = 0.03 - spread + spread * torch.empty(80).exponential_(generator=generator)
        wrong += certify(excess, 0.03, delta).holds
    assert wrong / trials <= delta + 2 * math.sqrt(delta * (1 - delta) / trials)


def test_certificates_hold_where_there_is_room() -> None:
    generator = torch.Generator().manual_seed(0)
    held = sum(
        certify(0.015 + 0.03 * torch.randn(150, generator=generator), 0.03).holds
        for _ in range(100)
    )
    assert held >= 80


def test_the_search_for_a_certified_share_ends_at_the_first_that_fails() -> None:
    asked = []

    def excess_at(share: float) -> Tensor:
        asked.append(share)
        return torch.full((300,), 0.0 if share != 0.3 else 0.1)

    found = largest_certified([0.1, 0.2, 0.3, 0.4], excess_at, 0.03)
    assert found is not None
    assert (found[0], asked) == (0.2, [0.1, 0.2, 0.3])


def test_choose_begins_where_it_is_told_and_knows_when_nothing_will_do() -> None:
    def valley(share: float) -> float:  # best at 0.6, as where the model was distilled
        return 3 + abs(share - 0.6)

    assert choose(valley, 3.0, 0.1) is None
    found = choose(valley, 3.0, 0.1, starts=(0.6, 0.0))
    assert found is not None
    assert found.share == pytest.approx(0.7, abs=1 / 64)
    below = choose(lambda share: 3 + share, 3.0, 0.1, starts=(0.6, 0.05))
    assert below is not None
    assert below.share == pytest.approx(0.1, abs=1 / 64)


def test_documents_of_each_kind_of_file(tmp_path) -> None:
    import lzma

    wiki = tmp_path / "wiki.txt"
    wiki.write_text(" \n = One = \n\n text \n\n = = Part = = \n more \n = Two = \n end \n")
    assert [each.split()[1] for each in read_documents([wiki])] == ["One", "Two"]
    packed = tmp_path / "lines.jsonl.xz"
    with lzma.open(packed, "wt") as stream:
        stream.write('{"text": "a"}\n{"text": " "}\n{"text": "b"}\n')
    assert read_documents([packed]) == ["a", "b"]
    (tmp_path / "torn.jsonl.xz").write_bytes(b"\xfd7zXZ\0torn")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_documents([tmp_path / "torn.jsonl.xz"])
    with pytest.raises(OSError):
        read_documents([tmp_path / "nowhere.txt"])


def test_windows_cover_the_text_once() -> None:
    windows = windows_of(["abcdefg", "xy"], lambda text: [ord(c) for c in text], 3, tokens=8)
    assert "".join(chr(i) for ids in windows.ids for i in ids) == "abcdef"
    assert windows.document == [0, 0]
    with pytest.raises(ValueError, match="fewer than two tokens"):
        windows_of(["a"], lambda text: [ord(c) for c in text], 3)


def test_each_window_begins_as_the_tokenizer_begins_a_text() -> None:
    made = windows_of(["abcd", "e"], lambda text: [0, *map(ord, text)], 3, first=[0])
    assert [ids.tolist() for ids in made.ids] == [[0, 97, 98], [0, 99, 100], [0, 101]]
    begins = tokenizer()
    assert around_of(begins, encodes=False) == ([], [])
    begins.add_special_tokens({"bos_token": "<begin>"})
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begins.bos_token_id)]
    )
    assert around_of(begins, encodes=False) == ([begins.bos_token_id], [])


@given(st.integers(5, 80), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_parts_of_a_split_share_nothing(count: int, documents: int) -> None:
    windows = Windows(
        [torch.full((4,), i) for i in range(count)], [i % documents for i in range(count)]
    )
    parts = Split.of(windows)
    held = [
        {int(ids[0]) for ids in part.ids} for part in (parts.train, parts.validation, parts.test)
    ]
    assert all(held)
    assert sorted(value for part in held for value in part) == list(range(count))


@pytest.mark.parametrize(("loss", "to"), [("logits", 0.8), ("text", 1.0)])
def test_distillation_lowers_its_loss(loss: str, to: float) -> None:
    torch.manual_seed(0)
    teacher, student = plain("swiglu"), plain("swiglu")
    windows = Windows([torch.randint(0, 250, (16,)) for _ in range(30)], list(range(30)))
    sparsify(student, DropSmall(), inputs=windows.ids[0][None])
    calibration = calibrate(student, [ids[None] for ids in windows.ids])
    how = Distillation(share=0.8, tokens=64 * 40, start=0.8, batch=64, lr=3e-3, loss=loss)  # type: ignore[arg-type]
    seen: list[float] = []
    done = distil(
        student, teacher, windows, how, calibration=calibration,
        progress=lambda step, steps, known: seen.append(known["loss"]),
    )  # fmt: skip
    assert done == len(seen) == 40
    assert sum(seen[-5:]) < to * sum(seen[:5])


def test_divergence_and_its_gradient_are_those_of_torch() -> None:
    torch.manual_seed(0)
    own, wanted = (3 * torch.randn(37, 50, dtype=torch.float64) for _ in range(2))
    own.requires_grad_()
    weights = torch.rand(37)
    expected = F.kl_div(
        own.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    (slope,) = torch.autograd.grad((expected * weights).sum(), own)
    found = _Divergence.apply(own.float(), wanted.float())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    (own_slope,) = torch.autograd.grad((_Divergence.apply(own, wanted) * weights).sum(), own)
    assert torch.allclose(own_slope, slope, atol=1e-6)


def test_distillation_of_the_blocks_leaves_the_rest() -> None:
    teacher, student = plain("gelu"), plain("gelu")
    windows = some_windows(30)
    sparsify(student, DropSmall(), inputs=windows.ids[0][None])
    calibration = calibrate(student, [ids[None] for ids in windows.ids])
    before = {name: value.clone() for name, value in student.named_parameters()}
    how = Distillation(share=0.8, tokens=640, batch=64, lr=1e-3, train="blocks")
    distil(student, teacher, windows, how, calibration=calibration)
    moved = {n for n, value in student.named_parameters() if not torch.equal(value, before[n])}
    assert moved
    assert all(".mlp." in name for name in moved)


def test_the_loss_of_blocks_is_that_of_each_beside_its_dense_self() -> None:
    teacher, student = plain("swiglu").eval(), plain("swiglu").eval()
    windows = some_windows(30)
    sparsify(student, DropSmall(), inputs=windows.ids[0][None])
    calibrate(student, [ids[None] for ids in windows.ids]).put(0.6)
    ids, there = windows.ids[3][None].expand(2, -1).clone(), torch.ones(2, 14, dtype=torch.bool)
    ids[1, 9:], there[1, 9:] = 0, False
    read: list[Tensor] = []
    made: list[Tensor] = []
    for layer in student.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
        layer.mlp.register_forward_hook(lambda module, args, y: made.append(y.detach()))
    lost = loss_of(student, teacher, ids, there, "blocks")
    expected = []
    for layer, x, y in zip(teacher.model.layers, read, made, strict=True):
        wanted = layer.mlp(x)
        expected.append(((y - wanted)[there] ** 2).sum() / (wanted[there] ** 2).sum())
    assert lost > 0.01
    torch.testing.assert_close(lost, torch.stack(expected).mean())
    lost.backward()
    learns = {name for name, p in student.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in student.named_parameters() if ".mlp." in name}


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_lora_adds_changes_of_low_rank_and_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    windows = some_windows(30)
    how = Distillation(share=0.8, tokens=64 * 12, batch=64, lr=1e-2, train="lora", rank=2)

    def distilled(folder: Path, *minutes: float) -> nn.Module:
        for limit in minutes:
            student = plain(kind)
            sparsify(student, DropSmall(), inputs=windows.ids[0][None])
            calibration = calibrate(student, [ids[None] for ids in windows.ids])
            distil(
                student, plain(kind), windows, how, calibration=calibration, folder=folder,
                minutes=limit,
            )  # fmt: skip
        return student

    student, before = distilled(tmp_path / "a", math.inf), dict(plain(kind).named_parameters())
    assert [n for n, _ in student.named_parameters()] == list(before)
    ranks = {}
    for name, value in student.named_parameters():
        assert value.requires_grad
        if not torch.equal(value, before[name]):
            ranks[name] = int(torch.linalg.matrix_rank(value - before[name], rtol=1e-4))
    assert set(ranks.values()) == {2}
    layers = [n for n, p in before.items() if ".h." in n or ".layers." in n if p.dim() == 2]
    assert set(ranks) == set(layers)
    again = distilled(tmp_path / "b", 1e-9, 1e-9, math.inf)
    for one, two in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_distillation_refuses_a_loss_that_is_not_finite() -> None:
    teacher, student = plain("gelu"), plain("gelu")
    windows = some_windows(30)
    sparsify(student, DropSmall(), inputs=windows.ids[0][None])
    calibration = calibrate(student, [ids[None] for ids in windows.ids])
    with torch.no_grad():
        teacher.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the loss of step 0 is nan"):
        distil(student, teacher, windows, Distillation(0.5, 640), calibration=calibration)


def test_judgement_of_a_model_against_itself() -> None:
    dense, model, windows = plain("swiglu").eval(), plain("swiglu").eval(), some_windows(20)
    with pytest.raises(ValueError, match="nothing to judge"):
        judge(model, windows, "x")
    sparsify(model, DropSmall(), inputs=windows.ids[0][None])
    judgement, each = judge(model, windows, "x", dense)
    assert judgement.excess == 0
    assert judgement.agreement == 1
    assert judgement.density == judgement.bytes_read == 1
    assert each is not None
    assert not each.any()
