"""The frontier: tasks, and what is compared on each to find the sparsest at equal quality.

`actsparse frontier` does the runs and `actsparse_lab.report.frontier` judges them. Settings of
tasks and recipes were found on validation data before the seeds here were run; change them here
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from actsparse_lab.analysis.comparison import CONTROL, HALF, HALVES, VANILLAS, WHOLE
from actsparse_lab.engine.config import RunConfig
from actsparse_lab.tasks import TASK_SETTINGS, config_of
from actsparse_lab.tasks.arms import arm_named


@dataclass(frozen=True)
class FrontierTask:
    """A task of `TASK_SETTINGS` in its ``quick`` form or not, and settings of a run to change.

    ``model`` and ``data`` in ``settings`` change some of the task's own, the rest stay.
    ``reads_data``: of the user's, who says where they lie. ``arms``: those of the task, if not all.
    """

    task: str
    settings: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    seeds: int = 5
    reads_data: bool = False
    arms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Race:
    """Dense arms and one that trains with ``accelerate=True``, to be timed one run at a time.

    ``task`` is one of `TASKS`; ``settings`` change its settings for the race. The blocks must be
    large enough to run sparse, and validations close enough to tell when a goal was reached.
    """

    task: str
    dense: tuple[str, ...]
    fast: str
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: int = 5


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``more`` over ``settings``; of ``model`` and ``data`` name by name."""
    inner: dict[str, Any] = {
        key: {**settings.get(key, {}), **more[key]} for key in ("model", "data") if key in more
    }
    return {**settings, **more, **inner}


CONTROLS = (*VANILLAS, CONTROL)
PAPER = ("paper", "paper-no-1d-decay")
RECIPES = (
    "best", *PAPER, "squared-relu", "l1-no-1d-decay", "hoyer-no-1d-decay",
)  # fmt: skip
# best without one of its parts, or with another in its place; l1-no-1d-decay is it without JSReLU
PARTS = (
    "best-1d-decay", "best-at-once", "best-hoyer", "best-capped", "best-jump", "jsrelu-no-1d-decay",
)  # fmt: skip

TASKS: dict[str, FrontierTask] = {
    # four patches: with sixteen, attention alone is as good
    "digits": FrontierTask("digits", {"eval_every": 500, "model": {"patch_size": 4}}),
    "text": FrontierTask("text", {"eval_every": 250}, arms=(*CONTROLS, HALF, *RECIPES, *PARTS)),
    "cifar10": FrontierTask("cifar10", {"eval_every": 500}, reads_data=True),
    "web": FrontierTask(
        "lm_web",
        {
            "steps": 900,
            "batch_size": 16,
            "lr": 5e-3,
            "weight_decay": 0.1,
            "eval_every": 300,
            "data": {"tokenizer": "bytes", "length": 64, "rows": 512},
            "model": {
                "n_positions": 64,
                "n_embd": 64,
                "n_inner": 512,
                "attn_implementation": "eager",
            },
        },
        quick=True,
        reads_data=True,
    ),
    # wider MLPs, and as much decay in all as in text-long, in minutes
    "demo": FrontierTask(
        "text",
        {
            "steps": 2000,
            "weight_decay": 0.7,
            "log_every": 100,
            "eval_every": 500,
            "model": {"d_ff": 384},
        },
        arms=(*CONTROLS, HALF, "best", "paper"),
    ),
    # to the knee of the curve, where five times as long is affordable
    "text-long": FrontierTask(
        "text",
        {"steps": 5000, "log_every": 250, "eval_every": 1250},
        arms=(*CONTROLS, "best", HALF, "l1-no-1d-decay", *PAPER),
    ),
}
# one block is as good here as two, in two thirds of the time
TASKS["web-long"] = replace(
    TASKS["web"],
    settings=_merged(
        TASKS["web"].settings,
        {"steps": 8000, "log_every": 400, "eval_every": 2000, "model": {"n_layer": 1}},
    ),
    arms=(*CONTROLS, "best", HALF, *PAPER),
)
WIDTHS = (64, 128, 256, 384)


