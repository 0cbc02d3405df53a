"""solve_normal_segments: against one problem at a time in fp64, its forms, failures, derivatives and bad input."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from onestep.linalg import solve_normal_segments, solve_normal_segments_ex

ops = torch.ops.onestep


def problems(lengths, d, k, dtype, *, gathers=True):
    """X, Y, offsets, and the keywords indices, weight and base."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    entries = int(offsets[-1])
    rows = entries // 2 + 1 if gathers else entries
    base = normal(2 * d, d)
    keywords = {"weight": normal(entries).abs() + 0.1, "base": base.mT @ base / d}
    if gathers:
        keywords["indices"] = torch.randint(rows, (entries,), generator=generator)
    return normal(rows, d), normal(entries, k), offsets, keywords


def one_at_a_time(X, Y, offsets, *, indices=None, weight=None, base=None, ridge=None):
    """The formula, problem after problem."""
    solutions = []
    for index, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        x = X[begin:end] if indices is None else X[indices[begin:end]]
        scaled = x if weight is None else x * weight[begin:end, None]
        A = scaled.mT @ x
        if base is not None:
            A = A + (base + base.mT) / 2
        if ridge is not None:
            A = A + torch.diag(ridge[index] if ridge.dim() == 2 else ridge)
        solutions.append(torch.linalg.solve(A, scaled.mT @ Y[begin:end]))
    return torch.stack(solutions)


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


LENGTHS = {
    "around d": [0, 60, 19, 20, 21, 1, 0, 7, 7, 7, 7, 12, 3, 5],
    "one of many rows": [3, 9000, 5, 2, 8, 1],
    "none": [],
    "empty ones": [0, 0, 0],
}


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("label", LENGTHS)
@pytest.mark.parametrize("ridge", ["uniform", "each", "base alone"])
def test_as_accurate_as_one_at_a_time(label, gathers, ridge):
    X, Y, offsets, keywords = problems(LENGTHS[label], 20, 2, torch.float32, gathers=gathers)
    each = torch.rand(len(offsets) - 1, 20) + 0.1
    penalty, exact = {"uniform": (0.5, torch.full((20,), 0.5)), "each": (each, each), "base alone": (0.0, None)}[ridge]
    got = solve_normal_segments(X, Y, offsets, ridge=penalty, **keywords)
    assert got.shape == (len(offsets) - 1, 20, 2)
    if not len(offsets) - 1:
        return
    wide = {name: value.double() if value.is_floating_point() else value for name, value in keywords.items()}
    expected = one_at_a_time(X.double(), Y.double(), offsets, ridge=None if exact is None else exact.double(), **wide)
    torchs = one_at_a_time(X, Y, offsets, ridge=exact, **keywords)
    if expected.norm() > 0:
        assert error(got, expected) <= 2 * error(torchs, expected) + 1e-7
    assert torch.equal(got[offsets.diff() == 0], torch.zeros_like(got[offsets.diff() == 0]))
    # int32, vectors, and the form that keeps factors
    again = solve_normal_segments_ex(X, Y[:, 0], offsets.int(), ridge=penalty, **keywords)
    assert (again.info == 0).all()
    torch.testing.assert_close(again.solution, got[..., 0], rtol=1e-4, atol=1e-5)


def test_ill_conditioned_base_takes_no_dual_form():
    """The rows mend what base lacks: whitening by its factor would lose them."""
    X, Y, offsets, keywords = problems([15] * 40, 20, 1, torch.float32)
    direction = torch.zeros(20)
    direction[0] = 1.0
    X[:, 0] = X[:, 0].abs() + 1
    keywords["base"] = 1e4 * (torch.eye(20) - torch.outer(direction, direction)) + 1e-4 * torch.eye(20)
    got = solve_normal_segments(X, Y, offsets, **keywords)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in keywords.items()}
    assert error(got, one_at_a_time(X.double(), Y.double(), offsets, **wide)) < 1e-6


