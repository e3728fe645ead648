"""MLPs that are shaped like others and cannot be taken are named in a warning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actsparse import find_mlp_blocks, observe, sparsify

T, D = 10, 16
X = torch.randn(2, T, D)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class MixerLayer(nn.Module):
    """As in MLP-Mixer (arXiv 2105.01601): one MLP over tokens, one over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.tokens, self.channels = MLP(T, 24), MLP(D, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


def test_the_token_mlps_of_a_mixer_are_named() -> None:
    model = nn.Sequential(MixerLayer(), MixerLayer())
    blocks = find_mlp_blocks(model, X)
    assert [block.name for block in blocks] == ["0.channels", "1.channels"]
    assert [each.name for each in blocks.refused] == ["0.tokens", "1.tokens"]
    said = r"sparsify takes 2 MLP blocks and leaves out .*0\.tokens … 1\.tokens \(2\): MLP-shaped"
    with pytest.warns(UserWarning, match=said):
        handle = sparsify(model, inputs=X)
    assert "refused 0.tokens … 1.tokens (2)" in str(handle)
    handle.remove()
    with pytest.warns(UserWarning, match="observe takes 2 MLP blocks"):
        observe(model, inputs=X).close()


def test_a_projection_and_a_classifier_beside_blocks_are_no_mlps() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(D), MLP(D, 64)
            self.pool, self.act, self.head = nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mlp(self.norm(x))
            return self.head(self.act(self.pool(x[:, 0])))

    sparsify(Classifier(), inputs=X)  # warnings are errors here
