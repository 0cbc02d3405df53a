"""Generalised linear models: loss, gradient and Hessian-vector products, each in one pass over X."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from onestep._fork import safe_after_fork
from onestep.linalg import gram
from onestep.ops import records_derivatives
from onestep.ops.glm import FAMILIES, glm_point, glm_product, parameter_dtype
from onestep.ops.operands import check_dense

# Rows of a bfloat16 X that are widened at a time for the Gram kernel.
_WIDENED_ROWS = 65536


class GLMPoint:
    """A generalised linear model at one W; made by ``glm``.

    Args:
        X, y, W, family, weight, intercept: as for ``glm``.

    Attributes:
        loss: Σ wᵢ ℓ(ηᵢ, yᵢ), a float64 scalar.
        grad: XᵀR, in the shape of W.
        W: the point.

    loss, grad, hvp and the Gram matrices are differentiable in W (and hvp in V) to every order, by backward, forward
    mode and torch.func. X, W and weight are not copied: a point holds as long as they are not changed in place.

    Examples:
        >>> import torch
        >>> from onestep.curvature import glm
        >>> point = glm(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]), torch.zeros(1), "logistic")
        >>> point.grad, point.hvp(torch.ones(1))
        (tensor([-0.5000]), tensor([1.2500]))
    """

    def __init__(
        self, X: Tensor, y: Tensor, W: Tensor, family: str, *, weight: Tensor | None = None, intercept: bool = False
    ) -> None:
        self.W = W
        self._X, self._weight, self._family, self._intercept = X, weight, family, intercept
        self._matrix = W.unsqueeze(-1) if W.dim() == 1 else W
        self.loss, grad, self._curvature = glm_point(X, y, self._matrix, weight, FAMILIES[family], intercept)
        self.grad: Tensor = grad.reshape(W.shape)

    @property
    def info(self) -> Tensor:
        """What a GPU found of y and weight, () int32: 0, 1 (a target unknown to the family) or 2 (a negative weight).

        Where it is not 0, loss and grad are NaN. On the CPU either raises, and this is 0.
        """
        n, k = self._X.shape[0], self._matrix.shape[1]
        info: Tensor = self._curvature[n * k].to(torch.int32)
        return info

    @safe_after_fork
    def hvp(self, V: Tensor) -> Tensor:
        """Computes XᵀC(XV), C = ∂²loss/∂η² at this point (Pearlmutter, Neural Computation 6, 1994).

        Args:
            V: the shape of W, or (m, *W.shape) for m right-hand sides, which share one pass over X. W's dtype.

        Returns:
            The products, in the shape of V.

        Raises:
            ValueError, TypeError: V has another shape or dtype.
        """
        check_dense("V", V, self._X)
        shape = tuple(self.W.shape)
        if tuple(V.shape[V.dim() - len(shape) :]) != shape or V.dim() > len(shape) + 1:
            raise ValueError(
                f"V has shape {tuple(V.shape)}; expected {shape}, W's, or (m, {', '.join(map(str, shape))})"
            )
        block = V.reshape(V.shape[0] if V.dim() > len(shape) else 1, *self._matrix.shape)
        product: Tensor = glm_product(
            block,
            self._X,
            self._matrix,
            self._weight,
            self._curvature,
            FAMILIES[self._family],
            self._intercept,
        )
        return product.reshape(V.shape)

    @safe_after_fork
    def gram(self) -> Tensor:
        """Computes the Hessian XᵀCX as a matrix H (p,p), p = W.numel(): H @ V.flatten() is hvp(V).flatten().

        One Gram matrix of X for each pair of outputs that the curvature couples: k for k outputs, C(C + 1)/2 for
        softmax with C classes. Where a derivative is recorded it is made of p products instead.
        """
        if self._records_derivatives():
            size = self.W.numel()
            identity = torch.eye(size, dtype=self.W.dtype, device=self.W.device)
            return self.hvp(identity.reshape(size, *self.W.shape)).reshape(size, size)
        with torch.no_grad():
            size, outputs = self._matrix.shape
            blocks = self.gram_blocks()
            H = blocks.new_zeros(size, outputs, size, outputs)
            for c, block in enumerate(blocks):
                H[:, c, :, c] = block
            if self._family == "softmax":
                P = self.output_curvature()
                for c in range(outputs - 1):
                    weights = P[:, c + 1 :].T * P[:, c]
                    off_diagonal = self._weighted_gram(weights if self._weight is None else weights * self._weight)
                    for b, block in enumerate(off_diagonal, start=c + 1):
                        H[:, c, :, b] = H[:, b, :, c] = -block
            matrix: Tensor = H.reshape(size * outputs, size * outputs)
            return matrix

    @safe_after_fork
    def gram_blocks(self) -> Tensor:
        """Computes the diagonal blocks of the Hessian, (k,d,d): one for each column of W."""
        if self._records_derivatives():
            d, k = self._matrix.shape
            return self.gram().reshape(d, k, d, k).diagonal(dim1=1, dim2=3).movedim(-1, 0)
        with torch.no_grad():
            return self._weighted_gram(self.diagonal_curvature().T)

    @safe_after_fork
    def gram_diagonal(self) -> Tensor:
        """Computes the diagonal of the Hessian, in the shape of W. Takes the memory of X's squares."""
        if self._records_derivatives():
            return self.gram().diagonal().reshape(self.W.shape)
        with torch.no_grad():
            curvature = self.diagonal_curvature()
            squares: Tensor = self._X.to(curvature.dtype).square().T @ curvature
            if self._intercept:
                squares = torch.cat((squares, curvature.sum(0, keepdim=True)))
            diagonal: Tensor = squares.reshape(self.W.shape)
            return diagonal

    def _records_derivatives(self) -> bool:
        return torch.compiler.is_compiling() or records_derivatives((self._X, self._matrix, self._weight))

    def output_curvature(self) -> Tensor:
        """What the kernel keeps, (n,k): wℓ″, or P for softmax."""
        shape = self._X.shape[0], self._matrix.shape[1]
        curvature: Tensor = self._curvature[: shape[0] * shape[1]].view(shape)
        return curvature

    @safe_after_fork
    def diagonal_curvature(self) -> Tensor:
        """∂²loss/∂η² of each row and output with itself, (n,k)."""
        curvature = self.output_curvature()
        if self._family == "softmax":
            curvature = curvature * (1 - curvature)
            if self._weight is not None:
                curvature = curvature * self._weight[:, None]
        return curvature

    def _weighted_gram(self, weights: Tensor) -> Tensor:
        """Xᵀdiag(w)X for each row of weights, bordered by the intercept's row and column."""
        X = self._X
        if X.dtype != weights.dtype:
            chunks = zip(X.split(_WIDENED_ROWS), weights.split(_WIDENED_ROWS, dim=1), strict=True)
            # Added one by one: torch's sum over a dimension has another order at the ends of rows, hence no symmetry.
            return functools.reduce(torch.add, (self._bordered_gram(x.to(weights.dtype), w) for x, w in chunks))
        return self._bordered_gram(X, weights)

    def _bordered_gram(self, X: Tensor, weights: Tensor) -> Tensor:
        if not self._intercept:
            return gram(X, weight=weights)[0]
        border: Tensor
        inner, border = gram(X, weights.new_ones(1).expand(X.shape[0]), weight=weights)
        corner = weights.sum(-1)[:, None, None]
        top = torch.cat((inner, border[..., None]), dim=-1)
        return torch.cat((top, torch.cat((border[:, None, :], corner), dim=-1)), dim=-2)


