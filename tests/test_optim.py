"""The optimisers by themselves: steps against dense formulas, damping, closures, state, failures."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from optim_cases import DESIGN, KINDS, START, closure_for, curve, exact, parameter
from torch import Tensor
from torch.nn.functional import cross_entropy

from onestep.curvature.conjugate_gradient import conjugate_gradient
from onestep.optim import GaussNewton, LevenbergMarquardt, NewtonCG, NonFiniteError


def halves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The five parameters as two tensors."""
    return [part.clone().requires_grad_() for part in START.to(dtype).split([3, 2])]


@pytest.mark.parametrize("m", [3, 40], ids=["wide", "tall"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_its_dense_formula_with_the_weight_decay_of_each_group(kind: Any, m: int) -> None:
    W = torch.diag(torch.tensor([0.05, 0.05, 0.05, 0.4, 0.4], dtype=torch.float64))
    J, r = torch.func.jacrev(lambda p: curve(p, m))(START), curve(START, m)
    hessian = torch.func.hessian(lambda p: curve(p, m).square().mean())(START)
    B, gradient = (hessian if kind is NewtonCG else 2 / m * J.mT @ J) + W, 2 / m * J.mT @ r + W @ START
    # Enough that Newton's matrix is definite and its first trial succeeds.
    damping = 6.0 if kind is NewtonCG else 0.3
    D = torch.diag(B.diagonal()) if kind is LevenbergMarquardt else torch.eye(5).double()
    step = -torch.linalg.solve(B + damping * D, gradient)

    tensors = halves()
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(tensors, (0.05, 0.4), strict=True)]
    optimizer = kind(groups, damping=damping, **exact(kind))
    loss = optimizer.step(closure_for(kind, lambda: curve(torch.cat(tensors), m)))
    torch.testing.assert_close(torch.cat(tensors).detach(), START + step, rtol=1e-7, atol=1e-9)

    def objective(p: Tensor) -> float:
        return (curve(p, m).square().mean() + 0.5 * p @ W @ p).item()

    report = optimizer.report
    assert (report.accepted, report.rejected, report.damping) == (True, 0, damping)
    assert loss == report.loss == pytest.approx(objective(START), rel=1e-12)
    assert report.new_loss == pytest.approx(objective(START + step), rel=1e-7)
    assert (report.grad_norm, report.step_norm) == pytest.approx((gradient.norm().item(), step.norm().item()), rel=1e-7)
    assert report.predicted == pytest.approx(-(gradient @ step + step @ B @ step / 2).item(), rel=1e-7)
    assert report.gain == pytest.approx((loss - report.new_loss) / report.predicted, rel=1e-9)


@pytest.mark.parametrize("kind", [LevenbergMarquardt, GaussNewton])
def test_a_step_on_outputs_and_a_convex_loss_is_its_dense_formula(kind: Any) -> None:
    X, classes = DESIGN[:, :3], torch.arange(40) % 3
    weight = torch.full((3, 3), 0.1, dtype=torch.float64, requires_grad=True)
    start = weight.detach().reshape(-1).clone()

    def loss(w: Tensor) -> Tensor:
        return cross_entropy(X @ w.reshape(3, 3), classes)

    # The outputs are linear: the Gauss-Newton matrix is the Hessian.
    A, gradient = torch.func.hessian(loss)(start), torch.func.grad(loss)(start)
    D = torch.diag(A.diagonal()) if kind is LevenbergMarquardt else torch.eye(9).double()
    kind([weight], damping=0.1, **exact(kind)).step(lambda: (X @ weight, lambda z: cross_entropy(z, classes)))
    expected = start - torch.linalg.solve(A + 0.1 * D, gradient)
    torch.testing.assert_close(weight.detach().reshape(-1), expected, rtol=1e-7, atol=1e-9)


def test_levenberg_marquardt_keeps_the_greatest_scale_and_carries_momentum() -> None:
    # At zero the sines are steepest: the diagonal falls from there.
    x = parameter(0.0, 0.0, 0.0, 0.0, 0.0)
    optimizer = LevenbergMarquardt([x], damping=5.0, momentum=0.3)
    point, D, step = (torch.zeros(5).double() for _ in range(3))
    for number in range(3):
        J = torch.func.jacrev(curve)(point)
        A, gradient = J.mT @ J / 20, J.mT @ curve(point) / 20
        assert number == 0 or bool((A.diagonal() < D).any())
        D = torch.maximum(D, A.diagonal())
        step = -torch.linalg.solve(A + optimizer.damping * torch.diag(D), gradient) + 0.3 * step
        point = point + step
        optimizer.step(lambda: curve(x))
        torch.testing.assert_close(x.detach(), point, rtol=1e-9, atol=1e-11)


def test_the_second_solve_starts_from_the_last_direction_with_remembered_squares_of_gradients() -> None:
    x = parameter(*START.tolist())
    optimizer = GaussNewton([x], damping=0.3, cg_iterations=1)
    optimizer.step(lambda: curve(x))
    points, damping = (START, x.detach().clone()), optimizer.damping
    J = [torch.func.jacrev(curve)(point) for point in points]
    first, second = (slope.mT @ curve(point) / 20 for slope, point in zip(J, points, strict=True))
    root = (0.9 * first.square() + 0.1 * second.square()).sqrt()
    solve = conjugate_gradient(
        lambda v: J[1].mT @ (J[1] @ v) / 20 + damping * v,
        -second,
        start=0.95 * (points[1] - points[0]),
        precondition=lambda v: v / (root / root.mean() + damping),
        tolerance=0.0,
        max_iterations=1,
    )
    optimizer.step(lambda: curve(x))
    torch.testing.assert_close(x.detach(), points[1] + solve.x, rtol=1e-9, atol=1e-11)


def test_newton_leaves_a_saddle_in_a_few_steps() -> None:
    """From 0 on z₀² - z₁² + z₁⁴/4 + z₁/1000, whose gradient is 0.001 there. SciPy's Newton-CG takes 6 steps."""
    z = parameter(0.0, 0.0)
    optimizer = NewtonCG([z])
    for _ in range(10):
        loss = optimizer.step(lambda: z[0] ** 2 - z[1] ** 2 + z[1] ** 4 / 4 + 1e-3 * z[1])
    assert loss == pytest.approx(-1.0014143385, abs=1e-9)
    assert optimizer.report is not None and optimizer.report.decrement < 1e-9


def test_newton_leaves_a_saddle_at_which_rounding_hides_the_slope() -> None:
    """The slope at the start, 1e-10 in float32, promises less than the loss can show."""
    z = torch.tensor([0.0, 5e-4], requires_grad=True)
    optimizer = NewtonCG([z])
    for _ in range(10):
        loss = optimizer.step(lambda: z[0] ** 2 - z[1] ** 2 + z[1] ** 4 / 4 + 1e-3 * z[1])
    assert loss == pytest.approx(-1.0014143, abs=1e-5)


def test_newton_leaves_a_saddle_for_a_minimum() -> None:
    x = parameter(1e-3, 1.0)
    optimizer = NewtonCG([x], damping=1e-3)
    for _ in range(15):
        optimizer.step(lambda: x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2)
    torch.testing.assert_close(x.detach().abs(), torch.tensor([1.0, 0.0]).double(), rtol=1e-6, atol=1e-6)


def test_where_negative_curvature_leads_too_far_the_step_goes_without_it() -> None:
    """Along x₁ the quadratic model goes 100 far, and x₁⁴ rises; x₀ is solved for all the same."""
    x = parameter(0.0, 0.0)
    optimizer = NewtonCG([x], damping=1e-6, **exact(NewtonCG))
    optimizer.step(lambda: 50 * (x[0] - 1) ** 2 + 0.1 * x[1] - 5e-4 * x[1] ** 2 + x[1] ** 4)
    assert optimizer.report is not None and (optimizer.report.accepted, optimizer.report.rejected) == (True, 0)
    assert x[0].item() == pytest.approx(1.0, abs=2e-3)


def test_at_negative_curvature_the_last_direction_is_left_out() -> None:
    """It may lead uphill: the step there is that of an optimiser which has no last direction."""

    def loss(z: Tensor) -> Tensor:
        return z[0] ** 2 - z[1] ** 2 + z[1] ** 4 / 4

    points = []
    for remembers in (True, False):
        z = parameter(0.5, 3.0)
        optimizer = NewtonCG([z], damping=1e-3)
        # Where the loss is convex: far along -z₁, which is uphill at the point of the second step.
        optimizer.step(lambda: loss(z))  # noqa: B023
        assert optimizer.state[z]["direction"][1] < -0.5
        if not remembers:
            del optimizer.state[z]["direction"]
        with torch.no_grad():
            z.copy_(torch.tensor([0.2, 0.1]))
        optimizer.step(lambda: loss(z))  # noqa: B023
        points.append(z.detach().clone())
    assert torch.equal(*points) and points[0][1] > 0.2


# ------------------------------------------------------------------------------------------------------------- damping


def test_damping_falls_to_a_third_in_all_groups_while_the_model_is_right() -> None:
    x, y = parameter(3.0), parameter(1.0)
    optimizer = LevenbergMarquardt([{"params": [x]}, {"params": [y]}], damping=1.0)
    for step in range(1, 4):
        optimizer.step(lambda: torch.cat([2 * x - 1, y - 5]))
        assert optimizer.report is not None and optimizer.report.gain == pytest.approx(1.0)
        assert [group["damping"] for group in optimizer.param_groups] == pytest.approx([3.0**-step] * 2)


def test_damping_rises_with_halved_steps_and_ever_faster_with_rejected_ones() -> None:
    # Gauss-Newton's step -atan(x) (1 + x²) leads from 2 to -3.5, which is worse; half of it does not.
    x = parameter(2.0)
    optimizer = LevenbergMarquardt([x], damping=1e-3)
    optimizer.step(x.atan)
    assert x.item() == pytest.approx(2 - 0.5 * math.atan(2) * 5 / 1.001, rel=1e-12)
    assert optimizer.damping == pytest.approx(1.3e-3)
    # From 10 even an eighth of it is too long.
    x = parameter(10.0)
    optimizer = LevenbergMarquardt([x], damping=1e-3)
    optimizer.step(x.atan)
    report = optimizer.report
    assert report is not None and (report.accepted, report.rejected) == (True, 5)
    assert report.damping == pytest.approx(1e-3 * 2 ** (1 + 2 + 3 + 4 + 5))
    assert x.item() == pytest.approx(10 - math.atan(10) * 101 / (1 + report.damping), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the closure's loss is")
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_if_every_trial_is_rejected(kind: Any) -> None:
    """Each call of the closure says a higher loss than the one before."""
    x, calls = parameter(*START.tolist()), 0

    def residuals() -> Tensor:
        nonlocal calls
        calls += 1
        return curve(x) * (1 + calls)

    optimizer = kind([x], damping=1e-3)
    optimizer.step(closure_for(kind, residuals))
    assert torch.equal(x.detach(), START)
    report = optimizer.report
    assert (report.accepted, report.step_norm, report.new_loss) == (False, 0.0, report.loss)
    assert (report.rejected, optimizer.damping) == (kind.trials, 1e15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_trial_at_which_the_loss_is_not_finite_is_rejected(value: float) -> None:
    x = parameter(1.0)
    optimizer = NewtonCG([x])
    # The full step leads to 0, its half to 0.5.
    optimizer.step(lambda: torch.where(x < 0.6, value, x.square()).sum())
    assert optimizer.report is not None and optimizer.report.rejected > 0
    assert 0.6 <= x.item() < 1 and optimizer.report.new_loss == x.item() ** 2


# --------------------------------------------------------------------------------------------------- parameters, state


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_optimisers_own_parameters_move_and_groups_can_be_added(kind: Any) -> None:
    (first, second), frozen = halves(), torch.zeros(5).double()
    optimizer = kind([second, frozen])
    closure = closure_for(kind, lambda: curve(torch.cat([first, second]) + frozen))
    optimizer.step(closure)
    assert torch.equal(first.detach(), START[:3]) and not torch.equal(second.detach(), START[3:])
    optimizer.add_param_group({"params": [first]})
    optimizer.step(closure)
    assert optimizer.report.accepted and not torch.equal(first.detach(), START[:3]) and not frozen.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("kind", [*KINDS, "momentum"], ids=lambda kind: getattr(kind, "__name__", kind))
def test_state_goes_through_a_file_and_resumes_bitwise(kind: Any, dtype: torch.dtype) -> None:
    options = {"momentum": 0.6} if kind == "momentum" else {}
    kind = LevenbergMarquardt if kind == "momentum" else kind

    def make(damping: float) -> tuple[list[Tensor], Any]:
        tensors = halves(dtype)
        groups = [{"params": [tensor], "weight_decay": 0.1 * i} for i, tensor in enumerate(tensors)]
        return tensors, kind(groups, damping=damping, **options)

    def take(steps: int, tensors: list[Tensor], optimizer: Any) -> None:
        for _ in range(steps):
            optimizer.step(closure_for(kind, lambda: curve(torch.cat(tensors))))

    straight, stopped, resumed = make(0.7), make(0.7), make(0.1)
    take(5, *straight)
    take(2, *stopped)
    file = io.BytesIO()
    torch.save((torch.cat(stopped[0]), stopped[1].state_dict()), file)
    file.seek(0)
    point, state = torch.load(file, weights_only=True)
    for tensor, value in zip(resumed[0], point.split([3, 2]), strict=True):
        tensor.data.copy_(value)
    resumed[1].load_state_dict(state)
    take(3, *resumed)
    assert torch.equal(torch.cat(resumed[0]), torch.cat(straight[0])) and not torch.equal(torch.cat(resumed[0]), point)
    assert resumed[1].report == straight[1].report


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("kind", KINDS)
def test_closures_that_are_missing_or_return_something_else_are_named(kind: Any) -> None:
    x = parameter(*START.tolist())
    closures: dict[str, Any] = {rf"{kind.__name__}.step\(\) needs a closure.*A trainer": None}
    if kind is NewtonCG:
        closures[r"shape \(40,\); NewtonCG expects the loss"] = lambda: curve(x)
        closures["returned float"] = lambda: 1.0
    else:
        closures[r"returned a scalar.*residuals \(their mean square is the loss\)"] = lambda: curve(x).square().mean()
        closures["returned list; .* expects residuals"] = lambda: [curve(x)]
        closures["returned tuple"] = lambda: (curve(x), START)
    for message, closure in closures.items():
        with pytest.raises(TypeError, match=message):
            kind([x]).step(closure)
    assert torch.equal(x.detach(), START)


def test_closures_without_a_usable_derivative_are_named() -> None:
    x = parameter(*START.tolist())
    outside = x + 1

    def calls_backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    for loss in (lambda: curve(x).square().mean(), lambda: x.sum()):
        with pytest.raises(RuntimeError, match=r"backward\(\) was called inside the closure"):
            NewtonCG([x]).step(lambda loss=loss: calls_backward(loss()))
    with pytest.raises(RuntimeError, match="does not depend on the parameters"):
        NewtonCG([x]).step(lambda: x.detach().sum())
    with pytest.raises(RuntimeError, match="in a way that torch functions do not show"):
        GaussNewton([x]).step(lambda: outside - 1)
    assert torch.equal(x.detach(), START)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_parameters(kind: Any) -> None:
    x = parameter(*START.tolist())
    with pytest.raises(NonFiniteError, match="loss is nan"):
        kind([x]).step(closure_for(kind, lambda: curve(x) * torch.nan))
    with pytest.raises(NonFiniteError, match="the gradient has NaN or infinite"):
        kind([x]).step(closure_for(kind, lambda: (x - x.detach()).sqrt() - 1))
    assert torch.equal(x.detach(), START)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_leaves_the_parameters_whichever_call_it_hits(kind: Any) -> None:
    options = {} if kind is LevenbergMarquardt else {"cg_iterations": 2}
    for hit in range(1, 100):
        x, calls = parameter(10.0, 1.0), 0

        def residuals() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == hit:  # noqa: B023
                raise KeyboardInterrupt
            return x.atan()  # noqa: B023

        optimizer = kind([x], **options)
        before = copy.deepcopy(optimizer.state_dict())
        try:
            optimizer.step(closure_for(kind, residuals))
        except KeyboardInterrupt:
            assert x.tolist() == [10.0, 1.0]
            assert optimizer.state_dict() == before
        else:
            break
    assert hit > 4 and x.tolist() != [10.0, 1.0]
    assert optimizer.state_dict() != before


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_failed_can_be_taken_again(kind: Any) -> None:
    points = []
    for failures in (False, True):
        x, fail = parameter(*START.tolist()), False

        def residuals() -> Tensor:
            # Not the first call but the trial.
            if fail and not torch.equal(x.detach(), start):  # noqa: B023
                raise ValueError("not now")
            return curve(x)  # noqa: B023

        optimizer = kind([x], damping=0.5)
        for _ in range(3):
            start = x.detach().clone()
            if failures:
                fail = True
                with pytest.raises(ValueError, match="not now"):
                    optimizer.step(closure_for(kind, residuals))
                fail = False
            optimizer.step(closure_for(kind, residuals))
        points.append(x.detach().clone())
    assert torch.equal(*points) and not torch.equal(points[0], START)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LevenbergMarquardt, {"damping": 0.0}, "damping=0.0; expected a finite number > 0"),
        (GaussNewton, {"damping": math.nan}, "damping=nan"),
        (NewtonCG, {"weight_decay": -1e-3}, "weight_decay=-0.001; expected a finite number >= 0"),
        (LevenbergMarquardt, {"momentum": 1.0}, r"momentum=1\.0"),
        (GaussNewton, {"cg_iterations": 0}, "cg_iterations=0; expected at least 1"),
        (NewtonCG, {"cg_tolerance": 1.0}, r"cg_tolerance=1\.0"),
    ],
)
def test_bad_settings_are_named(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([parameter(1.0)], **options)
