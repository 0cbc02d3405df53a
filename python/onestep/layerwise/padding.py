"""Which rows of what a layer is given are padding."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from onestep._restored import Entry, hooks
from onestep.layerwise.layout import Layouts, layouts_of

# What batches call the masks of the places: (name, whether True is a place that counts).
_PLACES = (("attention_mask", True), ("src_key_padding_mask", False))
_DECODER = (("decoder_attention_mask", True), ("tgt_key_padding_mask", False))
# What modules that look at another sequence call its states (transformers, torch.nn.Transformer).
_OTHER_STATES = {"encoder_hidden_states": None, "memory": None}.keys()
# Rows whose bits are added up at a time.
_MOST_ROWS = 1024


@dataclass
class _Frame:
    """A module that is running, with what it was given."""

    given: Tensor | None
    kept: Tensor | None  # which rows of it are not padding
    other: Tensor | None  # states of the encoder
    in_decoder: bool
    bits: Tensor | None = None

    def among(self, rows: Tensor) -> Tensor | None:
        """Which of the rows are not padding, where all are rows of what the module was given."""
        if self.given is None or self.kept is None or self.given.shape[-1] != rows.shape[-1]:
            return None
        if self.given.dtype != rows.dtype:
            return None
        if self.bits is None:
            self.bits = _sums_of_bits(self.given.reshape(-1, self.given.shape[-1]))
        bits = _sums_of_bits(rows)
        if not bool(torch.isin(bits, self.bits).all()):
            return None
        return torch.isin(bits, self.bits[self.kept])


@dataclass(frozen=True)
class Masks:
    """Which places of a batch are not padding.

    Attributes:
        places: (sequences, places), bool; None: all.
        decoder: the same of what the decoder of an encoder-decoder model is given.
        within: the module that what runs is a part of, where that is not the whole model.
        layouts: of the model's modules, where a mask has as many sequences as places.
    """

    places: Tensor | None = None
    decoder: Tensor | None = None
    within: _Frame | None = None
    layouts: Layouts = field(default_factory=dict)

    @staticmethod
    def of(batch: Any, model: nn.Module) -> Masks:
        """What a mapping of keyword arguments says of padding, by the names that transformers and torch.nn have.

        Args:
            batch: of the model.
            model: is run once more where a mask has as many sequences as places.
        """
        if not isinstance(batch, Mapping):
            return Masks()
        places, decoder = _mask_of(batch, _PLACES), _mask_of(batch, _DECODER)
        square = [mask for mask in (places, decoder) if mask is not None and _is_ambiguous(mask)]
        return Masks(places, decoder, layouts=layouts_of(model, batch, len(square[0])) if square else {})


def _mask_of(batch: Mapping[Any, Any], names: Iterable[tuple[str, bool]]) -> Tensor | None:
    for name, counts in names:
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() in (1, 2, 3, 4):
            # torch.nn takes masks of floats, too, that are added to the scores; so does transformers where they are of
            # each two places, (sequences, heads, places, places). A place that none looks at is padding.
            added = mask.dim() > 2 and mask.is_floating_point() and mask.numel() > 0 and float(mask.min()) < 0
            places = (mask == 0 if added else mask.bool()) if counts else mask == 0
            while places.dim() > 2:
                places = places.any(1)
            # One sequence without a dimension of sequences.
            places = places[None] if places.dim() == 1 else places
            return None if bool(places.all()) else places
    return None


class Padding:
    """Tells rows of padding apart while a model runs on one batch, with ``hooks`` there.

    A layer's input is known by its shape where it has all places, (sequences, places, features), (places, sequences,
    features), with a dimension of heads, or all in one dimension. Rows that a mixture sends to an expert are looked for
    among those that the modules around it were given, by their bits; what an expert's later layers are given has the
    rows of its first. In a decoder, which is known by an argument with the encoder's states, the mask is the decoder's,
    but for these states.

    Args:
        masks: of the batch.
    """

    def __init__(self, masks: Masks) -> None:
        self._masks = masks
        self._frames: list[_Frame] = [] if masks.within is None else [replace(masks.within)]
        self._experts: dict[tuple[int, int], Tensor] = {}

    def hooks(self, model: nn.Module, modules: Iterable[nn.Module]) -> list[Entry]:
        """What ``onestep._restored.replaced`` takes, for the modules that have these among their children.

        Args:
            model: that will run.
            modules: the layers; of stacked experts what has the stacks, which counts as a module around them.
        """
        if self._masks.places is None and self._masks.decoder is None:
            return []
        chosen = {id(module) for module in modules}
        around: dict[int, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if id(module) not in chosen:
                continue
            above = name.split(".")[:-1] if name else []
            for depth in range(len(above) + 1 if name else 0):
                outer = model.get_submodule(".".join(above[:depth]))
                around[id(outer)] = outer
            if not isinstance(getattr(module, "weight", None), Tensor):
                around[id(module)] = module
        # Decoders, after which the mask is theirs.
        around |= {id(module): module for module in model.modules() if _names_of(type(module).forward) & _OTHER_STATES}
        pairs = [(module, self._enter(module)) for module in around.values()]
        return hooks(pairs, before=True) + hooks([(module, self._leave) for module in around.values()])

    def here(self) -> Masks:
        """For what runs by itself afterwards, and now is a part of a module that is running."""
        frame = self._frames[-1] if self._frames else None
        return replace(self._masks, within=frame and _Frame(None, None, frame.other, frame.in_decoder))

    def kept(
        self, x: Tensor, module: nn.Module | None, expert: tuple[int, int] | None = None, *, sure: bool = True
    ) -> Tensor | None:
        """Which of an input's rows, all dimensions but the last in one, are not padding; None: all count.

        Args:
            x: what a layer is given.
            module: the layer; None: x is what the model returns.
            expert: of a stack (``expert_of``), the same for all its layers.
            sure: refuse an input of which it cannot be told where the sequences are.

        Returns:
            (rows,), bool.

        Raises:
            ValueError: ``sure``, and it cannot be told.
        """
        mask = self._mask_for(x, self._frames[-1] if self._frames else None)
        if mask is None or x.dim() < 2:
            return None
        rows = x.reshape(-1, x.shape[-1])
        if x.dim() > 2:
            shaped = _by_shape(x, mask, self._masks.layouts.get(None if module is None else id(module)))
            if shaped is not None:
                return shaped
            if sure and x.shape[:-1] == mask.shape:
                raise ValueError(
                    f"{type(module).__name__} is given {tuple(x.shape)} by a batch of {len(mask)} sequences of as many "
                    "places, so that which of the two come first cannot be told: pass batches with another number of "
                    "sequences"
                )
        else:
            inner = next((frame for frame in reversed(self._frames) if frame.given is not None), None)
            if inner is not None and inner.kept is not None and _are_same(inner.given, x):
                return inner.kept
        for frame in reversed(self._frames):
            found = frame.among(rows)
            if found is not None:
                if expert is not None:
                    self._experts[expert] = found
                return found
        for found in [None if expert is None else self._experts.get(expert)] + [
            frame.kept for frame in reversed(self._frames)
        ]:
            if found is not None and len(found) == len(rows):
                return found
        return mask.reshape(-1) if x.dim() == 2 and len(rows) == mask.numel() else None

    def expert(self, expert: tuple[int, int], x: Tensor) -> None:
        """Remembers which rows of an expert are not padding, for its layers to come."""
        self.kept(x, None, expert)

    def untold(self, x: Tensor, module: nn.Module) -> bool:
        """Whether an input has rows of which it is not known which are padding, so that all count.

        Those are rows of a mixture that are found nowhere, and other places than the mask has, as a model has that pads
        its input to whole windows, or looks at several samples of a sound at a time.

        Args:
            x: what a layer is given.
            module: the layer.
        """
        mask = self._mask_for(x, self._frames[-1] if self._frames else None)
        # One row for each sequence is no place that could be padding.
        if mask is None or x.dim() < 2 or x.numel() == len(mask) * x.shape[-1]:
            return False
        if self.kept(x, module, sure=False) is not None:
            return False
        if x.dim() == 2:
            return any(frame.kept is not None for frame in self._frames)
        # Others than of the sequences, such as embeddings of distances.
        return len(x) % len(mask) == 0 or x.shape[1] == len(mask)

    def _mask_for(self, x: Tensor, frame: _Frame | None) -> Tensor | None:
        if frame is None or not frame.in_decoder:
            return self._masks.places
        places, other = self._masks.places, frame.other
        if _are_same(other, x):
            return places
        # Without a mask of its own, a decoder has the other one, unless that is of the encoder's places.
        of_encoder = places is not None and other is not None and other.shape[:-1] == places.shape
        return self._masks.decoder if self._masks.decoder is not None or of_encoder else places

    def _enter(self, module: nn.Module) -> Callable[..., None]:
        names = _names_of(type(module).forward)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = dict(zip(names, args, strict=False)) | kwargs
            first = next(iter(values.values()), args[0] if args else None)
            outer = self._frames[-1] if self._frames else None
            other = next((values[name] for name in _OTHER_STATES if isinstance(values.get(name), Tensor)), None)
            within = other is not None or (outer is not None and outer.in_decoder)
            frame = _Frame(None, None, outer.other if other is None and outer is not None else other, within)
            self._frames.append(frame)
            if isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2:
                frame.given, frame.kept = first, self.kept(first, module, sure=False)

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        left = self._frames.pop() if self._frames else None
        if left is not None and left.in_decoder and self._frames:
            # What follows a decoder, such as a head, is given the decoder's places.
            self._frames[-1].in_decoder, self._frames[-1].other = True, left.other


def warn_of_padding(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One warning of all layers (or blocks) with rows of which it is not known which are padding.

    Args:
        shapes: of what each is given, by name.
    """
    if not shapes:
        return
    listed = [f"{name!r} {shape}" for name, shape in list(shapes.items())[:3]]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    warnings.warn(
        f"padding cannot be told apart in the rows that these layers are given, so that all count: {', '.join(listed)}"
        f"{more}. Where they have none, as those of another input do, nothing is wrong; otherwise pass batches without "
        "padding, or leave the layers out",
        stacklevel=3,
    )