def test_threads_do_not_change_a_bit():
    X, Y, offsets, keywords = problems([*range(70)] * 30, 33, 1, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(solve_normal_segments(X, Y, offsets, ridge=0.1, **keywords))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("record", [False, True])
def test_bad_problems_fail_alone(record):
    X, Y, offsets, keywords = problems(LENGTHS["around d"], 20, 1, torch.float64, gathers=False)
    clean = solve_normal_segments(X.clone().requires_grad_(record), Y, offsets, **keywords)
    X[3, 4] = torch.nan  # of problem 1, which has 60 rows
    Y[int(offsets[7])] = torch.inf  # of one with 7
    X.requires_grad_(record)
    result = solve_normal_segments_ex(X, Y, offsets, **keywords)
    bad = torch.zeros(14, dtype=torch.bool)
    bad[[1, 7]] = True
    assert result.info[[1, 7]].tolist() == [5, 21]
    assert result.info[~bad].eq(0).all()
    assert torch.equal(result.solution[~bad], clean[~bad])
    assert result.solution[bad].isnan().all()
    if record:
        (grad,) = torch.autograd.grad(result.solution.nan_to_num().square().sum(), X)
        assert grad.isfinite().all()
        assert (grad[int(offsets[1]) : int(offsets[2])] == 0).all()
    with pytest.raises(torch.linalg.LinAlgError, match=r"2 of 14 problems .*\[1\]: info=5"):
        solve_normal_segments(X, Y, offsets, **keywords)


def test_singular_without_base():
    X, Y, offsets, _ = problems([2, 5], 3, 1, torch.float64, gathers=False)
    assert solve_normal_segments_ex(X, Y, offsets).info.tolist() == [3, 0]


# ---------------------------------------------------------------------------------------------------------- derivatives


def samples(requires_grad):
    """Arguments of the ops: with everything, and with as little as there may be."""
    X, Y, offsets, keywords = problems([2, 0, 3], 2, 2, torch.float64)
    everything = (X, Y, offsets, keywords["indices"], keywords["weight"], keywords["base"], torch.rand(3, 2).double())
    X, Y, offsets, _ = problems([3, 4], 2, 1, torch.float64, gathers=False)
    for args in (everything, (X, Y, offsets, None, None, None, None, 0.3)):
        yield tuple(
            arg.detach().clone().requires_grad_(requires_grad)
            if isinstance(arg, torch.Tensor) and arg.is_floating_point()
            else arg
            for arg in args
        )


@pytest.mark.parametrize("sample", [0, 1])
def test_derivatives_of_every_order(sample):
    args = list(samples(True))[sample]
    places = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]

    def solve(*tensors):
        given = list(args)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return ops.solve_normal_segments(*given)[0]

    tensors = tuple(args[place] for place in places)
    assert gradcheck(solve, tensors, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(solve, tensors, check_fwd_over_rev=True)


@pytest.mark.parametrize("sample", [0, 1])
@pytest.mark.parametrize("op", ["solve_normal_segments", "solve_normal_segments_ex", "apply_segments_inverse"])
def test_opcheck(op, sample):
    args = list(samples(True))[sample]
    if op == "apply_segments_inverse":
        solution, L, _ = ops.solve_normal_segments_ex(*args)
        X, _, *others = args[:7]
        args = (torch.ones_like(solution).requires_grad_(), X, *others, L.detach())
    # Tracing takes seconds: once, of the op that has the most.
    traced = sample == 0 and op == "solve_normal_segments_ex"
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(ops, op).default, args, test_utils=(*utils, "test_aot_dispatch_dynamic") if traced else utils)


def test_vmap():
    X, Y, offsets, keywords = problems([3, 0, 5, 1], 3, 2, torch.float64)
    many = torch.stack([Y, 2 * Y])
    got = torch.func.vmap(lambda y: solve_normal_segments(X, y, offsets, **keywords))(many)
    torch.testing.assert_close(got[1], 2 * solve_normal_segments(X, Y, offsets, **keywords))


# ------------------------------------------------------------------------------------------------------------ bad input

X, Y, OFFSETS = torch.ones(4, 2), torch.ones(4), torch.tensor([0, 1, 4])
BAD = {
    "X's shape": ({"X": torch.ones(4)}, ValueError, r"X has shape \(4,\)"),
    "no features": ({"X": torch.ones(4, 0)}, ValueError, "at least one feature"),
    "rows": ({"X": torch.ones(5, 2)}, ValueError, "as many rows as Y, or pass indices"),
    "offsets are floats": ({"offsets": torch.ones(3)}, TypeError, "offsets has dtype"),
    "offsets are a list": ({"offsets": [0, 4]}, TypeError, "offsets is list"),
    "no offsets": ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets is empty"),
    "offsets begin late": ({"offsets": torch.tensor([1, 4])}, ValueError, "offsets goes from 1 to 4"),
    "offsets end early": ({"offsets": torch.tensor([0, 3])}, ValueError, "from 0 to 4"),
    "offsets fall": ({"offsets": torch.tensor([0, 5, 4])}, ValueError, "never fall"),
    "indices": ({"indices": torch.tensor([0, 1, 2, 4])}, ValueError, "indices has values from 0 to 4"),
    "negative index": ({"indices": torch.tensor([0, -1, 2, 3])}, ValueError, "from -1 to 3"),
    "indices' shape": ({"indices": torch.tensor([0, 1])}, ValueError, r"indices has shape \(2,\)"),
    "weight's shape": ({"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\); expected \(4,\)"),
    "negative weight": ({"weight": -torch.ones(4)}, ValueError, "weight has negative values"),
    "base's shape": ({"base": torch.ones(3, 3)}, ValueError, r"base has shape \(3, 3\); expected \(2, 2\)"),
    "base's dtype": ({"base": torch.ones(2, 2).double()}, TypeError, "base has dtype"),
    "ridge": ({"ridge": -1.0}, ValueError, "ridge=-1.0"),
    "negative ridge": ({"ridge": -torch.ones(1, 2)}, ValueError, "ridge has negative values"),
    "ridge's shape": ({"ridge": torch.ones(5)}, ValueError, r"ridge has shape \(5,\)"),
}


@pytest.mark.parametrize("label", BAD)
def test_bad_input(label):
    changed, kind, message = BAD[label]
    given = {"X": X, "Y": Y, "offsets": OFFSETS, "ridge": 1.0} | changed
    with pytest.raises(kind, match=message):
        solve_normal_segments(given.pop("X"), given.pop("Y"), given.pop("offsets"), **given)
