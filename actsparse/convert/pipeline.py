"""The whole conversion: calibrate, distil, choose within the budget, judge on unseen text."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from actsparse.blocks.find import find_mlp_blocks
from actsparse.blocks.refused import Refused
from actsparse.blocks.refused import told as told_left
from actsparse.convert.certificate import Certificate, certify, check_delta
from actsparse.convert.checkpoint import Start, in_dtype
from actsparse.convert.distillation import Distillation, Train, distil
from actsparse.convert.distillation_loss import Loss
from actsparse.convert.embeddings import Pooling, mean_distance
from actsparse.convert.judgement import Judgement, judge
from actsparse.convert.losses import check_causal, check_windows, counted, mean_loss
from actsparse.convert.scores import Calibration, Form, calibrate
from actsparse.convert.share import Choice, choose, nats
from actsparse.convert.text import Windows
from actsparse.modify.apply import sparsify
from actsparse.modify.drop_small import DropSmall

CALIBRATE = 8192  # tokens
DTYPES = ("bfloat16", "float32")
VALIDATE = 20_000  # tokens at most, read about ten times
Told = Callable[[str, int, int], None]  # stage, done, in all


@dataclass(frozen=True)
class Split:
    """Text in three parts that share no document: to train and calibrate on, to choose, to judge.

    Args:
        train: for calibration and distillation.
        validation: for the choice of the share.
        test: for the judgement and the certificate.
        pieces: whether windows of the same document are in several parts.

    >>> windows = Windows([torch.arange(9) + i for i in range(20)], list(range(20)))
    >>> parts = Split.of(windows)
    >>> [part.documents for part in (parts.train, parts.validation, parts.test)]
    [12, 4, 4]
    """

    train: Windows
    validation: Windows
    test: Windows
    pieces: bool = False

    @classmethod
    def of(cls, windows: Windows, tokens: int = 100_000) -> Split:
        """Split by document, in an order drawn once: a fifth to choose, a fifth to judge.

        Of documents that are the same only the first is taken. Where there are fewer than ten
        documents, windows are split as if they were documents; ``pieces`` says so then.

        Args:
            windows: the text.
            tokens: test has at most about so many, validation so many or 20,000.

        Returns:
            The parts.

        Raises:
            ValueError: fewer than five windows.
        """
        if tokens < 1:
            raise ValueError(f"tokens {tokens!r}: expected 1 or more")
        windows = _distinct(windows)
        if pieces := windows.documents < 10:
            windows = _distinct(Windows(windows.ids, list(range(len(windows.ids)))))
        if len(windows.ids) < 5:
            raise ValueError(
                f"the text has {len(windows.ids)} windows that differ; five at least are needed to "
                f"train, choose and judge on different ones: give more text, or a smaller --window"
            )
        numbers = sorted(set(windows.document))
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0)).tolist()
        lengths = dict.fromkeys(numbers, 0)
        for ids, number in zip(windows.ids, windows.document, strict=True):
            lengths[number] += len(ids)
        parts: list[list[int]] = []
        for most in (min(tokens, VALIDATE), tokens):
            part: list[int] = []
            held = 0
            while order and len(part) < max(1, len(numbers) // 5) and held < most:
                part.append(numbers[order.pop()])
                held += lengths[part[-1]]
            parts.append(part)
        rest = [numbers[place] for place in order]
        return cls(windows.take(rest), windows.take(parts[0]), windows.take(parts[1]), pieces)


def _distinct(windows: Windows) -> Windows:
    """The first of those documents that are the same."""
    contents: dict[int, list[bytes]] = {}
    for ids, number in zip(windows.ids, windows.document, strict=True):
        contents.setdefault(number, []).append(ids.numpy().tobytes())
    first: dict[bytes, int] = {}
    for number, pieces in contents.items():
        first.setdefault(hashlib.sha256(b"".join(pieces)).digest(), number)
    return windows.take(first.values())


@dataclass
class Conversion:
    """What a conversion did and found; ``model`` is the sparse model.

    Args:
        model: in evaluation mode, in the dtype it was judged in.
        budget: of perplexity, as 0.03; of encoders, the mean cosine distance.
        form: "gate", "product" or "both".
        choice: the share chosen on validation text.
        before: the same choice without distillation; None where nothing was distilled.
        distilled: (share, loss) of the distilled weights where they were looked at.
        distillation: what was trained; None if nothing.
        trained: the tokens trained on, those before ``start`` among them; none of a distillation
            whose weights allow less than those before it.
        judgements: one for each text that was judged.
        certificate: of the first text.
        pieces: whether what are called documents are windows, see :class:`Split`.
        left_out: blocks without thresholds, and why.
        pooling: of an encoder's embeddings; None for language models.

    The example of :func:`convert` shows it.
    """

    model: nn.Module
    budget: float
    form: Form
    choice: Choice
    before: Choice | None
    distilled: tuple[tuple[float, float], ...]
    distillation: Distillation | None
    trained: int
    judgements: list[Judgement]
    certificate: Certificate
    pieces: bool = False
    left_out: list[str] = field(default_factory=list)
    pooling: Pooling | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON.

        Returns:
            All fields but the model, by name.
        """
        return {
            "kind": "conversion",
            "schema": 1,
            "budget": self.budget,
            "budget_nats": _allowed(self.budget, self.pooling),
            "pooling": self.pooling,
            "form": self.form,
            "choice": asdict(self.choice),
            "before": None if self.before is None else asdict(self.before),
            "distilled": self.distilled,
            "distillation": None if self.distillation is None else asdict(self.distillation),
            "trained_tokens": self.trained,
            "judgements": [each.to_json() for each in self.judgements],
            "certificate": {**asdict(self.certificate), "holds": self.certificate.holds},
            "split": "windows" if self.pieces else "documents",
            "left_out": self.left_out,
            **self.extra,
        }