@cache
def _names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a module's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(forward).parameters.values()
    return tuple(parameter.name for parameter in given if parameter.kind in kinds)[1:]


def _are_same(one: Tensor | None, other: Tensor) -> bool:
    """Whether both are the same numbers in memory, such as a view in another shape."""
    return one is not None and one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _is_ambiguous(mask: Tensor) -> bool:
    """Whether the mask of (sequences, places) is another one of (places, sequences) of the same shape."""
    return mask.shape == mask.mT.shape and not torch.equal(mask, mask.mT)


def _by_shape(x: Tensor, mask: Tensor, places_first: bool | None) -> Tensor | None:
    """The mask of all rows of an input that has all places, each for all heads where there are such."""
    shape = x.shape[:-1]
    if len(shape) == 3:
        # The dimension of heads is the last one, or the one in the middle.
        ways = [] if places_first else [(mask, 2), (mask, 1)]
        ways += [(mask.mT, 2)] if places_first is not False else []
        fits = [
            way.unsqueeze(heads).expand(shape).reshape(-1)
            for way, heads in ways
            if way.shape == tuple(size for dim, size in enumerate(shape) if dim != heads)
        ]
        return fits[0] if fits and all(torch.equal(fit, fits[0]) for fit in fits) else None
    if shape == mask.shape and _is_ambiguous(mask):
        return None if places_first is None else (mask.mT if places_first else mask).reshape(-1)
    if shape == mask.shape:
        return mask.reshape(-1)
    return mask.mT.reshape(-1) if shape == mask.mT.shape else None


def _sums_of_bits(rows: Tensor) -> Tensor:
    """A number for each row (n, d) that other rows do not have: Σ bits · random numbers, modulo 2⁶⁴."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[rows.element_size()]
    # Made on the CPU, so that they are the same everywhere.
    factors = torch.randint(-(1 << 62), 1 << 62, rows.shape[1:], generator=torch.Generator().manual_seed(0))
    factors = factors.to(rows.device)
    parts = [(part.contiguous().view(kind).long() * factors).sum(-1) for part in rows.split(_MOST_ROWS)]
    return torch.cat(parts) if parts else factors.new_zeros(0)