@safe_after_fork
def glm(
    X: Tensor, y: Tensor, W: Tensor, family: str, *, weight: Tensor | None = None, intercept: bool = False
) -> GLMPoint:
    """Evaluates a generalised linear model, η = XW, loss Σ wᵢ ℓ(ηᵢ, yᵢ), its gradient and curvature in one pass over X.

    | family | ℓ(η, y) | y |
    | --- | --- | --- |
    | gaussian | ½(η − y)² | floats |
    | logistic | log(1 + eᶯ) − yη | 0 or 1 (bool, integers or floats), or probabilities |
    | softmax | log Σ eᶯ − Σ yη | class indices, or one-hot rows or probabilities |
    | poisson | eᶯ − yη | counts >= 0 |

    The point keeps the curvature (n or n × k numbers), so that each Hessian-vector product reads X once (McCullagh and
    Nelder, Generalized Linear Models, 1989, 2.5: for these canonical links Newton is Fisher scoring).

    Args:
        X: (n,d) float32, float64 or bfloat16 (on a GPU float16 too), any strides, read in place.
        y: (n,), or (n,k) beside a W of k columns; for softmax (n,) integers or (n,C) floats whose rows sum to 1.
        W: (d,) or (d,k), the point; softmax: (d,C). float32 beside 16-bit X, else X's dtype. With ``intercept`` one
            more row at the end.
        family: "gaussian", "logistic", "softmax" or "poisson".
        weight: (n,) weights of the rows, >= 0, of W's dtype.
        intercept: X gets a column of ones, without a copy.

    Returns:
        A ``GLMPoint`` with loss, grad, hvp(V) and gram().

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, family or value of y or weight.
        NotImplementedError: a derivative in X, y or weight is asked for; detach those that require grad.

    Examples:
        >>> import torch
        >>> from onestep.curvature import glm
        >>> point = glm(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]), torch.zeros(1), "logistic")
        >>> point.grad.item(), point.hvp(torch.ones(1)).item(), point.gram().item()
        (-0.5, 1.25, 1.25)
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(map(repr, FAMILIES))}")
    check_dense("X", X)
    check_dense("y", y, X)
    check_dense("W", W, X)
    if X.dim() != 2:
        raise ValueError(f"X has shape {tuple(X.shape)}; expected (n, d)")
    if W.dim() not in (1, 2):
        raise ValueError(f"W has shape {tuple(W.shape)}; expected (d,) or (d, k)")
    if family == "softmax" and W.dim() == 1:
        raise ValueError(f"W has shape {tuple(W.shape)}; expected (d, C): a column for each class")
    if weight is not None:
        check_dense("weight", weight, X)
        if weight.dim() != 1:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({X.shape[0]},)")
    return GLMPoint(X, _targets(X, y, W, family), W, family, weight=weight, intercept=intercept)


def _targets(X: Tensor, y: Tensor, W: Tensor, family: str) -> Tensor:
    """y as the ops read it: (n,k) in the dtype of W, or (n,1) class indices."""
    n, k = X.shape[0], 1 if W.dim() == 1 else W.shape[1]
    may_be_vector = k == 1 or family == "softmax"
    if tuple(y.shape) != (n, k) and not (may_be_vector and tuple(y.shape) == (n,)):
        alternative = f" or ({n},)" if may_be_vector else ""
        raise ValueError(f"y has shape {tuple(y.shape)}; expected ({n}, {k}){alternative}")
    if y.is_complex():
        raise TypeError(f"y has dtype {y.dtype}; expected real numbers")
    if y.dim() == 2:
        return y.to(parameter_dtype(X))
    if family != "softmax":
        return y.to(parameter_dtype(X)).unsqueeze(-1)
    if y.is_floating_point():
        raise TypeError(f"y has dtype {y.dtype}; expected integer class indices, or (n, C) probabilities")
    return y.to(torch.int64).unsqueeze(-1)
