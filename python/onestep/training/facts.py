"""What a plan is made of: the arguments of fit, and facts about the model, the loss and the first rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onestep._cached import cached_property
from onestep.evaluation.data import Chunk, Share, Source
from onestep.evaluation.losses import Loss
from onestep.evaluation.module import without_gradient
from onestep.evaluation.parameters import ParameterVector
from onestep.training.objective import DataObjective
from onestep.training.result import Record
from onestep.training.structures.affine import explained, why_not_affine
from onestep.training.structures.affine_head import Head, find_head
from onestep.training.structures.base import Mismatch

# The most rows of the first chunk, which is read before it is known how many rows fit into memory.
_FIRST_ROWS = 1024
# Rows that are enough to tell whether there is a gradient, nearly always.
_FEW = 8
# The arguments of fit that are whole numbers of at least 1.
_COUNTS = (
    *("max_steps", "batch_size", "curvature_batch_size", "chunk_size", "cg_iterations"),
    *("validation_every", "patience"),
)


@dataclass(frozen=True)
class Settings:
    """The arguments of ``fit`` other than model, data and loss; the docstring of ``fit`` has their meaning.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """

    method: str
    max_steps: int | None
    tol: float
    damping: float | None
    weight_decay: float
    batch_size: int | None
    curvature_batch_size: int | None
    chunk_size: int | None
    cg_iterations: int | None
    seed: int
    progress: bool
    checkpoint: Path | None
    max_seconds: float | None = None
    callback: Callable[[Record], object] | None = None
    epochs: float | None = None
    validation: Any = None
    validation_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} is {type(value).__name__}; expected an integer")
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds={self.max_seconds}; expected a number > 0, or None")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs={self.epochs}; expected a finite number > 0, or None")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("both max_steps and epochs are given; expected one of them")
        for name in ("patience", "validation_every"):
            if getattr(self, name) is not None and self.validation is None:
                raise ValueError(f"{name} is given without validation; expected the data that it is about")
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback is {type(self.callback).__name__}; expected a function of a Record")
        if not 0 <= self.tol < 1:
            raise ValueError(f"tol={self.tol}; expected a number from 0, less than 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay={self.weight_decay}; expected a finite number >= 0")


def cut(source: Source, share: Share, chunk_rows: int, *, hashed: bool = False) -> Source:
    """The same rows for one process's share, in chunks of at most ``chunk_rows``. The source itself stays as it is.

    ``hashed``: whether batches are hashed as they are read, for a checkpoint.
    """
    result = copy.copy(source)
    result.share, result.chunk_size, result.hashed = share, chunk_rows, hashed
    return result


class FirstPass:
    """The first chunk of a pass over the data, and the rest of that pass, for methods that read the data once.

    Attributes:
        first: at most 1,024 rows.
    """

    def __init__(self, source: Source, share: Share, *, shuffled: bool) -> None:
        self._source = cut(source, share, _FIRST_ROWS)
        self._chunks = self._source.shuffled() if shuffled else self._source.all()
        first = next(self._chunks, None)
        if first is None:
            raise ValueError("data gives this process no rows; expected at least one for each process")
        self.first = first

    def chunks(self, chunk_rows: int) -> Iterator[Chunk]:
        """All rows of the pass, the first chunk and then chunks of at most ``chunk_rows``; to be read once."""
        # Sources look at their chunk size before each chunk.
        self._source.chunk_size = chunk_rows
        yield self.first
        yield from self._chunks

    def close(self) -> None:
        """Ends the pass, which frees a DataLoader's workers."""
        self._chunks.close()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Facts:
    """What is known before a method is chosen. Properties that run the model are computed once, when asked for.

    Attributes:
        model: the user's, in eval mode.
        parameters: those that are trained.
        loss: what is minimised, without weight decay.
        described: the loss as the user gave it, in words; checkpoints compare it.
        source: all rows of the data.
        share: which of the rows this process computes.
        first_pass: a pass over the data of which the first chunk has been read.
        chunk_rows: rows of a chunk: as given, or so many that a backward pass keeps about 256 MiB.
        known_not_affine: why the outputs are not affine, where the closed form, which looks at all rows, has found it.
    """

    model: nn.Module
    parameters: ParameterVector
    loss: Loss
    described: str
    source: Source
    share: Share
    first_pass: FirstPass
    chunk_rows: int
    known_not_affine: str = ""

    @property
    def first(self) -> Chunk:
        """The first rows."""
        return self.first_pass.first

    @cached_property
    def not_affine(self) -> str:
        """Why the outputs are not affine in the parameters; empty if they are, as far as the first rows tell."""
        return self.known_not_affine or why_not_affine(self.model, self.parameters, self.first)

    @cached_property
    def no_gradient(self) -> str:
        """Why the loss has no gradient in the parameters, as far as the first rows tell; empty if it has one."""
        few, tensors = self.first.rows(slice(0, _FEW)), self.parameters.tensors
        try:
            return without_gradient(self.model, self.loss, iter((few, self.first)), tensors)
        except Exception:
            # A model or a loss that fails says so itself, where it is asked for more.
            return ""

    @cached_property
    def head(self) -> Head | Mismatch:
        """The linear layer that holds all that is trained and ends the model, as far as the first rows tell."""
        return find_head(self.model, self.parameters, self.first)

    @cached_property
    def no_jacobian(self) -> str:
        """Why rows of the Jacobian cannot be computed; empty if they can. torch.func.vmap cannot run nn.LSTM."""
        few = self.first.rows(slice(0, 2))
        objective = DataObjective(self.model, self.loss, lambda: [few], lambda: [few], fixed=True)
        try:
            with torch.no_grad():
                next(objective.root_jacobian(self.parameters, few))
        except Exception as error:
            return f"differentiates the model row by row, which fails here ({explained(error)})"
        return ""
