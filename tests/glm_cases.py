"""Generalised linear models for the tests of onestep.curvature.glm: a table, and the same in torch's own ops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cases
import torch
from torch import Tensor, func
from torch.nn.functional import cross_entropy, softplus

from onestep.curvature import GLMPoint, glm

FAMILIES = ("gaussian", "logistic", "softmax", "poisson")


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class GlmCase:
    """One model: k is None where W is a vector; ``targets`` is a dtype, "one-hot" or "probabilities"."""

    name: str
    family: str
    n: int = 20
    d: int = 5
    k: int | None = None
    m: int = 3
    intercept: bool = False
    weighted: bool = False
    targets: Any = "probabilities"
    layout: str = "contiguous"


@dataclass(frozen=True)
class Problem:
    """What ``glm`` takes, and right-hand sides V (m, *W.shape)."""

    X: Tensor
    y: Tensor
    W: Tensor
    V: Tensor
    family: str
    weight: Tensor | None
    intercept: bool

    def point(self, **changes: Any) -> GLMPoint:
        given = replace(self, **changes)
        return glm(given.X, given.y, given.W, given.family, weight=given.weight, intercept=given.intercept)

    def to(self, dtype: torch.dtype) -> Problem:
        """All operands but class indices in another dtype."""

        def cast(tensor: Tensor | None) -> Any:
            return tensor if tensor is None else tensor.to(dtype)

        labelled = self.family == "softmax" and self.y.dim() == 1
        y = self.y.long() if labelled else cast(self.y)
        return replace(self, X=cast(self.X), y=y, W=cast(self.W), V=cast(self.V), weight=cast(self.weight))

    def dense_loss(self, W: Tensor) -> Tensor:
        """The loss at W in torch's own ops, for operands of one dtype."""
        eta = self.X @ W[:-1] + W[-1] if self.intercept else self.X @ W
        if self.family == "softmax":
            losses = cross_entropy(eta, self.y, reduction="none")
        else:
            y = self.y.reshape(eta.shape)
            losses = {
                "gaussian": lambda: (eta - y).square() / 2,
                "logistic": lambda: softplus(eta) - y * eta,
                "poisson": lambda: eta.exp() - y * eta,
            }[self.family]()
            losses = losses if losses.dim() == 1 else losses.sum(1)
        return losses.sum() if self.weight is None else losses @ self.weight

    def dense(self) -> dict[str, Tensor]:
        """Loss, gradient and products in torch's own ops."""
        gradient = func.grad(self.dense_loss)
        products = [func.jvp(gradient, (self.W,), (v,))[1] for v in self.V]
        return {"loss": self.dense_loss(self.W), "grad": gradient(self.W), "hvp": torch.stack(products)}

    def dense_hessian(self) -> Tensor:
        return func.hessian(self.dense_loss)(self.W).reshape(self.W.numel(), self.W.numel())


def problem(case: GlmCase, dtype: torch.dtype = torch.float64) -> Problem:
    """The operands of a case, W scaled so that η is of order 1."""
    generator = cases.seeded(case.name)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outputs = case.k or 1
    shape = (case.d + case.intercept, *([] if case.k is None else [case.k]))
    x_layout = "contiguous" if case.layout == "expanded" else case.layout
    X = cases.lay_out(normal(case.n, case.d).to(dtype), x_layout)
    if case.layout == "expanded":
        X = X[:1].expand(case.n, case.d)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    y = normal(case.n, outputs).sigmoid()
    if case.family == "softmax":
        y = y / y.sum(-1, keepdim=True)
    if isinstance(case.targets, torch.dtype):
        top = outputs if case.family == "softmax" else 2
        columns = () if case.family == "softmax" else (outputs,)
        y = torch.randint(0, top, (case.n, *columns), generator=generator).to(case.targets)
    elif case.targets == "one-hot":
        y = torch.nn.functional.one_hot(y.argmax(-1), outputs).to(wide)
    else:
        y = y.to(wide)
    if y.is_floating_point():
        y = cases.lay_out(y, case.layout if case.layout != "expanded" else "strided")
    if case.k is None:
        y = y.squeeze(-1)
    weight = torch.rand(case.n, generator=generator, dtype=torch.float64) + 0.5 if case.weighted else None
    own = len(shape)
    return Problem(
        X,
        y,
        cases.lay_out((normal(*shape) / math.sqrt(case.d + 1)).to(wide), x_layout, own),
        cases.lay_out(normal(case.m, *shape).to(wide), x_layout, own),
        case.family,
        None if weight is None else cases.lay_out(weight.to(wide), x_layout, 1),
        case.intercept,
    )


