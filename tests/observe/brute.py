"""Small MLPs, and what observe must find in them, the slow way: keep every z and u, then count."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

import tests.mlp
from actsparse.activations import ACTIVATIONS
from actsparse.blocks import MLPBlock

D, H = 6, 10


class Phi(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.name].value(z)


class Mlp(tests.mlp.Mlp):
    """A block on a wide range of z."""

    def __init__(self, phi: str = "relu", gated: bool = False, h: int = H) -> None:
        super().__init__(Phi(phi), D, h, norm=nn.LayerNorm(D), gated=gated)
        with torch.no_grad():
            self.pre.weight.mul_(4)

    @property
    def pre(self) -> nn.Linear:
        return self.up if self.gate is None else self.gate


def mlp(phi: str = "relu", gated: bool = False) -> Mlp:
    """In float64."""
    return Mlp(phi, gated).double()


class Recorder:
    """Hooks of its own on up and gate; nothing of actsparse's seam takes part."""

    def __init__(self, blocks: Iterable[MLPBlock]) -> None:
        blocks = list(blocks)
        names = [block.name for block in blocks]
        self.blocks = {
            b.name if b.name and names.count(b.name) == 1 else b.up.name: b for b in blocks
        }
        self.z: dict[str, list[Tensor]] = {name: [] for name in self.blocks}
        self.u: dict[str, list[Tensor]] = {name: [] for name in self.blocks}

    def __enter__(self) -> Recorder:
        self.hooks = []
        for name, block in self.blocks.items():
            self._keep(block.pre_activation, self.z[name])
            if block.gate is not None:
                self._keep(block.up, self.u[name])
        return self

    def _keep(self, layer: Any, into: list[Tensor]) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            into.append(layer.select(output).detach().clone().flatten(0, -2))

        self.hooks.append(layer.module.register_forward_hook(hook))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self.hooks:
            hook.remove()

    def masks(self, name: str, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """a ≠ 0 and φ′(z) ≠ 0, bool [tokens kept, H]; ``keep``: bool, one for each row."""
        call = self.blocks[name].activation.call
        assert call is not None
        z = torch.cat(self.z[name])
        with torch.enable_grad():
            leaf = z.clone().requires_grad_()
            value = call(leaf * 1)  # not the leaf itself: φ may work in place
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        a = value.detach()
        if self.u[name]:
            a = a * torch.cat(self.u[name])
        if keep is not None:
            keep = keep.reshape(-1)
            assert len(keep) == len(a)
            a, slope = a[keep], slope[keep]
        return a != 0, slope != 0

    def summary(self, keep: dict[str, Tensor] | Tensor | None = None) -> dict[str, Any]:
        rows, living = [], 0
        for name in self.blocks:
            own = keep.get(name) if isinstance(keep, dict) else keep
            active, sloped = self.masks(name, own)
            alive = active.any(0)
            living += int(alive.sum()) * len(active)
            rows.append(
                {
                    "block": name,
                    "tokens": len(active),
                    "density": active.double().mean().item(),
                    "derivative_density": sloped.double().mean().item(),
                    "dead": int((~alive).sum()),
                    "units": active.shape[1],
                    "living_density": int(active.sum()) / max(int(alive.sum()) * len(active), 1),
                }
            )
        size = sum(row["units"] * row["tokens"] for row in rows)
        whole: dict[str, Any] = {
            key: sum(row[key] * row["units"] * row["tokens"] for row in rows) / size
            for key in ("density", "derivative_density")
        }
        whole |= {key: sum(row[key] for row in rows) for key in ("dead", "units")}
        whole["living_density"] = whole["density"] * size / max(living, 1)
        return whole | {"blocks": rows}


def same(got: Any, want: Any) -> bool:
    """Equal, numbers to 1e-12."""
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same, got, want))
    return got == want if isinstance(want, str | int) else abs(got - want) < 1e-12
