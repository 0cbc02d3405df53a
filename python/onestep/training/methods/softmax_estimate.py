"""A linear head under cross-entropy, estimated from one pass over the data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from onestep._serial_torch import eigh
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import share, summed, together
from onestep.evaluation.layers import columns
from onestep.evaluation.losses import IGNORED, scores_and_classes
from onestep.evaluation.parameters import ParameterVector
from onestep.optim import NonFiniteError
from onestep.training.methods.affine_equations import NotAffineError, Solution
from onestep.training.objective import DataObjective
from onestep.training.structures.affine import why_not_affine
from onestep.training.structures.affine_head import Head, features_and_outputs, find_head
from onestep.training.structures.base import Mismatch

# Rows of the pilot estimate, and of the final one, of all processes together.
_KEPT = 8192
# The pilot's rows are drawn from this many first rows. Data with no more rows than that is used whole.
_FIRST = 4 * _KEPT
# Ridge of the pilot estimate relative to one row, in standardised features.
_PILOT_RIDGE = 10.0
# The same of the final estimate.
_RIDGE = 1.0
# Weight of the proximal term, which stands for how the kept rows' curvature may differ from that of all rows.
_PROXIMITY = 0.1
_LBFGS_STEPS = 60


class Rows(NamedTuple):
    """Standardised features (n,d) and classes (n,)."""

    Z: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


class _Reservoir:
    """A uniform sample of the rows seen so far: those with the smallest random keys (Efraimidis and Spirakis 2006)."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.parts: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, rows: Rows) -> None:
        parts = (*rows, torch.rand(len(rows), generator=self.generator))
        if self.parts is not None:
            parts = tuple(map(torch.cat, zip(self.parts, parts, strict=True)))  # type: ignore[assignment]
        if len(parts[2]) > self.size:
            kept = parts[2].topk(self.size, largest=False).indices
            parts = tuple(part[kept] for part in parts)  # type: ignore[assignment]
        self.parts = parts

    def rows(self) -> Rows:
        """The sample of what has been added."""
        assert self.parts is not None
        return Rows(*self.parts[:2])


def solve(
    objective: DataObjective, parameters: ParameterVector, chunks: Iterable[Chunk], weight_decay: float, seed: int
) -> Solution:
    """Writes an estimate of the head that minimises the mean cross-entropy into it, reading the chunks once.

    A pilot estimate W₀ is the head of some of the first rows. Over the pass, only the gradient at W₀, the Gram matrix A
    and the variances B = mean p(1 - p) of the classes are summed, and a fresh sample of rows is kept. The result
    minimises the sample's loss, tilted so that its gradient at W₀ is that of all rows: the surrogate likelihood of
    Jordan, Lee and Yang (J. Amer. Stat. Assoc. 114, 2019), with the proximal term ½γ tr(ΔᵀAΔB), Δ = W - W₀. Rows should
    come in random order.

    Raises:
        NotAffineError: the model does not end in the one linear layer that is trained.
        NonFiniteError: the layer is given NaN or infinity.
    """
    with torch.no_grad():
        estimate = _Estimate(objective, parameters, weight_decay, seed)
        start = parameters.read()
        try:
            return estimate.solve(chunks)
        except BaseException:
            parameters.write(start)
            raise


