"""Conjugate gradients, the Newton decrement, schedulers and settings of the optimisers."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import DESIGN, KINDS, START, closure_for, curve, exact, parameter
from torch import Tensor

from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG
from onestep.optim.decrement import newton_decrement

# ------------------------------------------------------------------------------------------------- conjugate gradients


def definite(n: int) -> tuple[Tensor, Tensor]:
    """A (n,n) with eigenvalues from 0.01 to 100, and b (n,)."""
    generator = torch.Generator().manual_seed(n)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    A = Q @ torch.diag(torch.logspace(-2, 2, n, dtype=torch.float64)) @ Q.mT
    return A, torch.randn(n, dtype=torch.float64, generator=generator)


def test_conjugate_gradients_solve_what_a_dense_solve_does() -> None:
    A, b = definite(12)
    for precondition in (None, lambda v: v / A.diagonal()):
        solve = conjugate_gradient(lambda v: A @ v, b, precondition=precondition, tolerance=1e-12, max_iterations=100)
        torch.testing.assert_close(solve.x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(solve.residual, b - A @ solve.x, rtol=0, atol=1e-9)
        assert not solve.negative_curvature and 0 < solve.iterations <= 40


def test_a_warm_start_saves_conjugate_gradients_iterations() -> None:
    A, b = definite(12)
    start = torch.linalg.solve(A, b) * (1 + 1e-5)
    kept = start.clone()
    cold = conjugate_gradient(lambda v: A @ v, b, tolerance=1e-5, max_iterations=100)
    warm = conjugate_gradient(lambda v: A @ v, b, start=start, tolerance=1e-5, max_iterations=100)
    assert warm.iterations < cold.iterations
    assert (b - A @ warm.x).norm() <= 1.01e-5 * b.norm()
    assert torch.equal(start, kept)


def test_negative_curvature_ends_conjugate_gradients() -> None:
    A, b = torch.diag(torch.tensor([3.0, 1.0, -2.0])).double(), torch.tensor([1.0, 1.0, 0.1]).double()
    solve = conjugate_gradient(lambda v: A @ v, b, tolerance=1e-10, max_iterations=100)
    before = conjugate_gradient(lambda v: A @ v, b, tolerance=1e-10, max_iterations=solve.iterations - 1)
    assert solve.negative_curvature and not before.negative_curvature and not solve.converged
    assert torch.equal(solve.x, before.x)
    # The direction comes with it, and descends from there.
    assert solve.direction is not None and solve.image is not None
    torch.testing.assert_close(solve.image, A @ solve.direction)
    assert torch.dot(solve.direction, solve.image) < 0 < torch.dot(solve.direction, solve.residual)
    solve = conjugate_gradient(lambda v: -v, b, tolerance=1e-10, max_iterations=100)
    assert solve.negative_curvature and solve.iterations == 1 and not solve.x.any()
    torch.testing.assert_close(solve.direction, b)


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1e20, 1e35])
def test_conjugate_gradients_do_not_depend_on_the_size_of_the_right_hand_side(size: float) -> None:
    """In float32 squares of 1e-25 and 1e20 underflow and overflow."""
    A, b = definite(12)
    A, b = A.float() + torch.eye(12), b.float()
    expected = torch.linalg.solve(A.double(), b.double())
    block = torch.stack([b, -b], 1)
    for right in (b, block):
        solve = conjugate_gradient(
            lambda v: A @ v, right * size, tolerance=1e-5, max_iterations=200, least_progress=0.0
        )
        assert solve.converged.all()
        found = solve.x.double() / size if right is b else solve.x[:, 0].double() / size
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_block_and_a_vector_take_the_same_course() -> None:
    """One text serves both: each column of a block is what the vector alone is, to rounding."""
    A, _ = definite(12)
    B = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    B[:, 1] *= 1e-30
    diagonal = A.diagonal()
    block = conjugate_gradient(
        lambda V: A @ V, B, precondition=lambda V: V / diagonal[:, None], tolerance=1e-9, max_iterations=9
    )
    for column in range(3):
        one = conjugate_gradient(
            lambda v: A @ v, B[:, column], precondition=lambda v: v / diagonal, tolerance=1e-9, max_iterations=9
        )
        torch.testing.assert_close(block.x[:, column], one.x, rtol=1e-4, atol=1e-36)
        assert block.converged[column] == one.converged[0]
    least = torch.linalg.eigvalsh(A / diagonal.sqrt() / diagonal.sqrt()[:, None])[0]
    one = conjugate_gradient(
        lambda v: A @ v, B[:, 0], precondition=lambda v: v / diagonal, tolerance=1e-13, max_iterations=100
    )
    assert one.smallest_ritz_value() == pytest.approx(least.item(), rel=1e-3)


# -------------------------------------------------------------------------------------- how near the minimum is


def least_squares(columns: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """A (2p,p) whose columns have lengths from 1 to 1/spread, y, and the minimum of ‖Ax - y‖²."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -spread, columns, dtype=torch.float64)
    A = torch.randn(2 * columns, columns, dtype=torch.float64, generator=generator) * scale
    y = torch.randn(2 * columns, dtype=torch.float64, generator=generator)
    return A, y, torch.linalg.lstsq(A, y[:, None]).solution[:, 0]


