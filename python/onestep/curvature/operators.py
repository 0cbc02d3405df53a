"""The Hessian, Gauss-Newton and Fisher matrices of a loss over data, as linear operators."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from onestep._fork import one_thread_after_fork
from onestep.curvature._estimates import Estimate, estimate_diagonal, estimate_trace
from onestep.curvature._solve import MOST_DENSE, SolveReport, solve
from onestep.curvature.products import Route, hessian_product, hvp, outer_products
from onestep.evaluation.data import Chunk, as_source
from onestep.evaluation.distributed import equal_everywhere, share, summed, together
from onestep.evaluation.errors import NonFiniteError
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.losses import LOSSES, Loss, as_loss, check_mean_over_rows, drawn_slope
from onestep.evaluation.module import (
    autograd_gradient,
    call_model,
    chunk_rows,
    eval_mode,
    explain,
    parameter_names,
    summed_gradient,
    warn_of_eval_mode,
)
from onestep.evaluation.parameters import ParameterVector
from onestep.evaluation.progress import Progress, can_show_progress

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Named = dict[str, Tensor]
# A vector (p,), a block of k vectors (p,k), or a dict of tensors named as the parameters.
Vectors = TypeVar("Vectors", Tensor, dict[str, Tensor])

# A chunk has a gradient's affordable rows divided by this, and as many vectors at once as then fit: a second derivative
# keeps as much for each vector as a gradient does.
_CHUNK_PARTS = 4
# How many rows are looked at to tell what a row costs.
_FEW = 8
# Losses of two passes are the same if they differ by so many ε; on a GPU sums may come in another order.
_SAME_ROUNDINGS = 100
# Random vectors behind the diagonal preconditioner, and its least element relative to the mean.
_DIAGONAL_SAMPLES = 16
_LEAST_DIAGONAL = 1e-3


class CurvatureOperator(ABC):
    """A symmetric p × p matrix of a model's loss over data, of which only products are ever formed.

    The matrix belongs to L(θ) = 1/m Σᵢ ℓ(f(xᵢ; θ), yᵢ), i over all rows of the data, however they are batched, and m
    the number of elements of the loss ("mean"), or m = 1 ("sum"). θ are the parameters with requires_grad=True, at the
    values that they have when a product is taken. A product is one pass over the data, whatever the number of vectors;
    nothing is kept between batches.

    The model is evaluated in eval mode (dropout off, batch norm with its running statistics) and put back afterwards:
    otherwise the matrix would be another one for each pass, or couple the rows of a batch. Rows always come in the same
    order, that of a shuffling DataLoader being drawn from ``seed``; results are the same bits each time, as far as
    torch's kernels are deterministic.

    Under torch.distributed every process calls the same methods with the same arguments and computes its share of each
    batch (a DistributedSampler's batches as they are); all get the sum.

    Args:
        model: any module that returns a tensor, (n,…) for n rows.
        data: a pair of tensors (inputs, target), a Dataset of such pairs, or a DataLoader (any iterable that can be
            read again) of such batches, rows first. Inputs may be a tuple or a dict of tensors, which is unpacked.
            Batches are moved to the parameters' device.
        loss: "mse" (mean over all elements), "cross_entropy" (class indices; -100 is ignored), "poisson" (the model
            gives the logarithm of the rate), "bce" (the model gives log-odds); torch's losses, as functions or modules,
            with their class weights; or a function (outputs, target) → mean over the rows it was given. The old order
            of arguments, (model, loss, data), is deprecated.
        reduction: "mean" or "sum", over all rows of the data.
        chunk_size: rows computed at a time; None for as many as keep 256 MiB for a backward pass.
        seed: of the order of a shuffling DataLoader.
        progress: whether to show a bar during passes that take longer than two seconds. Needs tqdm.
        check_deterministic: whether to make sure, by two passes of the loss, that data and model are the same each
            time.

    Raises:
        ValueError, TypeError: an argument is not what it should be, or two passes over the data differ.
        NonFiniteError: NaN or infinity in data or loss, naming the batch; also from all methods that take products.
    """

    # How many frames __init__ is from the user's call, with that of its decorator, for warnings.
    _construction_depth = 3

    @one_thread_after_fork()
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Any = "mse",
        *,
        reduction: Literal["mean", "sum"] = "mean",
        chunk_size: int | None = None,
        seed: int = 0,
        progress: bool = True,
        check_deterministic: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}; expected 'mean' or 'sum'")
        if chunk_size is not None:
            _check_count("chunk_size", chunk_size)
        data, loss = _in_order(data, loss, stacklevel=self._construction_depth)
        self.model, self.reduction, self.seed = model, reduction, seed
        self._loss: Loss = as_loss(loss)
        self._parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
        self._names = parameter_names(model, self._parameters)
        self._source = as_source(data, seed)
        self._source.share = share()
        self._progress = progress and can_show_progress(stacklevel=self._construction_depth)
        # Whether torch.func.vmap can run the model, as far as is known.
        self._vectorizes, self._route = True, Route()
        warn_of_eval_mode(model, type(self).__name__, stacklevel=self._construction_depth)
        self._affordable_rows = together(self._look_at_rows)
        self._source.chunk_size = chunk_size or max(1, self._affordable_rows // _CHUNK_PARTS)
        if check_deterministic:
            self._check_deterministic()

    # ---------------------------------------------------------------------------------------------------- what it is

    @property
    def shape(self) -> tuple[int, int]:
        """(p,p)."""
        return len(self._parameters), len(self._parameters)

    @property
    def dtype(self) -> torch.dtype:
        """That of the parameters."""
        return self._parameters.dtype

    @property
    def device(self) -> torch.device:
        """That of the parameters."""
        return self._parameters.device

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, loss={self._loss.name!r}, reduction={self.reduction!r})"

    # ------------------------------------------------------------------------------------------------------ products

    @one_thread_after_fork()
    def __matmul__(self, v: Vectors) -> Vectors:
        """Computes A v.

        Args:
            v: (p,), or (p,k), k vectors in one pass over the data, in the order of ``model.parameters()``; or a dict of
                tensors named as in ``model.named_parameters()``, of their shapes, or of those and a last dimension k.

        Returns:
            A v, of the kind and shape of ``v``.

        Raises:
            ValueError, TypeError: ``v`` does not fit, or differs between processes.
            NonFiniteError: the product is NaN or infinite, naming the batch.
        """
        block = together(lambda: self._block(v, "v"))
        if not equal_everywhere(block):
            raise ValueError("v differs between processes; expected the same vectors in all")
        product: Vectors = self._like(v, self._multiply(block))
        return product

    @one_thread_after_fork()
    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """The loss over all data, and its gradient (p,): ``solve(-gradient, damping)`` is a damped Newton step."""
        with eval_mode(self.model):
            loss, gradient, elements = summed_gradient(
                lambda chunk: autograd_gradient(lambda: self._chunk_loss(chunk), self._parameters),
                lambda chunk: self._loss.elements(chunk.target, len(chunk)),
                self._chunks,
                self._parameters,
                self._source.share.pieces,
            )
        return (loss, gradient) if self.reduction == "sum" else (loss / elements, gradient / elements)

    def to_scipy(self) -> LinearOperator:
        """A scipy.sparse.linalg.LinearOperator of NumPy arrays, as ``eigsh`` and ``cg`` take it.

        Its dtype is float64 for parameters in float64, else float32. With several processes all must ask for the same
        products: give ``eigsh`` a ``v0``.

        Raises:
            ModuleNotFoundError: scipy is not installed.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_scipy() needs scipy, which is not installed: pip install scipy", name="scipy"
            ) from error
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def multiply(v: Any) -> Any:
            product = self @ torch.tensor(v, dtype=self.dtype, device=self.device)
            return product.to("cpu", wide).numpy()

        dtype = torch.empty(0, dtype=wide).numpy().dtype
        return LinearOperator(
            self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=dtype
        )

    # ----------------------------------------------------------------------------------------------------- estimates

    @one_thread_after_fork()
    def trace(self, samples: int | None = None, *, generator: torch.Generator | None = None) -> Estimate:
        """tr A: exact for up to 128 parameters, else estimated by Hutchinson's method (Commun. Statist. 19, 1990).

        Args:
            samples: how many products with random signs are averaged, at least 2. The standard error falls with their
                root. None for the exact value where the matrix is small, and 64 elsewhere.
            generator: draws the signs, the same in all processes; None for a new one with seed 0.

        Returns:
            ``Estimate``: value, standard_error, samples.
        """
        if samples is None and self.shape[0] <= MOST_DENSE:
            value = self._exact_diagonal().sum()
            return Estimate(value, torch.zeros_like(value), 0)
        return estimate_trace(self.__matmul__, self._empty(), 64 if samples is None else samples, generator)

    @one_thread_after_fork()
    def diagonal(self, samples: int | None = None, *, generator: torch.Generator | None = None) -> Estimate:
        """diag A, (p,): exact for up to 128 parameters, else estimated by z∘Az with random signs z.

        (Bekas, Kokiopoulou and Saad 2007.) An element's error comes from the rest of its row, and may make an estimate
        negative where the matrix has no negative elements there. Arguments and result as for ``trace``.
        """
        if samples is None and self.shape[0] <= MOST_DENSE:
            value = self._exact_diagonal()
            return Estimate(value, torch.zeros_like(value), 0)
        return estimate_diagonal(self.__matmul__, self._empty(), 64 if samples is None else samples, generator)

    def _exact_diagonal(self) -> Tensor:
        return (self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).diagonal().double()

    # --------------------------------------------------------------------------------------------------------- solve

    @one_thread_after_fork()
    def solve(
        self,
        b: Vectors,
        damping: float,
        *,
        tolerance: float = 1e-5,
        max_iterations: int = 250,
        preconditioner: Literal["diagonal"] | Callable[[Tensor], Tensor] | None = None,
        indefinite: Literal["raise", "minres"] = "raise",
    ) -> tuple[Vectors, SolveReport]:
        """Solves (A + damping·I) x = b by preconditioned conjugate gradients (Hestenes and Stiefel 1952).

        For up to 128 parameters the matrix is formed, in one pass over the data, and decomposed, if there is no
        preconditioner and ``max_iterations`` allows for as many products.

        Args:
            b: as ``v`` in ``A @ v``; the columns of a block share passes over the data.
            damping: at least 0, and large enough to make A + damping·I positive definite, or see ``indefinite``.
            tolerance: goal for ‖b - (A + damping·I) x‖ / ‖b‖ of each column.
            max_iterations: at most so many passes, besides those that check the residual.
            preconditioner: None; "diagonal", the damped absolute value of 16 samples' ``diagonal()``, for a diagonal
                that varies by orders of magnitude; or a function M⁻¹ of vectors, (p,) → (p,), or (p,j) → (p,j),
                j ≤ k, where b is a block (p,k): symmetric and positive definite.
            indefinite: what to do where negative curvature shows that A + damping·I is not positive definite: "raise",
                or "minres", to solve the indefinite system, for which a Newton step goes to a saddle (Paige and
                Saunders 1975). Conjugate gradients see negative curvature along what they search alone.

        Returns:
            x, of the kind and shape of ``b``, and a ``SolveReport``, with a warning where a residual is above the
            tolerance.

        Raises:
            ValueError, TypeError: an argument is not what it should be.
            LinAlgError: A + damping·I is not positive definite.
            NonFiniteError: a product is NaN or infinite, naming the batch.
        """
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping={damping}; expected a finite number >= 0")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}; expected a number between 0 and 1")
        _check_count("max_iterations", max_iterations)
        if indefinite not in ("raise", "minres"):
            raise ValueError(f"indefinite={indefinite!r}; expected 'raise' or 'minres'")
        B = self._block(b, "b")
        if B.shape[1] == 1 and not (isinstance(b, Tensor) and b.dim() == 2):
            # A vector is one for the preconditioner too.
            B = B.flatten()
        inverse = self._preconditioner(preconditioner, damping)

        x, report = solve(
            self.__matmul__,
            B,
            damping,
            tolerance=tolerance,
            max_iterations=max_iterations,
            precondition=inverse,
            indefinite=indefinite,
        )
        solution: Vectors = self._like(b, x.reshape(len(x), -1))
        return solution, report

    def _preconditioner(self, given: Any, damping: float) -> Callable[[Tensor], Tensor] | None:
        if given == "diagonal":
            diagonal = self.diagonal(_DIAGONAL_SAMPLES).value.abs()
            floor = _LEAST_DIAGONAL * diagonal.mean().item()
            inverse = (1 / (diagonal.clamp_min(floor) + damping)).to(self.dtype)
            return lambda v: inverse * v if v.dim() == 1 else inverse[:, None] * v
        if not (given is None or callable(given)):
            raise TypeError(f"preconditioner is {given!r}; expected None, 'diagonal' or a function")
        if given is None:
            return None

        def checked(r: Tensor) -> Tensor:
            z = given(r)
            if not isinstance(z, Tensor) or z.shape != r.shape:
                what = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
                raise ValueError(f"preconditioner returned {what} for {tuple(r.shape)}; expected the same shape")
            power = torch.linalg.vecdot(r, z, dim=0)
            if not bool((power > 0).logical_or(r.norm(dim=0) == 0).all()):
                raise ValueError(f"preconditioner M⁻¹ has rᵀM⁻¹r = {power.min().item():g}; expected positive definite")
            return z

        return checked

    # ------------------------------------------------------------------------------------------- vectors of all kinds

    def _empty(self) -> Tensor:
        return torch.empty(len(self._parameters), dtype=self.dtype, device=self.device)

    def _block(self, v: Any, name: str) -> Tensor:
        """v as (p,k)."""
        p = len(self._parameters)
        if isinstance(v, Tensor):
            if v.dim() not in (1, 2) or len(v) != p:
                raise ValueError(f"{name} has shape {tuple(v.shape)}; expected ({p},) or ({p}, k)")
            self._check_kind(v, name)
            block = v.detach().reshape(p, -1 if v.dim() == 1 else v.shape[1])
        elif isinstance(v, Mapping):
            block = self._block_of_mapping(v, name)
        else:
            raise TypeError(f"{name} is {type(v).__name__}; expected a tensor or a dict of tensors")
        if not _all_finite(block):
            raise ValueError(f"{name} holds NaN or infinity; expected finite numbers")
        return block

    def _block_of_mapping(self, v: Mapping[str, Any], name: str) -> Tensor:
        if v.keys() != set(self._names):
            differing = ", ".join(sorted(map(str, v.keys() ^ set(self._names))))
            raise ValueError(f"{name} and the model's trainable parameters hold different names: {differing}")
        columns = _columns(v[self._names[0]], self._parameters.tensors[0])
        parts = []
        for key, parameter in zip(self._names, self._parameters.tensors, strict=True):
            part = v[key]
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}[{key!r}] is {type(part).__name__}; expected a tensor")
            self._check_kind(part, f"{name}[{key!r}]")
            shape = tuple(parameter.shape)
            if tuple(part.shape) != shape + columns:
                if part.dim() == len(shape) + 1 and tuple(part.shape[1:]) == shape:
                    raise ValueError(
                        f"{name}[{key!r}] has shape {tuple(part.shape)}; expected {(*shape, part.shape[0])}: vectors "
                        "of a block are its last dimension, here they seem to be the first. Use movedim(0, -1)"
                    )
                others = f"{shape + columns} as the first" if columns else f"{shape} or {(*shape, 'k')}"
                raise ValueError(f"{name}[{key!r}] has shape {tuple(part.shape)}; expected {others}")
            parts.append(part.detach().reshape(parameter.numel(), *(columns or (1,))))
        return torch.cat(parts)

    def _check_kind(self, v: Tensor, name: str) -> None:
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(f"{name} is {v.dtype} on {v.device}; expected {self.dtype} on {self.device}")

    def _like(self, v: Any, block: Tensor) -> Any:
        """(p,k) in the form of v."""
        if isinstance(v, Tensor):
            return block.reshape(v.shape)
        parts = block.split(self._parameters.sizes)
        return {name: part.reshape(v[name].shape) for name, part in zip(self._names, parts, strict=True)}

    # ------------------------------------------------------------------------------------------------- over the data

    def _chunks(self) -> Iterator[Chunk]:
        for chunk in self._source.all():
            yield Chunk(*tree_map_only(Tensor, lambda t: t.to(self.device), tuple(chunk)))

    def _chunk_loss(self, chunk: Chunk) -> Tensor:
        """The loss summed over a chunk, at the model's own parameters."""
        with exclusive():
            return self._loss.sum(call_model(self.model, chunk.inputs), chunk.target)

    def _look_at_rows(self) -> int:
        """How many rows keep as much for a backward pass as may be kept."""
        self._source.chunk_size = _FEW
        first = next(self._chunks(), None)
        if first is None:
            raise ValueError("data gives this process no rows; expected at least one for each process")
        with eval_mode(self.model), exclusive():
            return chunk_rows(self.model, self._loss, first)

    def _checked_loss(self, chunk: Chunk) -> float:
        """The loss summed over a chunk, once it is known to be a mean over rows."""
        with exclusive():
            outputs = call_model(self.model, chunk.inputs).detach()
            check_mean_over_rows(self._loss, outputs, chunk.target)
            return self._loss.sum(outputs, chunk.target).item()

    def _check_deterministic(self) -> None:
        def losses() -> list[float]:
            found = []
            with torch.no_grad(), eval_mode(self.model):
                for number, chunk in enumerate(self._chunks()):
                    loss = self._checked_loss(chunk)
                    if not math.isfinite(loss):
                        raise NonFiniteError(explain(chunk, number, f"the loss is {loss}"))
                    found.append(loss)
            return found

        def compare() -> None:
            first, second = losses(), losses()
            close = _SAME_ROUNDINGS * torch.finfo(self.dtype).eps
            for number, (a, b) in enumerate(zip(first, second, strict=False)):
                if abs(a - b) > close * max(abs(a), abs(b)):
                    raise ValueError(f"data: the loss of batch {number} is {a:g}, then {b:g}; {_ORDERLY}")
            if len(first) != len(second):
                raise ValueError(f"data: a pass has {len(first)} batches, the next {len(second)}; {_ORDERLY}")

        together(compare)

    def _multiply(self, V: Tensor) -> Tensor:
        """A V, (p,k)."""
        names, values = self._names, self._parameters.read()
        point = dict(zip(names, self._parameters.split(values), strict=True))
        tangents = dict(zip(names, self._parameters.split(V.mT.contiguous()), strict=True))

        def local() -> tuple[Tensor, list[float]]:
            # (k,p), as products come: sums into columns would be slow.
            total = torch.zeros(V.mT.shape, dtype=torch.promote_types(V.dtype, torch.float32), device=V.device)
            parts = dict(zip(names, self._parameters.split(total), strict=True))
            elements = 0.0
            rows = self._source.known_rows
            with (
                torch.no_grad(),
                eval_mode(self.model),
                Progress(
                    None if rows is None else -(-rows // share().size),
                    enabled=self._progress,
                    what=f"{type(self).__name__} @ {V.shape[1]}",
                    unit="row",
                    of_a_pass=True,
                ) as bar,
            ):
                for number, chunk in enumerate(self._chunks()):
                    at_once = max(1, self._affordable_rows // len(chunk))
                    # The parameters are swapped inside a module that other threads may use.
                    with exclusive():
                        product = self._product(chunk, number, point)
                        for begin in range(0, V.shape[1], at_once):
                            some = slice(begin, begin + at_once)
                            results = self._of_each(product, {name: part[some] for name, part in tangents.items()})
                            for name, result in results.items():
                                parts[name][some].add_(result)
                    if not _all_finite(total):
                        raise NonFiniteError(explain(chunk, number, "the product is NaN or infinite"))
                    elements += self._loss.elements(chunk.target, len(chunk))
                    bar.update(len(chunk))
            return total, [elements]

        total, (elements,) = summed(local)
        if not elements:
            raise ValueError("every target of the data is ignored; there is no loss to differentiate")
        return (total.div_(elements) if self.reduction == "mean" else total).to(V.dtype).mT.contiguous()

    def _of_each(self, product: Callable[[Named], Named], V: Named) -> Named:
        """product of each of the vectors (k,…)."""
        k = len(V[self._names[0]])
        if k == 1:
            result = product({name: part[0] for name, part in V.items()})
            return {name: part[None] for name, part in result.items()}
        if self._vectorizes and not self._route.reverse_twice:
            try:
                block: Named = vmap(product, randomness="same")(V)
                return block
            except RuntimeError:
                # Not every module runs under vmap, nn.LSTM for one; what else is wrong, the loop will tell.
                self._vectorizes = False
        results = [product({name: part[j] for name, part in V.items()}) for j in range(k)]
        return {name: torch.stack([result[name] for result in results]) for name in self._names}

    @abstractmethod
    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        """v ↦ A v, A of the loss summed over a chunk, with the parameters at ``point``."""

    def _outputs(self, chunk: Chunk) -> Callable[[Named], Tensor]:
        return lambda values: call_model(self.model, chunk.inputs, values)

    def _loss_of_outputs(self, chunk: Chunk) -> Callable[[Tensor], Tensor]:
        return lambda outputs: self._loss.sum(outputs, chunk.target)


_ORDERLY = (
    "expected the same rows in the same batches: no random augmentation, a sampler that repeats its order "
    "(shuffle=False), and a model without randomness in eval mode"
)


def _all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity, told by the sum wherever that is finite, which is one pass."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {type(value).__name__}; expected an integer")
    if value < 1:
        raise ValueError(f"{name}={value}; expected at least 1")


def _in_order(data: Any, loss: Any, stacklevel: int) -> tuple[Any, Any]:
    """(data, loss), also from (loss, data), the order that was."""
    if isinstance(data, str) or (callable(data) and not isinstance(data, (Iterable, Dataset))):
        warnings.warn(
            "operators take (model, data, loss), as onestep.fit does; the order (model, loss, data) is deprecated",
            DeprecationWarning,
            stacklevel=stacklevel + 1,
        )
        return loss, data
    return data, loss


def _columns(part: Any, parameter: Tensor) -> tuple[int, ...]:
    """(k,) for a block, () for a vector."""
    blocked = isinstance(part, Tensor) and part.dim() == parameter.dim() + 1
    return (part.shape[-1],) if blocked else ()


class HessianOperator(CurvatureOperator):
    """H = ∂²L/∂θ², products by forward over reverse mode (Pearlmutter, Neural Computation 6, 1994)."""

    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outputs, loss = self._outputs(chunk), self._loss_of_outputs(chunk)
        return lambda v: hessian_product(lambda values: loss(outputs(values)), point, v, self._route)


class _OuterProductOperator(CurvatureOperator):
    """Jᵀ C J, J = ∂outputs/∂θ: the outputs' tangent and what Jᵀ goes back through come from one forward pass."""

    @abstractmethod
    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        """(outputs, tangent) ↦ C tangent, for the loss summed over a chunk."""

    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        outer = self._outer(chunk, number, point)
        return outer_products(self._outputs(chunk), outer, point, keep=False, route=self._route)


class GaussNewtonOperator(_OuterProductOperator):
    """G = 1/m Σᵢ Jᵢᵀ (∂²ℓᵢ/∂fᵢ²) Jᵢ, Jᵢ = ∂f(xᵢ)/∂θ (Schraudolph, Neural Computation 14, 2002).

    Positive semi-definite where ℓ is convex in the outputs.
    """

    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        loss = self._loss_of_outputs(chunk)
        return lambda outputs, tangent: hvp(loss, outputs, tangent)


class FisherOperator(_OuterProductOperator):
    """F = 1/m Σᵢ E ∇ℓᵢ ∇ℓᵢᵀ, with ℓᵢ = -log p(y | f(xᵢ; θ)) of all outputs of a row together.

    - kind="true": y is distributed as the model says (Amari 1998; Martens, New insights and perspectives on the natural
      gradient method, JMLR 21, 2020): for "mse" normal with variance ½, which makes the squared error -log p up to a
      constant, for "cross_entropy" categorical, for "poisson" Poisson. The expectation is exact: ∂²ℓ/∂f² does not
      depend on y there, and F is the Gauss-Newton matrix. With ``mc_samples=M`` it is the mean over M draws for each
      row, unbiased and the same draws in every product, of rank at most M times the rows.
    - kind="empirical": y is what the data holds. Not an approximation of the Hessian far from a fit (Kunstner, Balles
      and Hennig 2019). A function as ``loss`` must be a mean over rows, each a function of its own outputs.

    ``kind`` and ``mc_samples`` come on top of the arguments below; ``seed`` also sets the draws, which differ with the
    number of processes and the chunks.
    """

    _construction_depth = 4
    __doc__ = f"{__doc__}\n\n{CurvatureOperator.__doc__}"

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Any = "mse",
        *,
        kind: Literal["true", "empirical"] = "true",
        mc_samples: int | None = None,
        **options: Any,
    ) -> None:
        if kind not in ("true", "empirical"):
            raise ValueError(f"kind={kind!r}; expected 'true' or 'empirical'")
        if mc_samples is not None:
            _check_count("mc_samples", mc_samples)
            if kind == "empirical":
                raise ValueError(f"mc_samples={mc_samples} with kind='empirical', which draws nothing; expected None")
        data, loss = _in_order(data, loss, stacklevel=2)
        if kind == "true" and as_loss(loss).name not in LOSSES:
            raise ValueError(
                "kind='true' needs the distribution behind the loss, which a function does not tell; expected a named "
                "loss, kind='empirical', or GaussNewtonOperator"
            )
        self.kind, self.mc_samples = kind, mc_samples
        super().__init__(model, data, loss, **options)

    def _outer(self, chunk: Chunk, number: int, point: Named) -> Callable[[Tensor, Tensor], Tensor]:
        loss = self._loss_of_outputs(chunk)
        if self.kind == "true" and self.mc_samples is None:
            return lambda outputs, tangent: hvp(loss, outputs, tangent)
        outputs = self._outputs(chunk)(point)
        if self.kind == "empirical":
            slopes = grad(loss)(outputs)[None]
        else:
            generator = torch.Generator(self.device)
            generator.manual_seed((self.seed * 1_000_003 + number) * share().size + share().rank)
            draws = range(self.mc_samples or 0)
            slopes = torch.stack([drawn_slope(self._loss, outputs, chunk.target, generator) for _ in draws])

        def product(outputs: Tensor, tangent: Tensor) -> Tensor:
            along = (slopes * tangent).reshape(*slopes.shape[:2], -1).sum(-1)
            along = along.reshape(*along.shape, *[1] * (tangent.dim() - 1))
            mean: Tensor = (slopes * along).mean(0)
            return mean

        return product
