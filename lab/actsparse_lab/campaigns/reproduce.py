"""The papers' experiments, each a function that returns its runs; `actsparse reproduce` does them.

The quick forms, of minutes on two cores, are the digits' ViT with fewer steps and more weight
decay, so that from scratch the sum of learning rate × decay over the steps, which shrinks norm
scales, stays that of the whole task. The full forms are the ViT-S of `vit_cifar10`, for a GPU.
`noise` has nets of its own. What the records say of which claim stands in
`actsparse_lab.report.claims`, under the same names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from actsparse.activations import shifted_s_shape
from actsparse.modify import (
    LeaveOutMLP,
    Modification,
    NormFloor,
    PruneGradient,
    Recipe,
    SwapActivation,
    WeightNoise,
    ZerothBias,
)
from actsparse_lab.campaigns.compare import Config
from actsparse_lab.engine.gradient_noise import GradientNoiseConfig, splits_of
from actsparse_lab.engine.tasks import task_of
from actsparse_lab.tasks import EXPERIMENTS, config_of
from actsparse_lab.tasks.arms import ARMS, ONE_DIMENSIONAL, Arm

Arms = dict[str, Arm]
Stages = dict[str, list[Config]]  # done in turn, each in a folder under the experiment's own
SPARED = "-no-1d-decay"  # ends the names of control arms
SHIFT = 1.6
ALL = 1e6  # a threshold that no entry passes: the largest is at most √entries times the rms


@dataclass(frozen=True)
class Form:
    """What the functions below are given.

    ``out`` is the experiment's folder; ``data`` a folder of images, of MNIST for `noise`, which the
    ``full`` form needs. ``steps`` is for trials: of every run, instead of the form's own.
    """

    full: bool = False
    seeds: int = 5
    out: str = "."
    data: str | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.full and self.data is None:
            raise ValueError("--full needs --data FOLDER: images, or for noise MNIST's .npz files")
        if self.data is not None and not self.full:
            raise ValueError(f"--data {self.data} is for --full; the quick form brings its own")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: expected 1 or more; fewer than 5 decide nothing")

    def runs(
        self, arms: Mapping[str, Arm], task: str = "", steps: int = 1500, **settings: Any
    ) -> list[Config]:
        """Arms × seeds, seed by seed; ``task`` is what follows the task's name.

        The quick form takes ``steps`` and settings as they are, and a weight decay such that
        Σ lr·decay is that of 1500 steps at 0.5. The full form keeps the task's own, and reads and
        measures as often as the quick one.
        """
        often = ("log_every", "eval_every", "active_every")
        if self.full:
            full = EXPERIMENTS[f"vit_cifar10{task}"](False)
            settings |= {
                key: settings[key] * full["steps"] // steps for key in often if key in settings
            }
            settings |= {"data": {"path": self.data}, "save_every": None}  # or 0.5 GB a run stay
            settings.pop("weight_decay", None)
            steps = full["steps"]
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


def ratio(form: Form) -> Stages:
    """Flatness, its coefficient and density over training."""
    arms = _with_controls(_named("vanilla", "paper"))
    settings: dict[str, Any] = {"steps": 900, "log_every": 45, "eval_every": 300}
    measures = ("density", "flatness")
    return _one(
        form.runs(arms, **settings, measures=measures, active=("flatness",), active_every=90)
    )


def ablation(form: Form) -> Stages:
    """Each modification alone, in pairs, all; without 1-D decay too; placements and floors."""
    parts: dict[str, Modification] = {
        "bias": ZerothBias(),
        "floor": NormFloor(),
        "jsrelu": SwapActivation("jsrelu"),
    }
    arms = {}
    for chosen in product((False, True), repeat=3):
        names = [name for name, taken in zip(parts, chosen, strict=True) if taken]
        label = {0: "vanilla", 3: "paper"}.get(len(names), "+".join(names))
        arms[label] = _arm(label, *(parts[name] for name in names))
    arms = _with_controls(arms)
    arms["bias-at-output"] = _arm("bias-at-output", ZerothBias(at="output"))
    for floor in (2.0, 4.0):
        arms[f"floor-{floor:g}"] = _arm(f"floor-{floor:g}", NormFloor(floor=floor))
    return _one(form.runs(arms, steps=360, log_every=90, eval_every=120))


def manipulate(form: Form) -> Stages:
    """S-shapes that part the zeros of φ from those of φ′."""
    arms = {}
    for dx, dy in product((-SHIFT, SHIFT), repeat=2):
        name = f"s{dx:+g}{dy:+g}"
        arms[name] = _arm(name, SwapActivation(shifted_s_shape(dx, dy).name))
    shapes = form.runs(
        {name: arm for name, arm in _with_controls(arms).items() if name != "no-mlp"},
        steps=450,
        log_every=90,
        eval_every=150,
        measures=("density", "occupancy"),
    )
    plain = form.runs(_with_controls(_named("vanilla")), steps=450, log_every=90, eval_every=150)
    return _one([*shapes, *plain])


def pruning(form: Form) -> Stages:
    """Small effective gradients dropped in training, at several thresholds."""
    arms = {}
    for base, thresholds in (("vanilla", (0.3, 1.0, 3.0)), ("paper", (0.3, 1.0, 3.0))):
        arms[base] = ARMS[base]
        for threshold in thresholds:
            name = f"{base}-drop-{threshold:g}"
            changes = ARMS[base].recipe.modifications
            arms[name] = _arm(name, *changes, PruneGradient(threshold))
    arms["vanilla-drop-all"] = _arm("vanilla-drop-all", PruneGradient(ALL))
    spared = {name + SPARED: _sparing(arms[name]) for name in ("vanilla", "vanilla-drop-1")}
    trial = {"pruning": {"thresholds": [0.03, 0.1, 0.3, 1.0, 3.0]}}
    return _one(
        form.runs(
            arms | spared | _named("no-mlp"),
            steps=450,
            log_every=90,
            eval_every=150,
            active=trial,
        )
    )


def noise(form: Form) -> Stages:
    """Second moments of features and gradients, accumulated over training, by width and decay."""
    widths = (16, 32, 64, 128, 256, 512, 1024) if form.full else (16, 64, 256)
    decays = (0.0, 0.03, 0.1, 0.3) if form.full else (0.0, 0.1, 0.3)
    steps = form.steps or (6000 if form.full else 2000)
    return _one(
        [
            GradientNoiseConfig(
                arm=f"p{width}-decay{decay:g}",
                seed=seed,
                width=width,
                weight_decay=decay,
                lr=0.03,  # v1's 0.001, so that lr · decay · steps comes near its 19 to 56
                steps=steps,
                measure_every=max(1, steps // 10),
                data={"mnist": form.data},
            )
            for seed in range(form.seeds)
            for width in widths
            for decay in decays
        ]
    )


def robustness(form: Form) -> Stages:
    """Attacks on inputs, noise on features and weights, at checkpoints of training."""
    names = ("vanilla", "paper", "vanilla-no-1d-decay", "paper-no-1d-decay", "weight-noise")
    # such that vanilla keeps neither all of its accuracy nor none (seed 100)
    sizes: dict[str, tuple[float, ...]] = {"x": (1.0, 2.0), "d": (2.0,), "weights": (1.0, 2.0)}
    trials = {
        "robustness": {
            "against": [
                {"disturbance": "fgsm", "size": 0.3},
                {"disturbance": "pgd", "size": 0.3},
                *(
                    {"disturbance": "noise", "at": at, "size": size}
                    for at, each in sizes.items()
                    for size in each
                ),
            ]
        },
        "covering": {"attack": {"disturbance": "fgsm", "size": 0.1}},
        "gradient": {"epsilon": 1e-3},
    }
    return _one(
        form.runs(
            _named(*names, "hoyer-no-1d-decay"),
            steps=600,
            log_every=100,
            eval_every=200,
            active=trials,
            active_every=100,
            active_on=300,
        )
    )


def weight_noise(form: Form) -> Stages:
    """Training with weight noise: flatness and density."""
    strong = {"weight-noise-0.3": _arm("weight-noise-0.3", WeightNoise(rho=0.3))}
    arms = _with_controls(_named("vanilla", "weight-noise") | strong)
    measured = ("flatness", "gauss_newton", "token_copies")
    return _one(form.runs(arms, steps=700, log_every=100, eval_every=175, active=measured))


def finetune(form: Form) -> Stages:
    """Trained models finetuned for sparsity, beside plain finetuning."""
    bases = _named("vanilla", "vanilla-no-1d-decay")
    first = form.runs(bases, steps=900, log_every=150, eval_every=300)
    stages: Stages = {"base": first, "": []}
    hoyer = _named("hoyer-finetune")
    arms = _with_controls(_named("vanilla", "paper-finetune")) | hoyer
    arms.pop("no-mlp")
    for base, chosen in (("vanilla", arms), ("vanilla-no-1d-decay", arms)):
        names = {
            name if base == "vanilla" else f"{name}-from-spared": a for name, a in chosen.items()
        }
        stages[""] += form.runs(
            names,
            "_finetune",
            steps=300,
            weight_decay=0.8,
            log_every=100,
            eval_every=150,
            start=f"{form.out}/base/runs/{base}-seed{{seed}}/weights",
        )
    return stages


REPRODUCTIONS: dict[str, Callable[[Form], Stages]] = {
    "ratio": ratio,
    "ablation": ablation,
    "manipulate": manipulate,
    "pruning": pruning,
    "noise": noise,
    "robustness": robustness,
    "weight-noise": weight_noise,
    "finetune": finetune,
}


def reproduction(name: str, form: Form) -> Stages:
    """The runs of an experiment; `ValueError` lists the known ones."""
    if name not in REPRODUCTIONS:
        raise ValueError(f"unknown experiment {name!r}; known: {', '.join(REPRODUCTIONS)}")
    return REPRODUCTIONS[name](form)


def check_data(stages: Stages) -> None:
    """Read what the first run will; `ValueError` or what reading raises, before any work."""
    config = next(iter(stages.values()))[0]
    if isinstance(config, GradientNoiseConfig):
        splits_of(config)
    elif config.task not in ("digits", "digits_finetune"):
        task_of(config.task).splits(config)


def _one(runs: list[Config]) -> Stages:
    return {"": runs}


def _named(*names: str) -> Arms:
    return {name: ARMS[name] for name in names}


def _arm(name: str, *changes: Modification) -> Arm:
    return Arm(Recipe(name, changes))


def _sparing(arm: Arm) -> Arm:
    return dataclasses.replace(arm, no_decay=ONE_DIMENSIONAL)


def _with_controls(arms: Arms) -> Arms:
    """Each arm also without decay of 1-D parameters, and one without MLPs."""
    spared = {name + SPARED: _sparing(arm) for name, arm in arms.items()}
    return arms | spared | {"no-mlp": _arm("no-mlp", LeaveOutMLP())}
