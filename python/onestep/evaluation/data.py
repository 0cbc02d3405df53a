"""Data of every kind as chunks of rows: tensors, a Dataset, a DataLoader."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from onestep._serial_torch import serial_for
from onestep._torch_private import tree_leaves, tree_map_only
from onestep.evaluation.digest import digest
from onestep.evaluation.exclusive import exclusive


class Chunk(NamedTuple):
    """Rows that are computed together: what the model takes, what the loss compares with, and their batch's piece."""

    inputs: Any
    target: Any
    piece: int = 0

    def __len__(self) -> int:
        return len(_first(self.inputs))

    def rows(self, index: slice | Tensor) -> Chunk:
        """Some of the rows."""

        def some(tensor: Tensor) -> Tensor:
            rows = _with_rows(tensor).detach()
            with serial_for(len(index) * rows[:1].numel()) if isinstance(index, Tensor) else nullcontext():
                part = rows[index]
            # A model that differentiates in its inputs needs leaves, also where no gradients are recorded now.
            return part.requires_grad_() if tensor.requires_grad else part

        return Chunk(*tree_map_only(Tensor, some, tuple(self)))

    def of_piece(self, piece: int) -> Chunk:
        """The same rows as a part of a piece."""
        return Chunk(self.inputs, self.target, piece)

    def on(self, device: torch.device | None) -> Chunk:
        """The same rows on a device; where they are for None."""
        if device is None:
            return self
        inputs, target = tree_map_only(Tensor, lambda t: t.to(device), (self.inputs, self.target))
        return Chunk(inputs, target, self.piece)


