"""The k largest logits of a language model's head, found without multiplying by all of its rows."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsparse.kernels import backends, ops
from actsparse.kernels.prepared import fingerprint, laid

CHUNK = 4096  # rows that are widened to float32 at a time
SOME = 64  # rows whose logits are summed in float64 without a look at them in float32


class CertifiedHead:
    """The k largest logits of a head, with a proof that no other logit is among them.

    A head ``logits = h Wᵀ + b`` reads W [V, D] for each token, though most logits are far from the
    largest. Here some rows are multiplied first; the k-th largest of their logits is a level that
    the k largest of all reach. An int8 copy of W bounds the other logits (Cauchy–Schwarz, the
    screen of :func:`sparse_mlp`), and only rows that may reach the level are multiplied by.

    Logits are sums in float64, whatever the dtype of W. So they may order tokens otherwise than
    logits that are rounded to bfloat16. Of equal logits the lowest token comes first.

    Args:
        weight: W [V, D], float32 or bfloat16 on the CPU; changes of it are noticed.
        bias: b [V], or None.

    Raises:
        ValueError: the weight is no plain matrix of these dtypes on the CPU, or the bias does not
            fit it.

    >>> head = CertifiedHead(torch.eye(5))
    >>> head.topk(torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0]), 3)
    (tensor([3., 3., 2.]), tensor([1, 3, 4]))
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
        if not plain or weight.dim() != 2 or weight.dtype not in backends.CPU or not weight.is_cpu:
            raise ValueError(
                f"weight is a {type(weight).__name__} {weight.dtype} {list(weight.shape)} on "
                f"{weight.device}: expected a plain [V, D] in float32 or bfloat16 on the CPU"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}: expected {[len(weight)]}")
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.read = 0  # rows that the last call multiplied by, those of samples among them
        self._of: tuple[int, ...] | None = None
        self._codes: list[Tensor] = []
        self._samples: dict[int, Tensor] = {}

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> Self:
        """The head of a causal language model of transformers.

        Args:
            model: the model, on the CPU.
            ids: token ids [B, T] on which the model is run once.

        Returns:
            The head.

        Raises:
            ValueError: the model's logits are not its head's outputs, as where they are capped or
                scaled, or the head is not a plain linear layer.

        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)
        >>> CertifiedHead.of(GPT2LMHeadModel(config), torch.tensor([[1, 2]])).weight.shape
        torch.Size([9, 8])
        """
        layer = model.get_output_embeddings()
        if type(layer) is not nn.Linear:
            raise ValueError(
                f"the head of this {type(model).__name__} is a {type(layer).__name__}: expected a "
                f"plain nn.Linear"
            )
        made: list[Tensor] = []
        with layer.register_forward_hook(lambda module, args, y: made.append(y)), torch.no_grad():
            logits = model(ids).logits
        if len(made) != 1 or not torch.equal(made[0], logits):
            raise ValueError(
                f"the logits of this {type(model).__name__} are not what its head gives: they are "
                f"capped, scaled or changed otherwise afterwards"
            )
        return cls(layer.weight, layer.bias)

    def topk(self, hidden: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest logits and their tokens.

        Args:
            hidden: what enters the head [..., D], in the weight's dtype.
            k: how many, from 1 to V.

        Returns:
            Logits [..., k] in float32, largest first, and tokens [..., k].

        Raises:
            ValueError: ``hidden`` or ``k`` does not fit the head.
        """
        rows, width = self.weight.shape
        if hidden.shape[-1:] != (width,) or hidden.dtype is not self.weight.dtype:
            raise ValueError(
                f"hidden is {hidden.dtype} {list(hidden.shape)}: expected {self.weight.dtype} "
                f"[..., {width}]"
            )
        if not 1 <= k <= rows:
            raise ValueError(f"k is {k}: expected 1 to {rows}")
        screens = self._look()
        self.read = 0
        with torch.no_grad():
            each = [self._of_one(x, k, screens) for x in hidden.detach().reshape(-1, width)]
        shape = (*hidden.shape[:-1], k)
        if not each:
            return torch.empty(shape), torch.empty(shape, dtype=torch.int64)
        return tuple(torch.stack(part).view(shape) for part in zip(*each, strict=True))  # type: ignore[return-value]

    def _look(self) -> bool:
        """Whether rows can be screened; what was made of other weights is forgotten."""
        if not backends.screens(self.weight):
            return False
        try:
            now = self.weight._version, self.weight.data_ptr(), fingerprint(self.weight)
        except RuntimeError:  # made in inference mode: changes leave no trace
            return False
        if now != self._of:
            self._codes, self._samples, self._of = ops.quantise(laid(self.weight)), {}, now
        return True

    def _of_one(self, x: Tensor, k: int, screens: bool) -> tuple[Tensor, Tensor]:
        rows = len(self.weight)
        # of `step` rows one is in the sample, and about k · step rows reach its k-th largest logit;
        # the sample's rows lie together, and take a fourth of the time of others
        step = math.isqrt(rows // (4 * k))
        if not screens or step < 4 or not bool(x.isfinite().all()):
            return self._among(None, x, k)
        sample = self._samples.get(step)
        if sample is None:
            sample = self._samples[step] = self.weight[::step].contiguous()
        logits = F.linear(x, sample).float()
        if self.bias is not None:
            logits += self.bias[::step]
        self.read += len(sample)
        level = self._exact(logits.topk(k).indices * step, x).min()
        if not bool(level.isfinite()):
            return self._among(None, x, k)
        # what float64 may have rounded away when the bias was added
        sizes = level.abs() if self.bias is None else level.abs() + self.bias.abs().max().double()
        level = level - 2.0**-40 * sizes
        # bias − level, rounded up, so that rounding leaves no row out
        over = -level if self.bias is None else self.bias.double() - level
        over = torch.nextafter(over.to(x.dtype), x.new_tensor(math.inf)).expand(rows).contiguous()
        kernels = backends.compiled()
        _, found = kernels.candidates(x[None], laid(self.weight), over, *self._codes, 0.0)
        return self._among(found.long(), x, k)

    def _among(self, tokens: Tensor | None, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of these tokens, None: of all; tokens are in their order."""
        if tokens is None:
            tokens = torch.arange(len(self.weight))
        self.read += len(tokens)
        if len(tokens) > max(SOME, 2 * k):  # float32 tells which of them may be among the k
            wide = x.float()
            parts = [self.weight[some].float() for some in tokens.split(CHUNK)]
            logits = torch.cat([part @ wide for part in parts])
            sizes = torch.cat([part.norm(dim=1) for part in parts]) * wide.norm()
            gamma = (2 * len(x) + 64) * 2.0**-24  # of any order of summation, and of the norms
            error = gamma * sizes + len(x) * 2.0**-126
            if self.bias is not None:
                more = self.bias[tokens].float()
                logits, error = logits + more, error + gamma * (more.abs() + logits.abs())
            least = (logits - error).topk(k).values[-1]
            if bool((logits - error).isfinite().all()):
                tokens = tokens[logits + error >= least]
        exact = self._exact(tokens, x)
        order = exact.argsort(descending=True, stable=True)[:k]
        return exact[order].float(), tokens[order]

    def _exact(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Logits in float64, each summed as if it were the only one."""
        wide = x.double()
        parts = [(self.weight[some].double() * wide).sum(-1) for some in tokens.split(CHUNK)]
        logits = torch.cat(parts)
        return logits if self.bias is None else logits + self.bias[tokens].double()