def convert(
    model: nn.Module,
    text: Split,
    *,
    budget: float = 0.03,
    form: Form = "gate",
    tokens: int = 0,
    share: float | None = None,
    minutes: float = math.inf,
    dtype: torch.dtype = torch.bfloat16,
    delta: float = 0.1,
    also: dict[str, Windows] | None = None,
    lr: float = 1e-4,
    loss: Loss = "logits",
    train: Train = "all",
    folder: Path | None = None,
    pooling: Pooling | None = None,
    start: Start | None = None,
    told: Told = lambda stage, done, total: None,
) -> Conversion:
    """Make a causal language model drop as many activations as a budget of perplexity allows.

    Or an encoder, as many as a mean cosine distance to the dense encoder's embeddings allows.

    It calibrates thresholds, distils the model on its own dense logits with thresholds in force (if
    ``tokens`` is above 0), chooses the share to drop on validation text and judges on test text.
    Where distillation gains nothing, the weights stay as they were.

    Args:
        model: a causal language model or an encoder in float32; it is changed in place.
        text: the text, in three parts.
        budget: the perplexity that may be lost, as a share of the dense model's: 0.03 is 3 %; of an
            encoder, the mean of 1 − cos over windows.
        form: where thresholds stand, see :class:`actsparse.DropSmall`.
        tokens: how many to distil on; 0: none, the weights stay as they are.
        share: of activations that distillation aims at; None: 0.25 above what the budget allows
            without it, 0.1 with ``start``.
        minutes: stop distilling after so long.
        dtype: in which the model is judged and returned, and of the products in training.
        delta: the probability with which the certificate may be wrong.
        also: more texts to judge on, by name.
        lr: the learning rate of distillation.
        loss: what it learns from, see :class:`Distillation`; encoders learn from ``"blocks"`` or
            else from embeddings.
        train: what it trains, see :class:`Distillation`.
        folder: where distillation keeps its state, to go on after an interrupt.
        pooling: of an encoder's embeddings, ``"mean"`` or ``"cls"``; None: it is a causal language
            model.
        start: an earlier conversion of the same model, whose weights are gone on with; the model
            itself stays the teacher. None: the model's own.
        told: called with the stage, what is done and what there is.

    Returns:
        The conversion.

    Raises:
        ValueError: a model without such blocks or that sees later tokens, text that does not fit
            the model, or a setting that is not what it should be.

    >>> class Tiny(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed = nn.Embedding(8, 8)
    ...         self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
    ...
    ...     def forward(self, ids):
    ...         return self.down(self.act(self.up(self.embed(ids))))
    >>> windows = Windows([torch.randint(0, 8, (8,)) for _ in range(40)], list(range(40)))
    >>> found = convert(Tiny(), Split.of(windows), budget=0.05, dtype=torch.float32)
    >>> found.choice.share > 0.2, found.choice.excess <= 0.05
    (True, True)
    """
    check_settings(budget, form, tokens, share, minutes, dtype, delta, lr, loss, train)
    allowed, texts = _allowed(budget, pooling), {"test": text.test, **(also or {})}
    if also and "test" in also:
        raise ValueError("also= has a text named 'test': that is the name of the test text")
    for windows in (text.train, text.validation, *texts.values()):
        check_windows(model, windows)
    model.eval()
    longest = max(text.train.ids, key=len)
    if pooling is None:
        check_causal(model, longest)
    dense = in_dtype(copy.deepcopy(model), dtype)
    if start is not None:
        model.load_state_dict(start.weights, strict=False)
    found = find_mlp_blocks(model, longest[None].to(next(model.parameters()).device))
    handle = sparsify(model, DropSmall(form), blocks=found)
    refused = [
        Refused(row["block"], row["left_alone"]) for row in handle.rows() if "left_alone" in row
    ]
    left = told_left([*found.refused, *refused])
    for line in left:
        told(f"left as it was: {line}", 0, 1)

    def loss_of(model: nn.Module, progress: Callable[[int], None] | None = None) -> float:
        if pooling is None:
            return mean_loss(model, text.validation, progress)
        return mean_distance(model, dense, text.validation, pooling, progress)

    of_dense = loss_of(dense, counted(told, "dense loss", text.validation))
    if pooling is None:
        _check_fits(of_dense, text.validation)
    batches, seen = [], 0
    for ids in text.train.ids:
        if seen >= CALIBRATE:
            break
        batches.append(ids[None])
        seen += len(ids)
    passes = iter(range(1, 2 * len(batches) + 1))

    def run(model: nn.Module, ids: Tensor) -> None:
        model(ids)
        told("calibrate", next(passes), 2 * len(batches))

    told("calibrate", 0, 2 * len(batches))
    calibration = calibrate(model, batches, run)
    begins: tuple[float, ...] = (0.0,)
    further = 0.25
    if start is not None:  # its weights expect thresholds
        calibration.put(start.share)
        calibration = calibrate(model, batches, dense=False)
        begins, further = (start.share, start.share - 0.15, start.share - 0.3, 0.0), 0.1

    points: dict[float, float] = {}  # share → loss, of the last choice

    def chosen(stage: str, found: Calibration, *starts: float) -> Choice | None:
        ready = in_dtype(copy.deepcopy(model), dtype)

        def loss_at(share: float) -> float:
            told(stage, len(points), 7)
            Calibration(ready, found.blocks).put(share)
            return loss_of(ready)

        points.clear()
        return choose(loss_at, of_dense, allowed, starts, points)

    choice = chosen("choose", calibration, *(max(0.0, share) for share in begins))
    if choice is None:
        raise ValueError("the weights to start from lose more than the budget at any share")
    before, how, steps = None, None, 0
    if tokens:
        aim = min(0.95, choice.share + further) if share is None else share
        how = Distillation(
            share=aim, tokens=tokens, start=min(choice.share, aim), lr=lr, train=train,
            loss=loss if pooling is None or loss == "blocks" else "embeddings",
        )  # fmt: skip
        followed = calibration.copy()
        steps = distil(
            model, dense, text.train, how, calibration=followed, dtype=dtype, folder=folder,
            minutes=minutes, progress=lambda done, total, known: told("distil", done, total),
        )  # fmt: skip
        before, again = choice, chosen("choose again", followed, aim, choice.share)
        if again is not None and again.share > choice.share:
            choice, calibration = again, followed
        else:  # the weights of before do better
            model.load_state_dict(dense.state_dict() if start is None else start.weights, False)
            steps = 0
    calibration.put(choice.share)
    in_dtype(model, dtype)
    judgements, first = [], None
    for name, windows in texts.items():
        progress = counted(told, f"judge on {name}", windows)
        judgement, each = judge(model, windows, name, dense, progress, pooling)
        judgements.append(judgement)
        first = each if first is None else first
    assert first is not None
    return Conversion(
        model, budget, form, choice, before, tuple(sorted(points.items())) if how else (), how,
        (steps * how.batch if how else 0) + (start.trained if start else 0), judgements,
        certify(first, allowed, delta), text.pieces, left, pooling,
    )  # fmt: skip


