"""What the inputs did not reach is listed by name, and a model that runs whole lists nothing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse import NoMLPFound, SwapActivation, find_mlp_blocks, observe, sparsify
from actsparse.blocks.refused import told
from tests.zoo import CASES, LORA, Case

D, H = 8, 24
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def mlp(h: int = H) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, h), nn.ReLU(), nn.Linear(h, D))


class Some(nn.Module):
    """Runs those of its parts that a call names, one after another."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, which: tuple[int, ...]) -> Tensor:
        for i in which:
            x = x + self.parts[i](x)
        return x


class Lists(nn.Module):
    """Experts whose layers are held in a list each."""

    def __init__(self, h: int) -> None:
        super().__init__()
        self.w1 = nn.ModuleList(nn.Linear(D, h) for _ in range(4))
        self.w2 = nn.ModuleList(nn.Linear(h, D) for _ in range(4))

    def forward(self, x: Tensor, which: tuple[int, ...]) -> Tensor:
        for i in which:
            x = x + self.w2[i](F.relu(self.w1[i](x)))
        return x


class Fused(nn.Module):
    """Gate and up in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Branch(nn.Module):
    """Calls its own layers, or one of its parts, or another."""

    def __init__(self, h: int = H) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(D, h), nn.Linear(h, D), mlp()

    def forward(self, x: Tensor, own: bool) -> Tensor:
        return x + (self.down(F.relu(self.up(x))) if own else self.other(x))


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Sequential(mlp(), mlp(40)), mlp()

    def forward(self, text: Tensor | None = None, image: Tensor | None = None) -> Any:
        return (
            None if text is None else text + self.text(text),
            None if image is None else image + self.image(image),
        )


CASES_IDLE: list[Any] = [
    pytest.param(Some(*(mlp() for _ in range(4))), (X, (1,)), ["parts.0", "parts.2", "parts.3"],
                 id="experts"),
    pytest.param(Some(*(mlp(D) for _ in range(3))), (X, (0, 1)), ["parts.2"],
                 id="experts-as-wide-as-the-model"),
    pytest.param(Some(mlp(), mlp(40)), (X, (0,)), ["parts.1"], id="another-width"),
    pytest.param(Some(mlp(), Fused()), (X, (0,)), ["parts.1"], id="fused"),
    pytest.param(Some(mlp(), Some(mlp(), mlp())), (X, (0,)), ["parts.1"], id="largest-part"),
    pytest.param(Lists(H), (X, (0, 3)), ["w1.1", "w2.1", "w1.2", "w2.2"], id="lists-of-layers"),
    pytest.param(Lists(D), (X, (0,)), [f"w{j}.{i}" for i in (1, 2, 3) for j in (1, 2)],
                 id="lists-of-layers-as-wide-as-the-model"),
    pytest.param(Branch(), (X, True), ["other"], id="branch-of-a-module"),
    pytest.param(Branch(), (X, False), ["up", "down"], id="branch-of-layers"),
    pytest.param(Towers(), {"image": X}, ["text"], id="towers"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "inputs", "idle"), CASES_IDLE)
def test_what_did_not_run_is_listed_by_name(model: nn.Module, inputs: Any, idle: list[str]) -> None:
    blocks = find_mlp_blocks(model, inputs)
    assert sorted(item.name for item in blocks.refused) == sorted(idle)
    assert not any(item.reached for item in blocks.refused)
    assert {item.reason for item in blocks.refused} == {
        "its layers did not run on these inputs; give inputs that reach it"
    }


def test_an_error_says_so_where_nothing_else_ran() -> None:
    with pytest.raises(NoMLPFound, match="refused parts: its layers did not run") as caught:
        find_mlp_blocks(Some(mlp(), mlp()), (X, ()))
    assert [item.name for item in caught.value.refused] == ["parts"]


# --- no false alarm ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*(c for c in CASES if c.blocks), *LORA], ids=str)
def test_a_model_that_runs_whole_lists_nothing(case: Case) -> None:
    model, inputs = case.build()
    assert [i.name for i in find_mlp_blocks(model.eval(), inputs).refused if not i.reached] == []


class Spare(nn.Module):
    """Holds heads that nobody calls, and layers whose weights alone are used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(11, D), mlp()
        self.pooler, self.tied, self.head = nn.Linear(D, D), nn.Linear(D, 11), nn.Linear(D, 3)
        self.tied.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.experts = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(x, x, x)[0]
        x = x + self.mlp(x)
        up = torch.stack([e[0].weight for e in self.experts])
        down = torch.stack([e[2].weight for e in self.experts])
        return x + torch.einsum(
            "eh...,edh->...d", F.relu(torch.einsum("btd,ehd->ehbt", x, up)), down
        )


def test_heads_and_layers_whose_weights_alone_are_used_raise_no_alarm() -> None:
    refused = find_mlp_blocks(Spare(), torch.arange(10).view(2, 5)).refused
    assert [item for item in refused if not item.reached] == []


def test_an_adapter_that_is_switched_off_raises_no_alarm() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(mlp()), peft.LoraConfig(r=2, target_modules=["0.0", "0.2"])
    )
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0.0", "0.2"]))
    assert find_mlp_blocks(model, (X,)).refused == []


# --- who says it ---------------------------------------------------------------------------------


def test_names_that_differ_in_numbers_alone_share_a_line() -> None:
    model = Some(*(mlp() for _ in range(5)))
    blocks = find_mlp_blocks(model, (X, (0,)))
    line = "parts.1 … parts.4 (4): its layers did not run on these inputs"
    assert [text.startswith(line) for text in told(blocks.refused)] == [True]
    assert f"  refused {line}" in str(blocks)
    with pytest.warns(UserWarning, match=r"sparsify takes 1 MLP block.*parts\.1 … parts\.4"):
        handle = sparsify(model, SwapActivation("jsrelu"), inputs=(X, (0,)))
    assert f"  refused {line}" in str(handle)


def test_observing_warns_of_what_it_will_not_see() -> None:
    with pytest.warns(UserWarning, match="observe takes 1 MLP block.*leaves out.*text") as caught:
        observe(Towers(), inputs={"image": X}).close()
    assert [one.filename for one in caught] == [__file__]


def test_blocks_that_were_chosen_by_hand_bring_no_warning() -> None:
    model = Towers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(model, SwapActivation("jsrelu"), blocks=find_mlp_blocks(model, {"image": X}))