@pytest.mark.parametrize("columns", [12, 200])
@pytest.mark.parametrize("kind", [GaussNewton, NewtonCG])
def test_the_decrement_knows_parameters_whose_gradient_is_small_for_their_scale_alone(kind: Any, columns: int) -> None:
    """Off by its own size in the last parameter, whose gradient is 1e-8 of the others': not at the minimum."""
    A, y, minimum = least_squares(columns, 5.0)
    x = minimum.clone()
    x[-1] += 100.0
    x.requires_grad_()
    optimizer = kind([x], damping=1e-4, cg_iterations=3)
    closure = (lambda: A @ x - y) if kind is GaussNewton else (lambda: (A @ x - y).square().mean())
    gap = ((A @ (x - minimum)).square().mean()).item()
    # A test that would take this point for a minimum if the missing part were not seen.
    optimizer.settled = 0.5 * gap / (A @ x - y).square().mean().item()
    optimizer.step(closure)
    assert optimizer.report is not None and optimizer.report.decrement == float("inf")
    # Another optimiser: one whose test has failed asks again only when its steps promise less.
    settled = 2.2 * optimizer.settled
    optimizer = kind([x], damping=1e-4, cg_iterations=3)
    optimizer.settled = settled
    with torch.no_grad():
        x.copy_(minimum)
        x[-1] += 100.0
    optimizer.step(closure)
    assert gap <= optimizer.report.decrement * 1.001 <= 1.1 * gap * 1.01


