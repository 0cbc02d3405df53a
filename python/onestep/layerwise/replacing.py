"""A run of blocks replaced by one linear map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from onestep import linalg
from onestep._interrupts import undisturbed
from onestep._restored import Entry, hooked, hooks, replaced
from onestep._torch_private import own_children
from onestep.evaluation.progress import Progress
from onestep.layerwise.chain import without_caches
from onestep.layerwise.checks import check_dtype_of_sums, check_flags, check_number
from onestep.layerwise.layers import batches_of, call, count_of, evaluating, padded
from onestep.layerwise.outputs import output_of, solve_towards_outputs
from onestep.layerwise.padding import Masks, Padding, warn_of_padding
from onestep.layerwise.pairs import keep_places, map_of, places_of
from onestep.layerwise.places import Places, fill
from onestep.layerwise.rank import numerical_rank
from onestep.layerwise.report import LayerReport, Report


class LinearBlock(nn.Module):
    """A block that is a linear map of its first argument; other arguments are ignored.

    But for a cache of keys and values of transformers: models read from those of one block, often the first, how many
    places there have been. The map has none, and leaves zeros, one for each place.

    Attributes:
        map: nn.Linear.
        count: how long the tuple is that the block returns, all but the first of which are None; 0: it returns none.
        cached: the numbers that the blocks had in the cache.
    """

    # Of blocks that were pickled before there were numbers.
    cached: tuple[int, ...] = ()

    def __init__(self, map: nn.Linear, count: int, cached: Sequence[int] = ()) -> None:
        super().__init__()
        self.map, self.count, self.cached = map, count, tuple(cached)

    def forward(self, hidden: Tensor, *others: Any, **more: Any) -> Any:
        """hidden (…, d) → (…, d)."""
        cache = next((one for one in (*others, *more.values()) if hasattr(one, "get_seq_length")), None)
        if cache is not None and hidden.dim() == 3:
            self._leave_places(getattr(cache, "self_attention_cache", cache), hidden)
        out = self.map(hidden)
        return (out, *[None] * (self.count - 1)) if self.count else out

    def _leave_places(self, cache: Any, hidden: Tensor) -> None:
        zeros = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        for number in self.cached:
            layers = getattr(cache, "layers", [])
            # Those of other kinds, such as states of a recurrence, know of no places.
            if number >= len(layers) or hasattr(layers[number], "keys"):
                cache.update(zeros, zeros, number)


def cached_by(blocks: Iterable[nn.Module]) -> tuple[int, ...]:
    """The numbers that blocks have in a cache of transformers."""
    found: set[int] = set()
    for module in (module for block in blocks for module in block.modules()):
        number = getattr(module, "layer_idx", None)
        found |= set(module.cached) if isinstance(module, LinearBlock) else set()
        found |= {number} if isinstance(number, int) else set()
    return tuple(sorted(found))


@undisturbed
def replace_blocks(
    model: nn.Module,
    data: Any,
    blocks: Sequence[str],
    *,
    ridge: float = 1e-4,
    steps: int = 8,
    dtype: torch.dtype = torch.float64,
    progress: bool = True,
) -> Report:
    """Replaces a run of blocks of a model by one linear map, fitted to what the run does to ``data``.

    W, b ← argmin Σ‖Wx + b − t‖² + λ‖W − 1‖², with x what the first block is given, t what the last returns, and λ =
    ridge · mean diag Σ(x − x̄)(x − x̄)ᵀ, x̄ the mean (ReplaceMe: Shopkhoev et al., NeurIPS 2025). From there ``steps``
    Gauss-Newton steps bring what the whole model puts out closer to what it put out before, Σ‖f(x) − f₀(x)‖².

    The map takes the first block's place and the others leave their container (an nn.Sequential or nn.ModuleList). A
    first block that is given and returns one tensor becomes an nn.Linear, which loads without onestep; any other a
    ``LinearBlock``, which ignores the other arguments and has its nn.Linear as ``map``; in a cache of keys and values
    of transformers it leaves zeros, from which the model knows how many places there have been. ``save`` and ``load``
    keep the maps; ``from_pretrained`` of transformers does not know them and builds the blocks anew, with random
    weights.

    Args:
        model: changed in place.
        data: batches, as in ``quantize``; gone through once, and twice more for each step and the first look.
        blocks: the names of neighbouring blocks in order, such as ["blocks.1", "blocks.2"], whose first argument and
            result (or the first of them) are of the same shape (…, d).
        ridge: 0 or more. It pulls towards leaving the blocks out.
        steps: that are tried; 0: the map that is closest to the run. None are taken from fewer rows than features, nor
            where what the model puts out (its ``logits``, or the first tensor of floats) has no derivative.
        dtype: of the sums and of the solve.
        progress: show a bar.

    Returns:
        A ``Report`` of one map, with Σ‖t − Wx − b‖² / Σ‖t‖² at the end of the run, and the same for plain removal. The
        first grows by steps that look at the end of the model instead. ``damping`` is ``ridge``; ``dead`` and ``rank``
        are of Σxxᵀ.

    Raises:
        ValueError, TypeError: the blocks are not neighbours in one container, return more than a linear map can, or are
            looked at by the model in other ways; the model gives blocks something by their place, such as the masks of
            sliding windows, so that later blocks would be given others'; an argument is out of its range. The model is
            as it was then.
        LinAlgError: the equations are singular; pass a larger ridge.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import replace_blocks
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> report = replace_blocks(model, torch.randn(100, 4), ["0", "1"], ridge=0.0, progress=False)
        >>> model, report.layers[0].error < 1e-6
        (Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Linear(in_features=4, out_features=2, bias=True)
        ), True)
    """
    check_number("ridge", ridge)
    if type(steps) is not int or steps < 0:
        raise ValueError(f"steps is {steps!r}; expected an integer of 0 or more")
    check_flags(progress=progress)
    check_dtype_of_sums(dtype)
    container, first, count = _run_of(model, blocks)
    seen = _Run(blocks[0], dtype)
    batches = batches_of(data)
    with (
        evaluating(model),
        torch.no_grad(),
        replaced(padded([model])),
        Progress(count_of(batches), enabled=progress, what="replace_blocks", unit="batch") as bar,
    ):
        for batch in batches:
            seen.padding = Padding(Masks.of(batch, model))
            entries = seen.padding.hooks(model, [container[first]])
            entries += hooks([(container[first], seen.enter)], before=True)
            with replaced(entries), hooked([(container[first + count - 1], seen.leave)]):
                call(model, batch)
            bar.update()
    if seen.equations is None or seen.equations.count == 0:
        raise ValueError(f"no row of data reached the block {blocks[0]!r}")
    if seen.more:
        _check_more(model, next(iter(batches)), container[first + count - 1])
    d = seen.equations.d
    sums = seen.equations.sums
    scale = float(sums.gram.diagonal().mean()) or 1.0
    # Fitted to what the blocks add, t − x, so that the penalty pulls towards adding nothing.
    added, intercept = seen.equations.solve(ridge * scale)
    parameter = next(model.parameters())
    linear = nn.Linear(d, d, dtype=parameter.dtype, device=added.device)
    with torch.no_grad():
        linear.weight.copy_(added.mT + torch.eye(d, dtype=dtype, device=added.device))
        linear.bias.copy_(intercept)
    run = list(container)[first : first + count]
    block: nn.Module = linear if seen.plain else LinearBlock(linear, seen.count, cached_by(run))
    kept = [module for index, module in enumerate(container) if not first < index < first + count]
    kept[first] = block.train(model.training)
    places, whole = places_of(container), dict(container.named_children())
    fill(container, kept)
    try:
        before: list[Entry] = [(own_children(container), name, module) for name, module in whole.items()]
        around = padded([model]) + without_caches([model])
        with evaluating(model, *whole.values()), torch.no_grad(), replaced(around):
            by_place = Places(model, next(iter(batches)), blocks[0].rpartition(".")[0], container, first, count)
            _run_once(by_place, blocks)
            by_place.check_kinds()
            if not seen.plain:
                by_place.check_arguments(seen.count)
            if steps:
                solve_towards_outputs(model, batches, linear, lambda: replaced(before), steps, dtype)
    except BaseException:
        fill(container, list(whole.values()))
        raise
    keep_places(container, [*places[:first], map_of(places[first : first + count]), *places[first + count :]])
    whole_square = seen.square or 1.0
    # The equations' matrix is of inputs less their means.
    raw = sums.gram + seen.equations.count * torch.outer(sums.x_mean, sums.x_mean)
    report = LayerReport(
        name=blocks[0],
        rows=seen.equations.count,
        features=d,
        dead=int((raw.diagonal() == 0).sum()),
        rank=numerical_rank(raw, seen.equations.count),
        info=0,
        damping=ridge,
        error_before=seen.added_square / whole_square,
        error=seen.lost(linear) / whole_square,
    )
    return Report([report])


def _check_more(model: nn.Module, batch: Any, last: nn.Module) -> None:
    """Refuses a run whose last block returns more than a map can, unless the model does not use it."""

    def first_alone(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (output[0], *[None] * (len(output) - 1))

    same = False
    with evaluating(model), torch.no_grad(), replaced(padded([model]) + without_caches([model])):
        whole = output_of(call(model, batch))
        # A model may fail in any way without what it uses.
        with suppress(Exception), hooked([(last, first_alone)]):
            found = output_of(call(model, batch))
            same = whole is not None and found is not None and torch.equal(whole, found)
    if not same:
        raise ValueError(
            "the blocks return more than the hidden state, and the model uses it, which a linear map cannot give: take "
            "other blocks"
        )


def _run_once(by_place: Places, blocks: Sequence[str]) -> None:
    """Refuses blocks that the model looks at in other ways than by calling them."""
    try:
        by_place.run()
    except Exception as error:
        raise ValueError(
            f"the model does not run with a linear map in the place of {list(blocks)} ({error}): take other blocks; it "
            "is as it was"
        ) from error


def _run_of(model: nn.Module, blocks: Sequence[str]) -> tuple[Any, int, int]:
    """The container, the place of the first block in it, and how many there are."""
    if isinstance(blocks, str) or not blocks or not all(isinstance(name, str) for name in blocks):
        raise TypeError(f"blocks is {blocks!r}; expected the names of one or more blocks")
    names = [name.rpartition(".") for name in blocks]
    parents = {parent for parent, _, _ in names}
    places = [int(place) if place.isdigit() else -1 for _, _, place in names]
    if len(parents) != 1 or places != list(range(places[0], places[0] + len(places))) or places[0] < 0:
        raise ValueError(f"blocks is {list(blocks)}; expected neighbours of one container, such as blocks.1, blocks.2")
    parent = parents.pop()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")
    try:
        container = model.get_submodule(parent)
    except AttributeError:
        raise ValueError(f"blocks is {list(blocks)}; the model has no module {parent!r}") from None
    if not isinstance(container, (nn.Sequential, nn.ModuleList)) or places[-1] >= len(container):
        raise ValueError(
            f"blocks is {list(blocks)}; expected blocks of an nn.Sequential or nn.ModuleList, which is "
            f"{type(container).__name__} of {len(list(container.children()))} here"
        )
    return container, places[0], len(places)


class _Run:
    """What goes into a run of blocks, and what comes out of it."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype, self.warned = name, dtype, False
        self.padding = Padding(Masks())
        self.equations: linalg.NormalEquations | None = None
        self.plain, self.count, self.more = True, 0, False
        self.square = self.added_square = 0.0
        self._given: list[tuple[Tensor, Tensor | None]] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.plain = self.plain and len(args) == 1 and not kwargs
        given = args[0] if args else next(iter(kwargs.values()))
        kept = self.padding.kept(given, module) if isinstance(given, Tensor) else None
        if kept is None and not self.warned and isinstance(given, Tensor) and self.padding.untold(given, module):
            self.warned = True
            warn_of_padding({self.name: tuple(given.shape)})
        self._given.append((given, kept))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.count = len(output) if isinstance(output, tuple) else 0
        self.plain = self.plain and not self.count
        self.more = self.more or (self.count > 1 and any(value is not None for value in output[1:]))
        out = output[0] if self.count else output
        given, kept = self._given.pop()
        if out.shape != given.shape:
            raise ValueError(f"the blocks turn {tuple(given.shape)} into {tuple(out.shape)}; expected one shape")
        X, T = given.reshape(-1, given.shape[-1]), out.reshape(-1, out.shape[-1])
        if kept is not None:
            X, T = X[kept], T[kept]
        X, T = X.to(self.dtype), T.to(self.dtype)
        if self.equations is None:
            d = X.shape[1]
            self.equations = linalg.NormalEquations(d, d, intercept=True, dtype=self.dtype, device=X.device)
        self.equations.update(X, T - X)
        self.square += float(T.square().sum())
        self.added_square += float((T - X).square().sum())

    def lost(self, linear: nn.Linear) -> float:
        """Σ‖t − Wx − b‖²."""
        assert self.equations is not None
        sums, count = self.equations.sums, self.equations.count
        change = linear.weight.detach().to(sums.gram).mT - torch.eye(len(sums.gram)).to(sums.gram)
        # Of centred sums, and what the means leave.
        square = self.added_square - count * float(sums.y_mean.square().sum())
        fitted = float(((change.mT @ sums.gram) * change.mT).sum() - 2 * (change * sums.cross).sum())
        mean = sums.y_mean - sums.x_mean @ change - linear.bias.detach().to(sums.gram)
        return max(square + fitted, 0.0) + count * float(mean.square().sum())
