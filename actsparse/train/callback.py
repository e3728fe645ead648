"""A callback for any Hugging Face Trainer: schedules, penalty, measures and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from actsparse.kernels import Accelerated, accelerate
from actsparse.modify import Handle
from actsparse.modify.checkpoint_sidecar import annotate_checkpoints, stands_at
from actsparse.observe import Measures, Seen, observe
from actsparse.train.logs import go_first, into_logs
from actsparse.train.loss import JoinedLoss, TrainingFailed
from actsparse.train.place import handle_in, place_of
from actsparse.train.processes import everywhere, together, unsharded
from actsparse.train.record import Evaluation, Record, metrics_named, scores
from actsparse.train.sessions import Sessions

LAST = 0.8  # "training density" is measured from here to the end of the steps


class SparsityCallback(TrainerCallback):
    """A callback with which Hugging Face's Trainer trains a model that ``sparsify`` has modified.

    ``Trainer(model, args, callbacks=[SparsityCallback(handle)], ...)`` is enough.

    *Recipe.* Schedules and projections follow the real optimizer, also when Trainer resumes from a
    checkpoint or loads the best one at the end. A second training goes on where schedules are.
    Checkpoints carry the recipe; `actsparse.load` reads them.

    *Penalty.* It joins the model's own ``loss`` in training, so each optimizer step has its mean
    over the accumulated batches, whichever way Trainer averages the loss.

    *Logs.* ``density`` and ``dead_units`` of the training steps since the last log, and ``eval_…``
    of each evaluation, are in Trainer's logs, so trackers (TensorBoard, …) show their curves. With
    ``accelerate`` they are there if ``seen`` is given.

    *Gradients.* Measures of gradients are of per-sample losses, penalty included. The ``train``
    line says as ``loss_reduction`` whether these are sums or means over positions
    (docs/measures.md).

    *Acceleration.* What ``seen`` reads needs the whole hidden layer, so blocks run dense while it
    watches: in evaluations that Trainer schedules, and in every ``logging_steps``-th training step
    and the last. The measures of a ``train`` line are of these steps alone, and say how many
    ``steps`` that were; with fewer tokens more units count as dead. The attribute ``accelerated``
    is the handle of :func:`actsparse.accelerate`, to print, also after training. To accelerate a
    model as it is, use ``SparsityCallback(sparsify(model, "vanilla", inputs=batch),
    accelerate=True)``.

    *Errors.* `TrainingFailed` is raised if a loss is NaN or infinite, before it reaches the
    weights, or if ``active`` cannot measure the model. A `ValueError` is raised if a penalty finds
    no loss to join (label smoothing and ``compute_loss_func`` take the labels away from the model),
    or if no block can run sparse.

    With several processes losses, penalties and measures are those of all. The process that has the
    record writes it.

    Args:
        handle: what `sparsify` returned.
        seen: what `observe` returned. With a ``record`` it is read and reset at each log (training)
            and evaluation (inference); without one it counts on.
        record: gets a ``train`` line at each log, an ``eval`` line at each evaluation and a
            ``measured`` line for each call of ``active``. Seconds are since training began,
            evaluations included; a resumed run goes on from its checkpoint's.
        quality: the metric that ``eval`` lines take as quality, without Trainer's prefix.
        loss: the metric that they take as loss.
        active: measures the model by passes of its own, at the start, every ``active_every`` steps,
            after the steps ``active_at`` and at the end.
        active_every: in optimizer steps; None: at no multiple.
        active_at: further optimizer steps.
        on_step: called after each optimizer step with the number of steps done.
        interrupted: called after each optimizer step; if it returns True training ends there, with
            a checkpoint.
        accelerate: run the MLP blocks sparse in training, with the same results
            (:func:`actsparse.accelerate`): True where that is faster, ``"sparse"`` at any density.

    >>> import torch
    >>> from actsparse import sparsify
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> callback = SparsityCallback(sparsify(mlp, inputs=torch.randn(2, 8)))
    >>> state = callback.state_dict()  # with Trainer(..., callbacks=[callback]) in between
    >>> callback.load_state_dict(state)
    >>> callback.training() is None  # nothing is observed
    True
    >>> callback.close()
    """

    def __init__(
        self,
        handle: Handle,
        seen: Seen | None = None,
        record: Record | None = None,
        *,
        quality: str = "loss",
        loss: str = "loss",
        active: Callable[[nn.Module], Measures] | None = None,
        active_every: int | None = None,
        active_at: Collection[int] = (),
        on_step: Callable[[int], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
        accelerate: bool | Literal["auto", "sparse"] = False,
    ) -> None:
        self.handle, self.seen, self.record = handle, seen, record
        self.quality, self.loss = quality, loss
        self.on_step, self.interrupted = on_step, interrupted
        self.active, self.active_every, self.active_at = active, active_every, active_at
        self.accelerate = accelerate
        self.accelerated: Accelerated | None = None
        self.evaluation: Evaluation | None = None
        self._sessions = Sessions(seen)
        self._held: tuple[int, str, dict[str, Any] | None] | None = None  # of an evaluation
        self._hooks: list[Any] = []
        self._resumed: dict[str, Any] | None = None
        self._start(0)

    def _start(self, step: int) -> None:
        self._began = time.perf_counter()
        self._logged = step
        self._read = self._read_late = 0  # steps that were observed: since the last log, in tail
        self.joined = JoinedLoss(self.handle, self.seen)

    # -- training -------------------------------------------------------------------------------

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Come before trackers, which read the logs."""
        go_first(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer and to the model's loss, and accelerate."""
        self.close()  # of a training that an error ended
        go_first(self)  # if it was added later
        model = kwargs["model"]
        self.handle = handle_in(model, self.handle)
        self._start(state.global_step)
        self.evaluation = self.accelerated = None
        if args.fsdp and (reason := unsharded(model)):
            raise ValueError(reason)
        optimizer = kwargs["optimizer"]
        self.joined.scaler = getattr(optimizer, "scaler", None)
        start, steps = place_of(self.handle, state)
        self.handle.attach(optimizer, steps=steps, start=start)
        if args.average_tokens_across_devices:
            self.joined.devices = max(args.n_gpu, args.world_size)
        if self.accelerate:
            mode = "auto" if self.accelerate is True else self.accelerate
            self.accelerated = accelerate(model, blocks=self.handle.blocks, mode=mode)
            self._hooks.append(self.accelerated)
        self._hooks += self.joined.attach(model)
        self._sessions.begin(
            model,
            self.handle,
            keeps=self._keeps(args),
            dense=not self.accelerate,
        )
        if self._resumed is not None:
            self._go_on(model, self._resumed)
        elif not state.global_step:
            self._measure(model, state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn how many batches the step will accumulate, and whether to watch it."""
        group, loader = args.gradient_accumulation_steps, kwargs.get("train_dataloader")
        self.joined.begin(state.global_step, group, loader)
        late = state.global_step >= int(LAST * state.max_steps)
        if late:
            self._sessions.begin_tail(kwargs["model"], self.handle)
        if self.accelerated is not None:
            step, every = state.global_step + 1, state.logging_steps or state.max_steps
            first = step == 1 and args.logging_first_step
            reads = first or step % every == 0 or step == state.max_steps
            self._watch(reads)
            self._read += reads
            self._read_late += reads and late

    def _watch(self, on: bool) -> None:
        """Let what observes watch again, or get out of the sparse kernels' way."""
        if self.accelerated is not None:
            self._sessions.watch(on)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report progress, and measure where it is time to."""
        if control.should_evaluate:
            self._watch(True)
        if self.on_step is not None:
            self.on_step(state.global_step)
        every, done = self.active_every, state.global_step
        if done == state.max_steps:
            control.should_log = True  # or the steps since the last log would have no line
        due = done == state.max_steps or done in self.active_at
        if due or (every is not None and done % every == 0):
            self._measure(kwargs["model"], state)
        if self.interrupted is not None and not everywhere(not self.interrupted(), args.device):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch an evaluation that is to come."""
        if control.should_evaluate:
            self._watch(True)

    def _measure(self, model: nn.Module, state: TrainerState) -> None:
        if self.active is None or self.record is None:
            return
        # Curvature differentiates twice, which takes the layers; a tap on density keeps to them.
        dense = self.accelerated is not None
        try:
            with observe(model, blocks=self.handle.blocks) if dense else nullcontext():
                found = self.active(model)
        except (ValueError, ArithmeticError) as error:
            raise TrainingFailed(state.global_step, f"it cannot be measured: {error}") from error
        self._sessions.forget_inference()  # they saw these passes too
        if state.is_world_process_zero:
            self.record.write("measured", step=state.global_step, **found.to_json())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add density to the logs, and write a ``train`` line over the batches since the last."""
        prefix, _ = metrics_named(logs or {})
        if logs is not None and f"{prefix}_runtime" in logs and prefix != "train":
            measures, found = self._sessions.read("inference", self._keeps(args))
            self._held = state.global_step, prefix, measures
            into_logs(logs, state, found, f"{prefix}_")
        if logs is None or "loss" not in logs:
            return
        steps = state.global_step - self._logged
        loss, penalty = self.joined.means(steps, logs["loss"], args.device)
        measures, found = self._sessions.read("train", self._keeps(args))
        if self.seen is not None and measures is not None and self.seen.leaves("train"):
            measures["loss_reduction"] = self.seen.weighing.reduction
        if self.accelerated is not None and measures is not None:
            measures["steps"] = self._read
        into_logs(logs, state, found)
        if self.record is not None and state.is_world_process_zero:
            self.record.write(
                "train",
                step=state.global_step,
                loss=loss,
                lr=logs["learning_rate"],
                penalty=penalty,
                measures=measures,
                time={"seconds": time.perf_counter() - self._began},
            )
        self.joined.reset()
        self._logged, self._read = state.global_step, 0

    def _keeps(self, args: TrainingArguments) -> bool:
        """Whether a process keeps a record."""
        return not everywhere(self.record is None, args.device)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model's loss and its blocks alone again; stand where the best model does."""
        self._end()
        best = state.best_model_checkpoint
        place = stands_at(Path(best)) if args.load_best_model_at_end and best else None
        if place is not None:  # of adapters Trainer loads no buffers
            self.handle.load_state_dict(place)

    def _end(self) -> None:
        self.close()
        if self._sessions.tail is not None and together():
            self._sessions.tail.pool("train")

    def training(self) -> dict[str, Any] | None:
        """The measures over the last fifth of the steps.

        Returns:
            As :meth:`actsparse.observe.Seen.summary`; with acceleration also ``steps``, how many of
            these steps were observed. None if nothing is observed.
        """
        tail = self._sessions.tail
        summary = None if tail is None else tail.summary("train")
        if summary is None or not self.accelerate:
            return summary
        return summary | {"steps": self._read_late}

    # -- checkpoints ----------------------------------------------------------------------------

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the recipe, and where its schedules stand, beside the checkpoint's weights."""
        if args.should_save:
            annotate_checkpoints(kwargs["model"], Path(args.output_dir), state.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides Trainer's own files and the handle's step.

        Returns:
            ``numbers`` for JSON, and ``tensors``: what was counted since the last line of the
            record.
        """
        numbers = {
            "seconds": time.perf_counter() - self._began,
            "handle": self.handle.state_dict(),  # without the steps that GradScaler skipped
            "logged": self._logged,
            "read": [self._read, self._read_late],
            "loss": self.joined.state_dict(),
        }
        return {"numbers": numbers, "tensors": self._sessions.tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called, once training begins from that checkpoint.

        Args:
            state: what it returned.
        """
        self._resumed = state

    def take_up(self, model: nn.Module, step: int) -> None:
        """Take over at once what `load_state_dict` was given, of a training that has ended.

        Args:
            model: the model.
            step: the number of optimizer steps of that training.
        """
        assert self._resumed is not None
        self._start(step)
        self._go_on(model, self._resumed)
        self._end()

    def _go_on(self, model: nn.Module, state: dict[str, Any]) -> None:
        numbers, self._resumed = state["numbers"], None
        self._began -= numbers["seconds"]
        self.handle.load_state_dict(numbers["handle"])
        self._logged = numbers["logged"]
        self._read, self._read_late = numbers["read"]
        self.joined.load_state_dict(numbers["loss"])
        self._sessions.load(state["tensors"], model, self.handle)

    def close(self) -> None:
        """Remove the hook on the loss, the acceleration and the observation of the last steps."""
        if self._hooks:
            self._watch(True)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._sessions.end()

    # -- evaluation -----------------------------------------------------------------------------

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the evaluation, and write an ``eval`` line if it was of the validation split."""
        needed = self.record is not None
        found = scores(metrics or {}, self.loss, self.quality, state.global_step, needed)
        if found is None:
            return
        prefix, loss, quality = found
        step, (*of, measures) = state.global_step, self._held or (None, None, None)
        if of != [step, prefix]:  # it was not logged
            measures, _ = self._sessions.read("inference", self._keeps(args))
        self._held = None
        self.evaluation = Evaluation(step, loss, quality, measures)
        if self.record is not None and prefix == "eval" and state.is_world_process_zero:
            self.record.write(
                "eval",
                split="validation",
                step=state.global_step,
                loss=loss,
                quality=quality,
                measures=measures,
                time={"seconds": time.perf_counter() - self._began},
            )
