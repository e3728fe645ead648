"""Thresholds after training: drop small activations, as many as a limit on the loss allows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from actsparse.activations import known_as, thresholded
from actsparse.blocks.block import Blocks, MLPBlock, unwrap
from actsparse.blocks.site import site_at, site_of
from actsparse.modify.config_note import note_changes
from actsparse.modify.observed_blocks import Seen, seen_blocks
from actsparse.modify.swap_activation import MixedActivation

_ATTRIBUTE = "_actsparse_thresholds"
_LEAST, _STEPS = 1e-6, 255  # ε is 0, or one of so many from there to 1, each 5.6 % above the last


def calibrate_thresholds(
    model: nn.Module,
    seen: Seen,
    budget: float | None = None,
    *,
    evaluate: Callable[[], float] | None = None,
    share: float | None = None,
    blocks: Iterable[MLPBlock] | None = None,
) -> Thresholds:
    """Give φ of each block a threshold, in place: ``φ_t(z) = φ(z)`` where z > t, else 0.

    One number ε for the whole model says how much may be dropped. The threshold t_b of block b is
    the one that drops the most under the condition

        ``mean_t (Σ_{h: z ≤ t_b} a_th² / Σ_h a_th²) ≤ ε``

    over all tokens t that block b was seen with. In gated blocks z is the gate's and
    a = φ(z) ⊙ u. Of thresholds that drop the same the smallest is taken. Each token counts the
    same: with shares of Σ a² over all tokens, one token a thousand times as large as the others
    would silence them.

    There are two ways to choose ε:

    - ``budget`` and ``evaluate``: the largest ε, by bisection, with which
      ``evaluate() ≤ evaluate() without thresholds + budget``. The loss need not grow with ε: the
      result is within the budget, but perhaps not the largest that is. A larger budget never gives
      a smaller ε.
    - ``share``: ε itself. Nothing is evaluated.

    φ must be a ReLU, JSReLU or squared ReLU, with numbers or not, the model's own or
    ``sparsify``'s. If it has a threshold already, the larger of the two counts. Where t is 0
    nothing changes. ``observe`` and ``save`` know the thresholded φ by its name.

    Sources: CATS (Lee et al. 2024, arXiv 2404.08763) and TEAL (Liu et al. 2024, arXiv 2408.14690)
    choose thresholds by the distribution of what was seen, at one density for all blocks or by
    greedy search; FATReLU is ReLU with a threshold (ProSparse: Song et al. 2024, arXiv 2402.13516).
    One share of each token's Σ a² for all blocks is ours.

    Args:
        model: the model.
        seen: what ``observe(model, "magnitudes")`` returned, after passes in evaluation mode; best
            closed.
        budget: by how much the loss may rise, in its own unit, at least 0.
        evaluate: runs the model as it is and returns its loss (lower is better) on data of your
            choice (validation), in evaluation mode and the same each time. It is called about 9
            times.
        share: ε, from 0 to 1.
        blocks: which of ``seen.blocks`` to change; None: all.

    Returns:
        The handle. Print it for threshold and density of each block; ``remove()`` undoes it.

    Raises:
        ValueError: not one of the two ways; a φ that takes no threshold (GELU and SiLU are never
            zero: swap and finetune first), is a function of your own or is still being mixed;
            blocks that were not observed with ``"magnitudes"``, that no token passed in evaluation
            mode or that were seen with another φ, not 0 at z ≤ 0, or NaN; a model that has
            thresholds; a loss that is not finite. The model is as before then.

    >>> import torch
    >>> from actsparse import observe
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> x, target = torch.randn(64, 8), torch.randn(64, 8)
    >>> with observe(mlp, "magnitudes", inputs=x) as seen, torch.no_grad():
    ...     y = mlp(x)
    >>> loss = lambda: nn.functional.mse_loss(mlp(x), target).item()
    >>> thresholds = calibrate_thresholds(mlp, seen, 0.01, evaluate=loss)
    >>> thresholds.loss_after <= thresholds.loss_before + 0.01
    True
    >>> thresholds.remove()
    >>> torch.equal(mlp(x), y)
    True
    """
    if (share is None) == (budget is None) or (budget is None) != (evaluate is None):
        raise ValueError(
            "give either budget and evaluate=, or share= (how much of a token's Σ a² may go)"
        )
    for name, value, most in (("budget", budget, math.inf), ("share", share, 1.0)):
        if value is not None and not (0 <= value <= most and math.isfinite(value)):
            right = "a finite number ≥ 0" if name == "budget" else "a number from 0 to 1"
            raise ValueError(f"{name}={value!r}: expected {right}")
    chosen = seen_blocks(model, seen, blocks, "calibrate_thresholds")
    # copies, since a session that is still open goes on counting
    parts = {n: copy.deepcopy(seen.part(n, "inference", "magnitudes")) for n in chosen}
    handle = Thresholds(model, chosen, parts)
    try:
        handle._check()
        if budget is not None and evaluate is not None:
            handle._search(budget, evaluate)
        else:
            handle.put(share or 0.0)
    except BaseException:
        handle.remove()
        raise
    return handle


def thresholds_of(model: nn.Module) -> Thresholds | None:
    """The handle of a model's thresholds, also of those that ``load`` has read, or None.

    Args:
        model: any model.

    Returns:
        The handle, or None if the model has no thresholds.

    >>> thresholds_of(nn.Linear(2, 2)) is None
    True
    """
    held = (module.__dict__.get(_ATTRIBUTE) for module in unwrap(model).modules())
    return next((handle for handle in held if handle is not None), None)


def put_thresholds(model: nn.Module, blocks: Blocks, thresholds: Sequence[float]) -> None:
    """Give the blocks thresholds that are known, one each; 0 leaves a block alone.

    Raises:
        ValueError: as :func:`calibrate_thresholds`; the model is as before then.
    """
    given = {b.up.name: (b, t) for b, t in zip(blocks, thresholds, strict=True) if t}
    if not given:
        return
    handle = Thresholds(model, {name: block for name, (block, _) in given.items()})
    try:
        handle.set({name: threshold for name, (_, threshold) in given.items()})
    except BaseException:
        handle.remove()
        raise


class Magnitudes(Protocol):
    """What is asked of a block's measure in ``observe``."""

    @property
    def score(self) -> str:
        """What its thresholds are of: ``"z"``, as ours are, or another score."""

    def threshold(self, share: float) -> float:
        """What drops the most, but no more than this share of a token's Σ a², as a mean."""

    def density(self, threshold: float) -> float:
        """The share of tokens × units above it."""


