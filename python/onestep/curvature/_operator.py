"""What all curvature operators do: the arguments, products, estimates and solves."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from onestep._interrupts import undisturbed
from onestep.curvature._estimates import Estimate, estimate_diagonal, estimate_trace
from onestep.curvature._passes import Named, Passes
from onestep.curvature._solve import MOST_DENSE, SolveReport, as_preconditioner, solve
from onestep.curvature._vectors import as_block, like
from onestep.evaluation.data import Chunk
from onestep.evaluation.distributed import equal_everywhere, together
from onestep.evaluation.losses import as_loss
from onestep.evaluation.module import call_model, warn_of_eval_mode
from onestep.evaluation.progress import can_show_progress

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

# A vector (p,), a block of k vectors (p,k), or a dict of tensors named as the parameters.
Vectors = TypeVar("Vectors", Tensor, dict[str, Tensor])


class CurvatureOperator(ABC):
    """A symmetric p × p matrix of a model's loss over data, of which only products are ever formed.

    The matrix belongs to L(θ) = 1/m Σᵢ ℓ(f(xᵢ; θ), yᵢ), i over all rows of the data, however they are batched, and m
    the number of elements of the loss ("mean"), or m = 1 ("sum"). θ are the parameters with requires_grad=True, at the
    values that they have when a product is taken. A product is one pass over the data, whatever the number of vectors;
    nothing is kept between batches.

    The model is evaluated in eval mode (dropout off, batch norm with its running statistics): otherwise the matrix
    would be another one for each pass, or couple the rows of a batch. Afterwards, and also after Ctrl-C, all modules
    are in the modes that they had. Rows always come in the same order, that of a shuffling DataLoader being drawn from
    ``seed``; results are the same bits each time, as far as torch's kernels are deterministic.

    Threads may share a model, and take turns. While another thread is inside a ``torch.func.jvp`` of its own, a product
    may be taken by reverse mode twice, with other last bits.

    Under torch.distributed every process calls the same methods with the same arguments and computes its share of each
    batch (a DistributedSampler's batches as they are); all get the sum.

    Args:
        model: any module that returns a tensor, (n,…) for n rows. Parameters with requires_grad=True have one floating
            dtype and one device.
        data: a pair (inputs, target) of tensors, numpy arrays or data frames, a Dataset of such pairs, or a DataLoader
            (any iterable that can be read again) of such batches, rows first. Inputs may be a tuple or a dict of
            tensors, which is unpacked. Batches are moved to the parameters' device.
        loss: "mse" (mean over all elements), "cross_entropy" (class indices; -100 is ignored), "poisson" (the model
            gives the logarithm of the rate), "bce" (the model gives log-odds); torch's losses, as functions or modules,
            with their class weights; or a function (outputs, target) → mean over the rows it was given. A penalty on
            parameters in it, taken from the model when it is called, counts for HessianOperator; the others refuse it.
            The old order of arguments, (model, loss, data), is deprecated.
        reduction: "mean" or "sum", over all rows of the data.
        chunk_size: rows computed at a time; None for as many as keep 256 MiB for a backward pass.
        seed: of the order of a shuffling DataLoader.
        progress: whether to show a bar during passes that take longer than two seconds. Needs tqdm.
        check_deterministic: whether to make sure, by two passes of the loss, that data and model are the same each
            time.

    Raises:
        ValueError, TypeError: an argument is not what it should be, two passes over the data differ, or the loss
            carries no gradient of the parameters, as after ``detach`` in forward: products would be zero.
        NonFiniteError: NaN or infinity in data or loss, naming the batch; also from all methods that take products.
    """

    # How many frames __init__ is from the user's call, with that of its decorator, for warnings.
    _construction_depth = 3

    @undisturbed
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
        check_choice("reduction", reduction, "mean", "sum")
        check_flag("progress", progress)
        check_flag("check_deterministic", check_deterministic)
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        data, loss = in_order(data, loss, stacklevel=self._construction_depth)
        self.model, self.reduction, self.seed = model, reduction, seed
        self._loss = as_loss(loss)
        shown = progress and can_show_progress(stacklevel=self._construction_depth)
        warn_of_eval_mode(model, type(self).__name__, stacklevel=self._construction_depth)
        self._passes = Passes(model, self._loss, data, chunk_size=chunk_size, seed=seed, progress=shown)
        self._parameters, self._names = self._passes.parameters, self._passes.names
        self._check_parameters_in_loss()
        if check_deterministic:
            self._passes.check_deterministic()

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

    @undisturbed
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
        block = together(lambda: as_block(v, "v", self._names, self._parameters))
        if not equal_everywhere(block):
            raise ValueError("v differs between processes; expected the same vectors in all")
        what = f"{type(self).__name__} @ {block.shape[1]}"
        result = self._passes.multiply(block, self._product, what=what, mean=self.reduction == "mean")
        product: Vectors = like(v, result, self._names, self._parameters)
        return product

    @undisturbed
    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """The loss over all data, and its gradient (p,): ``solve(-gradient, damping)`` is a damped Newton step."""
        return self._passes.loss_and_gradient(mean=self.reduction == "mean")

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

    @undisturbed
    def trace(self, samples: int | None = None, *, generator: torch.Generator | None = None) -> Estimate:
        """tr A: exact for up to 128 parameters, else estimated by Hutchinson's method (Commun. Statist. 19, 1990).

        Args:
            samples: how many products with random signs are averaged, at least 2. The standard error falls with their
                root. None for the exact value where the matrix is small, and 64 elsewhere.
            generator: draws the signs, the same in all processes; None for a new one with seed 0.

        Returns:
            ``Estimate``: value () and standard_error () in float64, both exact with samples = 0 where none were drawn.

        Raises:
            TypeError: ``samples`` is no integer, or ``generator`` no torch.Generator.
            ValueError: ``samples`` is below 2.
            NonFiniteError: a product is NaN or infinite, naming the batch.
        """
        if samples is None and self.shape[0] <= MOST_DENSE:
            value = self._exact_diagonal().sum()
            return Estimate(value, torch.zeros_like(value), 0)
        return estimate_trace(self.__matmul__, self._empty(), 64 if samples is None else samples, generator)

    @undisturbed
    def diagonal(self, samples: int | None = None, *, generator: torch.Generator | None = None) -> Estimate:
        """diag A, (p,): exact for up to 128 parameters, else estimated by z∘Az with random signs z.

        (Bekas, Kokiopoulou and Saad 2007.) Gauss-Newton and Fisher matrices of models with up to 64 outputs a row have
        theirs exactly for any number of parameters, by rows of the Jacobian, where torch.func.vmap can run the model.
        Otherwise, for the losses with a name, theirs is the mean of squares (Jᵀs)², which is never negative, with s
        drawn by a root of the loss's Hessian. The relative standard error of each element is about √(2 / samples) then:
        18 % with 64, 4 % with 1,024. ``standard_error`` has it, element by element. The error of z∘Az comes from the
        rest of the row, and may make an element negative where the matrix has no negative elements.

        Args:
            samples: how many random vectors are averaged, at least 2; None for the exact diagonal where it can be had
                so, and 64 elsewhere.
            generator: draws them, the same in all processes; None for a new one with seed 0.

        Returns:
            ``Estimate``: value (p,) and standard_error (p,) in float64.

        Raises:
            TypeError: ``samples`` is no integer, or ``generator`` no torch.Generator.
            ValueError: ``samples`` is below 2.
            NonFiniteError: a product is NaN or infinite, naming the batch.
        """
        if samples is None:
            exact = self._exact_diagonal() if self.shape[0] <= MOST_DENSE else self._diagonal_by_rows()
            if exact is not None:
                return Estimate(exact, torch.zeros_like(exact), 0)
        return self._estimated_diagonal(64 if samples is None else samples, generator)

    def _estimated_diagonal(self, samples: int, generator: torch.Generator | None) -> Estimate:
        return estimate_diagonal(self.__matmul__, self._empty(), samples, generator)

    def _exact_diagonal(self) -> Tensor:
        return (self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).diagonal().double()

    def _diagonal_by_rows(self) -> Tensor | None:
        """diag A (p,) in float64, where it can be had at the cost of few products; else None."""
        return None

    # --------------------------------------------------------------------------------------------------------- solve

    @undisturbed
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
        preconditioner and ``max_iterations`` allows for as many products. For up to 2,000 it is formed, by blocks of
        columns, where iterations have cost as much without converging, and where MINRES would cost more.

        Args:
            b: as ``v`` in ``A @ v``; the columns of a block share passes over the data.
            damping: at least 0, and large enough to make A + damping·I positive definite, or see ``indefinite``.
            tolerance: goal for ‖b - (A + damping·I) x‖ / ‖b‖ of each column.
            max_iterations: at most so many passes, besides those that check the residual.
            preconditioner: None; "diagonal", the damped absolute value of 16 samples' ``diagonal()``, for a diagonal
                that varies by orders of magnitude; or a function M⁻¹ of vectors, (p,) → (p,), or (p,j) → (p,j),
                j ≤ k, where b is a block (p,k), in the parameters' dtype: symmetric and positive definite.
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
        damping = as_number("damping", damping, "a finite number >= 0")
        if not 0 <= damping < math.inf:
            raise ValueError(f"damping={damping}; expected a finite number >= 0")
        tolerance = as_number("tolerance", tolerance, "a number between 0 and 1")
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance={tolerance}; expected a number between 0 and 1")
        check_count("max_iterations", max_iterations)
        check_choice("indefinite", indefinite, "raise", "minres")
        B = as_block(b, "b", self._names, self._parameters)
        if B.shape[1] == 1 and not (isinstance(b, Tensor) and b.dim() == 2):
            # A vector is one for the preconditioner too.
            B = B.flatten()
        inverse = as_preconditioner(preconditioner, damping, lambda samples: self.diagonal(samples).value)

        x, report = solve(
            self.__matmul__,
            B,
            damping,
            tolerance=tolerance,
            max_iterations=max_iterations,
            precondition=inverse,
            indefinite=indefinite,
        )
        solution: Vectors = like(b, x.reshape(len(x), -1), self._names, self._parameters)
        return solution, report

    def _empty(self) -> Tensor:
        return torch.empty(len(self._parameters), dtype=self.dtype, device=self.device)

    @abstractmethod
    def _product(self, chunk: Chunk, number: int, point: Named) -> Callable[[Named], Named]:
        """v ↦ A v, A of the loss summed over a chunk, with the parameters at ``point``."""

    def _outputs(self, chunk: Chunk) -> Callable[[Named], Tensor]:
        return lambda values: call_model(self.model, chunk.inputs, values)

    def _check_parameters_in_loss(self) -> None:
        """Raises where the loss reads parameters of the model, as for a penalty: JᵀCJ has no part for them."""
        if self._passes.in_loss != "none":
            raise ValueError(
                f"loss depends on the model's parameters beside the outputs, of which {type(self).__name__} has no "
                "part; expected a function of outputs and target alone. Add a penalty's second derivatives by "
                "damping=, or take HessianOperator"
            )

    def _loss_of_outputs(self, chunk: Chunk) -> Callable[[Tensor], Tensor]:
        return lambda outputs: self._loss.sum(outputs, chunk.target)


def check_count(name: str, value: Any) -> None:
    """Raises if a value is not a count of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {type(value).__name__}; expected an integer")
    if value < 1:
        raise ValueError(f"{name}={value}; expected at least 1")


def check_flag(name: str, value: Any) -> None:
    """Raises if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; expected True or False")


def check_choice(name: str, value: Any, *choices: str) -> None:
    """Raises if a value is none of the words."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name}={value!r}; expected {' or '.join(map(repr, choices))}")


def as_number(name: str, value: Any, expected: str) -> float:
    """A real number, also as a tensor or an array of no dimensions."""
    single = isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex() and value.dtype != torch.bool
    if isinstance(value, bool) or not (single or isinstance(value, Real)):
        raise TypeError(f"{name} is {type(value).__name__}; expected {expected}")
    return float(value)


def in_order(data: Any, loss: Any, stacklevel: int) -> tuple[Any, Any]:
    """(data, loss), also from (loss, data), the order that was."""
    if isinstance(data, str) and isinstance(loss, str):
        raise TypeError(f"data is {data!r}; expected a pair of tensors, a data loader, or the like")
    if isinstance(data, str) or (callable(data) and not isinstance(data, (Iterable, Dataset))):
        warnings.warn(
            "operators and Laplace take (model, data, loss), as onestep.fit does; the order (model, loss, data) is "
            "deprecated",
            DeprecationWarning,
            stacklevel=stacklevel + 1,
        )
        return loss, data
    return data, loss
