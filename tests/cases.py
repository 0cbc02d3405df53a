"""Cases as data: one table of shapes and layouts that feeds every family, the inputs it describes, and the oracle.

Inputs are well conditioned (cond(XᵀX) below about 1e3), so that a wrong element stands out from rounding. Everything
that a layout leaves between the elements is NaN, so that reading past an operand shows.
"""

from __future__ import annotations

import functools
import math
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded")

Batch = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One problem shape. A batch that is None is ``batch``; ridge_form is one that ``solve_normal`` documents."""

    name: str
    n: int
    d: int
    k: int = 2
    batch: Batch = ()
    y_batch: Batch | None = None
    weight_batch: Batch | None = None
    ridge_batch: Batch | None = None
    weighted: bool = False
    ridge: float = 0.0
    ridge_form: str = "float"  # float, scalar, problem, column, feature, features
    layout: str = "contiguous"

    @property
    def problems(self) -> int:
        return math.prod(self.full_batch)

    @property
    def full_batch(self) -> Batch:
        batches = [self.batch, self.y_batch, self.weight_batch, self.ridge_batch]
        return tuple(torch.broadcast_shapes(*[batch for batch in batches if batch is not None]))


class Inputs(NamedTuple):
    """What ``solve_normal`` takes."""

    X: Tensor
    Y: Tensor
    weight: Tensor | None
    ridge: float | Tensor

    def contiguous(self) -> Inputs:
        return Inputs(*[part.contiguous() if isinstance(part, Tensor) else part for part in self])

    def keywords(self) -> dict[str, Tensor | float | None]:
        return {"weight": self.weight, "ridge": self.ridge}


# Batches that fill the vector lanes of a pack (2, 4, 8, 16) exactly, or with one problem more or less.
_LANES = [Case(f"lanes-{batch}", n=9, d=3, batch=(batch,)) for batch in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33)]

# Packed problems: d and k around the rows (4), columns (3) and rows per block (16) of the pack's tiles.
_PACKED = [Case(f"packed-d{d}-k{k}", n=2 * d + 5, d=d, k=k, batch=(11,))
           for d, k in ((1, 1), (2, 1), (3, 3), (4, 4), (5, 1), (6, 2), (7, 7), (8, 1), (9, 3), (12, 1), (13, 16),
                        (16, 2), (17, 1), (24, 5), (25, 1), (31, 2), (32, 1))]  # fmt: skip
_PACKED_ROWS = [Case(f"packed-n{n}", n=n, d=3, batch=(6,), ridge=0.5) for n in (3, 4, 15, 16, 17, 31, 32, 33, 200)]

# From d = 33 or k = 17 on, and for a few large problems, one problem at a time.
_PACK_LIMIT = [
    Case("packed-32-16", n=70, d=32, k=16, batch=(8,)),
    Case("blocked-33-16", n=70, d=33, k=16, batch=(8,)),
    Case("blocked-32-17", n=70, d=32, k=17, batch=(8,)),
    Case("blocked-1-17", n=20, d=1, k=17, batch=(3,)),
    Case("blocked-tall", n=700, d=6, k=3),
    Case("blocked-large-few", n=300, d=30, k=1),
]

# Panels of 6, 12, 24, 48 columns and tiles of 4 or 8 rows.
_PANELS = [Case(f"panel-d{d}-k{k}", n=2 * d + 9, d=d, k=k, batch=(2,))
           for d, k in ((34, 1), (35, 2), (36, 3), (37, 1), (39, 1), (40, 8), (41, 2), (47, 1), (48, 1), (49, 2),
                        (50, 1), (63, 3), (64, 1), (65, 1), (72, 5), (73, 1))]  # fmt: skip

# The factor's blocks of 96 rows, and the size from which they are shared among threads.
_FACTOR = [Case(f"factor-{d}", n=2 * d, d=d, k=3) for d in (95, 96, 97, 128, 191, 192, 193, 255, 256, 257, 290)]

# Right-hand sides around whole vectors.
_TARGETS = [Case(f"targets-{k}", n=50, d=20, k=k, batch=(2,)) for k in (15, 16, 17, 24, 25, 49)]

# Blocks of 128 rows, slabs of 4096, and the pieces into which rows are cut from 8192 on for fewer than 16 problems.
_ROWS = [
    *[Case(f"rows-{n}", n=n, d=35, k=1) for n in (127, 128, 129, 257)],
    *[Case(f"rows-{n}", n=n, d=5, k=1) for n in (4095, 4096, 4097, 8191, 8192, 8193, 12289)],
    Case("rows-12300-by-15", n=12300, d=2, k=1, batch=(15,)),
    Case("rows-12300-by-16", n=12300, d=2, k=1, batch=(16,)),
    Case("rows-8200-wide", n=8200, d=34, k=2, weighted=True, ridge=0.5),
]

_EDGES = [
    Case("single-feature", n=6, d=1, k=1, weighted=True),
    Case("single-feature-long", n=9000, d=1, k=1),
    Case("single-row", n=1, d=1, k=1),
    Case("no-targets", n=9, d=3, k=0, batch=(3,)),
    Case("no-targets-blocked", n=90, d=36, k=0, batch=(2,)),
    Case("no-rows", n=0, d=3, batch=(2,), ridge=0.5),
    Case("no-rows-blocked", n=0, d=40, batch=(2,), ridge=0.5, weighted=True),
    Case("no-problems", n=7, d=3, batch=(0,), weighted=True),
    Case("no-problems-blocked", n=70, d=40, batch=(2, 0), ridge=0.5),
    Case("no-problems-dual", n=7, d=40, batch=(0,), ridge=0.5),
    Case("wide-packed", n=5, d=9, batch=(10,), ridge=0.5),
    Case("wide-at-limit", n=10, d=32, batch=(10,), ridge=0.5),
    Case("wide-dual", n=10, d=33, batch=(3,), ridge=0.5),
    Case("wide-dual-weighted", n=40, d=120, ridge=0.5, weighted=True),
    Case("wide-dual-features", n=20, d=50, batch=(2,), ridge=0.5, ridge_form="features", weighted=True),
    Case("wide-single-row", n=1, d=40, ridge=0.5),
]

_PENALTIES = [
    Case(f"ridge-{form}-d{d}", n=2 * d, d=d, batch=(3, 4), ridge=0.5, ridge_form=form, weighted=True)
    for form in ("float", "scalar", "problem", "column", "feature", "features")
    for d in (6, 38)
]

_BATCHES = [
    Case("batch-2d", n=9, d=4, batch=(3, 5), weighted=True, ridge=0.5),
    Case("batch-3d-blocked", n=80, d=36, batch=(2, 1, 2), weighted=True),
    Case("broadcast-x", n=9, d=4, batch=(), y_batch=(7,), weighted=True, weight_batch=(7,)),
    Case("broadcast-y", n=9, d=4, batch=(7,), y_batch=(), weighted=True, weight_batch=()),
    Case("broadcast-all", n=12, d=4, batch=(3, 1), y_batch=(5,), weighted=True, weight_batch=(2, 1, 1), ridge=0.5,
         ridge_form="features", ridge_batch=(3, 5)),
    Case("broadcast-all-blocked", n=80, d=36, batch=(2, 1), y_batch=(3,), weighted=True, weight_batch=(1, 1),
         ridge=0.5, ridge_form="features", ridge_batch=(3,)),
    Case("broadcast-ridge", n=9, d=4, batch=(3, 2), ridge=0.5, ridge_form="features", ridge_batch=(2,)),
    Case("broadcast-ridge-only", n=9, d=4, ridge=0.5, ridge_form="features", ridge_batch=(6,)),
    Case("broadcast-ridge-blocked", n=90, d=36, batch=(2, 1), ridge=0.5, ridge_form="column", ridge_batch=(3,)),
    Case("broadcast-ridge-dual", n=9, d=36, batch=(2, 1), ridge=0.5, ridge_form="features", ridge_batch=(2, 3)),
    Case("batch-8d", n=9, d=3, batch=(1, 2, 1, 2, 1, 1, 2, 1), weighted=True),
    Case("batch-9d", n=9, d=3, batch=(1, 2, 1, 2, 1, 1, 2, 1, 1), weighted=True, ridge=0.5),
    Case("batch-9d-broadcast", n=9, d=3, batch=(1, 2, 1, 2, 1, 1, 2, 1, 1), y_batch=(2, 1), weighted=True,
         weight_batch=(2,), ridge=0.5, ridge_form="features", ridge_batch=()),
]  # fmt: skip

_LAYOUT_CASES = [
    replace(case, name=f"{layout}-{case.name}", layout=layout)
    for layout in LAYOUTS[1:]
    for case in (
        Case("packed", n=21, d=7, k=3, batch=(10,), weighted=True, ridge=0.5, ridge_form="features"),
        Case("blocked", n=90, d=37, k=2, batch=(2, 2), weighted=True, ridge=0.5, ridge_form="features"),
        Case("rows", n=8200, d=6, k=2, batch=(2,), weighted=True),
        Case("dual", n=12, d=41, k=3, batch=(3,), weighted=True, ridge=0.5, ridge_form="features"),
        Case("9d", n=8, d=3, batch=(1, 2, 1, 2, 1, 1, 2, 1, 1), weighted=True),
    )
]

CASES = [
    *_LANES, *_PACKED, *_PACKED_ROWS, *_PACK_LIMIT, *_PANELS, *_FACTOR, *_TARGETS, *_ROWS, *_EDGES, *_PENALTIES,
    *_BATCHES, *_LAYOUT_CASES,
]  # fmt: skip

# Orders of square matrices, around the same edges.
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 31, 32, 33, 36, 37, 48, 49, 64, 65, 95, 96, 97, 100, 128,
          192, 193, 255, 256, 257, 289, 384, 385)  # fmt: skip


def over(cases: list[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test's ``case``."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def named(*names: str) -> list[Case]:
    """The cases of these names."""
    by_name = {case.name: case for case in CASES}
    return [by_name[name] for name in names]


# -------------------------------------------------------------------------------------------------------------- inputs


def seeded(name: str) -> torch.Generator:
    """A generator whose numbers depend on the name alone, so that a test does not depend on the order of tests."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def lay_out(tensor: Tensor, layout: str, own: int = 2) -> Tensor:
    """The tensor in another layout, NaN between its elements; ``own`` trailing dimensions are not batch dimensions.

    All layouts keep the values, except "expanded": every problem of the batch becomes the first, with stride 0.
    """
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "transposed" and own == 2:
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        if tensor.numel() == 0:
            return tensor
        return tensor[(0,) * (tensor.dim() - own)].expand(tensor.shape)
    if layout == "offset":  # one element into a buffer: aligned to nothing but the element
        buffer = tensor.new_full((tensor.numel() + 2,), torch.nan)
        view = buffer[1 : 1 + tensor.numel()].view(tensor.shape)
    else:  # every second row and every third column
        steps = (2, 3)[-own:] if own else ()
        batch, size = tensor.shape[: tensor.dim() - own], tensor.shape[tensor.dim() - own :]
        buffer = tensor.new_full(
            (*batch, *[length * step for length, step in zip(size, steps, strict=True)]), torch.nan
        )
        view = buffer[(..., *[slice(None, None, step) for step in steps])]
    return view.copy_(tensor)


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """The operands of a case: rows of X are standard normal, and Y a linear function of them with noise."""
    generator = seeded(f"{case.name} {seed}")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def uniform(low: float, high: float, shape: Batch) -> Tensor:
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)

    y_batch = case.batch if case.y_batch is None else case.y_batch
    X = normal(*case.batch, case.n, case.d)
    signal = X[(0,) * len(case.batch)] @ normal(case.d, case.k) if math.prod(case.batch) else 0
    Y = signal + normal(*y_batch, case.n, case.k)
    weight = None
    if case.weighted:
        weight = uniform(0.5, 2.0, ((case.batch if case.weight_batch is None else case.weight_batch) + (case.n,)))
    ridge: float | Tensor = case.ridge
    batch = case.batch if case.ridge_batch is None else case.ridge_batch
    if case.ridge_form != "float":
        shape = {
            "scalar": (), "problem": batch, "column": (*batch, 1), "feature": (case.d,), "features": (*batch, case.d),
        }[case.ridge_form]  # fmt: skip
        ridge = lay_out((case.ridge * uniform(0.5, 2.0, shape)).to(dtype), case.layout, min(len(shape), 1))
    return Inputs(
        lay_out(X.to(dtype), case.layout),
        lay_out(Y.to(dtype), case.layout),
        None if weight is None else lay_out(weight.to(dtype), case.layout, 1),
        ridge,
    )


