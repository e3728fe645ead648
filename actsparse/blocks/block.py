"""What an MLP block is: the parts of ``x → z = xUᵀ + b → a = φ(z) → y = aVᵀ + b′``, by name.

Gated blocks compute ``a = φ(z_gate) ⊙ z_up``. The parts are the model's own modules, found by
:func:`actsparse.find_mlp_blocks`; nothing here changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from actsparse import html
from actsparse.blocks.refused import Refused, told


@dataclass(eq=False)
class Layer:
    """A linear layer of a block, or a range of output rows of one that computes several.

    Args:
        name: the module's path in the model.
        module: the module itself.
        layout: how its weight is stored: ``"Linear"`` [out, in] or ``"Conv1D"`` [in, out].
        rows: which outputs of the module are the layer's own, where one module computes up and gate
            together (Phi-3, ModernBERT); None: all.

    >>> fused = Layer("gate_up", nn.Linear(8, 64), rows=slice(32, 64))
    >>> print(fused, list(fused.weight.shape), fused.width)
    gate_up[32:64] [32, 8] 64
    """

    name: str
    module: nn.Module
    layout: Literal["Linear", "Conv1D"] = "Linear"
    rows: slice | None = None

    def _read(self, name: str) -> Tensor:
        base = base_layer(self.module)
        tensor = base._parameters.get(name)  # at once: Module.__getattr__ takes a microsecond
        if tensor is None:
            tensor = getattr(base, name, None)
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"layer {self.name!r} holds no {name} that can be read: {type(base).__name__}, "
                f"quantised?"
            )
        if tensor.is_meta:
            raise ValueError(f"layer {self.name!r}: {on_meta(base)}")
        return tensor

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], whatever the layout: a view of the model's parameter.

        Raises:
            ValueError: there is none to read, as in quantised layers, or it is on 'meta'.
        """
        weight = self._read("weight")
        weight = weight.T if self.layout == "Conv1D" else weight
        return weight if self.rows is None else weight[self.rows]

    @property
    def bias(self) -> Tensor | None:
        """The bias [out], a view of the model's parameter, or None if the layer has none.

        Raises:
            ValueError: as for ``weight``.
        """
        base = base_layer(self.module)
        if base._parameters.get("bias") is None and getattr(base, "bias", None) is None:
            return None
        bias = self._read("bias")
        return bias if self.rows is None else bias[self.rows]

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """``weight`` and ``bias`` at once: each call of a block asks for them.

        Returns:
            Both, or None for the bias.

        >>> Layer("up", nn.Linear(8, 32, bias=False)).tensors()[1] is None
        True
        """
        own = self.module._parameters
        weight = own.get("weight")
        whole = self.rows is None and self.layout == "Linear" and not self.module._modules
        if whole and weight is not None and not weight.is_meta and "bias" in own:
            return weight, own["bias"]
        return self.weight, self.bias

    @property
    def width(self) -> int:
        """How many outputs the module has, those of other layers in it included."""
        return widths(self.module)[1]

    def select(self, output: Tensor) -> Tensor:
        """Take this layer's part of the module's output.

        Args:
            output: what the module returned, [..., width].

        Returns:
            The layer's own outputs, [..., out].

        >>> import torch
        >>> Layer("gate_up", nn.Linear(8, 64), rows=slice(32, 64)).select(torch.ones(2, 64)).shape
        torch.Size([2, 32])
        """
        return output if self.rows is None else output[..., self.rows]

    def __str__(self) -> str:
        if self.rows is None:
            return self.name
        step = "" if self.rows.step in (None, 1) else f":{self.rows.step}"
        return f"{self.name}[{self.rows.start}:{self.rows.stop}{step}]"


@dataclass(eq=False)
class Norm:
    """A normalisation layer, with its effective scale ``s = scale + offset``.

    Args:
        name: the module's path in the model.
        module: the module itself.
        scale: the name of the parameter that holds its scale [D]; None if it has none.
        bias: the name of the parameter that holds its bias [D]; None if it has none.
        offset: 1 where the layer multiplies by ``1 + weight`` (Gemma), else 0.

    >>> norm = Norm("ln", nn.LayerNorm(8), scale="weight", bias="bias")
    >>> norm.parameter("scale").shape
    torch.Size([8])
    """

    name: str
    module: nn.Module
    scale: str | None
    bias: str | None
    offset: float = 0.0

    def parameter(self, role: Literal["scale", "bias"]) -> nn.Parameter | None:
        """The scale or bias itself; looked up at each call, because sharding replaces parameters.

        Args:
            role: ``"scale"`` or ``"bias"``.

        Returns:
            The parameter [D], or None if the layer has none.
        """
        name = self.scale if role == "scale" else self.bias
        return None if name is None else getattr(self.module, name)


