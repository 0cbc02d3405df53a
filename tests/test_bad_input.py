"""Bad arguments, of onestep.linalg above all, are refused by name, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import onestep
from onestep.linalg import (
    cholesky,
    cholesky_solve,
    gram,
    moments,
    solve_normal,
    solve_normal_ex,
    solve_spd,
)

# ------------------------------------------------------------------------------------------------------- bad arguments

X = torch.ones(6, 3) + torch.eye(6, 3)
Y = torch.ones(6, 2)
WIDE = torch.ones(5, 40)
SQUARE = torch.eye(3)
ROWS = torch.ones(3, 2)
NAN = float("nan")
INF = float("inf")


def refused(error: type[Exception], match: str, *calls: Callable[[], object]) -> list[object]:
    return [pytest.param(call, error, match, id=f"{match}-{at}") for at, call in enumerate(calls)]


BAD_TYPES = [
    *refused(TypeError, "X is ndarray", lambda: solve_normal(X.numpy(), Y), lambda: gram(X.numpy(), Y),
             lambda: moments(X.numpy(), Y)),
    *refused(TypeError, "X is list", lambda: solve_normal(X.tolist(), Y)),
    *refused(TypeError, "Y is ndarray", lambda: solve_normal(X, Y.numpy()), lambda: gram(X, Y.numpy()),
             lambda: moments(X, Y.numpy())),
    *refused(TypeError, "Y is NoneType", lambda: solve_normal(X, None)),
    *refused(TypeError, "weight is ndarray", lambda: solve_normal(X, Y, weight=np.ones(6)),
             lambda: gram(X, Y, weight=np.ones(6))),
    *refused(TypeError, "weight is list", lambda: solve_normal(X, Y, weight=[1.0] * 6)),
    *refused(TypeError, "weight is", lambda: moments(X, Y, weight=np.ones(6)), lambda: moments(X, Y, weight=[1.0] * 6)),
    *refused(TypeError, "A is ndarray", lambda: solve_spd(SQUARE.numpy(), ROWS)),
    *refused(TypeError, "L is ndarray", lambda: cholesky_solve(ROWS, SQUARE.numpy())),
    *refused(TypeError, "B is ndarray", lambda: cholesky_solve(ROWS.numpy(), SQUARE),
             lambda: solve_spd(SQUARE, ROWS.numpy())),
    *refused(TypeError, "ridge", lambda: solve_normal(X, Y, ridge="a"), lambda: solve_normal(X, Y, ridge=None),
             lambda: solve_normal(X, Y, ridge=[1.0, 2.0, 3.0]), lambda: solve_normal(X, Y, ridge=np.ones(3)),
             lambda: solve_normal(WIDE, WIDE, ridge="a"), lambda: solve_normal(X, Y, ridge=1j)),
    *refused(TypeError, "refine", lambda: solve_normal(X, Y, refine=1.5), lambda: solve_normal(X, Y, refine="a")),
    *refused(TypeError, "jitter", lambda: solve_normal_ex(X, Y, jitter="a")),
]  # fmt: skip

BAD_DTYPES = [
    *refused(TypeError, "X has dtype torch.int32", lambda: solve_normal(X.int(), Y), lambda: gram(X.int())),
    *refused(TypeError, "X has dtype torch.complex64", lambda: solve_normal(X.cfloat(), Y)),
    *refused(TypeError, "X has dtype torch.bool", lambda: moments(X.bool(), Y)),
    *refused(TypeError, "Y has dtype torch.int64", lambda: solve_normal(X, Y.long()), lambda: gram(X, Y.long())),
    *refused(TypeError, "Y has dtype torch.float64; expected torch.float32", lambda: solve_normal(X, Y.double()),
             lambda: gram(X, Y.double()), lambda: moments(X, Y.double()), lambda: solve_normal(X.half(), Y.double())),
    *refused(TypeError, "weight has dtype torch.bool", lambda: solve_normal(X, Y, weight=torch.ones(6).bool())),
    *refused(TypeError, "weight has dtype torch.float64; expected torch.float32",
             lambda: solve_normal(X, Y, weight=torch.ones(6).double()),
             lambda: moments(X, Y, weight=torch.ones(6).double())),
    *refused(TypeError, "ridge has dtype torch.int64", lambda: solve_normal(X, Y, ridge=torch.tensor(1))),
    *refused(TypeError, "A has dtype torch.int32", lambda: cholesky(SQUARE.int()),
             lambda: solve_spd(SQUARE.int(), ROWS)),
    *refused(TypeError, "B has dtype torch.float64", lambda: solve_spd(SQUARE, ROWS.double()),
             lambda: cholesky_solve(ROWS.double(), SQUARE)),
]  # fmt: skip

BAD_SHAPES = [
    *refused(ValueError, r"X has shape \(3,\); expected \(..., n, d\)", lambda: solve_normal(X[0], Y),
             lambda: gram(X[0]), lambda: moments(X[0], Y)),
    *refused(ValueError, r"X has shape \(\)", lambda: solve_normal(X[0, 0], Y)),
    *refused(ValueError, r"X has shape \(6, 0\); expected at least one feature", lambda: solve_normal(X[:, :0], Y)),
    *refused(ValueError, r"Y has shape \(\)", lambda: solve_normal(X, Y[0, 0]), lambda: gram(X, Y[0, 0])),
    *refused(ValueError, r"Y has shape \(5, 2\); expected \(..., 6, k\)", lambda: solve_normal(X, Y[:5]),
             lambda: gram(X, Y[:5]), lambda: moments(X, Y[:5])),
    *refused(ValueError, r"Y has shape \(5", lambda: solve_normal(X, Y[:5, 0]), lambda: gram(X, Y[:5, 0])),
    *refused(ValueError, r"weight has shape \(5,\); expected \(..., 6\)",
             lambda: solve_normal(X, Y, weight=torch.ones(5)), lambda: gram(X, Y, weight=torch.ones(5)),
             lambda: moments(X, Y, weight=torch.ones(5))),
    *refused(ValueError, r"weight has shape \(\)", lambda: solve_normal(X, Y, weight=torch.tensor(1.0))),
    *refused(ValueError, r"ridge has shape \(2,\); expected", lambda: solve_normal(X, Y, ridge=torch.ones(2))),
    *refused(ValueError, r"ridge has shape \(7, 5\)", lambda: solve_normal(X, Y, ridge=torch.ones(7, 5))),
    *refused(ValueError, r"moments takes one table.*X \(1, 6, 3\)", lambda: moments(X[None], Y[None])),
    *refused(ValueError, r"A has shape \(2, 3\); expected square", lambda: cholesky(SQUARE[:2]),
             lambda: solve_spd(SQUARE[:2], ROWS)),
    *refused(ValueError, r"A has shape \(3,\)", lambda: cholesky(SQUARE[0])),
    *refused(ValueError, r"L has shape \(2, 3\)", lambda: cholesky_solve(ROWS, SQUARE[:2])),
    *refused(ValueError, r"B has shape \(2, 2\); expected \(..., 3, k\)", lambda: cholesky_solve(ROWS[:2], SQUARE),
             lambda: solve_spd(SQUARE, ROWS[:2])),
    *refused(ValueError, r"X, Y, weight.*: batch dimensions do not broadcast: got \(2,\), \(3,\)",
             lambda: solve_normal(torch.ones(2, 6, 3), torch.ones(3, 6, 2)),
             lambda: gram(torch.ones(2, 6, 3), torch.ones(3, 6, 2))),
    *refused(ValueError, "batch dimensions do not broadcast",
             lambda: solve_normal(torch.ones(2, 6, 3), torch.ones(2, 6, 2), weight=torch.ones(3, 6)),
             lambda: solve_normal(torch.ones(2, 5, 40), torch.ones(3, 5, 2), ridge=1.0),
             lambda: cholesky_solve(torch.ones(2, 3, 1), torch.ones(4, 3, 3)),
             lambda: solve_spd(torch.ones(2, 3, 3), torch.ones(4, 3, 1))),
    *refused(ValueError, "do not broadcast",
             lambda: solve_normal(torch.ones(2, 6, 3), Y, weight=torch.ones(3, 6), ridge=torch.tensor(1.0))),
]  # fmt: skip

BAD_VALUES = [
    *refused(ValueError, "weight has negative values", lambda: solve_normal(X, Y, weight=-torch.ones(6)),
             lambda: solve_normal(X, Y, weight=torch.tensor([1.0, 1, 1, 1, 1, -1e-6])),
             lambda: solve_normal_ex(X, Y, weight=-torch.ones(6)),
             lambda: solve_normal(X.expand(3, 6, 3), Y, weight=-torch.ones(3, 6)),
             lambda: solve_normal(WIDE, WIDE[:, :1], weight=-torch.ones(5), ridge=1.0)),
    *refused(ValueError, "weight has negative values", lambda: gram(X, Y, weight=-torch.ones(6)),
             lambda: moments(X, Y, weight=-torch.ones(6))),
    *refused(ValueError, r"ridge=-1\.0; expected .*a number from 0", lambda: solve_normal(X, Y, ridge=-1.0),
             lambda: solve_normal_ex(X, Y, ridge=-1.0), lambda: solve_normal(WIDE, WIDE, ridge=-1.0)),
    *refused(ValueError, "ridge=nan", lambda: solve_normal(X, Y, ridge=NAN),
             lambda: solve_normal(WIDE, WIDE, ridge=NAN)),
    *refused(ValueError, "ridge=inf", lambda: solve_normal(X, Y, ridge=INF)),
    *refused(ValueError, "ridge=inf", lambda: solve_normal(WIDE, WIDE, ridge=INF)),
    *refused(ValueError, r"ridge=1e\+300", lambda: solve_normal(X, Y, ridge=1e300),
             lambda: solve_normal(WIDE, WIDE, ridge=1e300)),
    *refused(ValueError, "ridge has negative values", lambda: solve_normal(X, Y, ridge=torch.tensor(-1.0)),
             lambda: solve_normal(X, Y, ridge=torch.tensor([1.0, 0.0, -1e-3])),
             lambda: solve_normal(WIDE, WIDE, ridge=-torch.ones(40))),
    *refused(ValueError, "refine=-1; expected", lambda: solve_normal(X, Y, refine=-1),
             lambda: solve_normal_ex(X, Y, refine=-1), lambda: solve_normal(WIDE, WIDE, refine=-1, ridge=1.0)),
    *refused(ValueError, "jitter=.*; expected", lambda: solve_normal_ex(X, Y, jitter=0),
             lambda: solve_normal_ex(X, Y, jitter=-1e-6), lambda: solve_normal_ex(X, Y, jitter=2.0),
             lambda: solve_normal_ex(X, Y, jitter=NAN), lambda: solve_normal_ex(WIDE, WIDE, ridge=1.0, jitter=2.0)),
]  # fmt: skip

BAD_PLACES = [
    *refused(ValueError, "X has layout torch.sparse_coo", lambda: solve_normal(X.to_sparse(), Y),
             lambda: gram(X.to_sparse()), lambda: moments(X.to_sparse(), Y)),
    *refused(ValueError, "Y has layout torch.sparse_coo", lambda: solve_normal(X, Y.to_sparse())),
    *refused(ValueError, "weight has layout torch.sparse_coo",
             lambda: solve_normal(X, Y, weight=torch.ones(6).to_sparse())),
    *refused(ValueError, "weight has layout torch.sparse_coo",
             lambda: moments(X, Y, weight=torch.ones(6).to_sparse())),
    *refused(ValueError, "ridge has layout torch.sparse_coo",
             lambda: solve_normal(X, Y, ridge=torch.ones(3).to_sparse())),
    *refused(ValueError, "A has layout torch.sparse_coo", lambda: cholesky(SQUARE.to_sparse())),
    *refused(ValueError, "meta", lambda: solve_normal(X.to("meta"), Y),
             lambda: solve_normal(X, Y.to("meta")), lambda: solve_normal(X, Y, weight=torch.ones(6, device="meta")),
             lambda: solve_normal(X, Y, ridge=torch.ones(3, device="meta")), lambda: gram(X, Y.to("meta")),
             lambda: solve_normal(WIDE, WIDE, ridge=1.0, weight=torch.ones(5, device="meta")),
             lambda: moments(X, Y, weight=torch.ones(6, device="meta")),
             lambda: solve_spd(SQUARE, ROWS.to("meta")), lambda: cholesky_solve(ROWS.to("meta"), SQUARE)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), [*BAD_TYPES, *BAD_DTYPES, *BAD_SHAPES, *BAD_VALUES, *BAD_PLACES])
def test_bad_argument_is_refused_by_name(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_meta_tensors_give_shapes():
    """All operands on the meta device: shapes and dtypes, no values, as torch's own ops do."""
    result = solve_normal_ex(X.to("meta"), Y.to("meta"), ridge=1.0)
    assert result.solution.device.type == "meta"
    assert result.solution.shape == (3, 2)
    assert result.info.dtype == torch.int32


def test_meta_tensors_give_shapes_in_the_dual_form():
    wide = WIDE.to("meta")
    assert solve_normal(wide, wide[:, :2], ridge=torch.ones(40, device="meta")).shape == (40, 2)


def test_parameters_on_the_meta_device_are_refused():
    """They have no values; torch's own words name item() or a device."""
    model, data = torch.nn.Linear(2, 1, device="meta"), (torch.randn(9, 2), torch.randn(9, 1))
    for call in (
        lambda: onestep.fit(model, data, progress=False),
        lambda: onestep.curvature.HessianOperator(model, data, "mse") @ torch.ones(3),
        lambda: onestep.optim.NewtonCG(model.parameters()).step(lambda: model(data[0]).sum()),
    ):
        with pytest.raises(ValueError, match="on the device 'meta', where they have no values"):
            call()