def spd(d: int, dtype: torch.dtype, batch: Batch = (), name: str = "spd") -> Tensor:
    """Symmetric positive definite matrices with condition numbers of about 30."""
    M = torch.randn((*batch, d, 2 * d), dtype=torch.float64, generator=seeded(f"{name} {d} {batch}"))
    return (M @ M.mT / d).to(dtype)


# -------------------------------------------------------------------------------------------------------------- oracle


def penalties(case: Case, ridge: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The ridge as (…,d)."""
    value = torch.as_tensor(ridge, dtype=dtype)
    if case.ridge_form == "problem":
        value = value.unsqueeze(-1)
    return value.expand(*value.shape[:-1], case.d)


def extended(tensor: Tensor) -> np.ndarray:
    """fp32 in fp64; fp64 in long double, of 64 bits on x86. Where that is plain fp64 the oracles are a little worse."""
    return tensor.detach().numpy().astype(np.longdouble if tensor.dtype == torch.float64 else np.float64)


def rounded(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


def reference_solve(X: Tensor, Y: Tensor, weight: Tensor | None = None, ridge: float | Tensor = 0.0) -> Tensor:
    """The solution to fp64 accuracy: QR of [sqrt(D) X; sqrt(Λ)] in fp64, refined twice with extended residuals.

    ridge is a number, or broadcasts with (…,d).
    """
    d, k = X.shape[-1], Y.shape[-1]
    D = X.new_ones(X.shape[-2]) if weight is None else weight
    penalty = torch.as_tensor(ridge, dtype=X.dtype)
    penalty = penalty.expand(*penalty.shape[:-1], d)
    batch = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], D.shape[:-1], penalty.shape[:-1])
    X, Y, D = X.expand(*batch, -1, -1), Y.expand(*batch, -1, -1), D.unsqueeze(-1).expand(*batch, -1, -1)
    penalty = penalty.expand(*batch, d)
    augmented = torch.cat((D.double().sqrt() * X.double(), torch.diag_embed(penalty.double().sqrt())), -2)
    R = torch.linalg.qr(augmented, mode="r").R

    wide_x, wide_y, wide_d, wide_penalty = (extended(part) for part in (X, Y, D, penalty))
    W = np.zeros((*batch, d, k), dtype=wide_x.dtype)
    for _ in range(3):
        right = np.swapaxes(wide_x, -1, -2) @ (wide_d * (wide_y - wide_x @ W)) - wide_penalty[..., None] * W
        half = torch.linalg.solve_triangular(R.mT, rounded(right), upper=False)
        W = W + torch.linalg.solve_triangular(R, half, upper=True).numpy()
    return rounded(W)


def torch_solve(X: Tensor, Y: Tensor, weight: Tensor | None = None, ridge: float | Tensor = 0.0) -> Tensor:
    """What a torch user writes today, in the dtype of X; its error is the yardstick for ours."""
    scaled = X if weight is None else X * weight.unsqueeze(-1)
    A = X.mT @ scaled
    penalty = torch.as_tensor(ridge, dtype=X.dtype)
    A = A + torch.diag_embed(penalty.expand(*penalty.shape[:-1], X.shape[-1]))
    return torch.cholesky_solve(scaled.mT @ Y, torch.linalg.cholesky_ex(A).L)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The root mean square over the batch of ‖actual − expected‖ / ‖expected‖ (Frobenius)."""
    difference = (actual.double() - expected).flatten(-2).norm(dim=-1)
    size = expected.flatten(-2).norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float((difference / size).square().mean().sqrt()) if expected.numel() else 0.0


def assert_as_accurate(actual: Tensor, torchs: Tensor, expected: Tensor) -> None:
    """The rule of DESIGN 5: at most twice torch's error in the same dtype on the same input (or 4 ε, to allow luck)."""
    assert actual.shape == expected.shape
    assert actual.dtype == torchs.dtype
    ours, theirs = relative_error(actual, expected), relative_error(torchs, expected)
    floor = 4 * torch.finfo(actual.dtype).eps
    assert ours <= 2 * max(theirs, floor), f"error {ours:.2e}; torch's {theirs:.2e}, floor {floor:.2e}"


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, with NaN equal to NaN; says where it is not."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} elements differ, first at {(~same).nonzero()[0].tolist()}"


def name_of(value: object) -> str:
    """A name for a test's parameter that is the same in every process: without the address of a function."""
    if isinstance(value, functools.partial):
        return "-".join([name_of(value.func), *value.keywords])
    return getattr(value, "__name__", None) or str(value)
