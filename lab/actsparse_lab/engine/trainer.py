"""Hugging Face's Trainer with checkpoints that count only when whole, and rows counted once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler, Subset
from transformers import EvalPrediction, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import EvalLoopOutput

from actsparse.blocks.block import unwrap
from actsparse.blocks.pass_state import sites_asleep
from actsparse.train.callback import SparsityCallback
from actsparse.train.processes import gathered, launched, meet
from actsparse_lab.data import Stream
from actsparse_lab.engine.checkpoint import prune, seal
from actsparse_lab.engine.tasks import Task
from actsparse_lab.records import RecordError

WEIGHTS = "model.safetensors"


class RunTrainer(Trainer):
    """Trainer for the runs of this package.

    - A checkpoint holds all weights, adapters or not, by the names they have in the model, and what
      the callback and the data loader need to go on; its manifest is written last (`seal`).
    - Evaluation passes every row once, whatever the number of processes: Trainer pads the last
      batches with rows seen before, which would be counted twice.
    - A `Stream` is read in sequence; a ``loader`` takes the place of Trainer's own.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        task: Task,
        callback: SparsityCallback,
        keep: int,
        loader: Any = None,
        **options: Any,
    ) -> None:
        first = [*options.pop("callbacks"), callback]
        super().__init__(model, args, **options)
        self.task, self.callback, self.keep = task, callback, keep
        # after the one that decides what a step is followed by, before trackers, which shall see
        # the density that the callback adds to the logs
        self.callback_handler.callbacks[1:1] = first
        # All rows have as many targets, so the mean over a batch is the mean over its targets. Told
        # their number, Trainer multiplies the loss by the processes also where a model ignores it.
        self.model_accepts_loss_kwargs = False
        self.loader = loader
        self.before: dict[str, Any] | None = None  # the test split before finetuning

    # -- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The loader, or Trainer's."""
        if self.loader is None:
            return super().get_train_dataloader()
        return _Sized(self.loader, self.args.max_steps * self.args.gradient_accumulation_steps)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if isinstance(self.train_dataset, Stream):
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's share of the rows: each so-manieth."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, processes = launched()
        return DataLoader(
            Subset(rows, range(rank, len(rows), processes)),
            batch_size=self.args.eval_batch_size,
            collate_fn=default_data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The task's scores over all rows of all processes."""
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        if not (self.accelerator._models or self.is_fsdp_enabled):  # no training came before
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        was = model.training
        model.eval()
        kept = []
        first = None
        for batch in dataloader:
            first = batch if first is None else first
            kept.append(self._kept(model, batch))
        # sharded, a pass takes all processes: those with fewer batches go along uncounted
        most = max(gathered(len(kept))) if self.is_fsdp_enabled else len(kept)
        with sites_asleep():
            for _ in range(most - len(kept)):
                self._kept(model, first)
        model.train(was)
        parts = gathered(np.concatenate(kept) if kept else None)
        own = [part for part in parts if part is not None]
        count = sum(map(len, own))
        whole = np.empty((count, *own[0].shape[1:]), own[0].dtype)
        for rank, part in enumerate(own):
            whole[rank :: len(parts)] = part
        scores = self.task.score(EvalPrediction(whole, whole))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        return EvalLoopOutput(predictions=whole, label_ids=None, metrics=metrics, num_samples=count)

    def _kept(self, model: nn.Module, batch: Any) -> np.ndarray[Any, Any]:
        _, logits, labels = self.prediction_step(model, batch, prediction_loss_only=False)
        kept: Tensor = self.task.reduce(logits, labels)
        return kept.float().cpu().numpy()

    # -- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        rank, processes = launched()
        record: Any = self.callback.record  # a RecordWriter
        if record is not None:
            record.check()  # the folder may be gone, and another's there
        try:
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            meet()
            super()._save_checkpoint(model, trial)
            folder.mkdir(parents=True, exist_ok=True)
            self._save_own(folder / f"actsparse-{rank}.safetensors")
            meet()
            if rank == 0:
                facts = {"step": self.state.global_step, "processes": processes}
                seal(folder, **facts, record=record and record.state())
                prune(folder.parent, self.keep)
            meet()
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # the disk
            reason = getattr(error, "strerror", None) or error
            raise RecordError(
                f"cannot write {folder}: {reason}; free some space or choose another folder: the "
                f"checkpoints before it are whole"
            ) from error

    def _save_own(self, file: Path) -> None:
        state = self.callback.state_dict()
        numbers = {
            "callback": state["numbers"],
            "data": None if self.loader is None else self.loader.state_dict(),
            "before": self.before,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state["tensors"].items()}
        save_file(tensors, file, metadata={"state": json.dumps(numbers)})

    def load_own(self, checkpoint: Path) -> None:
        """Give callback and data loader what they need to go on."""
        rank, _ = launched()
        with safe_open(checkpoint / f"actsparse-{rank}.safetensors", "pt") as file:
            numbers = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.before = numbers["before"]
        self.callback.load_state_dict({"numbers": numbers["callback"], "tensors": tensors})
        if self.loader is not None:
            self.loader.load_state_dict(numbers["data"])

    def take_up(self, checkpoint: Path) -> None:
        """Be where training ended, without training: Trainer would begin another epoch."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = self.args.max_steps
        self.callback.take_up(self.model, self.args.max_steps)

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        # not save_pretrained: it renames what older versions called otherwise, and of a model
        # with adapters it keeps these alone
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            save_model(unwrap(self.model), str(folder / WEIGHTS))
        else:  # gathered from shards
            save_file(state_dict, folder / WEIGHTS)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(unwrap(self.model), str(Path(resume_from_checkpoint) / WEIGHTS))


class _Sized:
    """An endless loader as one epoch of ``length`` batches, so that Trainer knows the end."""

    def __init__(self, loader: Any, length: int) -> None:
        self.loader, self.length = loader, length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.loader)

    def __len__(self) -> int:
        return self.length
