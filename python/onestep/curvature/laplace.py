"""Laplace's approximation: a Gaussian over a model's parameters from the curvature of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onestep._fork import one_thread_after_fork
from onestep._interrupts import undisturbed
from onestep._restored import eval_mode
from onestep._torch_private import tree_leaves
from onestep.curvature._operator import in_order
from onestep.curvature.jacobian import root_jacobian
from onestep.curvature.kernels import differentiable_kernels
from onestep.curvature.laplace_assembly import STRUCTURES, Structure, Sums, find_last_layer
from onestep.curvature.laplace_blocks import Posterior
from onestep.evaluation.arrays import from_numpy
from onestep.evaluation.data import Chunk, as_source
from onestep.evaluation.distributed import share
from onestep.evaluation.exclusive import exclusive
from onestep.evaluation.layers import columns
from onestep.evaluation.losses import LOSSES, as_loss
from onestep.evaluation.module import call_model, chunk_rows, parameter_names, warn_of_eval_mode, without_gradient
from onestep.evaluation.parameters import ParameterVector

# Rows that are read before it is known how many fit into memory.
_FEW = 32
# The logarithm of the prior precision is looked for between these two,
_LEAST_LOG = -46.0
_MOST_LOG = 46.0
# and is found when its interval is this small.
_LOG_TOLERANCE = 1e-10
# Noise and prior precision are fitted in turn, this many times at most,
_TURNS = 200
# until neither moves by more than this.
_SETTLED = 1e-9


@dataclass(frozen=True)
class Prediction:
    """What a model gives for some rows, and how sure its parameters leave it. All in the dtype of the model's outputs.

    Attributes:
        mean: the model's outputs, (n,…).
        variance: of each output, in the shape of ``mean``; that of the parameters alone, without noise in the target.
        covariance: (n,k,k) of a row's k outputs, where it was asked for.
        probabilities: (n,…) in the shape of ``mean``, of the classes under "cross_entropy", of a 1 under "bce", with
            the outputs' variance integrated out by the probit approximation (MacKay, Neural Computation 4, 1992); None
            under other losses.

    Examples:
        >>> import torch
        >>> from onestep.curvature import Laplace
        >>> model = torch.nn.Linear(1, 1)
        >>> posterior = Laplace(model, (torch.tensor([[0.0], [2.0]]), torch.zeros(2, 1)), "mse", noise_variance=1.0)
        >>> posterior.predict(torch.tensor([[1.0]])).variance
        tensor([[0.3636]])
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None
    probabilities: Tensor | None