def test_tests_that_fail_cost_no_more_than_steps_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of so much damping promise less than the tolerance: a test of a hundred products is not for each."""
    A, y, minimum = least_squares(200, 4.0)
    x = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    optimizer = GaussNewton([{"params": [x], "damping_decrease": 1.0}], damping=1e4)
    # Just less than what could be gained, so that it takes long to see.
    optimizer.settled = 0.99 * (1 - ((A @ minimum - y).square().mean() / y.square().mean()).item())
    products, tested = [0, 0], newton_decrement

    def counted(product: Callable[[Tensor], Tensor], *arguments: Any) -> float:
        def count(v: Tensor) -> Tensor:
            products[1] += 1
            return product(v)

        return tested(count, *arguments)

    monkeypatch.setattr("onestep.optim._matrix_free.newton_decrement", counted)
    for _ in range(60):
        optimizer.step(lambda: A @ x - y)
        products[0] += optimizer.report.cg_iterations if optimizer.report else 0
    assert optimizer.report is not None and optimizer.report.accepted and optimizer.report.decrement == math.inf
    # One test, and then as much as the steps.
    assert 100 < products[1] < 250 + products[0]


def test_there_is_no_decrement_at_a_saddle() -> None:
    x = parameter(1e-9, 1e-9)
    optimizer = NewtonCG([x], damping=10.0)
    optimizer.step(lambda: 1 + x[0] ** 2 - x[1] ** 2)
    assert optimizer.report is not None and optimizer.report.decrement == float("inf")


# ------------------------------------------------------------------------------------------- schedulers and settings


def scheduled(kind: Any, make: Callable[[Any], Any], steps: int = 3) -> list[float]:
    """The rate before each step, which takes so much of what it solved for."""
    x = parameter(*START.tolist())
    # So much that Newton's steps meet no negative curvature, along which they go on.
    optimizer = kind([x], damping=5.0, **exact(kind))
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rate, before = optimizer.param_groups[0]["lr"], x.detach().clone()
        full = before.clone().requires_grad_()
        reference = kind([full])
        reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for group in reference.param_groups:
            group["lr"] = 1.0
        reference.step(closure_for(kind, lambda: curve(full)))  # noqa: B023
        optimizer.step(closure_for(kind, lambda: curve(x)))
        torch.testing.assert_close(x.detach() - before, rate * (full.detach() - before), rtol=1e-5, atol=1e-9)
        rates.append(rate)
        scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
    return rates


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_scale_the_steps(kind: Any) -> None:
    schedulers = torch.optim.lr_scheduler
    assert scheduled(kind, lambda o: schedulers.StepLR(o, 1, 0.5)) == [1.0, 0.5, 0.25]
    assert scheduled(kind, lambda o: schedulers.LambdaLR(o, lambda t: t / 2)) == [0.0, 0.5, 1.0]
    assert scheduled(kind, lambda o: schedulers.ReduceLROnPlateau(o, patience=0)) == [1.0, 1.0, pytest.approx(0.1)]
    for make in (
        lambda o: schedulers.CosineAnnealingLR(o, 3),
        lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=4, cycle_momentum=False),
    ):
        assert len(scheduled(kind, make, 2)) == 2


def test_settings_are_in_param_groups_and_in_the_state() -> None:
    x = parameter(*START.tolist())
    settings = {"cg_iterations": 7, "cg_tolerance": 0.1, "damping": 0.2, "weight_decay": 0.3}
    optimizer = GaussNewton([x], **settings)
    assert settings.items() <= optimizer.param_groups[0].items()
    other = GaussNewton([x])
    other.load_state_dict(optimizer.state_dict())
    assert settings.items() <= other.param_groups[0].items()
    marquardt = LevenbergMarquardt([x], momentum=0.5)
    assert marquardt.param_groups[0]["momentum"] == 0.5 and marquardt.param_groups[0]["damping_decrease"] == 0.6
    # A checkpoint from before has no rate.
    state = optimizer.state_dict()
    del state["param_groups"][0]["lr"]
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 1.0


def test_settings_of_one_group_are_used_for_all_or_refused() -> None:
    x, y = parameter(1.0), parameter(2.0)
    with pytest.raises(ValueError, match=r"damping=0\.001 in a param group, 3\.0 in the first; .* as an argument"):
        LevenbergMarquardt([{"params": [x], "damping": 3.0}, {"params": [y]}])
    optimizer = LevenbergMarquardt([{"params": [x]}], damping=3.0)
    # What the others have reached, where a group is added later.
    optimizer.add_param_group({"params": [y], "weight_decay": 0.1})
    assert [group["damping"] for group in optimizer.param_groups] == [3.0, 3.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    with pytest.raises(ValueError, match=r"damping=7\.0 in a param group, 0\.001 in the first; expected one value"):
        LevenbergMarquardt([{"params": [x]}, {"params": [y], "damping": 7.0}])
    optimizer.param_groups[1]["damping"] = 5.0
    with pytest.raises(ValueError, match=r"damping is \[3\.0, 5\.0\] in the param groups"):
        optimizer.step(lambda: torch.cat([x, y]))
    optimizer.damping = 4.0
    optimizer.step(lambda: torch.cat([x, y]))
    with pytest.raises(ValueError, match=r"lr=-1; expected a finite number >= 0"):
        LevenbergMarquardt([{"params": [parameter(1.0)], "lr": -1}])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_a_closure_is_noticed(kind: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(20, 1))
    X = DESIGN.float()
    optimizer = kind(model.parameters())
    with pytest.warns(UserWarning, match=r"then .* at the same parameters.*model\.eval\(\)") as caught:
        optimizer.step(closure_for(kind, lambda: model(X) - 1))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Once is enough, and no warning where there is nothing to warn of.
        optimizer.step(closure_for(kind, lambda: model(X) - 1))
        model.eval()
        kind(model.parameters()).step(closure_for(kind, lambda: model(X) - 1))