class _Estimate:
    def __init__(self, objective: DataObjective, parameters: ParameterVector, weight_decay: float, seed: int) -> None:
        self.objective, self.parameters, self.weight_decay = objective, parameters, weight_decay
        # Processes draw different rows.
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + share().rank)
        self.kept = max(1, _KEPT // share().size)
        self.head: Head | None = None
        self.initial = 0.0
        self.rows = 0
        self.mean = self.scale = torch.empty(0)

    def solve(self, chunks: Iterable[Chunk]) -> Solution:
        """Reads the first rows, makes the pilot, reads the rest, and writes the head."""
        pieces = self._pieces(chunks)
        first, more = together(lambda: self._first(pieces))
        self._standardise(first)
        first = Rows(self._augmented(first.Z), first.y)
        seen = torch.bincount(first.y, minlength=self.classes).to(first.Z.dtype)
        counts, (rows, unread) = summed(lambda: (seen, [float(len(first)), float(more)]))
        W = first.Z.new_zeros(first.Z.shape[1], self.classes)
        if self.with_bias:
            W[-1] = ((counts + 0.5) / (rows + 0.5 * self.classes)).log()
        if not unread:
            W, loss = self._minimise(first, W, _RIDGE / rows, None)
        else:
            order = torch.randperm(len(first), generator=self.generator)
            pilot, others = (Rows(first.Z[some], first.y[some]) for some in order.tensor_split([self.kept]))
            W, _ = self._minimise(pilot, W, _PILOT_RIDGE / _KEPT, None)
            W, loss = self._refine(pilot, others, pieces, W)
        self._write(W)
        initial, elements = summed(lambda: (torch.empty(0), [self.initial, float(self.rows)]))[1]
        return Solution(initial / elements, loss, "")

    def _pieces(self, chunks: Iterable[Chunk]) -> Iterator[Rows]:
        """What the head is given, and the classes, at most ``_KEPT`` rows at a time."""
        for number, chunk in enumerate(chunks):
            if self.head is None:
                self._find_head(chunk)
            assert self.head is not None
            found = features_and_outputs(self.head, self.objective.module, chunk)
            if found is None:
                raise NotAffineError
            features, result = found
            _, classes = scores_and_classes(result, chunk.target)
            counted = classes != IGNORED
            X, y = columns(self.head.layer, features)[counted], classes[counted]
            if not bool(X.isfinite().all()):
                raise NonFiniteError(f"step 1, batch {number}: the head is given NaN or infinity")
            self.initial += self.objective.loss.sum(result, chunk.target).item()
            self.rows += len(y)
            yield from map(Rows, X.split(_KEPT), y.split(_KEPT))

    def _find_head(self, chunk: Chunk) -> None:
        if why_not_affine(self.objective.module, self.parameters, chunk):
            raise NotAffineError
        head = find_head(self.objective.module, self.parameters, chunk)
        if isinstance(head, Mismatch):
            raise NotAffineError
        self.head = head
        self.classes, self.with_bias = len(self.head.weight), self.head.bias is not None

    def _first(self, pieces: Iterator[Rows]) -> tuple[Rows, bool]:
        """The rows that the pilot is drawn from, and whether there may be more."""
        kept: list[Rows] = []
        count, more = 0, False
        for rows in pieces:
            kept.append(rows)
            count += len(rows)
            if count * share().size >= _FIRST:
                more = True
                break
        if not count:
            raise ValueError("data gives this process no rows whose target is not ignored; expected at least one")
        return Rows(*(torch.cat(parts) for parts in zip(*kept, strict=True))), more

    def _standardise(self, first: Rows) -> None:
        """A common scale, and the mean where there is a bias to take it up again."""
        d = first.Z.shape[1]
        totals, (rows,) = summed(lambda: (first.Z.double().sum(0), [float(len(first))]))
        self.mean = (totals / rows * self.with_bias).to(first.Z)
        square = summed(lambda: (torch.empty(0), [(first.Z - self.mean).double().square().sum().item()]))[1][0]
        self.scale = torch.tensor((square / rows / d) ** 0.5).to(first.Z).clamp_min(torch.finfo(first.Z.dtype).tiny)

    def _augmented(self, X: Tensor) -> Tensor:
        Z = (X - self.mean) / self.scale
        return torch.cat([Z, Z.new_ones(len(Z), 1)], 1) if self.with_bias else Z

    def _unscaled(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """The head's weight (C,d) and bias (C,)."""
        d = len(self.mean)
        weight = (W[:d] / self.scale).mT
        return weight, (W[d] if self.with_bias else W.new_zeros(W.shape[1])) - weight @ self.mean

    def _refine(self, pilot: Rows, others: Rows, pieces: Iterator[Rows], start: Tensor) -> tuple[Tensor, float]:
        """W and its loss, from the pilot's W on, by the other ones of the first rows and all that are still unread."""
        fresh = _Reservoir(self.kept, self.generator)

        def local() -> tuple[Tensor, list[float]]:
            sums, total = _sums(pilot, start)
            for rows in itertools.chain([others], (Rows(self._augmented(X), y) for X, y in pieces)):
                more, loss = _sums(rows, start)
                sums += more
                total += loss
                fresh.add(rows)
            return sums, [total, float(self.rows)]

        sums, (total, count) = summed(local)
        sums = (sums / count).to(start)
        d, classes = start.shape
        gradient, variance, gram = sums.split([d * classes, classes, d * d])
        gram = gram.unflatten(0, (d, d))
        sample = fresh.rows()

        def of_sample() -> tuple[Tensor, list[float]]:
            loss, slope = _cross_entropy(sample.Z @ start, sample.y)
            return sample.Z.mT @ slope, [loss, float(len(sample))]

        sampled, (own, kept) = summed(of_sample)
        tilt = gradient.unflatten(0, start.shape) - sampled / kept

        def surrogate(W: Tensor) -> Tensor:
            step = W - start
            value: Tensor = (tilt * step).sum() + 0.5 * _PROXIMITY * (step * (gram @ step) * variance).sum()
            return value

        W, loss = self._minimise(sample, start, _RIDGE / count, surrogate)
        return W, loss + total / count - own / kept

    def _minimise(
        self, rows: Rows, W: Tensor, ridge: float, addition: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, float]:
        """W and its loss by L-BFGS over all processes' rows, in coordinates in which their Gram matrix is I."""
        gram, (count,) = summed(lambda: ((rows.Z.mT @ rows.Z).double(), [float(len(rows))]))
        values, vectors = eigh(gram / count)
        spread = values.clamp_min(0) + 1e-2 * values.mean()
        basis, inverse = (vectors * spread.rsqrt()).to(W), (vectors * spread.sqrt()).mT.to(W)
        V = (inverse @ W).contiguous().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [V], max_iter=_LBFGS_STEPS, tolerance_grad=1e-6, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )
        Q = rows.Z @ basis

        def rest(V: Tensor) -> Tensor:
            """All but the cross-entropy."""
            W = basis @ V
            decayed = torch.cat([part.flatten() for part in self._unscaled(W)]).square().sum()
            penalty = 0.5 * self.weight_decay * decayed
            return penalty if addition is None else penalty + addition(W)

        def cross_entropy(V: Tensor) -> tuple[Tensor, float]:
            """The gradient with respect to V (k, d), and the loss."""

            def local() -> tuple[Tensor, list[float]]:
                loss, slope = _cross_entropy(Q @ V, rows.y)
                return Q.mT @ slope, [loss]

            gradient, (loss,) = summed(local)
            return gradient / count, loss / count

        def closure() -> Tensor:
            gradient, loss = cross_entropy(V.detach())
            with torch.enable_grad():
                smooth = rest(V) + 0.5 * ridge * (basis @ V).square().sum()
                (slope,) = torch.autograd.grad(smooth, V)
            V.grad = gradient + slope
            total: Tensor = smooth.detach() + loss
            return total

        optimizer.step(closure)
        V = V.detach()
        return basis @ V, cross_entropy(V)[1] + rest(V).item()

    def _write(self, W: Tensor) -> None:
        assert self.head is not None
        weight, bias = self._unscaled(W)
        self.head.weight.copy_(weight.reshape(self.head.weight.shape))
        if self.head.bias is not None:
            self.head.bias.copy_(bias)


def _cross_entropy(scores: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Summed over rows, with its gradient p - e_y in the scores (n,C)."""
    P = torch.log_softmax(scores, 1)
    loss = F.nll_loss(P, y, reduction="sum").item()
    P.exp_()[torch.arange(len(y)), y] -= 1
    return loss, P


def _sums(rows: Rows, W: Tensor) -> tuple[Tensor, float]:
    """Sums over rows of the gradient Zᵀ(p - e_y), of the variances p(1 - p) and of the Gram matrix; and of the loss."""
    loss, slope = _cross_entropy(rows.Z @ W, rows.y)
    variance = (slope.abs() - slope.square()).sum(0)
    return torch.cat([t.double().flatten() for t in (rows.Z.mT @ slope, variance, rows.Z.mT @ rows.Z)]), loss