class Laplace:
    """The posterior N(θ, P⁻¹) of a fitted model's parameters, P = Σᵢ Jᵢᵀ Hᵢ Jᵢ + prior_precision·I.

    (MacKay, Neural Computation 4, 1992; Daxberger et al., Laplace Redux, NeurIPS 2021.) i runs over all rows of the
    data, Jᵢ is the Jacobian of a row's outputs in the parameters, Hᵢ the Hessian in those outputs of -log p(yᵢ): of the
    loss itself for "cross_entropy", "poisson" and "bce"; for "mse" of a normal distribution, (f - y)²/(2·noise
    variance). θ are the model's parameters when it is made, at which the loss should have its minimum, weight decay of
    prior_precision/2 ‖θ‖² on the summed -log p included. Vectors of parameters have torch's order: that of
    ``model.parameters()``, or weight and then bias of the last layer. All is computed in float64, from rows in the
    model's own precision.

    Args:
        model: any module that returns a tensor, (n,…) for n rows. It is evaluated in eval mode.
        data: as for ``onestep.fit``: a pair (inputs, target), a Dataset of such pairs, or a DataLoader of batches.
        loss: "mse", "cross_entropy", "poisson" or "bce", or torch's losses of these kinds without class weights.
            The old order of arguments, (model, loss, data), is deprecated.
        parameters: "last_layer", the nn.Linear that ends the model, whose matrix is made by the weighted Gram kernel
            without a Jacobian; or "all" with requires_grad=True.
        structure: of the matrix. "exact"; "block", one block for each module ("all") or output ("last_layer");
            "kronecker", for linear layers E[xxᵀ] ⊗ Σ ggᵀ, and the diagonal of other parameters (Martens and Grosse,
            ICML 2015); "diagonal".
        prior_precision: ≥ 0; 0 needs data that determines every parameter.
        noise_variance: of the target under "mse"; None for the mean squared residual.
        chunk_size: rows computed at a time; None for as many as keep 256 MiB for a backward pass.

    Raises:
        ValueError, TypeError: an argument is not what it should be.
        LinAlgError: the posterior precision is not positive definite; from the methods that need its factor.
        NotImplementedError: torch.distributed runs on several processes.

    Examples:
        >>> import torch, onestep
        >>> X = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        >>> model = torch.nn.Linear(1, 1, dtype=torch.float64)
        >>> _ = onestep.fit(model, (X, 3 * X), "mse", progress=False)
        >>> posterior = onestep.curvature.Laplace(model, (X, 3 * X), "mse", noise_variance=0.01, prior_precision=0.0)
        >>> posterior.standard_deviations().shape
        torch.Size([2])
    """

    @undisturbed
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        loss: Any = "mse",
        *,
        parameters: Literal["last_layer", "all"] = "last_layer",
        structure: Structure = "exact",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
        data, loss = in_order(data, loss, stacklevel=3)
        if parameters not in ("last_layer", "all"):
            raise ValueError(f"parameters={parameters!r}; expected 'last_layer' or 'all'")
        if structure not in STRUCTURES:
            raise ValueError(f"structure={structure!r}; expected one of {', '.join(map(repr, STRUCTURES))}")
        if share().size > 1:
            raise NotImplementedError("Laplace runs on one process; torch.distributed has several")
        self._loss = as_loss(loss)
        if self._loss.name not in LOSSES:
            raise ValueError(
                f"Laplace needs the distribution behind the loss, which {self._loss.name!r} does not tell; expected "
                f"one of {', '.join(map(repr, LOSSES))}"
            )
        if noise_variance is not None and self._loss.name != "mse":
            raise ValueError(f"noise_variance={noise_variance} with loss {self._loss.name!r}; expected None")
        self.model, self.parameters, self.structure = model, parameters, structure
        self.prior_precision = _checked("prior_precision", prior_precision, zero=True)
        warn_of_eval_mode(model, "Laplace", 2)
        with eval_mode(model):
            self._read(data, chunk_size)
        variance = self._sums.loss / self._sums.elements if noise_variance is None else noise_variance
        self.noise_variance = _checked("noise_variance", variance) if self._loss.name == "mse" else None
        self._kept: tuple[tuple[float, float], Posterior] | None = None

    def _read(self, data: Any, chunk_size: int | None) -> None:
        leaf = next(self.model.parameters(), None)
        if leaf is None:
            raise ValueError("the model has no parameters")
        source = as_source(from_numpy(data, leaf), seed=0)
        source.device, source.chunk_size = leaf.device, _FEW
        first = next(source.all())
        self._head = find_last_layer(self.model, first) if self.parameters == "last_layer" else None
        tensors = self._head.layer.parameters() if self._head else self.model.parameters()
        self._vector = ParameterVector([p for p in tensors if self._head or p.requires_grad])
        self.names = parameter_names(self.model, self._vector)
        with torch.no_grad():
            outputs = call_model(self.model, first.inputs)
        # As ``scores_and_classes`` takes them: classes are last where the target has all other dimensions.
        last = not isinstance(first.target, Tensor) or first.target.shape == outputs.shape[:-1]
        self._class_dim = -1 if last or outputs.dim() < 3 else 1
        self._chunk_rows = chunk_size or chunk_rows(self.model, self._loss, first)
        # Later rows are read only where the first have no gradient.
        rows = chain([first], source.all())
        reason = "" if self._head else without_gradient(self.model, self._loss, rows, self._vector.tensors)
        if reason:
            raise ValueError(f"model: {reason}")
        source.chunk_size = self._chunk_rows
        self._sums = Sums(self.model, self._loss, self._vector, self.names, self._head)
        self._blocks = self._sums.blocks(self.structure, source.all)
        self.mean = self._vector.read()

    def __repr__(self) -> str:
        return (
            f"Laplace(p={len(self.mean)}, loss={self._loss.name!r}, parameters={self.parameters!r}, "
            f"structure={self.structure!r}, prior_precision={self.prior_precision:g})"
        )

    # ------------------------------------------------------------------------------------------------ the Gaussian

    def _scale(self, noise_variance: float | None) -> float:
        """What the sum of the loss's curvature is multiplied by: -log p = loss·scale + constant."""
        return 1.0 if noise_variance is None else 0.5 / noise_variance

    @property
    def _posterior(self) -> Posterior:
        at = self._scale(self.noise_variance), self.prior_precision
        if self._kept is None or self._kept[0] != at:
            self._kept = at, Posterior(self._blocks, len(self.mean), *at)
        return self._kept[1]

    @one_thread_after_fork()
    def solve(self, b: Tensor) -> Tensor:
        """P⁻¹b: with gradients of test losses as b, influence functions.

        Args:
            b: (p,) or (p,k), of any real dtype.

        Returns:
            P⁻¹b in the shape of ``b``, float64.

        Raises:
            ValueError: ``b`` has another shape.
        """
        if not isinstance(b, Tensor) or b.dim() not in (1, 2) or len(b) != len(self.mean):
            shape = tuple(b.shape) if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"b has shape {shape}; expected ({len(self.mean)},) or ({len(self.mean)}, k)")
        columns = b.detach().double().reshape(len(b), -1)
        return self._posterior.solve(columns).reshape(b.shape)

    @one_thread_after_fork()
    def covariance(self) -> Tensor:
        """P⁻¹ (p,p), float64."""
        return self._posterior.solve(torch.eye(len(self.mean), dtype=torch.float64, device=self.mean.device))

    @one_thread_after_fork()
    def standard_deviations(self) -> Tensor:
        """The square roots of P⁻¹'s diagonal, (p,), float64."""
        return self._posterior.variances().sqrt()

    @one_thread_after_fork()
    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``count`` vectors of parameters drawn from the posterior, (count,p), in the parameters' own dtype.

        ``torch.nn.utils.vector_to_parameters`` takes one of them where parameters="all".

        Args:
            count: how many, at least 1.
            generator: of torch, on the parameters' device; None for torch's own.

        Returns:
            (count,p), a vector a row.

        Raises:
            ValueError: ``count`` is no integer of at least 1.
        """
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"count={count!r}; expected an integer of at least 1")
        p, device = len(self.mean), self.mean.device
        Z = torch.randn(p, count, dtype=torch.float64, device=device, generator=generator)
        return (self.mean.double() + self._posterior.color(Z).mT).to(self.mean.dtype)

    # --------------------------------------------------------------------------------------------------- predictions

    @undisturbed
    @one_thread_after_fork()
    def predict(self, inputs: Any, *, joint: bool = False) -> Prediction:
        """Outputs and their variance by the model linearised in its parameters, J P⁻¹ Jᵀ.

        (Immer, Korzepa and Bauer, AISTATS 2021.)

        Args:
            inputs: rows as in the data.
            joint: whether to give the covariance of a row's outputs, too.

        Returns:
            ``Prediction``: mean and variance (n,…) in the outputs' dtype, and what else was asked for.

        Raises:
            TypeError: ``inputs`` holds no tensors or arrays.
        """
        inputs = from_numpy(inputs, self.mean)
        leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not leaves:
            raise TypeError(f"inputs are {type(inputs).__name__}; expected tensors, rows first")
        # There is no target: any tensor with as many rows.
        rows = Chunk(inputs, leaves[0])
        means, variances, covariances = [], [], []
        with torch.no_grad(), eval_mode(self.model):
            for chunk in self._parts(rows):
                mean, spread = self._of_outputs(chunk.on(self.mean.device), joint=joint)
                means.append(mean)
                variances.append(spread.diagonal(dim1=-2, dim2=-1) if joint else spread)
                covariances.append(spread)
        mean = torch.cat(means)
        variance = torch.cat(variances).to(mean.dtype).reshape(mean.shape)
        covariance = torch.cat(covariances).to(mean.dtype) if joint else None
        return Prediction(mean, variance, covariance, self._probabilities(mean, variance))

    def _parts(self, rows: Chunk) -> Iterator[Chunk]:
        for begin in range(0, len(rows), self._chunk_rows):
            yield rows.rows(slice(begin, begin + self._chunk_rows))

    def _of_outputs(self, chunk: Chunk, *, joint: bool) -> tuple[Tensor, Tensor]:
        if self._head is not None:
            features, outputs = self._head.features(self.model, chunk)
            phi = columns(self._head.layer, features).double()
            if self._head.layer.bias is not None:
                phi = torch.cat([phi, phi.new_ones(len(phi), 1)], 1)
            return outputs, self._posterior.parts[0][1].of_outputs(phi, joint=joint)
        names, parts = self.names, []
        values: Callable[[Tensor], dict[str, Tensor]] = lambda vector: dict(  # noqa: E731
            zip(names, self._vector.split(vector), strict=True)
        )
        with exclusive(), differentiable_kernels():
            for J in root_jacobian(self.model, None, chunk, self._vector.read(), values, self._sums.route):
                J = J.double()
                solved = self._posterior.solve(J.flatten(0, 1).mT).mT.reshape(J.shape)
                parts.append(J @ solved.mT if joint else (J * solved).sum(-1))
        return call_model(self.model, chunk.inputs), torch.cat(parts)

    def _probabilities(self, mean: Tensor, variance: Tensor) -> Tensor | None:
        if self._loss.name not in ("cross_entropy", "bce"):
            return None
        moderated = mean / (1 + math.pi / 8 * variance).sqrt()
        return moderated.softmax(self._class_dim) if self._loss.name == "cross_entropy" else moderated.sigmoid()

    # ------------------------------------------------------------------------------------------ marginal likelihood

    @one_thread_after_fork()
    def log_marginal_likelihood(
        self, prior_precision: float | None = None, noise_variance: float | None = None
    ) -> float:
        """log p(data) by Laplace: log p(data | θ) + ½ p log τ - ½ τ‖θ‖² - ½ log det P, τ the prior precision.

        Args:
            prior_precision, noise_variance: others than those of the object, for comparisons; > 0.

        Returns:
            The log marginal likelihood, in natural units.

        Raises:
            TypeError: one of them is no number.
            ValueError: it is not above 0, or ``noise_variance`` is given for another loss than "mse".
        """
        prior = _checked("prior_precision", self.prior_precision if prior_precision is None else prior_precision)
        if noise_variance is not None and self._loss.name != "mse":
            raise ValueError(f"noise_variance={noise_variance} with loss {self._loss.name!r}; expected None")
        noise = self.noise_variance if noise_variance is None else _checked("noise_variance", noise_variance)
        p, scale = len(self.mean), self._scale(noise)
        likelihood = -scale * self._sums.loss + self._sums.log_constants
        if noise is not None:
            likelihood -= 0.5 * self._sums.elements * math.log(2 * math.pi * noise)
        determinant = Posterior(self._blocks, p, scale, prior).log_determinant()
        return likelihood + 0.5 * (p * math.log(prior) - prior * self._squared_norm() - determinant)

    def _squared_norm(self) -> float:
        return self.mean.double().square().sum().item()

    @one_thread_after_fork()
    def tune(self, *, noise: bool = True) -> Laplace:
        """Sets the prior precision, and under "mse" the noise variance, to where the marginal likelihood is greatest.

        For fixed θ and curvature: at the maximum τ‖θ‖² = γ = Σ sλ/(sλ + τ), over the eigenvalues λ, and the noise
        variance is the sum of squared residuals over (elements - γ) (MacKay 1992). The model stays as it is: fit it
        again with the weight decay that this implies, and tune again, to maximise over all.

        Args:
            noise: whether the noise variance is set, too.

        Raises:
            ValueError: all parameters are zero, for which no prior precision is the best.
        """
        values = torch.cat([block.eigenvalues().flatten() for block in self._blocks])
        norm = self._squared_norm()
        if norm == 0:
            raise ValueError("all parameters are zero, where no prior_precision is the best; expected a fitted model")

        def used(log_prior: float) -> float:
            scaled = values * self._scale(self.noise_variance)
            return (scaled / (scaled + math.exp(log_prior))).sum().item()

        for _ in range(_TURNS):
            # γ falls and τ‖θ‖² rises with τ: they meet once.
            low, high = _LEAST_LOG, _MOST_LOG
            while high - low > _LOG_TOLERANCE:
                middle = (low + high) / 2
                low, high = (middle, high) if used(middle) > math.exp(middle) * norm else (low, middle)
            moved = abs(math.log(self.prior_precision) - low) if self.prior_precision > 0 else math.inf
            self.prior_precision = math.exp(low)
            if self.noise_variance is not None and noise:
                left = self._sums.elements - used(low)
                variance = self._sums.loss / left if left > 0 else self.noise_variance
                moved = max(moved, abs(math.log(variance / self.noise_variance)))
                self.noise_variance = variance
            if moved <= _SETTLED:
                break
        return self


def _checked(name: str, value: Any, *, zero: bool = False) -> float:
    """A finite number above zero, or at least zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {type(value).__name__}; expected a number")
    if not (0 < value < math.inf or (zero and value == 0)):
        raise ValueError(f"{name}={value}; expected a finite number {'>= 0' if zero else '> 0'}")
    return float(value)
