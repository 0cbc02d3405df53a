"""What the optimisers minimise: a loss of the parameters, with its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import jacrev
from torch.overrides import TorchFunctionMode

import onestep.linalg as linalg
from onestep._forward_mode import jacfwd
from onestep.curvature import hvp
from onestep.curvature.jacobian import jacobian_by_rows
from onestep.curvature.kernels import differentiable_kernels
from onestep.curvature.products import Route, gauss_newton_products, hessian_product
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.module import without_graph
from onestep.evaluation.parameters import ParameterVector, call_with, flatten

# damping → (v (p,) ↦ about (matrix + damping I)⁻¹v)
Preconditioner: TypeAlias = Callable[[float], Callable[[Tensor], Tensor]]


class CurvatureRoot(ABC):
    """A matrix R (m,p) with RᵀR = A, the Gauss-Newton matrix."""

    @property
    @abstractmethod
    def diagonal(self) -> Tensor:
        """That of A (p,)."""

    @abstractmethod
    def multiply(self, v: Tensor) -> Tensor:
        """Av."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """A (p,p)."""


class Objective(ABC):
    """A loss of the parameters p that an optimiser was given, at their present values.

    Attributes:
        fixed: whether the next step will see the same function, so that its value and gradient at the point reached
            can be kept for it.

    Examples:
        Optimisers make one of the closure that ``step`` is given; of residuals, the mean square is the loss:

        >>> import torch
        >>> from onestep.optim import LevenbergMarquardt
        >>> p = torch.zeros(2, requires_grad=True)
        >>> LevenbergMarquardt([p]).step(lambda: p - 1)  # the loss before the step
        1.0
    """

    fixed = False

    @abstractmethod
    def value(self, parameters: ParameterVector) -> float:
        """The loss.

        Args:
            parameters: those that are trained, p numbers of one dtype, as the optimiser keeps them.

        Returns:
            The loss at their present values.
        """

    def before(self, parameters: ParameterVector) -> float | None:
        """What ``value`` gives before a step, where steps are judged on other rows than they are made of.

        Args:
            parameters: as for ``value``.

        Returns:
            The loss on the rows that judge, or None where they are the same rows.
        """
        return None

    @abstractmethod
    def gradient(self, parameters: ParameterVector) -> tuple[float, Tensor]:
        """The loss and its gradient.

        Args:
            parameters: as for ``value``.

        Returns:
            The loss, and the gradient (p,) in the parameters' dtype.
        """

    @abstractmethod
    def curvature(self, parameters: ParameterVector, *, hessian: bool) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian or the Gauss-Newton matrix at the parameters' present values.

        Args:
            parameters: as for ``value``.
            hessian: whether it is the Hessian.

        Returns:
            The function v (p,) → Hv (p,), in the parameters' dtype.
        """

    def preconditioner(self, parameters: ParameterVector) -> Preconditioner | None:
        """Of the Gauss-Newton matrix, where more is known of it than a gradient tells.

        Args:
            parameters: as for ``value``.

        Returns:
            None, or damping → the function v (p,) → about (matrix + damping I)⁻¹v.
        """
        return None

    def without_flat(self, parameters: ParameterVector) -> Callable[[Tensor], Tensor] | None:
        """Takes off vectors what is known to change no loss of any row, wherever the parameters are.

        Rounding alone moves parameters that way, and costs outputs their digits.

        Args:
            parameters: as for ``value``.

        Returns:
            None, or a linear function v (p,) → (p,), in the parameters' dtype.
        """
        return None

    def curvature_root(self, parameters: ParameterVector) -> CurvatureRoot | None:
        """Of the Gauss-Newton matrix, where products with it are to be preferred to the matrix itself.

        Args:
            parameters: as for ``value``.

        Returns:
            None, or R (m,p) with RᵀR the matrix, as a ``CurvatureRoot``.
        """
        return None

    def output_gradient(self, parameters: ParameterVector) -> Tensor | None:
        """That of a sum of the outputs times random numbers, which are the same each time.

        Args:
            parameters: as for ``value``.

        Returns:
            The gradient (p,) over the rows of the curvature, in the parameters' dtype; None where there are no outputs
            but the loss.
        """
        return None

    @abstractmethod
    def gauss_newton_matrix(self, parameters: ParameterVector, *, precise: bool = False) -> Tensor:
        """The Gauss-Newton matrix, formed.

        Args:
            parameters: as for ``value``.
            precise: whether products of rows of the Jacobian are float64, whatever their type.

        Returns:
            The matrix (p,p), float64.
        """


_NO_BACKWARD = "backward() was called inside the closure: return the loss and leave the derivatives to the optimiser"


def _mean_square(residuals: Tensor) -> Tensor:
    return residuals.square().mean()


