"""Zeroth bias: a learnt vector for each token position, added to the MLP's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from actsparse.blocks.block import Layer, MLPBlock, Norm
from actsparse.blocks.sharding import sharded
from actsparse.blocks.site import Site, site_of
from actsparse.blocks.token_map import TokenMap
from actsparse.modify.modification import Attached, Modification, NotApplicable, Progress
from actsparse.values import Above0, Positive

CHILD = "actsparse"  # the submodule of up that holds the table; peft: modules_to_save=["actsparse"]
_LARGE = 2**20  # entries of a table that are few in any case
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class ZerothBias(Modification):
    """Add a learnt vector d_t for each token position t to the input of each MLP.

    The MLP then sees ``x_t + d_t`` ("doubly biased MLP"). d starts at zero and is clipped entrywise
    to ``±clip·|s|`` after every optimizer step, where s is the norm's effective scale (1 without a
    norm). d makes the norm's own bias redundant, so that bias is frozen, unless the norm also feeds
    something else.

    Source: arXiv 2309.03004, the modified Transformer. The parameter is called
    ``….actsparse.zeroth_bias``, has the shape [length, d_model] and the norm's dtype.

    Args:
        clip: the bound on |d| as a multiple of |s|, above 0.
        at: ``"input"``, or ``"output"`` to add d to the MLP's output, as the authors' program does.
        length: the number of positions. None: the maximum that the config names, else the length of
            the inputs with which the blocks were found; this too where a table of the maximum has
            more than 2²⁰ entries and more than up (8192 positions would double a SmolLM2-135M).
        finetune: allow a norm bias that is not zero, and keep its value. From scratch it must be
            zero.

    >>> from actsparse import sparsify
    >>> mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> handle = sparsify(mlp, ZerothBias(length=16), inputs=torch.randn(2, 5, 8))
    >>> mlp[1].actsparse.zeroth_bias.shape
    torch.Size([16, 8])
    """

    order: ClassVar[int] = 1  # after the norm floor, whose scale bounds the clip
    changes_function: ClassVar[bool] = True

    clip: Above0 = 0.1
    at: Literal["input", "output"] = "input"
    length: Positive | None = None
    finetune: bool = False

    @override
    def apply(self, block: MLPBlock) -> Attached:
        if sharded([*block.path, block.up.module]):
            raise ValueError(
                f"block {block.name!r} is sharded already, which would leave its zeroth bias out; "
                f"the order is sparsify, fully_shard, optimizer, handle.attach"
            )
        length, origin = (self.length, "as given") if self.length else _length(block)
        norm, notes = block.norm, [f"{length} positions ({origin})"]
        if length * block.d_model > _LARGE:
            notes.append(f"{length * block.d_model:,} parameters")
        bias = norm.parameter("bias") if norm else None
        freeze = False
        if norm is not None and bias is not None:
            if block.norm_feeds:
                notes.append(f"{norm.name}.{norm.bias} stays trainable: the norm feeds more")
            else:
                if not self.finetune and bool(bias.detach().ne(0).any()):
                    raise ValueError(
                        f"ZerothBias from scratch replaces the norm's bias, but "
                        f"{norm.name}.{norm.bias} is not zero; for a trained model use the "
                        f"recipe 'paper-finetune' or ZerothBias(finetune=True)"
                    )
                freeze = True
                notes.append(f"{norm.name}.{norm.bias} frozen")
        if CHILD in block.up.module._modules:
            raise ValueError(f"block {block.name!r} has a zeroth bias already; a recipe takes one")
        scale = norm.parameter("scale") if norm else None
        reference = scale if scale is not None else block.up.weight
        table = ZerothBiasTable(length, block.d_model, reference, block.name)
        block.up.module.add_module(CHILD, table)
        site = site_of(block)
        return _Added(site, ", ".join(notes), self, table, norm if freeze else None)


class ZerothBiasTable(nn.Module):
    """The parameter ``zeroth_bias`` [length, d_model], added to [B, T, D] at the true positions."""

    def __init__(self, length: int, d_model: int, reference: Tensor, block_name: str) -> None:
        super().__init__()
        self.block_name = block_name
        dtype = reference.dtype if reference.dtype.is_floating_point else torch.float32
        self.zeroth_bias = nn.Parameter(
            torch.zeros(length, d_model, dtype=dtype, device=reference.device)
        )

    def forward(self, x: Tensor, tokens: TokenMap) -> Tensor:
        """``x + d`` at the positions of the running call; x in the model's own layout.

        Raises:
            ValueError: a position beyond the table, or a layout without tokens.
        """
        arranged = tokens.arrange(x)
        batch, time = arranged.shape[:2]
        table = self.zeroth_bias.to(x.dtype)
        positions = tokens.positions(batch, time, of=id(self))
        if isinstance(positions, int):
            self._check(positions + time)
            shift = table[positions : positions + time]
        else:
            reach = tokens.reach(batch, time)
            if reach is None or reach > len(table):
                # a look at the values would break a graph, and stop an accelerator's pipeline
                if not torch.compiler.is_compiling() and positions.device.type == "cpu":
                    self._check(int(positions.max()) + 1 if positions.numel() else 0)
                elif reach is not None:
                    self._check(reach)
            shift = F.embedding(positions, table)
        return tokens.restore(arranged + shift, x)

    def _check(self, needed: int) -> None:
        if needed > self.zeroth_bias.shape[0]:
            raise ValueError(
                f"block {self.block_name!r}: a token at position {needed - 1} lies beyond the "
                f"zeroth bias table of {self.zeroth_bias.shape[0]} positions; sparsify with "
                f"ZerothBias(length={needed}) or more, or shorten the sequence"
            )


class _Added(Attached):
    def __init__(
        self, site: Site, note: str, config: ZerothBias, table: ZerothBiasTable, frozen: Norm | None
    ) -> None:
        super().__init__(site, note)
        self.config, self.frozen = config, frozen
        self.thawed = False
        if frozen is not None:
            bias = frozen.parameter("bias")
            assert bias is not None
            self.thawed = bias.requires_grad
            bias.requires_grad_(False)
            bias.grad = None  # else an optimizer that holds the bias would go on moving it
        if config.at == "input":
            site.transform_input(self.shift_input)
        else:
            site.transform_output(self.shift_output)

    @property
    def table(self) -> nn.Module:
        # by name, since peft and sharding exchange modules and parameters
        return getattr(self.site.block.up.module, CHILD)

    def shift_input(self, site: Site, x: Tensor) -> Tensor:
        return self.table(x, site.tokens)

    def shift_output(self, site: Site, y: Tensor, a: Tensor, layer: Layer) -> Tensor:
        return self.table(y, site.tokens)

    @override
    @torch.no_grad()
    def project(self, progress: Progress) -> None:
        norm = self.site.block.norm
        scale = norm.parameter("scale") if norm else None
        for name, parameter in self.table.named_parameters():
            if not name.endswith("zeroth_bias"):
                continue
            if norm is None or scale is None:
                parameter.clamp_(-self.config.clip, self.config.clip)
            else:
                bound = (self.config.clip * (scale + norm.offset).abs()).to(parameter.dtype)
                parameter.clamp_(-bound, bound)

    @override
    def remove(self) -> None:
        self.site.release(self.shift_input, self.shift_output)
        self.site.block.up.module._modules.pop(CHILD, None)
        if self.frozen is not None and self.thawed:
            bias = self.frozen.parameter("bias")
            assert bias is not None
            bias.requires_grad_(True)


def _length(block: MLPBlock) -> tuple[int, str]:
    seen = block.input_shape[1] if len(block.input_shape) == 3 else None
    if len(block.input_shape) > 3:
        seen = int(torch.Size(block.input_shape[1:-1]).numel())
    if seen is not None and block.batch_first is False:
        seen = block.input_shape[0]
    maximum, source = _configured(block)
    if maximum is not None and maximum >= (seen or 0):
        large = maximum * block.d_model
        if seen is None or large <= max(_LARGE, block.d_model * block.d_hidden):
            return maximum, source
        return seen, f"the length seen in inputs; {source} would take {large:,} parameters"
    if seen is None:
        raise NotApplicable(
            f"its input of shape {block.input_shape} has no token axis and no config names a "
            f"maximum length; pass ZerothBias(length=...)"
        )
    return seen, "the length seen in inputs"


def _configured(block: MLPBlock) -> tuple[int | None, str]:
    """The longest sequence that the nearest stack or its config declares."""
    for module in reversed(block.path):
        for name in (
            "max_source_positions",
            "max_target_positions",
        ):  # a stack of an encoder–decoder
            value: Any = getattr(module, name, None)
            if isinstance(value, int):
                return value, f"{type(module).__name__}.{name}"
        config = getattr(module, "config", None)
        for name in _LENGTHS:
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                return value, f"config.{name}"
    return None, ""