@dataclass(eq=False)
class Activation:
    """The nonlinearity φ of a block: a module, or operations inside some module's forward.

    Args:
        name: how the model calls it.
        function: its name in :mod:`actsparse.activations`, found by its values; None if unknown.
        call: computes φ of a tensor of any shape; None where that cannot be told.
        module: the module that computes φ; None if a function does.
        owner: the module in whose forward that function is called.
        steps: the functions that make φ, each applied to the result of the one before; empty where
            the operations form no such chain.
        in_place: whether φ overwrites its input.

    >>> Activation("act", "relu", nn.ReLU(), nn.ReLU()).function
    'relu'
    """

    name: str
    function: str | None
    call: Callable[[Tensor], Tensor] | None
    module: nn.Module | None = None
    owner: nn.Module | None = None
    steps: tuple[Callable[..., Any], ...] = ()
    in_place: bool = False


@dataclass(frozen=True)
class Between:
    """What stands between the activation (or the gated product) and down: a dropout or a norm.

    Args:
        name: the module's path in the model.
        kind: ``"dropout"`` or ``"norm"``.
        module: the module itself; None if a function does it.

    >>> Between("drop", "dropout", nn.Dropout(0.1)).kind
    'dropout'
    """

    name: str
    kind: Literal["dropout", "norm"]
    module: nn.Module | None = None


@dataclass(eq=False, repr=False)
class MLPBlock:
    """One MLP block of a model: its layers, its activation and how they are connected.

    :func:`actsparse.find_mlp_blocks` makes them.

    Args:
        name: the path of the smallest module that holds both up and down.
        norm: the norm whose output enters up; None if there is none.
        up: the layer D → H.
        gate: the other layer D → H of gated blocks, whose output enters φ; None if not gated.
        activation: φ.
        between: what stands between φ and down.
        down: the layer H → D.
        d_model: D, the width of the block's input and output.
        d_hidden: H, the number of hidden units.
        norm_position: ``"pre"`` (the residual adds the norm's input), ``"post"`` (the residual adds
            the norm's output, as in BERT) or ``"none"``.
        norm_feeds: what else reads the norm's output.
        calls: how often the block was called in the pass that found it.
        input_shape: the shape of its input in that pass.
        path: the modules whose forward leads to up, outermost first.
        around: how many of ``path``, from the outermost, also lead to down.
        hidden_feeds: what else reads the hidden layer between up and down.
        same_input: whether gate and up get the very same tensor.
        standing: notices modules that are exchanged after the block was found.
        inputs: describes what the model ran on when the block was found.
        batch_first: whether the first axis of the input is the batch; None: unknown.

    >>> import torch
    >>> from actsparse import find_mlp_blocks
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> (block,) = find_mlp_blocks(mlp, torch.randn(2, 8))
    >>> block.gated, block.d_hidden, block.row()["activation"]
    (False, 32, '1')
    """

    name: str
    norm: Norm | None
    up: Layer
    gate: Layer | None
    activation: Activation
    between: tuple[Between, ...]
    down: Layer
    d_model: int
    d_hidden: int
    norm_position: Literal["pre", "post", "none"] = "none"
    norm_feeds: tuple[str, ...] = ()
    calls: int = 1
    input_shape: tuple[int, ...] = ()
    path: tuple[nn.Module, ...] = field(default=(), repr=False)
    around: int = 0
    hidden_feeds: tuple[str, ...] = ()
    same_input: bool = True
    standing: Any = field(default=None, repr=False)
    inputs: Any = field(default=None, repr=False)
    batch_first: bool | None = True

    @property
    def gated(self) -> bool:
        """Whether the block multiplies φ(gate) with up."""
        return self.gate is not None

    @property
    def layout(self) -> str:
        """How up stores its weight: ``"Linear"`` or ``"Conv1D"``."""
        return self.up.layout

    @property
    def pre_activation(self) -> Layer:
        """The layer whose output enters φ: gate in gated blocks, else up."""
        return self.up if self.gate is None else self.gate

    def __repr__(self) -> str:
        return f"<MLPBlock {self._line()}>"

    def _repr_html_(self) -> str:
        return html.table(("part", "value"), self.row().items())

    def _line(self) -> str:
        gate = f" × {self.gate}" if self.gate else ""
        return (
            f"{self.name or '(root)'}: {self.norm.name if self.norm else 'no norm'} → "
            f"{self.up}{gate} → {self.activation.name} ({self.activation.function}) → "
            f"{self.down}, {self.d_model} → {self.d_hidden}"
        )

    def row(self) -> dict[str, Any]:
        """The block as one row of a table.

        Returns:
            Strings, numbers and lists by column, for JSON.
        """
        return {
            "name": self.name,
            "norm": self.norm.name if self.norm else None,
            "norm_position": self.norm_position,
            "norm_feeds": list(self.norm_feeds),
            "up": str(self.up),
            "gate": str(self.gate) if self.gate else None,
            "activation": self.activation.name,
            "function": self.activation.function,
            "between": [part.name for part in self.between],
            "down": str(self.down),
            "layout": self.layout,
            "d_model": self.d_model,
            "d_hidden": self.d_hidden,
        }


