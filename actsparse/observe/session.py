"""``observe``: measures that read a model's own passes and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from actsparse.blocks.block import MLPBlock
from actsparse.blocks.resolve import blocks_of
from actsparse.observe.averages import Averages
from actsparse.observe.density import Density
from actsparse.observe.gradient_measure import GradientMeasure, Reduction, Scale, Weighing
from actsparse.observe.registry import MEASURES, PHASES, Mask, Names, Phase, Watch, options_of
from actsparse.observe.session_state import check_state
from actsparse.observe.show import html_of, plotted, text_of
from actsparse.observe.tables import table_of

SampleMask = Tensor | Callable[[int], Tensor | None]


def observe(
    model: nn.Module,
    measures: Names = ("density",),
    *,
    inputs: Any = None,
    blocks: Iterable[MLPBlock] | None = None,
    mask: Mask | None = None,
    sample_mask: SampleMask | None = None,
    loss_reduction: Reduction = "mean",
    loss_scale: Scale | torch.amp.GradScaler = 1.0,
) -> Seen:
    """Measure the MLP blocks of a model while you run it, in training and in inference.

    Outputs, gradients and random numbers stay as they are. Training and inference are counted
    apart, by the mode (``.train()``, ``.eval()``) that each block is in. Counts are exact. They are
    added up on the block's device without waiting for it. A pass that gradient checkpointing
    repeats counts once. Every process counts its own passes.

    Args:
        model: any model: compiled or not, modified by ``sparsify`` before or after, or not at all.
        measures: names, or name → options of the measure. ``"density"``, ``"magnitudes"``; of
            gradients, read in backward: ``"flatness"``, ``"gradient"``, ``"noise"``; of weights:
            ``"spectrum"``.
        inputs: for finding the blocks in one pass, as :func:`actsparse.find_mlp_blocks` takes them.
        blocks: the blocks to watch, instead. A model that ``sparsify`` has modified needs neither.
        mask: which tokens to count: bool [B, T], True = count, or a function of (B, T), the batch
            and length of the running call, that returns such a mask or None for all. Without it,
            padding that the model's own ``attention_mask`` (or ``…_key_padding_mask``) marks is
            left out. A model that gets none counts padding.
        sample_mask: which samples have a part in the loss: bool [B], or a function of B. The
            others are left out of the measures of gradients.
        loss_reduction: how the loss that backward starts from is made of per-sample losses:
            ``"mean"`` or ``"sum"`` over samples. If per-sample losses are sums over tokens, a
            language model's mean over all tokens of the batch is a sum with ``loss_scale=1 /
            tokens``. For samples of equal length it is also a mean of means.
        loss_scale: what that loss was multiplied by: 1/k under accumulation of k batches; AMP's
            ``GradScaler``; a number, or a function that gives it, called in each forward pass.

    Returns:
        The session. It watches until it is closed, or until the end of a ``with`` block; print it
        for a table.

    Raises:
        ValueError: unknown measures; blocks missing, or not of this model; ``loss_reduction``.
        NoMLPFound: ``inputs`` show no MLP block.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> x = torch.randn(4, 5, 8)
    >>> with observe(mlp, inputs=x) as seen:
    ...     y = mlp(x)
    >>> summary = seen.summary("inference")
    >>> summary["units"], summary["density"] == (mlp[0](x) > 0).double().mean().item()
    (32, True)
    >>> seen.summary("train") is None
    True
    """
    options = options_of(measures, MEASURES)
    found = blocks_of(model, inputs, blocks, "observe")
    return Seen(found, options, mask, Weighing(loss_reduction, loss_scale, sample_mask))


class Seen:
    """A session of :func:`observe` and what it has seen so far; print it for a table.

    Its attribute ``blocks`` maps names to blocks. The name is the block's own, or its up layer's
    where that is empty or shared. It counts on until :meth:`reset`; what it says of a long training
    is an average over all of it, and a warning says so unless its attribute ``whole`` is True.

    Args:
        blocks: the blocks to watch.
        options: measure → its options.
        mask: which tokens count, as for :func:`observe`.
        weighing: how gradients are scaled to those of per-sample losses.
        always: read gradients also of outputs that do not require one, as in a frozen model.

    >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    >>> seen = observe(mlp, inputs=torch.randn(2, 8))
    >>> _ = mlp(torch.randn(100, 8))
    >>> seen.units("0", "inference").shape, int(seen.part("0", "inference", "density").tokens)
    (torch.Size([32]), 100)
    >>> seen.close()
    >>> _ = mlp(torch.randn(100, 8))  # not seen
    >>> seen.open()
    >>> _ = mlp(torch.randn(100, 8))
    >>> state = seen.state_dict()
    >>> seen.reset()
    >>> seen.summary("inference") is None, seen.leaves("train")
    (True, [])
    >>> seen.load_state_dict(state)
    >>> seen.summary("inference")["blocks"][0]["tokens"]
    200
    >>> seen.close()
    """

    def __init__(
        self,
        blocks: list[MLPBlock],
        options: dict[str, dict[str, Any]],
        mask: Mask | None = None,
        weighing: Weighing | None = None,
        always: bool = False,
    ) -> None:
        self.measures = tuple(options)
        self.weighing = weighing or Weighing()
        called = [block.name for block in blocks]
        self._watches: dict[str, Watch] = {}
        for block in blocks:
            alone = block.name and called.count(block.name) == 1
            label = block.name if alone else block.up.name
            self._watches[label] = Watch(block, options, mask, self.weighing, always)
        self.blocks = {name: watch.block for name, watch in self._watches.items()}
        for watch in self._watches.values():
            watch.attach()
        self._open = True
        self.whole = False  # whether averages over a training are meant
        self._averages = Averages(blocks)

    def summary(self, phase: Phase) -> dict[str, Any] | None:
        """Sum up the measures over all passes of one phase.

        Args:
            phase: ``"train"`` or ``"inference"``.

        Returns:
            Numbers for JSON, or None if there was no pass. Of density: ``density``,
            ``derivative_density`` (shares of all units × tokens), ``dead`` (how many units were
            never active), ``units``, ``living_density`` (density among units that were active at
            least once; 0.0 if none was). Under ``blocks`` are the same for each block that tokens
            passed, with its name, ``block``, and ``tokens``. A block that is called several times
            in a pass (ALBERT) has its units once and each call's tokens.

        Raises:
            ValueError: no such phase.
        """
        _check(phase)
        if phase == "train" and not self.whole:
            self._averages.notice()
        whole: dict[str, Any] | None = None
        rows: dict[str, dict[str, Any]] = {}
        for name in self.measures:
            parts = {label: w.measures[phase][name] for label, w in self._watches.items()}
            summary = MEASURES[name].summary(parts)
            if summary is not None:
                for row in summary["blocks"]:
                    rows.setdefault(row["block"], {}).update(row)
                whole = (whole or {}) | summary
        return None if whole is None else whole | {"blocks": list(rows.values())}

    def units(self, block: str, phase: Phase) -> Tensor:
        """The share of the tokens for which each hidden unit of a block was active.

        Args:
            block: the block's name.
            phase: ``"train"`` or ``"inference"``.

        Returns:
            Shares from 0 to 1, float64 [H].

        Raises:
            ValueError: no such block or phase, density is not observed, or no token was seen.
        """
        density: Density = self.part(block, phase, "density")
        return density.active.double() / density.tokens

    def part(self, block: str, phase: Phase, measure: str) -> Any:
        """One measure of one block in one phase, as the object that counts it.

        Args:
            block: the block's name.
            phase: ``"train"`` or ``"inference"``.
            measure: the measure's name.

        Returns:
            An object of the measure's class.

        Raises:
            ValueError: no such block or phase, not observed, or no token was seen.
        """
        _check(phase)
        if block not in self._watches:
            raise ValueError(f"unknown block {block!r}; known: {', '.join(self._watches)}")
        part = self._watches[block].measures[phase].get(measure)
        if part is None:
            raise ValueError(f"{measure} is not observed; measures: {', '.join(self.measures)}")
        if not int(getattr(part, "tokens", 1)):
            raise ValueError(f"block {block!r} has seen no token in phase {phase!r}")
        return part

    def leaves(self, phase: Phase) -> list[Tensor]:
        """The tensors whose gradients collect what measures read in the backward pass.

        Args:
            phase: ``"train"`` or ``"inference"``.

        Returns:
            The tensors; none if no measure of gradients is observed.
        """
        return [
            leaf
            for watch in self._watches.values()
            for measure in watch.measures[phase].values()
            if isinstance(measure, GradientMeasure)
            for leaf in measure.leaves
        ]

    def reset(self, phase: Phase | None = None) -> None:
        """Forget the passes of one phase, or of both.

        Args:
            phase: ``"train"`` or ``"inference"``; None: both.
        """
        if phase is not None:
            _check(phase)
        if phase != "inference":
            self._averages.begin()
        for watch in self._watches.values():
            for each in PHASES if phase is None else (phase,):
                for measure in watch.measures[each].values():
                    measure.reset()

    def pool(self, phase: Phase | None = None) -> None:
        """Add up what all processes of ``torch.distributed`` have seen.

        Call it in each of them. Afterwards each holds the sum, so reset all but one before they see
        more.

        Args:
            phase: ``"train"`` or ``"inference"``; None: both.
        """
        if phase is not None:
            _check(phase)
        phases = PHASES if phase is None else (phase,)
        with torch.inference_mode(False):  # else no later step outside it could add to them
            for _, measure in self._measures(phases):
                total = [
                    tensor.clone(memory_format=torch.contiguous_format)
                    for tensor in measure.state()
                ]
                for tensor in total:
                    torch.distributed.all_reduce(tensor)
                measure.load(total)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that was counted so far; :meth:`load_state_dict` goes on from it.

        Measures of the weights themselves (``"spectrum"``) count nothing. Every process has a state
        of its own.

        Returns:
            Copies, by ``<block>/<phase>/<measure>/<number>``; an empty tensor stands for zeros
            only.

        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> seen = observe(mlp, inputs=torch.randn(4, 5, 8))
        >>> _ = mlp(torch.randn(4, 5, 8))
        >>> {key: list(tensor.shape) for key, tensor in seen.state_dict().items()}
        {'0/train/density/0': [32], '0/train/density/1': [32], '0/train/density/2': [],
         '0/inference/density/0': [0], '0/inference/density/1': [0], '0/inference/density/2': [0]}
        """
        return {
            key: tensor.clone() if bool(tensor.any()) else tensor.new_empty(0)
            for key, tensor in self._tensors().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where :meth:`state_dict` was called; earlier counts are forgotten.

        Args:
            state: what it returned.

        Raises:
            ValueError: the state is of other blocks or measures, or of other sizes. Nothing has
                changed then.
        """
        own = self._tensors()
        check_state(state, own)
        with torch.inference_mode(False):
            for stem, measure in self._measures():
                held = {f"{stem}/{i}": tensor for i, tensor in enumerate(measure.state())}
                measure.load(
                    [
                        state[key] if state[key].numel() else tensor.new_zeros(()).expand_as(tensor)
                        for key, tensor in held.items()
                    ]
                )

    def _measures(self, phases: Iterable[Phase] = PHASES) -> Iterator[tuple[str, Any]]:
        for label, watch in self._watches.items():
            for phase in phases:
                for name, measure in watch.measures[phase].items():
                    yield f"{label}/{phase}/{name}", measure

    def _tensors(self) -> dict[str, Tensor]:
        """What holds the counts, by the keys of the state."""
        return {
            f"{stem}/{i}": tensor
            for stem, measure in self._measures()
            for i, tensor in enumerate(measure.state())
        }

    def open(self) -> None:
        """Watch again after :meth:`close`, and count on."""
        if not self._open:
            self._open = True
            for watch in self._watches.values():
                watch.attach()

    def close(self) -> None:
        """Stop watching and keep what was seen; calling it twice does no harm."""
        if self._open:
            self._open = False
            for watch in self._watches.values():
                watch.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def print(self) -> None:
        """Print the tables, in colour if the terminal has it."""
        from rich.console import Console

        console = Console()
        if console.is_terminal or console.is_jupyter:
            for table in self._tables():
                console.print(table)
        else:
            print(self)

    def plot(self, key: str = "density", ax: Any | None = None) -> Any:
        """Plot a number of each block, a line for each phase that was seen.

        Args:
            key: a number in the ``blocks`` of :meth:`summary`, such as ``"dead"``.
            ax: axes of matplotlib to draw into; None: new ones.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: matplotlib is missing.
            ValueError: the blocks have no such number.
        """
        return plotted(self._summaries(), key, ax)

    def __str__(self) -> str:
        return text_of(self._tables())

    def __repr__(self) -> str:
        state = "watching" if self._open else "closed"
        return f"<Seen {', '.join(self.measures)}: {len(self.blocks)} MLP blocks, {state}>"

    def _repr_html_(self) -> str:
        return html_of(self.measures, self._summaries())

    def _summaries(self) -> dict[str, dict[str, Any] | None]:
        return {phase: self.summary(phase) for phase in PHASES}

    def _tables(self) -> list[Any]:
        """One for each measure."""
        summaries = self._summaries()
        return [table_of(MEASURES[name].columns, summaries) for name in self.measures]


def _check(phase: str) -> None:
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; known: {', '.join(PHASES)}")
