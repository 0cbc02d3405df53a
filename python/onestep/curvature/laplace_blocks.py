"""Blocks of a Gauss-Newton matrix, and what a Gaussian with the precision scale·block + prior·I needs of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from onestep._cached import cached_property
from onestep.linalg import cholesky_ex, cholesky_solve


class Block(ABC):
    """A positive semi-definite matrix H over some of the parameters, and P = scale·H + prior·I. All in float64.

    Attributes:
        index: places in the vector of all parameters, in the order of H's rows. For the weight and bias of a last layer
            it is (outputs, inputs + 1), the bias in the last column.
    """

    index: Tensor

    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Those of H, of any shape."""

    @abstractmethod
    def at(self, scale: float, prior: float) -> Gaussian:
        """The Gaussian with precision P.

        Raises:
            LinAlgError: P is not positive definite.
        """


class Gaussian(ABC):
    """N(0, P⁻¹) over a block's parameters."""

    @abstractmethod
    def log_determinant(self) -> float:
        """log det P."""

    @abstractmethod
    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹V for V (m,k)."""

    @abstractmethod
    def color(self, Z: Tensor) -> Tensor:
        """Vectors (m,k) with covariance P⁻¹ from independent standard normal ones."""

    @abstractmethod
    def variances(self) -> Tensor:
        """diag P⁻¹, (m,)."""

    @abstractmethod
    def of_outputs(self, features: Tensor, *, joint: bool) -> Tensor:
        """The variances (n,k) of a last layer's outputs, or with ``joint`` their covariances (n,k,k).

        Args:
            features: what the layer is given, (n,d), the last one a 1 if there is a bias.
        """


class DenseBlocks(Block):
    """B independent matrices (m,m)."""

    def __init__(self, index: Tensor, matrices: Tensor) -> None:
        self.index, self.matrices = index, matrices

    @cached_property
    def _eigenvalues(self) -> Tensor:
        values: Tensor = torch.linalg.eigvalsh(self.matrices).clamp_min(0)
        return values

    def eigenvalues(self) -> Tensor:
        return self._eigenvalues

    def at(self, scale: float, prior: float) -> Gaussian:
        P = self.matrices * scale
        P.diagonal(dim1=-2, dim2=-1).add_(prior)
        L, info = cholesky_ex(P)
        if bool(info.any()):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"the posterior precision with prior_precision={prior:g} is not positive definite: the data leaves "
                "some direction of the parameters free. Expected a larger prior_precision, or float64 parameters"
            )
        return _DenseGaussian(L, self.index)


class _DenseGaussian(Gaussian):
    def __init__(self, L: Tensor, index: Tensor) -> None:
        self.L, self.outputs = L, len(index)

    def _each(self, V: Tensor) -> Tensor:
        """(m,k) as (B,m/B,k)."""
        return V.reshape(len(self.L), -1, V.shape[-1])

    def log_determinant(self) -> float:
        return 2 * self.L.diagonal(dim1=-2, dim2=-1).log().sum().item()

    def solve(self, V: Tensor) -> Tensor:
        return cholesky_solve(self._each(V), self.L).reshape(V.shape)

    def color(self, Z: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.solve_triangular(self.L.mT, self._each(Z), upper=True)
        return solution.reshape(Z.shape)

    @cached_property
    def covariance(self) -> Tensor:
        return torch.cholesky_inverse(self.L)

    def variances(self) -> Tensor:
        return self.covariance.diagonal(dim1=-2, dim2=-1).flatten()

    def of_outputs(self, features: Tensor, *, joint: bool) -> Tensor:
        d, k = features.shape[1], self.outputs
        if len(self.L) == 1:
            S = self.covariance.view(k, d, k, d)
            if joint:
                half = torch.einsum("ni,cidj->cdnj", features, S)
                result: Tensor = torch.einsum("cdnj,nj->ncd", half, features)
                return result
            blocks = S.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        else:
            blocks = self.covariance
        variances = ((features @ blocks) * features).sum(-1).mT
        return variances.diag_embed() if joint else variances


class KroneckerBlock(Block):
    """H = left ⊗ right: left (a,a) over a layer's outputs, right (b,b) over its inputs; index is (a,b).

    P = (U ⊗ V) diag(scale·λμᵀ + prior) (U ⊗ V)ᵀ, with the eigenvectors U of left and V of right.
    """

    def __init__(self, index: Tensor, left: Tensor, right: Tensor) -> None:
        self.index = index
        (self.lambdas, self.U), (self.mus, self.V) = (torch.linalg.eigh(factor) for factor in (left, right))

    def eigenvalues(self) -> Tensor:
        values: Tensor = self.lambdas.clamp_min(0)[:, None] * self.mus.clamp_min(0)
        return values

    def at(self, scale: float, prior: float) -> Gaussian:
        precision = scale * self.eigenvalues() + prior
        _check_positive(precision, prior)
        return _KroneckerGaussian(self.U, self.V, precision)


class _KroneckerGaussian(Gaussian):
    def __init__(self, U: Tensor, V: Tensor, precision: Tensor) -> None:
        self.U, self.V, self.precision = U, V, precision

    def log_determinant(self) -> float:
        return self.precision.log().sum().item()

    def solve(self, V: Tensor) -> Tensor:
        M = V.mT.reshape(-1, *self.precision.shape)
        M = self.U @ ((self.U.mT @ M @ self.V) / self.precision) @ self.V.mT
        return M.reshape(V.shape[1], -1).mT

    def color(self, Z: Tensor) -> Tensor:
        M = Z.mT.reshape(-1, *self.precision.shape) * self.precision.rsqrt()
        return (self.U @ M @ self.V.mT).reshape(Z.shape[1], -1).mT

    def variances(self) -> Tensor:
        return (self.U.square() @ self.precision.reciprocal() @ self.V.square().mT).flatten()

    def of_outputs(self, features: Tensor, *, joint: bool) -> Tensor:
        # (n,a): the variance along each eigenvector of left.
        along = (features @ self.V).square() @ self.precision.reciprocal().mT
        return (self.U * along[:, None, :]) @ self.U.mT if joint else along @ self.U.square().mT


class DiagonalBlock(Block):
    """H is diagonal."""

    def __init__(self, index: Tensor, diagonal: Tensor) -> None:
        self.index, self.diagonal = index, diagonal.flatten()

    def eigenvalues(self) -> Tensor:
        return self.diagonal

    def at(self, scale: float, prior: float) -> Gaussian:
        precision = scale * self.diagonal + prior
        _check_positive(precision, prior)
        return _DiagonalGaussian(precision, len(self.index))


class _DiagonalGaussian(Gaussian):
    def __init__(self, precision: Tensor, outputs: int) -> None:
        self.precision, self.outputs = precision, outputs

    def log_determinant(self) -> float:
        return self.precision.log().sum().item()

    def solve(self, V: Tensor) -> Tensor:
        return V / self.precision[:, None]

    def color(self, Z: Tensor) -> Tensor:
        return Z * self.precision.rsqrt()[:, None]

    def variances(self) -> Tensor:
        return self.precision.reciprocal()

    def of_outputs(self, features: Tensor, *, joint: bool) -> Tensor:
        variances = features.square() @ self.variances().view(self.outputs, -1).mT
        return variances.diag_embed() if joint else variances


def _check_positive(precision: Tensor, prior: float) -> None:
    if not bool((precision > 0).all()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"the posterior precision with prior_precision={prior:g} is not positive: the data says nothing of some "
            "parameters. Expected prior_precision > 0"
        )


class Posterior:
    """N(0, P⁻¹) over all parameters, block by block."""

    def __init__(self, blocks: Sequence[Block], size: int, scale: float, prior: float) -> None:
        self.size = size
        self.parts = [(block.index.flatten(), block.at(scale, prior)) for block in blocks]

    def log_determinant(self) -> float:
        """log det P."""
        return sum(gaussian.log_determinant() for _, gaussian in self.parts)

    def solve(self, V: Tensor) -> Tensor:
        """P⁻¹V for V (p,k)."""
        result = torch.empty_like(V)
        for index, gaussian in self.parts:
            result[index] = gaussian.solve(V[index])
        return result

    def color(self, Z: Tensor) -> Tensor:
        """Vectors (p,k) with covariance P⁻¹ from independent standard normal ones."""
        result = torch.empty_like(Z)
        for index, gaussian in self.parts:
            result[index] = gaussian.color(Z[index])
        return result

    def variances(self) -> Tensor:
        """diag P⁻¹, (p,)."""
        first = self.parts[0][1].variances()
        result = first.new_empty(self.size)
        for index, gaussian in self.parts:
            result[index] = gaussian.variances()
        return result
