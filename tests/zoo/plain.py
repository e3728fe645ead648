"""Models written in plain torch, as users write them, and models without an MLP block."""

# ruff: noqa: C408  (a table of keyword arguments reads as one)
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Build, Case, D, H, V, block, blocks, ids, numbered, seeded, stream


class Residual(nn.Module):
    """x + mlp(norm(x)), twice, on a stream."""

    def __init__(self, mlp: Callable[[], nn.Module], n: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(D), "mlp": mlp()}) for _ in range(n)
        )
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = x + layer["mlp"](layer["norm"](x))
        return self.head(x)


class InPlace(Residual):
    """x += …: what the norm read is overwritten before the layer ends."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for layer in self.blocks:
            x += layer["mlp"](layer["norm"](x))
        return self.head(x)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, H, bias=False)
        self.w2 = nn.Linear(H, D, bias=False)
        self.w3 = nn.Linear(D, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Interleaved(nn.Module):
    """One layer whose even rows are the gate and odd rows are up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D, 2 * H)
        self.down = nn.Linear(H, D)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        return self.down(gate_up[..., 1::2] * self.act(gate_up[..., ::2]))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


class SineMlp(nn.Module):
    """An activation nobody has a name for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), Sine(), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class TimmMlp(nn.Module):
    """timm's layers.Mlp, forward line for line."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = norm(H), nn.Linear(H, D), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)
        self.ls1, self.ls2, self.drop_path2 = Scale(), Scale(), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(D), TimmMlp(norm)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.ls1(self.attn(h, h, h, need_weights=False)[0])
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class NanoAttention(nn.Module):
    """Causal self-attention with fused q, k, v, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in self.c_attn(x).split(D, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoGPTMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, H), nn.Linear(H, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


class NanochatMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(D, H, bias=False), nn.Linear(H, D, bias=False)
        nn.init.zeros_(self.c_proj.weight)  # as nanochat starts

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = F.relu(x).square()
        return self.c_proj(x)


class NanoBlock(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module], norms: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(D), nn.LayerNorm(D)) if norms else (None, None)
        self.attn, self.mlp = NanoAttention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        ln_1, ln_2 = self.ln_1 or rms, self.ln_2 or rms
        x = x + self.attn(ln_1(x))
        return x + self.mlp(ln_2(x))


def rms(x: Tensor) -> Tensor:
    """nanochat's norm: a function, no weight."""
    return F.rms_norm(x, (x.size(-1),))


class Nano(nn.Module):
    def __init__(self, mlp: Callable[[], nn.Module], norms: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(V, D)
        self.h = nn.ModuleList(NanoBlock(mlp, norms) for _ in range(2))
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(x)


class OneActivation(nn.Module):
    """Every layer calls the one activation module the model holds; layers hold only matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(D), "up": nn.Linear(D, H), "down": nn.Linear(H, D)})
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](self.act(layer["up"](layer["norm"](x))))
        return x


class HoldsActivation(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), act, nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def shared() -> nn.Module:
    act = nn.ReLU()
    return Residual(lambda: HoldsActivation(act))


class TimeFirst(nn.Module):
    """Attention and MLP on [T, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 2)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


class BatchNormStem(nn.Module):
    """BatchNorm ahead of a residual MLP: a forward pass in train mode would move its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(7, D), nn.BatchNorm1d(D))
        self.body = Residual(lambda: HoldsActivation(nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """D → D/4 → D on pooled channels, but what comes back is a gate, not a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
        self.reduce, self.expand = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return self.head((x * gate[..., None, None]).mean((2, 3)))


def on_stream(make: Callable[[], nn.Module], *shape: int) -> Build:
    return seeded(lambda: (make(), stream(*shape)))


def sequential(act: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), act or nn.GELU(), nn.Linear(H, D))


def with_dropout() -> nn.Module:
    """torchvision's MLP."""
    up, down = nn.Linear(D, H), nn.Linear(H, D)
    return nn.Sequential(up, nn.GELU(), nn.Dropout(0.1), down, nn.Dropout(0.1))


def nano(mlp: Callable[[], nn.Module], norms: bool) -> Build:
    return seeded(lambda: (Nano(mlp, norms), {"tokens": ids()}))


SEQUENTIAL = dict(name="mlp", up="mlp.0", act="mlp.1", fn="gelu", norm="norm", pos="pre")
HELD = dict(name="mlp", up="mlp.up", down="mlp.down", act="mlp.act", norm="norm", pos="pre")
BLOCKS = numbered("blocks.{}")
TIMM = dict(
    name="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    act="mlp.act",
    fn="gelu",
    norm="norm2",
    pos="pre",
)
NANO = dict(name="mlp", up="mlp.c_fc", down="mlp.c_proj")