class Thresholds:
    """The handle that :func:`calibrate_thresholds` returns: print it for what each block drops.

    ``share`` is ε; ``loss_before`` and ``loss_after`` are what ``evaluate`` returned. They are None
    where they were not asked for.

    Args:
        model: the model.
        blocks: the blocks that may have a threshold, by name.
        seen: what was observed of each; None for thresholds from a file.

    Raises:
        ValueError: the model has thresholds already, or a block takes none.

    >>> import torch
    >>> from actsparse import observe
    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> x = torch.randn(64, 8)
    >>> with observe(mlp, "magnitudes", inputs=x) as seen:
    ...     y = mlp(x)
    >>> handle = calibrate_thresholds(mlp, seen, share=0.1)
    >>> (row,) = handle.rows()
    >>> row["density_after"] < row["density_before"]
    True
    >>> handle.set({"0": 0.5})
    >>> [round(threshold, 2) for threshold in handle.in_force().values()]
    [0.5]
    >>> handle.put(0.2)
    >>> handle.remove()
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, MLPBlock],
        seen: Mapping[str, Magnitudes] | None = None,
    ) -> None:
        self.share: float | None = None
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self._seen = seen or {}
        self._root = unwrap(model)
        if thresholds_of(model) is not None:
            raise ValueError(
                "the model has thresholds already; thresholds_of(model).remove() first"
            )
        self._places = {name: _Place(name, block) for name, block in blocks.items()}
        self._root.__dict__[_ATTRIBUTE] = self

    def _check(self) -> None:
        """Check that every block was seen with a φ that is 0 at z ≤ 0, as a threshold needs it."""
        for name, part in self._seen.items():
            if part.score != "z":
                raise ValueError(
                    f"block {name!r} was observed with activations that are not 0 at z ≤ 0 (by "
                    f"another φ than {self._places[name].function} now, or NaN): observe it again"
                )

    def set(self, thresholds: Mapping[str, float]) -> None:
        """Set the thresholds of blocks.

        Args:
            thresholds: by name of the block; 0 takes its threshold away.
        """
        for name, threshold in thresholds.items():
            self._places[name].set(threshold)
        note_changes(self._root)

    def put(self, share: float) -> None:
        """Set the thresholds that drop at most a given share of a token's Σ a², on average.

        Args:
            share: ε of :func:`calibrate_thresholds`, from 0 to 1.
        """
        self.share = share
        self.set({name: part.threshold(share) for name, part in self._seen.items()})

    def _search(self, budget: float, evaluate: Callable[[], float]) -> None:
        """Set the thresholds of the largest ε that bisection finds within a budget."""
        known: dict[tuple[float, ...], float] = {}

        def loss(step: int) -> float:
            self.put(_LEAST ** (1 - step / _STEPS) if step else 0.0)
            now = tuple(place.threshold for place in self._places.values())
            if now not in known:
                known[now] = float(evaluate())
            return known[now]

        before = self.loss_before = loss(0)
        if not math.isfinite(before):
            raise ValueError(f"evaluate() returned {before} for the model without thresholds")
        within, beyond = 0, _STEPS + 1
        while beyond - within > 1:
            middle = (within + beyond) // 2
            if loss(middle) <= before + budget:  # NaN is not
                within = middle
            else:
                beyond = middle
        self.loss_after = loss(within)

    def remove(self) -> None:
        """Give the blocks the φ back that they had: the model's own or ``sparsify``'s."""
        self.set(dict.fromkeys(self._places, 0.0))
        if self._root.__dict__.get(_ATTRIBUTE) is self:
            del self._root.__dict__[_ATTRIBUTE]

    @property
    def blocks(self) -> Blocks:
        """The blocks that may have a threshold."""
        return Blocks(place.block for place in self._places.values())

    def in_force(self) -> dict[nn.Module, float]:
        """The thresholds above 0.

        Returns:
            By the module of up of each block.
        """
        places = self._places.values()
        return {place.block.up.module: place.threshold for place in places if place.threshold}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each block.

        Returns:
            Rows for JSON: ``block``; ``function`` (the name of its φ now); ``threshold``; and, on
            the data seen, ``density_before`` and ``density_after``, None for thresholds from a
            file. Densities are for the block by itself: thresholds of earlier blocks do not change
            its input.
        """
        rows = []
        for name, place in self._places.items():
            part, t = self._seen.get(name), place.threshold
            before = None if part is None else part.density(-math.inf)
            after = before if part is None or not t else part.density(t)
            known = {"block": name, "function": place.function, "threshold": t}
            rows.append({**known, "density_before": before, "density_after": after})
        return rows

    def __str__(self) -> str:
        head = f"thresholds in {len(self.in_force())} of {len(self._places)} MLP blocks"
        if self.share is not None:
            head += f", which drop at most {self.share:.3g} of a token's Σ a² (mean)"
        if self.loss_before is not None and self.loss_after is not None:
            head += f": loss {self.loss_before:.6g} → {self.loss_after:.6g}"
        lines = [head]
        for row in self.rows():
            line = f"  {row['block']}: {row['function']}"
            if row["density_before"] is not None:
                before, after = 1 - row["density_before"], 1 - row["density_after"]
                line += f", sparsity {before:.2%} → {after:.2%}"
            lines.append(line)
        return "\n".join(lines)