class Blocks(list[MLPBlock]):
    """The MLP blocks of a model, a list in order of execution; print it for an overview.

    Args:
        blocks: the blocks.
        refused: what was left out: what cannot be handled, and what did not run on the inputs.
        inputs: describes what the model ran on when the blocks were found.

    >>> print(Blocks(refused=[Refused("experts", "batched experts")]))
    0 MLP blocks
      refused experts: batched experts
    """

    def __init__(
        self,
        blocks: Iterable[MLPBlock] = (),
        refused: Iterable[Refused] = (),
        inputs: Any = None,
    ) -> None:
        super().__init__(blocks)
        self.refused = list(refused)
        for block in self if inputs is not None else ():
            block.inputs = inputs
        self.inputs = next((block.inputs for block in self), inputs)

    def __str__(self) -> str:
        lines = [f"{len(self)} MLP block{'s' * (len(self) != 1)}"]
        lines += [f"  {block._line()}" for block in self]
        lines += [f"  refused {line}" for line in told(self.refused)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = ("name", "norm", "up", "gate", "function", "down", "d_model", "d_hidden")
        rows = [[block.row()[head] for head in heads] for block in self]
        return html.table(heads, rows, f"{len(self)} MLP blocks") + html.lines(
            f"refused {line}" for line in told(self.refused)
        )

    def __getitem__(self, index: Any) -> Any:
        """One block, or for a slice the chosen ones as :class:`Blocks`."""
        chosen = super().__getitem__(index)
        return Blocks(chosen, self.refused, self.inputs) if isinstance(index, slice) else chosen


def on_meta(module: nn.Module) -> str | None:
    """Why the values of a module's parameters cannot be read or changed now, or None.

    >>> on_meta(nn.Linear(2, 2)), on_meta(nn.Linear(2, 2, device="meta")) is None
    (None, False)
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return None
    return (
        "its weights are on 'meta', without values: not loaded yet, or offloaded (cpu_offload, "
        "device_map='auto') and present only while its own forward runs"
    )


def widths(module: nn.Module) -> tuple[int, int]:
    """How many features enter and leave a linear layer.

    >>> widths(nn.Linear(2, 3))
    (2, 3)
    """
    # not hasattr, which takes microseconds where a module has no such attribute
    names = ("nx", "nf") if "nf" in module.__dict__ else ("in_features", "out_features")
    return getattr(module, names[0]), getattr(module, names[1])


def base_layer(module: nn.Module) -> nn.Module:
    """The pretrained layer inside a layer of peft, else the layer itself."""
    base = module._modules.get("base_layer")  # getattr would raise, which is slow, where none is
    return module if base is None else base


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside ``torch.compile`` and DDP wrappers.

    >>> import torch
    >>> inner = nn.Linear(2, 2)
    >>> unwrap(torch.compile(inner, backend="eager")) is inner
    True
    """
    while True:
        wraps = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = model.module if wraps else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