def check_settings(
    budget: float,
    form: str,
    tokens: int,
    share: float | None,
    minutes: float,
    dtype: torch.dtype,
    delta: float,
    lr: float,
    loss: str,
    train: str,
) -> None:
    """Refuse settings that :func:`convert` cannot work with, before it does any work.

    The arguments are those of :func:`convert`.

    Raises:
        ValueError: a setting is not what it should be.
    """
    nats(budget)
    check_delta(delta)
    if form not in get_args(Form):
        raise ValueError(f"form {form!r}: expected {', '.join(get_args(Form))}")
    if not tokens >= 0:
        raise ValueError(f"tokens {tokens!r}: expected 0 or more")
    if not minutes >= 0:
        raise ValueError(f"minutes {minutes!r}: expected 0 or more")
    if dtype not in (getattr(torch, each) for each in DTYPES):
        raise ValueError(f"dtype {dtype!r}: expected {' or '.join(DTYPES)}")
    share = 0.5 if share is None else share
    Distillation(share, max(1, tokens), lr=lr, loss=loss, train=train)  # type: ignore[arg-type]


def _allowed(budget: float, pooling: Pooling | None) -> float:
    """The excess loss that a budget allows, in nats for each token; of encoders, the distance."""
    return nats(budget) if pooling is None else budget


def _check_fits(loss: float, windows: Windows) -> None:
    """Refuse text that the model predicts worse than the frequencies of its own tokens."""
    counts = torch.cat(windows.ids).bincount().double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log()).sum())
    if loss > entropy + 0.5:
        raise ValueError(
            f"the dense model's loss on this text is {loss:.2f} nats a token, more than guessing "
            f"by frequency ({entropy:.2f}): is the tokenizer another model's, or the text of "
            f"another kind?"
        )
