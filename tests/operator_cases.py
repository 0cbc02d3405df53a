"""The operators under test, and models with losses and data for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator

OPERATORS = [HessianOperator, GaussNewtonOperator, FisherOperator]
ROWS, CLASSES = 11, 3


class Attention(nn.Module):
    """A block of F.scaled_dot_product_attention with a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + mixed).mean(1))


class Encoder(nn.Module):
    """nn.TransformerEncoderLayer, which holds nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(4, 2, 5, 0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Tied(nn.Module):
    """The same weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, CLASSES)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


class Recurrent(nn.Module):
    """nn.LSTM, which torch.func.vmap cannot run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    model[0].weight.requires_grad_(False)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)), (4,)),
    "attention": (Attention, (5, 4)),
    "encoder": (Encoder, (4, 4)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, CLASSES)
        ),
        (2, 6, 6),
    ),
    "tied": (Tied, (3,)),
    "lstm": (Recurrent, (4, 3)),
    "frozen": (frozen, (4,)),
}


def functional_mse(outputs: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(outputs, target)


class Setting:
    """A model in float64, its data, and the matrices by their definitions."""

    def __init__(self, name: str = "mlp", loss: str = "cross_entropy", reduction: str = "mean") -> None:
        make, shape = MODELS[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make().double()
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64)
        self.target = {
            "cross_entropy": torch.tensor([0, 1, 2, -100, 1, 0, 2, 2, 0, 1, -100]),
            "mse": torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64),
            "poisson": torch.randint(5, (ROWS, CLASSES), generator=generator).double(),
        }[loss]
        self.loss, self.reduction = loss, reduction
        self.elements = int((self.target != -100).sum())
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.point = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        self.p = sum(p.numel() for p in self.point.values())
        self.V = torch.randn(self.p, 3, generator=generator, dtype=torch.float64)

    def batches(self, *sizes: int) -> list[tuple[Tensor, Tensor]]:
        """The rows in batches of these sizes."""
        return list(zip(self.inputs.split(sizes), self.target.split(sizes), strict=True))

    def operator(self, kind: Any, data: Any = None, /, **options: Any) -> Any:
        data = self.batches(4, 4, 3) if data is None else data
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*eval mode", UserWarning)
            return kind(self.model, data, self.loss, reduction=self.reduction, progress=False, **options)

    def outputs(self, vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in self.point.values()])
        values = {name: part.reshape(p.shape) for (name, p), part in zip(self.point.items(), parts, strict=True)}
        return functional_call(self.model, values, (self.inputs,))

    def summed_loss(self, outputs: Tensor) -> Tensor:
        """As torch has it."""
        if self.loss == "mse":
            return (outputs - self.target).square().sum()
        if self.loss == "poisson":
            return (outputs.exp() - self.target * outputs).sum()
        return F.cross_entropy(outputs, self.target, ignore_index=-100, reduction="sum")

    def vector(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.point.values()])

    def dense(self, kind: Any) -> Tensor:
        """The whole matrix."""
        modes = self.model.training
        self.model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                matrix = self._dense(kind)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
            self.model.train(modes)
        return matrix / self.elements if self.reduction == "mean" else matrix

    def _dense(self, kind: Any) -> Tensor:
        vector = self.vector()
        if kind is HessianOperator:
            # Row by row, since vmap over the backward pass of layer_norm's backward pass is wrong in torch 2.13.
            return torch.autograd.functional.hessian(lambda v: self.summed_loss(self.outputs(v)), vector)
        J = jacrev(self.outputs)(vector).reshape(-1, self.p)
        z = self.outputs(vector).detach()
        if kind is GaussNewtonOperator:
            H = hessian(lambda flat: self.summed_loss(flat.reshape(z.shape)))(z.reshape(-1))
            return J.mT @ H @ J
        return J.mT @ self._expected_outer_products(z) @ J

    def _expected_outer_products(self, z: Tensor) -> Tensor:
        """E of (∂ℓ/∂z)(∂ℓ/∂z)ᵀ under the model's distribution, summed over y for classes, known moments elsewhere."""
        if self.loss == "mse":
            return 4 * 0.5 * torch.eye(z.numel(), dtype=z.dtype)
        if self.loss == "poisson":
            return torch.diag(z.exp().reshape(-1))
        blocks = []
        for row, target in zip(torch.softmax(z, 1), self.target, strict=True):
            slopes = row - torch.eye(CLASSES, dtype=z.dtype)
            blocks.append((row[:, None, None] * slopes[:, :, None] * slopes[:, None, :]).sum(0) * (target != -100))
        return torch.block_diag(*blocks)