_OPTIONS = [
    GlmCase(f"{family}-k{k}-intercept{intercept:d}-weight{weighted:d}", family, k=k, intercept=intercept,
            weighted=weighted)
    for family in FAMILIES
    for k in ((3,) if family == "softmax" else (None, 1, 3))
    for intercept in (False, True)
    for weighted in (False, True)
]  # fmt: skip

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_TARGETS = [
    *[GlmCase(f"softmax-{dtype}", "softmax", k=2 if dtype == torch.bool else 3, weighted=True, targets=dtype)
      for dtype in _INTEGERS],
    *[GlmCase(f"{family}-{dtype}", family, k=k, targets=dtype)
      for family, k in (("gaussian", None), ("logistic", None), ("poisson", 3))
      for dtype in (*_INTEGERS, torch.float64, torch.bfloat16)],
    GlmCase("softmax-one-hot", "softmax", k=4, targets="one-hot", intercept=True),
]  # fmt: skip

# Vectors hold 2 to 16 elements, tiles 64 rows or what fits into 192 KiB, pieces 256 rows.
_SIZES = [
    *[GlmCase(f"{family}-n{n}", family, n=n, d=9, k=k, intercept=True, weighted=True)
      for family, k in (("logistic", None), ("softmax", 3))
      for n in (1, 2, 15, 17, 63, 64, 65, 255, 256, 257, 513)],
    *[GlmCase(f"{family}-d{d}-k{k}", family, n=70, d=d, k=k, intercept=d % 2 == 0)
      for family, k, widths in (
          ("poisson", None, (1, 2, 7, 8, 9, 15, 16, 17, 33, 300)),
          ("gaussian", 2, (1, 8, 17, 33)),
          ("softmax", 10, (1, 2, 7, 8, 9, 16, 17, 300)),
      )
      for d in widths],
    *[GlmCase(f"softmax-classes{k}-m{m}", "softmax", n=67, d=11, k=k, m=m, weighted=True, targets=torch.int64)
      for k in (2, 3, 8, 10, 25, 130) for m in (1, 3, 9)],
    *[GlmCase(f"logistic-k{k}-m{m}", "logistic", n=67, d=11, k=k, m=m)
      for k in (None, 1, 2, 17, 130) for m in (1, 9, 33)],
    GlmCase("softmax-wide-and-long", "softmax", n=700, d=300, k=25, m=9, intercept=True, targets=torch.int64),
    GlmCase("intercept-alone", "poisson", d=0, intercept=True),
    GlmCase("intercept-alone-softmax", "softmax", d=0, k=3, intercept=True),
    GlmCase("no-features", "logistic", d=0),
    GlmCase("no-rows", "logistic", n=0, weighted=True),
    GlmCase("no-rows-softmax", "softmax", n=0, k=3, targets=torch.int64),
    GlmCase("no-right-hand-sides", "logistic", m=0),
]  # fmt: skip

_LAYOUTS = [
    GlmCase(f"{layout}-{family}-d{d}", family, n=70, d=d, k=k, weighted=True, intercept=True, layout=layout)
    for layout in cases.LAYOUTS[1:]
    for family, k in (("logistic", None), ("softmax", 3), ("poisson", 2))
    for d in (3, 37)
]

CASES = [*_OPTIONS, *_TARGETS, *_SIZES, *_LAYOUTS]
SMALL = [case for case in _OPTIONS if case.k != 1]


def named(*names: str) -> list[GlmCase]:
    return [case for case in CASES if case.name in names]


def as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1)