USERS = [
    Case(
        "nanogpt-inline-gelu",
        nano(NanoGPTMlp, norms=True),
        blocks(numbered("h.{}"), **NANO, act="mlp.gelu()", fn="gelu", norm="ln_2", pos="pre"),
    ),
    Case(  # a chain of two calls: which of them names it is the finder's choice
        "nanochat-inline-squared-relu",
        nano(NanochatMlp, norms=False),
        blocks(numbered("h.{}"), **NANO, act="mlp.*()", fn="squared_relu"),
    ),
    Case(
        "sequential",
        on_stream(lambda: Residual(sequential)),
        blocks(BLOCKS, **SEQUENTIAL, down="mlp.2"),
    ),
    Case(
        "sequential-relu-in-place",
        on_stream(lambda: InPlace(lambda: sequential(nn.ReLU(inplace=True)))),
        blocks(BLOCKS, **dict(SEQUENTIAL, fn="relu"), down="mlp.2"),
    ),
    Case(
        "sequential-like-torchvision",
        on_stream(lambda: Residual(with_dropout)),
        blocks(BLOCKS, **SEQUENTIAL, down="mlp.3", between=("mlp.2",)),
    ),
    Case(
        "like-timm-with-mlp-norm",
        on_stream(lambda: nn.Sequential(*(TimmBlock(nn.LayerNorm) for _ in range(2)))),
        blocks(["0", "1"], **TIMM, between=("mlp.drop1", ("mlp.norm", "norm"))),
    ),
    Case(
        "like-timm-identity-for-norm",
        on_stream(lambda: nn.Sequential(*(TimmBlock(lambda _: nn.Identity()) for _ in range(2)))),
        blocks(["0", "1"], **TIMM, between=("mlp.drop1",)),
    ),
    Case(
        "swiglu",
        on_stream(lambda: Residual(SwiGLU)),
        blocks(
            BLOCKS,
            name="mlp",
            gate="mlp.w1",
            up="mlp.w3",
            down="mlp.w2",
            act="mlp.silu()",
            fn="silu",
            norm="norm",
            pos="pre",
        ),
    ),
    Case(
        "swiglu-interleaved-rows",
        on_stream(lambda: Residual(Interleaved)),
        blocks(
            BLOCKS,
            name="mlp",
            gate="mlp.gate_up",
            up="mlp.gate_up",
            rows=(range(0, 2 * H, 2), range(1, 2 * H, 2)),
            down="mlp.down",
            act="mlp.act",
            fn="silu",
            norm="norm",
            pos="pre",
        ),
    ),
    Case(
        "unknown-activation",
        on_stream(lambda: Residual(SineMlp)),
        blocks(BLOCKS, **HELD, fn=None),
    ),
    Case(
        "one-activation-at-the-root",
        on_stream(OneActivation),
        tuple(
            block(
                "",
                name=f"layers.{i}",
                up=f"layers.{i}.up",
                down=f"layers.{i}.down",
                act="act",
                fn="gelu",
                norm=f"layers.{i}.norm",
                pos="pre",
            )
            for i in range(2)
        ),
    ),
    Case(  # two paths lead to the one module: either is right
        "one-activation-held-by-each-layer",
        on_stream(shared),
        blocks(BLOCKS, **HELD, fn="relu"),
    ),
    Case(
        "time-first",
        on_stream(lambda: nn.Sequential(TimeFirst(), TimeFirst())),
        blocks(["0", "1"], up="fc1", down="fc2", act="relu()", fn="relu", norm="norm2", pos="pre"),
    ),
    Case(
        "bare-sequential",
        seeded(
            lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), stream(4, 8))
        ),
        blocks([""], up="0", act="1", down="2", fn="relu", d=8, h=32),
    ),
    Case(
        "bare-swiglu",
        on_stream(SwiGLU),
        blocks([""], gate="w1", up="w3", down="w2", act="*silu()", fn="silu"),
    ),
    Case(
        "batchnorm-stem",
        on_stream(BatchNormStem, 9, 7),
        blocks(numbered("body.blocks.{}"), **HELD, fn="relu"),
    ),
]

NOTHING: dict[str, Build] = {
    "classifier": seeded(
        lambda: (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), stream(4, 8))
    ),
    "cnn": on_stream(Cnn, 2, 3, 12, 12),
    "cnn-squeeze-excite": on_stream(SqueezeExcite, 2, 3, 12, 12),
}
