"""The plain arguments of torch.ops.onestep.solve_normal and solve_normal_ex: their schemas, and where they lead."""

import pytest
import torch

import onestep  # noqa: F401 (defines the ops)

ops = torch.ops.onestep


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


TENSORS = "Tensor X, Tensor Y, Tensor? weight=None, Tensor? ridge=None"


@pytest.mark.parametrize(
    ("op", "options", "results"),
    [
        ("solve_normal", "int refine=0, bool dual=False, bool check=False", 2),
        ("solve_normal_ex", "int refine=0, float jitter=0., bool dual=False, bool rcond=True, bool check=False", 5),
    ],
)
def test_schemas_of_the_solves(op, options, results):
    """What others call by position and store in exported programs: an argument moves or changes its default never."""
    schema = str(getattr(ops, op).default._schema)
    tensors = ", ".join(["Tensor"] * results)
    assert schema == f"onestep::{op}({TENSORS}, float uniform_ridge=0., {options}) -> ({tensors})"


def test_options_of_solve_normal_reach_the_same_solve_as_those_of_solve_normal_ex():
    X, Y = torch.randn(6, 9), torch.randn(6, 2)
    X[:, 1] = X[:, 0] + 1e-3 * X[:, 1]
    ridge = torch.full((9,), 1e-4)
    once, refined = (ops.solve_normal(X, Y, None, ridge, 0.0, refine)[0] for refine in (0, 2))
    assert not torch.equal(once, refined)
    assert torch.equal(refined, ops.solve_normal_ex(X, Y, None, ridge, 0.0, 2)[0])
    dual = ops.solve_normal(X, Y, None, ridge, 0.0, 2, True)[0]
    assert not torch.equal(dual, refined)
    assert torch.equal(dual, ops.solve_normal_ex(X, Y, None, ridge, 0.0, 2, 0.0, True)[0])
    with pytest.raises(torch.linalg.LinAlgError, match="problems could not be solved"):
        ops.solve_normal(X, Y, check=True)
    with pytest.raises(torch.linalg.LinAlgError, match="problems could not be solved"):
        ops.solve_normal_ex(X, Y, check=True)
    assert ops.solve_normal(X, Y)[1] == ops.solve_normal_ex(X, Y)[2] != 0


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"), [({"refine": -1}, "refine=-1; expected"), ({"jitter": 2.0}, "jitter=2.0")]
)
def test_options_out_of_range_are_refused(wrong, message, dual):
    X, Y, ridge = torch.randn(6, 3), torch.randn(6, 2), torch.ones(3)
    for _ in range(2):  # the second time, too
        with pytest.raises(ValueError, match=message):
            ops.solve_normal_ex(X, Y, None, ridge, **wrong, dual=dual)
