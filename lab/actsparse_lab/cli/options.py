"""Options that several verbs share: settings of a run that override the task's own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from actsparse.untrusted import parse_json
from actsparse.values import shown

Task = Annotated[
    str,
    typer.Option(
        help="digits, text (T5 span corruption), lm (causal); digits_finetune, lm_finetune; on "
        "data of yours cifar10, vit_cifar10, t5_web, lm_web, and the papers' vit_imagenet, t5_c4, "
        "vit_cifar10_finetune, vit_imagenet_finetune, t5_c4_finetune."
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="The task's form of a few minutes on two cores.")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder of images (train/<class>/…, val/<class>/…, or tables as on the Hub), or "
        "shards of text: a folder, file, glob or address of JSON lines, as C4's."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="For text: T5's spiece.model, vocab.json by merges.txt, a folder, or bytes."),
]
Start = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Checkpoint to finetune: a run's weights/, or Hugging Face's folder. {seed} in it "
        "stands for the seed.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any other setting, such as --set micro_batch=64 --set data.repeats=1 --set "
        "lora=null; values as in JSON. It wins over an option.",
        metavar="NAME=VALUE",
    ),
]
Threads = Annotated[int, typer.Option(help="CPU threads of a run.", min=1, show_default="1")]
_OWN = "the task's"
Steps = Annotated[int | None, typer.Option(help="Optimizer steps.", show_default=_OWN)]
Lr = Annotated[float | None, typer.Option(help="Peak learning rate.", show_default=_OWN)]
WeightDecay = Annotated[float | None, typer.Option(help="AdamW's.", show_default=_OWN)]
BatchSize = Annotated[int | None, typer.Option(help="Rows in a batch.", show_default=_OWN)]
Model = Annotated[
    str | None,
    typer.Option(
        help="Settings of the model to change, such as hidden_size=256,intermediate_size=1024.",
        show_default=_OWN,
    ),
]
LogEvery = Annotated[int | None, typer.Option(help="Steps between logs.", show_default=_OWN)]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between validations.", show_default=_OWN)
]
Measures = Annotated[
    str | None,
    typer.Option(
        help="With commas between: density, flatness, gradient, noise, spectrum, magnitudes, "
        "occupancy (of S-shapes), read in each pass; gauss_newton, hessian, token_copies, "
        "top_eigenvalue, robustness, covering, pruning, "
        'by passes of their own. With options: --set \'active={"gradient": {"epsilon": 1e-4}}\'.',
        show_default="density",
    ),
]
MeasureEvery = Annotated[
    int | None,
    typer.Option(help="Steps between the latter.", min=1, show_default="start and end alone"),
]
Accelerate = Annotated[
    bool,
    typer.Option(
        "--accelerate",
        help="Let MLP blocks run sparse in training where that is faster. Small ones, such as the "
        "tasks' own, stay dense. Training density is then that of the logged steps.",
    ),
]


def names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``a,b``; None stays None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def chosen(
    task: str,
    quick: bool,
    model: str | None,
    data: str | None,
    tokenizer: str | None,
    given: list[str] | None,
) -> dict[str, Any]:
    """Overrides of `run_config` out of options; a ``name=value`` wins over its own option.

    Raises:
        ValueError: text that is no ``name=value``, or a name that the task does not have.
    """
    from actsparse_lab.tasks import EXPERIMENTS

    if task not in EXPERIMENTS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(EXPERIMENTS)}")
    own = EXPERIMENTS[task](quick)
    found: dict[str, Any] = {"quick": quick}
    known = own["model"]
    if model is not None and not known:
        raise ValueError(f"{task} takes the model that --from names, as it is; --model is not its")
    for part in () if model is None else model.split(","):
        name, value = _pair("--model", part)
        if name not in known:
            raise ValueError(
                f"unknown setting {name!r} of {task}'s model; known: {', '.join(known)}"
            )
        found.setdefault("model", {})[name] = value
    place = "path" if "path" in own.get("data", {}) else "shards"
    for name, path in ((place, data), ("tokenizer", tokenizer)):
        if path is not None:
            if name not in own.get("data", {}):
                raise ValueError(f"{task} brings its own data; --data and --tokenizer are not its")
            found.setdefault("data", {})[name] = path
    for part in given or ():
        name, value = _pair("--set", part)
        group, _, inner = name.partition(".")
        if name in ("task", "arm", "seed", "quick"):
            raise ValueError(f"--set {name}: it has an option of its own, --{name}")
        if inner and group in ("model", "data", "lora"):
            if not isinstance(held := found.setdefault(group, {}), dict):
                raise ValueError(f"--set {name}: {group} was set to {shown(held)} before")
            held[inner] = value
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def given_of(**options: Any) -> dict[str, Any]:
    """The options that were given: None stands for one that was not.

    >>> given_of(steps=5, lr=None)
    {'steps': 5}
    """
    return {name: value for name, value in options.items() if value is not None}


def _pair(option: str, text: str) -> tuple[str, Any]:
    name, equals, value = (each.strip() for each in text.partition("="))
    if not (name and equals and value):
        raise ValueError(f"{option} {text!r}: expected name=value, such as hidden_size=256")
    try:
        return name, parse_json(value.encode(), option)
    except ValueError:
        return name, value
