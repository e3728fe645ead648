"""Train low-rank changes of a model's linear layers in the place of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _LowRank(nn.Module):
    """``W + B A`` with B = 0 at first (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, columns))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@contextmanager
def low_rank(model: nn.Module, rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """Let all linear layers but the head learn a change of some rank; in the end it is added.

    Layers that share their weight with an embedding stay as they are too.

    Args:
        model: any model; changed in place while the context lasts.
        rank: of each change.
        seed: of the first values.

    Yields:
        The parameters to train, by name.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    >>> with low_rank(mlp, rank=2, seed=0) as learning:
    ...     sorted(learning)[:2]
    ['0.parametrizations.weight.0.down', '0.parametrizations.weight.0.up']
    >>> sorted(dict(mlp.named_parameters()))
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and id(module.weight) not in kept
    ]
    orders = [list(layer._parameters) for layer in layers]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            change = _LowRank(layer.weight, rank)  # type: ignore[arg-type]
            parametrize.register_parametrization(layer, "weight", change)
    try:
        names = dict(model.named_parameters())
        yield {name: p for name, p in names.items() if ".parametrizations.weight.0." in name}
    finally:
        for layer, order in zip(layers, orders, strict=True):
            parametrize.remove_parametrizations(layer, "weight")
            for name in order:  # as parameters() had them
                layer._parameters[name] = layer._parameters.pop(name)
