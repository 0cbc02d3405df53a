"""What the processes of torch.distributed do together, in which a failure anywhere is an error everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from onestep._processes import add_up, collective, initialised, place
from onestep.evaluation.data import IndexedSource, LoaderSource, Share, Source, length_of
from onestep.evaluation.errors import NonFiniteError

Result = TypeVar("Result")


def share() -> Share:
    """This process's place; (0, 1) where torch.distributed is not initialised."""
    rank, size = place()
    return Share(rank, size, size) if initialised() else Share()


def together(compute: Callable[[], Result]) -> Result:
    """compute(), after which all processes go on, or none does.

    If it raises in one, that one raises its error and the others raise too instead of waiting for it: NonFiniteError
    and KeyboardInterrupt like the first, RuntimeError for any other. The gravest error of all counts.
    """
    rank, size = share()[:2]
    if size == 1:
        return compute()
    error: BaseException | None = None
    try:
        result = compute()
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    # Gravity times size plus rank, so that the greatest says what and where.
    own = _gravity(error) * size + rank if error is not None else 0
    worst = torch.tensor(own)
    collective(dist.all_reduce, worst, dist.ReduceOp.MAX)
    gravity, where = divmod(int(worst), size)
    if gravity == 0:
        return result
    if error is not None and _gravity(error) == gravity:
        raise error
    if gravity == 3:
        raise KeyboardInterrupt from error
    kind = NonFiniteError if gravity == 1 else RuntimeError
    raise kind(f"onestep: process {where} of {size} failed; see its error") from error


def _gravity(error: BaseException | None) -> int:
    if error is None:
        return 0
    return 3 if isinstance(error, KeyboardInterrupt) else 1 if isinstance(error, NonFiniteError) else 2


def from_first(compute: Callable[[], Result]) -> Result:
    """What compute() gives in the first process, in all."""
    if share().size == 1:
        return compute()
    box = [together(lambda: compute() if share().rank == 0 else None)]
    collective(dist.broadcast_object_list, box, 0)
    result: Any = box[0]
    return result  # type: ignore[no-any-return]


def summed(compute: Callable[[], tuple[Tensor, list[float]]]) -> tuple[Tensor, list[float]]:
    """The sums over all processes of compute(), a tensor and some numbers; failures as with ``together``."""
    tensor, numbers = together(compute)
    if share().size == 1:
        return tensor, numbers
    return _add_up(tensor.contiguous(), numbers)


def _add_up(tensor: Tensor, numbers: list[float]) -> tuple[Tensor, list[float]]:
    """The sums over all processes, the tensor's in its place."""
    values = torch.tensor(numbers, dtype=torch.float64)
    add_up(tensor, values)
    return tensor, values.tolist()


def summed_by_piece(
    pieces: int, like: tuple[Tensor, int], terms: Callable[[], Iterable[tuple[int, Tensor, list[float]]]]
) -> tuple[Tensor, list[float]]:
    """The sums over all processes of terms (piece of the batch, tensor, numbers); failures as with ``together``.

    Terms are added up within each piece as they come, and then piece by piece. So the result is the same to the last
    bit however the pieces are spread over processes.

    Args:
        pieces: how many there are, each of them in one process.
        like: a tensor like those of the terms, and the count of their numbers.
        terms: makes them; changed by the sum.
    """

    def local() -> dict[int, tuple[Tensor, list[float]]]:
        sums: dict[int, tuple[Tensor, list[float]]] = {}
        for piece, tensor, numbers in terms():
            if piece in sums:
                total, so_far = sums[piece]
                sums[piece] = total.add_(tensor), [a + b for a, b in zip(so_far, numbers, strict=True)]
            else:
                sums[piece] = tensor, numbers
        return sums

    sums = together(local)
    spread = share().size > 1
    total, counts = torch.zeros_like(like[0]), [0.0] * like[1]
    for piece in range(pieces):
        part = sums.pop(piece, None)
        if spread:
            # All but one process have zeros, which change nothing.
            part = _add_up(*(part or (torch.zeros_like(total), [0.0] * like[1])))
        if part is not None:
            total.add_(part[0])
            counts = [a + b for a, b in zip(counts, part[1], strict=True)]
    return total, counts


def same_everywhere(tensors: list[Tensor]) -> None:
    """Gives every process the first one's values."""
    if share().size > 1:
        for tensor in tensors:
            value = tensor.detach().contiguous()
            collective(dist.broadcast, value, 0)
            tensor.detach().copy_(value)


def equal_everywhere(tensor: Tensor) -> bool:
    """Whether all processes hold the same finite tensor, as far as its shape, sum and norm tell."""
    if share().size == 1:
        return True
    numbers = [*tensor.shape, tensor.sum(dtype=torch.float64).item(), tensor.double().norm().item()]
    extremes = torch.tensor([*numbers, *(-number for number in numbers)], dtype=torch.float64)
    collective(dist.all_reduce, extremes, dist.ReduceOp.MAX)
    greatest, least = extremes.chunk(2)
    return torch.equal(greatest, -least)


def check_equal_batches(data: Any, source: Source) -> None:
    """Raises unless all processes have equally many batches or rows: some rows would not be computed otherwise."""
    if isinstance(source, IndexedSource):
        _check_equal(source.known_rows, "rows")
    elif (length := length_of(data)) is not None:
        _check_equal(length, "batches" if isinstance(data, DataLoader) else "items")


def check_equal_passes(source: Source) -> None:
    """The same of the batches that the last pass had, for data without a length."""
    if isinstance(source, LoaderSource) and length_of(source.loader) is None:
        _check_equal(source.counted[0], "batches")


def _check_equal(count: int, what: str) -> None:
    processes = share().size
    if processes == 1:
        return
    counts = summed(lambda: (torch.empty(0), [count, count**2]))[1]
    if processes * counts[1] != counts[0] ** 2:
        raise ValueError(
            f"data has {count} {what} in this process, and {counts[0] / processes:g} on average over all "
            f"{processes}; expected the same data everywhere, or a DataLoader with a DistributedSampler"
        )