def _first(tree: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    if not leaves:
        raise TypeError(f"a batch holds {type(tree).__name__}; expected tensors")
    return _with_rows(leaves[0])


def _with_rows(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        raise ValueError("a batch holds a tensor of shape (), which has no rows; expected inputs and targets (n, …)")
    return tensor


# What a batch that is a dict calls its target, as the collators of transformers and others do.
_LABELS = ("labels", "label")


def _as_chunk(batch: Any, with_labels: bool = False) -> Chunk:
    if isinstance(batch, Mapping):
        name = next((name for name in _LABELS if name in batch), None)
        if name is None:
            raise TypeError(f"a batch is a dict of {', '.join(map(repr, batch))}; expected one of them to be 'labels'")
        # A collator's own kind of dict is not one that torch looks into.
        inputs = {key: value for key, value in batch.items() if key != name}
        return Chunk(inputs | {"labels": batch[name]} if with_labels else inputs, batch[name])
    if isinstance(batch, Sequence) and len(batch) == 2 and not isinstance(batch, (str, bytes)):
        return Chunk(*batch)
    kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, Sequence) else type(batch).__name__
    raise TypeError(
        f"a batch is a {kind}; expected a pair (inputs, target), of which several inputs are a tuple ((a, b), target), "
        "or a dict with labels"
    )


class Share(NamedTuple):
    """Which of the ``pieces`` that each batch is cut into this process computes: the rank-th of size parts of them.

    A batch of few rows is cut into fewer, of ``least`` rows or more.
    """

    rank: int = 0
    size: int = 1
    pieces: int = 1
    least: int = 1

    def of(self, n: int, first: int = 0) -> Iterator[tuple[int, range]]:
        """The numbers of its pieces of n rows, with the rows; ``first``: the number from which pieces are given out."""
        count = min(self.pieces, -(-n // self.least))
        own = range(self.pieces * self.rank // self.size, self.pieces * (self.rank + 1) // self.size)
        for part in range(count):
            piece = (first + part * self.pieces // count) % self.pieces
            if piece in own:
                yield piece, range(n * part // count, n * (part + 1) // count)


class Source(ABC):
    """Rows, cut into chunks of at most ``chunk_size``, of which this process gets its share."""

    share = Share()
    chunk_size: int | None = None
    # Where chunks are moved to; None to leave them where the data is.
    device: torch.device | None = None
    # Whether what is read is hashed, for a checkpoint.
    hashed = False
    # The hash of what of a pass has been read so far, where a resumed run reads it again.
    read_hash: str | None = None

    @property
    def known_rows(self) -> int | None:
        """How many rows there are in all, where that is known."""
        return None

    @abstractmethod
    def known_batches(self, size: int) -> int | None:
        """How many steps of ``size`` rows a pass has, where that is known."""

    @abstractmethod
    def all(self) -> Iterator[Chunk]:
        """This process's share of all rows, once."""

    def shuffled(self) -> Iterator[Chunk]:
        """The same in random order, where the rows can be had in one."""
        return self.all()

    @abstractmethod
    def batch(self, step: int, size: int) -> list[Chunk]:
        """This process's share of the ``size`` rows of a step."""

    @abstractmethod
    def sample(self, step: int, size: int) -> list[Chunk]:
        """This process's share of ``size`` rows of all, drawn for a step."""

    def others(self, step: int, size: int) -> list[Chunk]:
        """This process's share of ``size`` rows on which the step that ``batch`` was made for is judged."""
        return self.sample(step, size)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the step's number."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        if state:
            raise ValueError("the checkpoint is of a DataLoader, the data is not")


class IndexedSource(Source):
    """Rows that can be had by number; a step's rows depend on the seed and the step alone."""

    def __init__(self, rows: int, take: Callable[[Any], Chunk], seed: int) -> None:
        if rows == 0:
            raise ValueError("data holds no rows; expected at least one")
        self.rows, self.take, self.seed = rows, take, seed
        self._epoch: tuple[int, Tensor] = (-1, torch.empty(0))

    @property
    def known_rows(self) -> int:
        """All rows."""
        return self.rows

    def known_batches(self, size: int) -> int:
        """Rows that are left over at the end of a pass make no batch."""
        return max(1, self.rows // size)

    def _chunks(self, n: int, index: Callable[[slice], Any]) -> Iterator[Chunk]:
        for piece, part in self.share.of(n):
            begin = part.start
            while begin < part.stop:
                # The chunk size may change on the way.
                end = min(begin + (self.chunk_size or part.stop), part.stop)
                yield self.take(index(slice(begin, end))).of_piece(piece).on(self.device)
                begin = end

    def all(self) -> Iterator[Chunk]:
        return self._chunks(self.rows, lambda rows: rows)

    def shuffled(self) -> Iterator[Chunk]:
        order = self._permutation(0)
        return self._chunks(self.rows, lambda rows: order[rows])

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch, torch.randperm(self.rows, generator=generator)
        return self._epoch[1]

    def batch(self, step: int, size: int) -> list[Chunk]:
        size = min(size, self.rows)
        a_epoch = self.rows // size
        order = self._permutation(step // a_epoch)[step % a_epoch * size :][:size]
        return list(self._chunks(size, lambda rows: order[rows]))

    def sample(self, step: int, size: int) -> list[Chunk]:
        if size >= self.rows:
            return list(self.all())
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randint(self.rows, (size,), generator=generator)
        return list(self._chunks(size, lambda rows: order[rows]))


def length_of(data: Any) -> int | None:
    """len(data), or None: a DataLoader of a dataset without a length has the method, too, and raises TypeError."""
    try:
        return len(data)
    except TypeError:
        return None


def _sampler_of(loader: Iterable[Any]) -> Any:
    """What draws a DataLoader's rows: its sampler, or the one inside its batch_sampler, or None."""
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return inner if isinstance(inner, DistributedSampler) else getattr(loader, "sampler", None)


class LoaderSource(Source):
    """A DataLoader's or any other iterable's batches, as they come; one pass over it is all the data.

    The order of a pass that shuffles depends on the seed and the number of the pass alone, not on the random numbers
    drawn before: it is the same on a resumed run and in all processes, and all passes for a full batch have one order.
    """

    def __init__(self, loader: Iterable[Any], seed: int, with_labels: bool = False) -> None:
        self.loader, self.seed, self.with_labels = loader, seed, with_labels
        if getattr(loader, "drop_last", False) and isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError(
                "data is a DataLoader with drop_last=True and shuffle=True, which gives other rows on each pass; "
                "expected the same rows, in any order"
            )
        # Such a loader already gives each process its own rows.
        self.sharded = isinstance(_sampler_of(loader), DistributedSampler)
        self._iterator: Iterator[Chunk] | None = None
        self._epoch, self._taken = -1, 0
        # How many batches the last pass over all rows had, for this source and its copies.
        self.counted = [0]

    @property
    def known_rows(self) -> int | None:
        """As the sampler counts them, where batches are made of what it gives."""
        loader = self.loader
        if not isinstance(loader, DataLoader) or loader.batch_size is None or not isinstance(loader.sampler, Sized):
            return None
        if isinstance(loader.sampler, DistributedSampler):
            sampler = loader.sampler
            return sampler.total_size if sampler.drop_last else len(cast(Sized, sampler.dataset))
        return len(loader.sampler)

    def known_batches(self, size: int) -> int | None:
        """A step takes as many of the loader's batches as have ``size`` rows."""
        batches = length_of(self.loader)
        if batches is None:
            return None
        rows = getattr(self.loader, "batch_size", None)
        if size > 1 and rows is None:
            return None
        return -(-batches // -(-size // (rows or 1)))

    def _own_rows(self) -> float:
        """How many rows of a pass are this process's own; those that a DistributedSampler adds come after them.

        It repeats rows so that all processes have as many. Counted twice, they would change the solution.
        """
        sampler = _sampler_of(self.loader)
        if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
            return math.inf
        return -(-(len(cast(Sized, sampler.dataset)) - sampler.rank) // sampler.num_replicas)

    def _share(self, chunk: Chunk, number: int) -> Iterator[Chunk]:
        whole = [(self.share.rank, range(len(chunk)))]
        for piece, rows in whole if self.sharded else self.share.of(len(chunk), number):
            size = self.chunk_size or len(rows)
            for begin in range(rows.start, rows.stop, size):
                yield chunk.rows(slice(begin, min(begin + size, rows.stop))).of_piece(piece).on(self.device)

    def _whole(self, number: int) -> Iterator[Chunk]:
        sampler = _sampler_of(self.loader)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(number)
        # A sampler draws its order, or the seed of it, when it is asked for the first batch. Other threads must not
        # draw from the process's random numbers, or set them, meanwhile.
        with exclusive(), torch.random.fork_rng(devices=[]):
            seed = self.seed * 1_000_003 + number
            torch.manual_seed(seed)
            batched = getattr(self.loader, "batch_sampler", None)
            for owner in (self.loader, sampler, batched, getattr(batched, "sampler", None)):
                generator = getattr(owner, "generator", None)
                if isinstance(generator, torch.Generator):
                    generator.manual_seed(seed)
            batches = iter(self.loader)
            first = next(batches, batches)
        if first is batches:
            raise ValueError("data holds no batches; expected at least one (an iterator can be read only once)")
        yield _as_chunk(first, self.with_labels)
        yield from (_as_chunk(batch, self.with_labels) for batch in batches)

    def all(self) -> Iterator[Chunk]:
        # Mini-batches keep the repeated rows: all processes go on to the next pass at the same step.
        left = self._own_rows()
        for number, chunk in enumerate(self._whole(0)):
            if left <= 0:
                return
            own = chunk if len(chunk) <= left else chunk.rows(slice(0, int(left)))
            left -= len(own)
            yield from self._share(own, number)
        self.counted[0] = number + 1

    def _next(self) -> Chunk:
        while True:
            if self._iterator is None:
                self._epoch, self._taken, self.read_hash = self._epoch + 1, 0, None
                self._iterator = self._whole(self._epoch)
            chunk = next(self._iterator, None)
            if chunk is not None:
                self._taken += 1
                self._hash(chunk)
                return chunk
            self._iterator = None

    def _hash(self, chunk: Chunk) -> None:
        if self.hashed:
            self.read_hash = digest((self.read_hash, chunk.inputs, chunk.target))

    def batch(self, step: int, size: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        rows = 0
        while rows < size:
            chunk = self._next()
            rows += len(chunk) * (self.share.size if self.sharded else 1)
            chunks.extend(self._share(chunk, self._taken))
        return chunks

    def others(self, step: int, size: int) -> list[Chunk]:
        # What comes next, since a second pass at the same time would share the loader's generators and workers.
        return self.batch(step, size)

    def sample(self, step: int, size: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        rows = 0
        for number, chunk in enumerate(self._whole(step)):
            each = self.share.size if self.sharded else 1
            part = chunk.rows(slice(0, -(-(size - rows) // each)))
            rows += len(part) * each
            chunks.extend(self._share(part, number))
            if rows >= size:
                break
        return chunks

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "taken": self._taken, "random": torch.get_rng_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if not state:
            raise ValueError("the checkpoint is not of a DataLoader, the data is")
        self._epoch, self._taken, self._iterator, self.read_hash = state["epoch"], state["taken"], None, None
        if self._taken:
            self._iterator = self._whole(self._epoch)
            for number in range(self._taken):
                chunk = next(self._iterator, None)
                if chunk is None:
                    raise ValueError(
                        f"data has {number} batches in pass {self._epoch + 1}, of which the checkpoint has used "
                        f"{self._taken}: it is other data"
                    )
                self._hash(chunk)
        # A dataset may draw from it for each row.
        torch.set_rng_state(state["random"])


def as_source(data: Any, seed: int, with_labels: bool = False) -> Source:
    """Tensors (inputs, target), a Dataset of such pairs, or an iterable of batches of them.

    Each pair may be a dict with labels. ``with_labels``: whether these are an input of the model, too.
    """
    if isinstance(data, TensorDataset) and len(data.tensors) == 2:
        data = tuple(data.tensors)
    if isinstance(data, IterableDataset):
        raise TypeError("data is an IterableDataset; wrap it in a DataLoader, which knows the batch size")
    if isinstance(data, Dataset):
        dataset: Dataset[Any] = data

        def load(index: Any) -> Chunk:
            rows = list(range(index.start, index.stop)) if isinstance(index, slice) else index.tolist()
            return _as_chunk(next(iter(DataLoader(Subset(dataset, rows), batch_size=len(rows)))), with_labels)

        return IndexedSource(len(data), load, seed)  # type: ignore[arg-type]
    two_batches = isinstance(data, list) and all(isinstance(item, (tuple, list)) and len(item) == 2 for item in data)
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)) and len(data) == 2 and not two_batches:
        chunk = Chunk(*data)
        if tree_leaves(chunk.inputs) and isinstance(tree_leaves(chunk.inputs)[0], Tensor):
            return _of_tensors(chunk, seed)
    if isinstance(data, Mapping):
        return _of_tensors(_as_chunk(data, with_labels), seed)
    if isinstance(data, Iterable) and not isinstance(data, (Tensor, str, bytes, Mapping)):
        return LoaderSource(data, seed, with_labels)
    raise TypeError(
        f"data is {type(data).__name__}; expected a pair of tensors or arrays (inputs, target), a Dataset of such "
        "pairs, or a DataLoader"
    )


def _of_tensors(chunk: Chunk, seed: int) -> Source:
    tensors = [leaf for leaf in tree_leaves((chunk.inputs, chunk.target)) if isinstance(leaf, Tensor)]
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError("data holds a tensor of shape (), which has no rows; expected inputs and targets (n, …)")
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise TypeError(f"data holds a tensor of layout {tensor.layout}; expected dense ones")
    lengths = {len(tensor) for tensor in tensors}
    if len(lengths) != 1:
        raise ValueError(f"data holds tensors of {sorted(lengths)} rows; expected as many inputs as targets")
    return IndexedSource(len(chunk), chunk.rows, seed)
