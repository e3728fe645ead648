"""Distil: train a model with thresholds in force to give its dense teacher's answers."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actsparse import files
from actsparse.blocks.site import site_of
from actsparse.convert.distillation_loss import Loss, loss_of
from actsparse.convert.low_rank import low_rank
from actsparse.convert.scores import Calibration, calibrate
from actsparse.convert.text import Windows
from actsparse.modify.drop_small import dropping_blocks
from actsparse.modify.weights import disk_refusals
from actsparse.untrusted import read_json
from actsparse.values import Above0, BadValue, Count, Positive, Rule, check, check_fields

STATE, WEIGHTS = "distil.json", "distil.safetensors"
Train = Literal["all", "blocks", "lora"]
_Share = Annotated[float, Rule("a share from 0 to 1", lambda value: 0 <= value <= 1)]


@dataclass(frozen=True)
class Distillation:
    """How to distil; the values that are not given suit a model of some hundred million parameters.

    Args:
        share: which share of the activations is dropped at the end.
        tokens: how many tokens are trained on.
        start: the share dropped at the first step.
        ramp: over which part of all steps the share rises from ``start`` to ``share``.
        lr: the learning rate of AdamW after warm-up; a cosine takes it to a tenth.
        batch: tokens of a step.
        loss: ``"logits"``: KL(teacher ‖ student) of each token; ``"text"``: the text's own
            cross-entropy, the control; ``"blocks"``: the outputs of each MLP block, on the same
            inputs as its dense self; ``"embeddings"``: 1 − cos to the teacher, for encoders.
        train: ``"all"`` parameters, those of the MLP ``"blocks"`` alone, or ``"lora"``: low-rank
            changes of all linear layers but the head (Hu et al. 2021, arXiv 2106.09685), which are
            added to the weights in the end. The loss ``"blocks"`` trains the blocks alone.
        seed: of the order of windows.
        rank: of the changes that ``"lora"`` trains.

    Raises:
        ValueError: a value is none of these.

    >>> Distillation(share=0.6, tokens=10_000).steps
    20
    """

    share: _Share
    tokens: Positive
    start: _Share = 0.3
    ramp: _Share = 0.4
    lr: Above0 = 1e-4
    batch: Positive = 512
    loss: Loss = "logits"
    train: Train = "all"
    seed: int = 0
    rank: Positive = 16

    def __post_init__(self) -> None:
        check_fields(self, form="Distillation({}={})")

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return math.ceil(self.tokens / self.batch)

    def share_at(self, step: int) -> float:
        """The share dropped at a step, from 0.

        Args:
            step: the number of steps done.

        Returns:
            The share, between ``start`` and ``share``.

        >>> Distillation(share=0.6, tokens=5120, start=0.2).share_at(2)
        0.4
        """
        over = self.ramp * self.steps
        done = 1.0 if over == 0 else min(1.0, step / over)
        start = min(self.start, self.share)
        return start + (self.share - start) * done

    @property
    def renewals(self) -> set[int]:
        """The steps before which thresholds are calibrated anew: after the rise, and nine more."""
        return {int(self.steps * (self.ramp + (1 - self.ramp) * part / 10)) for part in range(10)}

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0.

        Args:
            step: the number of steps done.

        Returns:
            It rises over the first 2 % of steps, then follows a cosine to a tenth.

        >>> round(Distillation(share=0.6, tokens=51200, lr=1.0).lr_at(99), 2)
        0.1
        """
        warm = max(1, self.steps // 50)
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1) / self.steps))
        return self.lr * min(1.0, (step + 1) / warm) * (0.1 + 0.9 * cosine)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    windows: Windows,
    how: Distillation,
    *,
    calibration: Calibration,
    dtype: torch.dtype = torch.float32,
    folder: Path | None = None,
    minutes: float = math.inf,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> int:
    """Train ``student`` in place, with its thresholds in force, on the teacher's logits.

    The share that is dropped rises as ``how`` says. Thresholds follow the student: at the end of
    the rise and ten times afterwards they are calibrated anew, with thresholds in force.

    Args:
        student: a causal language model, or an encoder, with :class:`actsparse.DropSmall`, in
            float32.
        teacher: the dense model; not changed.
        windows: the text to train on.
        how: what is trained, how long.
        calibration: of the student; its thresholds are those of the end on return.
        dtype: of the products (autocast); float32 or bfloat16.
        folder: where the state is kept every five minutes and on an interrupt; if it has one of the
            same distillation, that is gone on with. None: nowhere.
        minutes: stop after so long, though there are steps left. The schedule is that of all.
        progress: called after each step with the steps done, all steps and what is known.

    Returns:
        The number of steps done in all.

    Raises:
        ValueError: the loss is not finite, or ``folder`` has the state of another distillation.
    """
    with _learning(student, calibration, how) as parameters:
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=how.lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True
        )
        said = {"how": asdict(how), "of": _origin(student, teacher, windows, dtype)}
        step = _resume(folder, said, optimizer, parameters, calibration)
        batches = _batches(windows, how, step)
        kept = began = time.monotonic()
        device = next(student.parameters()).device
        # no dropout: thresholds are chosen without it, and a resumed run is the same
        student.eval()
        teacher.eval()
        try:
            while step < how.steps and time.monotonic() - began < 60 * minutes:
                ids, there = next(batches)
                calibration.put(how.share_at(step))
                if step and step in how.renewals:
                    pieces = [row[held][None] for row, held in zip(ids, there, strict=True)]
                    seen = calibrate(student, pieces, dense=False)
                    calibration.blocks.update(seen.blocks)
                    calibration.put(how.share_at(step))
                for group in optimizer.param_groups:
                    group["lr"] = how.lr_at(step)
                with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                    loss = loss_of(student, teacher, ids, there, how.loss)
                if not bool(loss.isfinite()):
                    raise ValueError(
                        f"the loss of step {step} is {loss.item()}: lower the learning rate "
                        f"({how.lr:g}), or look at the text"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                step += 1
                if progress is not None:
                    known = {
                        "loss": loss.item(),
                        "share": how.share_at(step),
                        "gradient": float(norm),
                    }
                    progress(step, how.steps, known)
                if time.monotonic() - kept > 300:
                    _keep(folder, said, step, optimizer, parameters, calibration)
                    kept = time.monotonic()
        finally:
            _keep(folder, said, step, optimizer, parameters, calibration)
        return step


def _origin(student: nn.Module, teacher: nn.Module, windows: Windows, dtype: torch.dtype) -> str:
    """A digest of what is distilled on what; of large weights some thousand values each."""
    digest = hashlib.sha256(str(dtype).encode())
    for block in dropping_blocks(student):
        cut = site_of(block).cut
        digest.update(f"{block.name} {None if cut is None else cut.form}".encode())
    for name, parameter in [*teacher.named_parameters(), *student.named_parameters()]:
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 4096)]
        digest.update(name.encode() + values.float().cpu().numpy().tobytes())
    for ids in windows.ids:
        digest.update(len(ids).to_bytes(8) + ids.numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _learning(
    student: nn.Module, calibration: Calibration, how: Distillation
) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained, by name; in the end all parameters need gradients as they did before."""
    before = [(parameter, parameter.requires_grad) for parameter in student.parameters()]
    blocks = tuple(f"{name}." for name in calibration.blocks)
    with ExitStack() as stack:
        learning = {
            name: parameter
            for name, parameter in student.named_parameters()
            if how.train == "all" or name.startswith(blocks)
        }
        if how.train == "lora":
            learning = stack.enter_context(low_rank(student, how.rank, how.seed))
        student.requires_grad_(False)
        for parameter in learning.values():
            parameter.requires_grad_(True)
        try:
            yield learning
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)


def _batches(windows: Windows, how: Distillation, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of about ``how.batch`` tokens without end; the first ``done`` are passed over."""
    generator = torch.Generator().manual_seed(how.seed)
    ids: list[Tensor] = []
    while True:
        for index in torch.randperm(len(windows.ids), generator=generator).tolist():
            ids.append(windows.ids[index])
            if sum(map(len, ids)) < how.batch:
                continue
            if (done := done - 1) < 0:
                lengths = torch.tensor([len(piece) for piece in ids])
                padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
                yield padded, torch.arange(padded.shape[1]) < lengths[:, None]
            ids = []


def _keep(
    folder: Path | None,
    said: dict[str, Any],
    step: int,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    calibration: Calibration,
) -> None:
    if folder is None:
        return
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value
    for name, block in calibration.blocks.items():
        tensors |= {f"{name}|scale": block.scale, f"{name}|counts": block.counts}
        if block.pairs is not None:
            tensors[f"{name}|pairs"] = block.pairs
    with files.whole_folder(folder, {STATE, WEIGHTS}) as new:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with disk_refusals(folder / WEIGHTS):
            save_file(whole, new / WEIGHTS)
        state = {**said, "step": step, "sha256": files.sha256(new / WEIGHTS)}
        (new / STATE).write_text(json.dumps(state), encoding="utf-8")


def check_state(folder: Path) -> None:
    """Refuse a folder for the state of a distillation that holds anything else.

    Args:
        folder: where the state would be kept.

    Raises:
        FileExistsError: it is a file, or holds other files.
    """
    files.check_free(folder, {STATE, WEIGHTS})


def forget_state(folder: Path) -> None:
    """Delete the state of a distillation that has ended, and nothing else.

    Args:
        folder: where it was kept; it may be missing.
    """
    with suppress(FileNotFoundError):
        check_state(folder)
        rmtree(folder)


def _resume(
    folder: Path | None,
    own: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    calibration: Calibration,
) -> int:
    """The step to go on from: 0 where nothing was kept."""
    if folder is None or not (folder / STATE).is_file():
        return 0
    said = read_json(folder / STATE)
    check(str(folder / STATE), said, {"how": dict, "of?": str, "step": Count, "sha256": str})
    remedy = "give another folder, or delete it to begin anew"
    if said["how"] != own["how"]:
        raise BadValue(
            f"{folder} holds another distillation, {said['how']}: this one is {own['how']}; "
            f"{remedy}"
        )
    if said.get("of", own["of"]) != own["of"]:
        raise BadValue(
            f"{folder} holds the distillation of another model, form, dtype or text: {remedy}"
        )
    if files.sha256(folder / WEIGHTS) != said["sha256"]:
        raise BadValue(f"{folder / WEIGHTS} is not what was kept: its SHA-256 differs")
    tensors = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
            state: dict[str, Any] = {
                key.rpartition("|")[2]: value
                for key, value in tensors.items()
                if key.rpartition("|")[0] == name
            }
            if state:
                optimizer.state[parameter] = state
    for name, block in calibration.blocks.items():
        block.scale, block.counts = tensors[f"{name}|scale"], tensors[f"{name}|counts"]
        block.pairs = tensors.get(f"{name}|pairs")
    return int(said["step"])
