"""Normal equations that are added up chunk by chunk, in memory that does not grow with the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from onestep._fork import one_thread_after_fork, safe_after_fork
from onestep._processes import collective, initialised, place
from onestep._serial_torch import eigh
from onestep.linalg import spd
from onestep.linalg._arguments import features, floating
from onestep.linalg._normal import Moments, moments
from onestep.linalg.constant_columns import without_constants
from onestep.linalg.dlpack import as_tensor, giver, is_foreign, mapped
from onestep.ops import normal
from onestep.ops.operands import LinAlgError

_DTYPES = (torch.float32, torch.float64)


class LinearSolution(NamedTuple):
    """What ``NormalEquations`` solves for: predictions are ``X @ W + intercept``, whether or not one was asked for.

    Attributes:
        W: (d,k), or (p,d,k) for p penalties; float32 or float64, as ``NormalEquations`` was told.
        intercept: (k,), or (p,k), in W's dtype; zeros without an intercept.

    Examples:
        >>> import torch
        >>> from onestep.linalg import NormalEquations
        >>> equations = NormalEquations(1, 1, intercept=True, dtype=torch.float64)
        >>> solution = equations.update(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]])).solve()
        >>> round(solution.W.item(), 6), round(solution.intercept.item(), 6)
        (2.0, 1.0)
    """

    W: Tensor
    intercept: Tensor


class NormalEquations:
    """Adds up XᵀDX and XᵀDY over chunks of rows, and solves for W (and an intercept) at any time.

    Minimises Σ w ‖y − xW − b‖² + Σⱼ ridgeⱼ‖Wⱼ‖² over all rows seen. Holds d² + dk + d + k float64 numbers, however many
    rows there are. ``moments`` sums each chunk in one pass, and without a copy where it has ``dtype`` already. With an
    intercept the sums are of rows less their means, and chunks are merged by the update of Chan, Golub and LeVeque (The
    American Statistician 37, 1983), so that neither large offsets nor 10⁸ rows cost digits. However the rows are cut
    into chunks, the sums agree to rounding; the same cut gives the same bits, for any number of threads.

    XᵀX squares the condition of X, and ``refine`` as in ``solve_normal`` would need the rows again: where features are
    nearly dependent, ``dtype=torch.float64`` keeps more digits, and converts narrower chunks. Not differentiable in the
    rows; ``solve`` and ``sweep`` are in the ridge.

    Args:
        d: features, at least 1.
        k: targets.
        intercept: whether to fit an intercept, which is not penalised.
        dtype: torch.float32 or torch.float64, of the rows that are read in place and of the solutions; None for torch's
            default. The sums are float64 in any case.
        device: where the rows and the sums are. Checking a chunk for NaN, and solving, wait for a GPU.

    Attributes:
        count: rows seen, those of weight 0 included.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size.

    Examples:
        >>> import torch
        >>> from onestep.linalg import NormalEquations
        >>> equations = NormalEquations(1, 1, intercept=True)
        >>> for x in (0.0, 1.0, 2.0):
        ...     _ = equations.update(torch.tensor([[x]]), torch.tensor([1 + 2 * x]))
        >>> W, intercept = equations.solve()
        >>> round(W.item(), 5), round(intercept.item(), 5)
        (2.0, 1.0)
    """

    # What makes solutions of tensors, where rows came as another library's arrays.
    _give: Callable[[Tensor], Any] | None = None

    @safe_after_fork
    def __init__(
        self,
        d: int,
        k: int,
        *,
        intercept: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.d, self.k = _size("d", d, 1), _size("k", k, 0)
        if not isinstance(intercept, bool):
            raise TypeError(f"intercept is {type(intercept).__name__}; expected True or False")
        self.intercept = intercept
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.dtype not in _DTYPES:
            raise TypeError(f"dtype is {self.dtype}; expected torch.float32 or torch.float64")
        sums = torch.zeros(self._numel(), dtype=torch.float64, device=_device(device))
        # With its index, as tensors have it.
        self.device = sums.device
        self.count = 0
        # Replaced as a whole and never written into, so that an update is there in full or not at all.
        self._sums = self._split(sums)

    def __repr__(self) -> str:
        return f"NormalEquations({self._described()}, dtype={self.dtype}, count={self.count})"

    def _described(self) -> str:
        return f"d={self.d}, k={self.k}, intercept={self.intercept}"

    @property
    def sums(self) -> Moments:
        """What has been added up, float64: see ``Moments``. A snapshot: later updates replace it. Not to be written."""
        return self._sums

    @one_thread_after_fork()
    def update(self, X: Tensor, Y: Tensor, weight: Tensor | None = None) -> NormalEquations:
        """Adds a chunk of rows.

        Args:
            X: (n,d), any strides; n may be 0. float32, float64, bfloat16 or float16, no wider than ``dtype``.
            Y: (n,k) or, for k = 1, (n,); likewise.
            weight: (n,), >= 0; likewise. Weight 2 is the same as the row twice.

        Returns:
            self.

        Raises:
            ValueError: a wrong shape or device, a negative weight, NaN, infinity, or products that overflow ``dtype``.
            TypeError: no tensor, no floating dtype, or one wider than ``dtype``.
            NotImplementedError: an argument requires grad.

        After an error nothing of the chunk has been added. Arrays of NumPy, JAX, TensorFlow and others on the CPU are
        taken, too, by DLPack; ``solve`` and ``sweep`` return the last chunk's kind.
        """
        give = giver(X) if is_foreign(X) else None
        X, Y, weight = as_tensor(X), as_tensor(Y), as_tensor(weight)
        half = isinstance(X, Tensor) and X.dtype in (torch.bfloat16, torch.float16) and self.dtype == torch.float32
        X = self._on_device("X", features(X)) if half else self._rows("X", X)
        if X.dim() != 2 or X.shape[1] != self.d:
            raise ValueError(f"X has shape {tuple(X.shape)}; expected (n, {self.d})")
        n = len(X)
        Y = self._rows("Y", Y)
        if Y.shape != (n, self.k) and not (self.k == 1 and Y.shape == (n,)):
            vector = f" or ({n},)" if self.k == 1 else ""
            raise ValueError(f"Y has shape {tuple(Y.shape)}; expected ({n}, {self.k}){vector}, as many rows as X")
        Y = Y.reshape(n, self.k)
        if weight is not None:
            weight = self._rows("weight", weight)
            if weight.shape != (n,):
                raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({n},), one per row of X")
        added = moments(X, Y, weight=weight, center=self.intercept)
        # NaN and infinity show in the sums, so that no pass over the rows is spent on looking for them.
        if not all(math.isfinite(part.sum().item()) for part in added):
            self._raise_not_finite({"X": X, "Y": Y, "weight": weight})
        self._sums, self.count = _merged(self._sums, added, self.intercept), self.count + n
        self._give = give
        return self

    def _on_device(self, name: str, value: Tensor) -> Tensor:
        if value.device != self.device:
            raise ValueError(f"{name} is on device {value.device}; expected {self.device}")
        return value

    def _rows(self, name: str, value: Tensor) -> Tensor:
        value = self._on_device(name, floating(name, value))
        if value.dtype.itemsize > self.dtype.itemsize:
            raise TypeError(
                f"{name} has dtype {value.dtype}; expected {self.dtype}, or narrower: pass {name}.float(), or make "
                "NormalEquations with dtype=torch.float64"
            )
        return value.to(self.dtype)

    def _raise_not_finite(self, rows: Mapping[str, Tensor | None]) -> None:
        for name, value in rows.items():
            if value is not None and not value.isfinite().all():
                bad = (~value.isfinite()).reshape(len(value), -1).any(-1).nonzero()
                raise ValueError(f"{name} holds NaN or infinity, first in row {bad[0].item()}; expected finite values")
        raise ValueError(f"X, Y or weight holds values whose products overflow {self.dtype}: rescale them")

    @one_thread_after_fork()
    def merge(self, other: NormalEquations) -> NormalEquations:
        """Adds the rows that another accumulator has seen, which stays as it is; returns self.

        Args:
            other: of the same d, k and intercept.

        Raises:
            TypeError: ``other`` is no NormalEquations, or its sums are of float32 rows and this one's dtype is float64.
            ValueError: it has another d, k or intercept.
        """
        if not isinstance(other, NormalEquations):
            raise TypeError(f"other is {type(other).__name__}; expected NormalEquations")
        if other._described() != self._described():
            raise ValueError(f"other has {other._described()}; expected {self._described()}")
        if other.dtype.itemsize < self.dtype.itemsize:
            raise TypeError(f"other has dtype {other.dtype}, whose rounding is in its sums; expected {self.dtype}")
        self._sums, self.count = _merged(self._sums, other._sums, self.intercept), self.count + other.count
        return self

    @safe_after_fork
    def all_reduce(self, group: Any = None) -> NormalEquations:
        """Merges what all ranks of a torch.distributed group have seen, and leaves it with each of them.

        The ranks are merged in the order of their numbers, so all end with the same bits. Call it once, after the last
        update: in a second call the rows of every rank would count as often as there are ranks. While it runs it takes
        a few times the memory of the sums, whatever the number of ranks.

        Args:
            group: a process group whose backend takes tensors on this device (gloo; nccl on GPUs); None for the
                default one. All of its ranks must call.

        Returns:
            self.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: this process is not in the group; or, on every rank, d, k, intercept or dtype differ.
        """
        if not initialised():
            raise RuntimeError("all_reduce needs a process group: call torch.distributed.init_process_group first")
        rank, size = place(group)
        if rank < 0:
            raise ValueError("this process is not in group; expected a group that it belongs to")
        # Headers of one size first: sums of different sizes would hang, or mix up their numbers.
        mine = torch.tensor([self.d, self.k, self.intercept, self.dtype.itemsize, self.count], device=self.device)
        headers = [torch.empty_like(mine) for _ in range(size)]
        collective(dist.all_gather, headers, mine, group=group)
        *expected, _ = headers[0].tolist()
        for other, header in enumerate(headers):
            *found, _ = header.tolist()
            if found != expected:
                names = "(d, k, intercept, bytes of dtype)"
                raise ValueError(f"rank {other} of the group has {names} = {found}; expected {expected}, as rank 0 has")
        total = self._split(torch.zeros(self._numel(), dtype=torch.float64, device=self.device))
        own = torch.cat([part.reshape(-1) for part in self._sums])
        for source in range(size):
            flat = own if source == rank else torch.empty_like(own)
            collective(dist.broadcast, flat, group=group, group_src=source)
            total = _merged(total, self._split(flat), self.intercept)
        self._sums, self.count = total, sum(int(header[-1]) for header in headers)
        return self

    def _sizes(self) -> list[tuple[int, ...]]:
        return [(self.d, self.d), (self.d, self.k), (self.d,), (self.k,), ()]

    def _numel(self) -> int:
        return self.d * self.d + self.d * self.k + self.d + self.k + 1

    def _split(self, flat: Tensor) -> Moments:
        sizes = self._sizes()
        parts = flat.split([torch.Size(size).numel() for size in sizes])
        return Moments(*(part.reshape(size) for part, size in zip(parts, sizes, strict=True)))

    @one_thread_after_fork()
    def solve(self, ridge: float | Tensor | Sequence[float] = 0.0) -> LinearSolution:
        """Solves (XᵀDX + diag(ridge)) W = XᵀDY by Cholesky, in float64 on features scaled to a unit diagonal.

        Scaling so is within a factor d of the best there is (van der Sluis, Numer. Math. 14, 1969): the units of the
        features do not matter. With an intercept, X and Y are less their means.

        Args:
            ridge: penalty >= 0: a number, or one per feature (d,). A tensor may require grad.

        Returns:
            ``LinearSolution(W, intercept)``: (d,k) and (k,) in ``dtype``, the intercept zeros where none is fitted.

        Raises:
            torch.linalg.LinAlgError: the equations are singular to working precision: a pivot is under 8 ε of its
                diagonal element, ε that of ``dtype``; or the solution overflows ``dtype``.
            ValueError, TypeError: a bad ridge.
        """
        penalty = _penalties("ridge", ridge, self.device, [(), (self.d,)], f"a number >= 0, or {self.d} of them")
        return self._solution(self._by_cholesky(without_constants(self._sums, self.dtype), penalty))

    @safe_after_fork
    def sweep(self, ridges: Sequence[float] | Tensor) -> LinearSolution:
        """Solves for many penalties, each the same for all features, from one eigendecomposition of XᵀDX.

        With XᵀDX = V diag(λ) Vᵀ, W = V diag(1 / (λ + ridge)) VᵀXᵀDY. A penalty so small that the smallest λ + ridge is
        under 1e-8 of the largest (float32: 1e-6), where λ is not accurate enough, is solved for as ``solve`` does.

        Args:
            ridges: (p,) penalties >= 0. A tensor may require grad.

        Returns:
            ``LinearSolution(W, intercept)``: (p,d,k) and (p,k), for each penalty what ``solve`` returns, to rounding.

        Raises:
            torch.linalg.LinAlgError, ValueError, TypeError: as ``solve``.
        """
        penalties = _penalties("ridges", ridges, self.device, None, "a sequence of numbers >= 0")
        sums = without_constants(self._sums, self.dtype)
        # Where this holds the pivots that ``solve`` judges by are good too: scaling does not lower the ratio.
        least = max(spd.LEAST_RCOND, spd.SINGULAR_EPSILONS * torch.finfo(self.dtype).eps)
        values, vectors = eigh(sums.gram)
        rotated = vectors.mT @ sums.cross
        found = [
            vectors @ (rotated / (values + penalty).unsqueeze(-1))
            if values[-1] + penalty > 0 and spd.eigenvalues_are_accurate(values, penalty, least)
            else self._by_cholesky(sums, penalty)
            for penalty in penalties
        ]
        return self._solution(torch.stack(found) if found else sums.cross.new_empty(0, self.d, self.k))

    def _by_cholesky(self, sums: Moments, penalty: Tensor) -> Tensor:
        factor = spd.factor(sums.gram + torch.diag(penalty.expand(self.d)))
        if factor.zero >= 0:
            self._raise_singular(f"feature {factor.zero} is {'constant' if self.intercept else 'zero'} in all rows")
        dependent = factor.first_singular(self.dtype)
        if dependent >= 0:
            self._raise_singular(f"feature {dependent} is linearly dependent on those before it")
        return factor.solve(sums.cross)

    def _raise_singular(self, why: str) -> None:
        raise LinAlgError(
            f"the normal equations of {self.count} rows and {self.d} features are singular to the precision of "
            f"{self.dtype}: {why}; pass ridge > 0, or leave it out"
        )

    def _solution(self, W: Tensor) -> LinearSolution:
        rounded = W.to(self.dtype)
        # The intercept for W as it is returned: rounding W then moves no prediction at the mean of the rows.
        intercept = (self._sums.y_mean - self._sums.x_mean @ rounded.double()).to(self.dtype)
        if not (bool(rounded.isfinite().all()) and bool(intercept.isfinite().all())):
            raise LinAlgError(f"the solution overflows {self.dtype}: rescale X or Y, or pass ridge > 0")
        solution = LinearSolution(rounded, intercept)
        if self._give is None:
            return solution
        detached = LinearSolution(rounded.detach(), intercept.detach())
        return cast(LinearSolution, mapped(self._give, detached))

    @safe_after_fork
    def state_dict(self) -> dict[str, Any]:
        """The sums and what they are of: tensors and plain values, which torch.save keeps bit for bit."""
        settings = {"d": self.d, "k": self.k, "intercept": self.intercept, "dtype": self.dtype, "count": self.count}
        return settings | {name: part.clone() for name, part in self._sums._asdict().items()}

    @safe_after_fork
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the place of what was added up so far, from ``state_dict`` of an accumulator made alike.

        Args:
            state: what ``state_dict`` gave.

        Raises:
            ValueError: a key is missing or unknown, d, k, intercept or dtype differ, or a tensor's shape, dtype, device
                or values cannot be. Nothing is taken over then.
            TypeError: a value of the wrong type.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is {type(state).__name__}; expected a dict, as of state_dict()")
        _check_keys(state, self.state_dict())
        for name in ("d", "k", "intercept", "dtype"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state has {name}={state[name]}; expected {name}={getattr(self, name)}")
        count = _size("state['count']", state["count"], 0)
        sums = Moments(
            *(
                _stored(name, state[name], torch.Size(size), self.device)
                for name, size in zip(Moments._fields, self._sizes(), strict=True)
            )
        )
        if not torch.equal(sums.gram, sums.gram.mT) or (sums.gram.diagonal() < 0).any():
            raise ValueError("state['gram'] is not symmetric with a diagonal >= 0; expected a Gram matrix")
        if sums.weight_sum < 0:
            raise ValueError(f"state['weight_sum'] is {sums.weight_sum.item()}; expected a number >= 0")
        self._sums, self.count = sums, count


def _merged(first: Moments, second: Moments, centred: bool) -> Moments:
    """The sums of both, in new tensors: G = G₁ + G₂ + (w₁w₂/w) (x̄₂ − x̄₁)(x̄₂ − x̄₁)ᵀ with w = w₁ + w₂."""
    gram, cross = first.gram + second.gram, first.cross + second.cross
    total = first.weight_sum + second.weight_sum
    if not centred or not total > 0:
        return Moments(gram, cross, first.x_mean, first.y_mean, total)
    share = second.weight_sum / total
    x_step, y_step = second.x_mean - first.x_mean, second.y_mean - first.y_mean
    # The root on both sides keeps the Gram matrix exactly symmetric.
    root = (first.weight_sum * share).sqrt()
    gram.addr_(root * x_step, root * x_step)
    cross.addr_(root * x_step, root * y_step)
    return Moments(gram, cross, first.x_mean + share * x_step, first.y_mean + share * y_step, total)


def _size(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {type(value).__name__}; expected an integer >= {least}")
    if int(value) < least:
        raise ValueError(f"{name}={value}; expected an integer >= {least}")
    return int(value)


def _device(device: object) -> torch.device:
    """The device as torch has it; raises if there is no kernel for its type."""
    place = torch.device(device) if isinstance(device, (str, torch.device)) else None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device}; expected 'cpu' or 'cuda'")
    normal.moments.require(place.type)
    return place


def _penalties(
    name: str, value: object, device: torch.device, shapes: Iterable[tuple[int, ...]] | None, meaning: str
) -> Tensor:
    """Finite penalties >= 0 as a float64 tensor, of one of the shapes, or of one dimension if there are none."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}; expected {meaning}")
        if value.device != device:
            raise ValueError(f"{name} is on device {value.device}; expected {device}, like the sums")
        penalties = value.double()
    else:
        try:
            number = None if isinstance(value, bool) else value
            penalties = torch.as_tensor(number, dtype=torch.float64, device=device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} is {type(value).__name__}; expected {meaning}") from None
    if penalties.dim() != 1 if shapes is None else tuple(penalties.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(penalties.shape)}; expected {meaning}")
    if not ((penalties >= 0) & penalties.isfinite()).all():
        raise ValueError(f"{name}={value}; expected {meaning}, finite")
    return penalties


def _check_keys(state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    missing, unknown = sorted(like.keys() - state.keys()), sorted(map(str, state.keys() - like.keys()))
    if missing or unknown:
        raise ValueError(f"state lacks {missing} and has unknown {unknown}; expected the keys {sorted(like)}")


def _stored(name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    """A copy on the device of one tensor of a state, once it is what a state may hold."""
    if not isinstance(value, Tensor):
        raise TypeError(f"state[{name!r}] is {type(value).__name__}; expected torch.Tensor")
    if value.shape != shape:
        raise ValueError(f"state[{name!r}] has shape {tuple(value.shape)}; expected {tuple(shape)}")
    if value.dtype != torch.float64 or value.is_meta or value.layout != torch.strided:
        raise ValueError(
            f"state[{name!r}] is {value.dtype}, {value.layout} on {value.device}; expected dense torch.float64 values"
        )
    if not value.isfinite().all():
        raise ValueError(f"state[{name!r}] holds NaN or infinity; expected finite values")
    return value.detach().to(device).clone(memory_format=torch.contiguous_format)
