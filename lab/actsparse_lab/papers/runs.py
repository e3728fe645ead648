"""How the runs of the papers' experiments are described, and the parts that they share.

The quick forms, of minutes on two cores, are the digits' ViT with fewer steps and more weight
decay, so that from scratch the sum of learning rate × decay over the steps, which shrinks norm
scales, stays that of the whole task. The full forms are the ViT-S of `vit_cifar10`, for a GPU.
`noise` has nets of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from actsparse.modify import LeaveOutMLP, Modification, Recipe
from actsparse_lab.engine.folder import Config
from actsparse_lab.papers.experiments import part_of
from actsparse_lab.papers.questions import SPARED
from actsparse_lab.tasks import TASK_SETTINGS, config_of
from actsparse_lab.tasks.arms import ARMS, ONE_DIMENSIONAL, Arm

Arms = dict[str, Arm]
Stages = dict[str, list[Config]]  # done in turn, each in a folder under the experiment's own


@dataclass(frozen=True)
class Form:
    """What the `runs` of an experiment are given.

    ``out`` is the experiment's folder; ``data`` a folder of images, of MNIST for `noise`, which the
    ``full`` form needs. ``steps`` is for trials: of every run, instead of the form's own.
    """

    full: bool = False
    seeds: int = 5
    out: str = "."
    data: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.data is not None and not self.full:
            raise ValueError(f"--data {self.data} is for --full; the quick form brings its own")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected 1 or more; fewer than 5 decide nothing")

    def runs(
        self,
        arms: Mapping[str, Arm],
        task: str = "",
        steps: int = 1500,
        full: Mapping[str, Any] = MappingProxyType({}),
        **settings: Any,
    ) -> list[Config]:
        """Arms × seeds, seed by seed; ``task`` is what follows the task's name.

        The quick form takes ``steps`` and settings as they are, and a weight decay such that
        Σ lr·decay is that of 1500 steps at 0.5. The full form keeps the task's own but for those in
        ``full``, and reads and measures as often as the quick one.
        """
        often = ("log_every", "eval_every", "active_every")
        if self.full:
            own = {**TASK_SETTINGS[f"vit_cifar10{task}"](False), **full}
            settings |= {
                key: settings[key] * own["steps"] // steps for key in often if key in settings
            }
            settings |= {"data": {"path": self.data}, "save_every": None}  # or 0.5 GB a run stay
            settings.pop("weight_decay", None)
            settings |= {key: value for key, value in full.items() if key != "steps"}
            steps = own["steps"]
        else:
            settings = {"weight_decay": 750 / steps, **settings}
        if self.steps is not None:
            settings |= {
                key: max(1, settings[key] * self.steps // steps) for key in often if key in settings
            }
            steps = self.steps
        return [
            config_of(
                f"{'vit_cifar10' if self.full else 'digits'}{task}",
                name,
                arm,
                seed,
                steps=steps,
                **settings,
            )
            for seed in range(self.seeds)
            for name, arm in arms.items()
        ]


def runs_of(name: str, form: Form) -> Stages:
    """The runs of an experiment.

    Raises:
        ValueError: it is not known, or its full form needs data. Where it does not, its `runs`
            module says ``BRINGS_DATA``.
    """
    module = part_of(name, "runs")
    if form.full and form.data is None and not getattr(module, "BRINGS_DATA", False):
        raise ValueError("--full needs --data FOLDER: images, or for noise MNIST's .npz files")
    stages: Stages = module.runs(form)
    return stages


def named(*names: str) -> Arms:
    """Those of `ARMS` with these names."""
    return {name: ARMS[name] for name in names}


def arm_of(name: str, *changes: Modification) -> Arm:
    """A new arm, of these modifications alone."""
    return Arm(Recipe(name, changes))


def sparing(arms: Arms) -> Arms:
    """Each arm without decay of 1-D parameters."""
    return {
        name + SPARED: dataclasses.replace(arm, no_decay=ONE_DIMENSIONAL)
        for name, arm in arms.items()
    }


def with_controls(arms: Arms) -> Arms:
    """Each arm also without decay of 1-D parameters, and one without MLPs."""
    return arms | sparing(arms) | {"no-mlp": arm_of("no-mlp", LeaveOutMLP())}