class _Place:
    """One block's φ: on its own, or with a threshold."""

    def __init__(self, name: str, block: MLPBlock) -> None:
        self.block = block
        site = site_at(block)
        swap = None if site is None else site.phi
        if swap is not None and not (isinstance(swap, MixedActivation) and swap.done):
            what = (
                "still being mixed"
                if isinstance(swap, MixedActivation)
                else "a function of all units"
            )
            raise ValueError(f"φ of block {name!r} is {what}: it takes no threshold")
        if swap is not None and known_as(swap.new.name) is not swap.new:
            raise ValueError(
                f"φ of block {name!r} is a function of your own, {swap.new.name!r}: it takes no "
                f"threshold; leave the block out of blocks="
            )
        function = block.activation.function if swap is None else swap.new.name
        if function is None:
            raise ValueError(f"φ of block {name!r} is not known by name: it takes no threshold")
        try:
            plain = thresholded(function, 0.0)
        except ValueError as error:
            raise ValueError(
                f"φ of block {name!r} takes no threshold on z: {error}; swap it for a ReLU and "
                f"finetune first, or leave the block out of blocks="
            ) from None
        self.plain = plain if swap is None else swap.new
        # the threshold goes into a swap's own φ, so that recipe and thresholds come and go freely
        self.ours = swap is None
        self.phi = MixedActivation(self.plain, mixed=True) if swap is None else swap
        self._threshold = 0.0

    @property
    def threshold(self) -> float:
        """What is in force; 0 also where a swap that held it was taken back."""
        site = site_at(self.block)
        return self._threshold if site is not None and site.phi is self.phi else 0.0

    @property
    def function(self) -> str:
        """The name of φ, the threshold in it."""
        return self.phi.new.name if self.threshold else self.plain.name

    def set(self, threshold: float) -> None:
        """Drop a where z ≤ ``threshold``; 0 gives the block's φ back."""
        site = site_of(self.block)
        self.phi.new = thresholded(self.plain.name, threshold) if threshold else self.plain
        self._threshold = threshold
        if not self.ours:
            site.refresh()
        elif not threshold:
            site.release(self.phi)
        elif site.phi is not self.phi:
            site.replace_activation(self.phi)
        else:
            site.refresh()