def _width(d: int) -> FrontierTask:
    """A causal model of four blocks, H = 4 D, that reads 12.3 million bytes once.

    Learning rates fall as 1/√D. Learning rate × weight decay is the same at all widths, and its sum
    over the steps is 2.4, near web-long's: 7.5 cost a pilot much of its loss. Autocast to bfloat16
    pays from D = 128 on; eager attention is then faster on CPUs than fused.
    """
    lr = 4e-3 * (64 / d) ** 0.5
    settings: dict[str, Any] = {
        "steps": 6000,
        "batch_size": 16,
        "lr": lr,
        "weight_decay": 8e-4 / lr,
        "precision": "float32" if d < 128 else "bf16",
        "log_every": 250,
        "eval_every": 750,
        "save_every": 750,
        "keep": 1,
        "report_to": (),
        "data": {"tokenizer": "bytes", "length": 128, "rows": 512},
        "model": {
            "n_embd": d,
            "n_inner": 4 * d,
            "n_layer": 4,
            "n_head": 4,
            "attn_implementation": "sdpa" if d < 128 else "eager",
        },
    }
    arms = (WHOLE, "best", CONTROL, HALF, "best-half-steps")
    papers = {64: ("vanilla", "paper", "paper-half-steps"), 128: ("vanilla", "paper")}.get(d, ())
    return FrontierTask("lm_web", settings, quick=True, reads_data=True, arms=(*arms, *papers))


TASKS |= {f"width-{d}": _width(d) for d in WIDTHS}
RACE = Race(
    "cifar10",
    dense=("vanilla-no-1d-decay",),
    fast="best",
    settings={
        "steps": 300,
        "batch_size": 256,
        "eval_every": 20,
        "model": {
            "hidden_size": 256,
            "intermediate_size": 2048,
            "num_attention_heads": 8,
            "initializer_range": 0.035,
        },
    },
)


def frontier(
    task: str,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    data: str | None = None,
) -> list[RunConfig]:
    """The runs of a frontier task: controls, `HALF` and `RECIPES`, seed by seed.

    Args:
        task: a name in `TASKS`.
        arms: of those, the ones to do; None: all.
        seeds: paired seeds of each, from 0; None: the task's.
        steps: of every run, to try the machinery (`HALF` takes half); None: the task's.
        data: where the task's data lie, for a task that reads data of the user's.

    Raises:
        ValueError: unknown task or arm, data that it lacks, or that it brings itself.

    >>> runs = frontier("digits", arms=["vanilla-no-1d-decay", "half-steps"], seeds=1)
    >>> [(run.arm, run.steps, run.no_decay) for run in runs]
    [('vanilla-no-1d-decay', 1500, ('norm', 'bias')), ('half-steps', 750, ('norm', 'bias'))]
    """
    found = _task(task, data)
    known = dict.fromkeys(found.arms or (*CONTROLS, HALF, *RECIPES))
    for arm in arms or ():
        if arm not in known:
            raise ValueError(f"unknown arm {arm!r} of {task}; known: {', '.join(known)}")
    return [
        _run(found, found.settings, arm, seed, steps, data)
        for seed in range(seeds or found.seeds)
        for arm in (known if arms is None else dict.fromkeys(arms))
    ]


def race(
    *,
    seeds: int | None = None,
    steps: int | None = None,
    data: str | None = None,
) -> list[RunConfig]:
    """The runs of `RACE`, in the order in which to do them.

    A seed's runs follow each other, and the order turns by one from seed to seed, so that what
    slows the machine for a while slows no arm in particular.
    """
    found = _task(RACE.task, data)
    arms = (*RACE.dense, RACE.fast)
    runs = []
    for seed in range(seeds or RACE.seeds):
        at = seed % len(arms)
        for arm in (*arms[at:], *arms[:at]):
            settings = _merged(found.settings, RACE.settings)
            fast = {"accelerate": True} if arm == RACE.fast else {}
            runs.append(_run(found, settings | fast, arm, seed, steps, data))
    return runs


def _task(name: str, data: str | None) -> FrontierTask:
    if name not in TASKS:
        raise ValueError(f"unknown frontier task {name!r}; known: {', '.join(TASKS)}")
    if TASKS[name].reads_data and data is None:
        raise ValueError(f"{name} reads data of yours: give --data {name}=PATH")
    if data is not None and not TASKS[name].reads_data:
        raise ValueError(f"{name} takes no --data, got {data!r}")
    return TASKS[name]


def _run(
    of: FrontierTask,
    settings: dict[str, Any],
    arm: str,
    seed: int,
    steps: int | None,
    data: str | None,
) -> RunConfig:
    own = TASK_SETTINGS[of.task](of.quick)
    whole = settings.get("steps", own["steps"])
    settings = {**settings, "steps": whole if steps is None else steps}
    if steps is not None:  # lines and validations at the same shares of the steps
        for key in ("log_every", "eval_every"):
            settings[key] = max(1, settings.get(key, own[key]) * steps // whole)
    if arm in HALVES:
        settings["steps"] = max(1, settings["steps"] // 2)
    place = "path" if "path" in own.get("data", {}) else "shards"
    if data is not None:
        settings = _merged(settings, {"data": {place: data}})
    chosen = arm_named(HALVES.get(arm, arm))
    return config_of(of.task, arm, chosen, seed, quick=of.quick, **settings)