class _NoBackward(TorchFunctionMode):
    """Refuses backward(), which a closure for a first-order optimiser calls."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward or func is torch.autograd.backward:
            raise RuntimeError(_NO_BACKWARD)
        return func(*args, **(kwargs or {}))


class ClosureObjective(Objective):
    """The loss that a user's closure computes.

    The closure returns a scalar loss; or residuals, whose mean square is the loss; or a pair (outputs,
    loss_of_outputs), the second a function of the first. Only the last two have a Gauss-Newton matrix.
    """

    def __init__(self, closure: Callable[[], Any], *, scalar: bool, optimizer: str) -> None:
        self.closure = closure
        self.scalar = scalar
        self.optimizer = optimizer
        self.route = Route()

    def _parse(self, result: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        if self.scalar:
            if not isinstance(result, Tensor) or result.numel() != 1:
                shape = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
                raise TypeError(f"the closure returned {shape}; {self.optimizer} expects the loss, a scalar tensor")
            return result, torch.Tensor.sum
        if isinstance(result, Tensor):
            if result.dim() == 0:
                raise TypeError(
                    f"the closure returned a scalar; {self.optimizer} needs what the loss is made of: return the "
                    "residuals (their mean square is the loss), or (outputs, loss_of_outputs)"
                )
            return result, _mean_square
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor) and callable(result[1]):
            return result
        raise TypeError(
            f"the closure returned {type(result).__name__}; {self.optimizer} expects residuals (a tensor), or a pair "
            "(outputs, loss_of_outputs) of a tensor and a function of it"
        )

    def _loss(self) -> Tensor:
        outputs, loss = self._parse(self._run())
        return loss(outputs)

    def _run(self) -> Any:
        with _NoBackward():
            return self.closure()

    def value(self, parameters: ParameterVector) -> float:
        with torch.no_grad():
            return without_graph(self._loss).item()

    def gradient(self, parameters: ParameterVector) -> tuple[float, Tensor]:
        with torch.enable_grad():
            loss = self._loss()
            parts: list[Tensor | None] = [None] * len(parameters.tensors)
            if loss.requires_grad:
                parts = list(torch.autograd.grad(loss, parameters.tensors, allow_unused=True))
            if all(part is None for part in parts):
                raise RuntimeError(
                    "the closure's loss does not depend on the parameters, as far as torch follows it: return it "
                    "undetached, and without torch.func.linearize, which takes parameters for constants"
                )
        used = [
            torch.zeros_like(tensor) if part is None else part
            for tensor, part in zip(parameters.tensors, parts, strict=True)
        ]
        return loss.item(), flatten(used)

    def output_gradient(self, parameters: ParameterVector) -> Tensor | None:
        if self.scalar:
            return None
        with torch.enable_grad():
            outputs, _ = self._parse(self._run())
            return random_pullback(outputs, parameters, torch.Generator(outputs.device).manual_seed(0))

    def _functions(
        self, parameters: ParameterVector
    ) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """θ, θ ↦ outputs and outputs ↦ loss."""
        point = parameters.read()

        def outputs(vector: Tensor) -> Tensor:
            return self._parse(call_with(self._run, parameters.tensors, parameters.split(vector)))[0]

        with torch.enable_grad():
            result, loss = self._parse(call_with(self._run, parameters.tensors, parameters.split(point)))
        # Parameters that are not trained may require gradients too: of those, result is allowed to be a function.
        if result.requires_grad and any(
            slope is not None for slope in torch.autograd.grad(result.sum(), parameters.tensors, allow_unused=True)
        ):
            raise RuntimeError(
                "the closure uses a parameter in a way that torch functions do not show (a compiled or scripted "
                "module?): derivatives would miss it"
            )
        return point, outputs, loss

    def curvature(self, parameters: ParameterVector, *, hessian: bool) -> Callable[[Tensor], Tensor]:
        point, outputs, loss = self._functions(parameters)
        with torch.no_grad():
            if not hessian:
                products = gauss_newton_products(outputs, loss, point, route=self.route)

        def product(v: Tensor) -> Tensor:
            with torch.no_grad():
                if hessian:
                    return hessian_product(lambda p: loss(outputs(p)), point, v, self.route)
                return products(v)

        return product

    def gauss_newton_matrix(self, parameters: ParameterVector, *, precise: bool = False) -> Tensor:
        point, outputs, loss = self._functions(parameters)
        with torch.no_grad(), exclusive(), differentiable_kernels():
            flat, shape = without_graph(lambda: outputs(point)), torch.Size()
            shape, flat = flat.shape, flat.detach().reshape(-1)
            J = self.route.take(
                lambda: _jacobian(outputs, point, len(flat)),
                lambda: jacobian_by_rows(outputs, point)[1].reshape(len(flat), len(point)),
            )
            if loss is _mean_square:
                return linalg.gram(J.double())[0] * (2 / len(flat))
            HJ = torch.stack([hvp(lambda z: loss(z.reshape(shape)), flat, column) for column in J.mT], 1)
        A: Tensor = J.double().mT @ HJ.double()
        return (A + A.mT) / 2


def random_pullback(outputs: Tensor, parameters: ParameterVector, generator: torch.Generator) -> Tensor:
    """The gradient (p,) of a sum of outputs times numbers N(0,1)."""
    slope = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    if not outputs.requires_grad:
        return torch.zeros(len(parameters), dtype=parameters.dtype, device=parameters.device)
    return flatten(torch.autograd.grad(outputs, parameters.tensors, slope, materialize_grads=True))


def _jacobian(outputs: Callable[[Tensor], Tensor], point: Tensor, m: int) -> Tensor:
    """J (m,p) by torch.func."""
    J: Tensor = jacrev(outputs)(point) if m < len(point) else jacfwd(outputs, point)
    return J.reshape(m, len(point))
