"""Trace and diagonal of a symmetric matrix from products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Random vectors are made in blocks of at most this many elements. Each block is one pass over the data.
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Estimate:
    """The mean of independent unbiased samples.

    Attributes:
        value: a scalar () for a trace, (p,) for a diagonal; in float64.
        standard_error: of each element of ``value``, in its shape and dtype: the samples' standard deviation over the
            root of their number.
        samples: how many there were; 0 where the value is exact.

    Examples:
        >>> import torch
        >>> from onestep.curvature import HessianOperator
        >>> H = HessianOperator(torch.nn.Linear(1, 1), (torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)), "mse")
        >>> H.trace()
        Estimate(value=tensor(7., dtype=torch.float64), standard_error=tensor(0., dtype=torch.float64), samples=0)
    """

    value: Tensor
    standard_error: Tensor
    samples: int


def estimate_trace(
    product: Callable[[Tensor], Tensor], like: Tensor, samples: int, generator: torch.Generator | None
) -> Estimate:
    """tr A = E zᵀAz, z of independent random signs (Hutchinson, Communications in Statistics 19, 1990)."""
    blocks = [(Z * product(Z)).sum(0, dtype=torch.float64) for Z in _signs(like, samples, generator)]
    values = torch.cat(blocks)
    return Estimate(values.mean(), values.std() / math.sqrt(samples), samples)


def estimate_diagonal(
    product: Callable[[Tensor], Tensor], like: Tensor, samples: int, generator: torch.Generator | None
) -> Estimate:
    """diag A = E z∘Az (Bekas, Kokiopoulou and Saad, Applied Numerical Mathematics 57, 2007)."""
    return averaged(((Z * product(Z)).double() for Z in _signs(like, samples, generator)), like, samples)


def averaged(blocks: Iterable[Tensor], like: Tensor, samples: int) -> Estimate:
    """The mean of samples (p,k), which come in blocks, with its standard error."""
    mean = torch.zeros(len(like), dtype=torch.float64, device=like.device)
    squares, count = torch.zeros_like(mean), 0
    for values in blocks:
        # Means and sums of squared deviations of two samples combine (Chan, Golub and LeVeque 1983).
        number, total = values.shape[1], count + values.shape[1]
        block_mean = values.mean(1)
        shift = block_mean - mean
        squares += (values - block_mean[:, None]).square().sum(1) + shift.square() * (count * number / total)
        mean += shift * (number / total)
        count = total
    return Estimate(mean, (squares / (samples - 1) / samples).sqrt(), samples)


def seeds(like: Tensor, samples: int, generator: torch.Generator | None) -> Iterator[list[int]]:
    """A seed for each sample, in blocks of as many as there may be vectors."""
    generator = _checked(samples, generator)
    drawn = torch.randint(2**40, (samples,), generator=generator, device=generator.device).tolist()
    at_once = max(1, _BLOCK_ELEMENTS // len(like))
    return (drawn[begin : begin + at_once] for begin in range(0, samples, at_once))


def _checked(samples: int, generator: torch.Generator | None) -> torch.Generator:
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"samples is {type(samples).__name__}; expected an integer")
    if samples < 2:
        raise ValueError(f"samples={samples}; expected at least 2, since one has no standard error")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    elif not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {type(generator).__name__}; expected a torch.Generator or None")
    return generator


def _signs(like: Tensor, samples: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Columns of -1 and 1, ``samples`` in all, in blocks (p,k); the same however they are cut, and on every device."""
    generator = _checked(samples, generator)
    at_once = max(1, _BLOCK_ELEMENTS // len(like))
    for begin in range(0, samples, at_once):
        shape = (min(at_once, samples - begin), len(like))
        bits = torch.randint(2, shape, generator=generator, device=generator.device, dtype=torch.int8)
        yield bits.to(like).mul_(2).sub_(1).mT
