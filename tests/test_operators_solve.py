"""Operators' solve, exact diagonals and SciPy, against dense matrices in float64."""

from __future__ import annotations

import builtins
import contextlib
import math
from typing import Any

import pytest
import torch
from operator_cases import CLASSES, Setting
from torch import Tensor, nn

from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator

# ---------------------------------------------------------------------------------------------------------------- solve


@pytest.mark.parametrize("preconditioner", [None, pytest.param("diagonal", marks=pytest.mark.long), "function"])
def test_solve_is_the_dense_solve(preconditioner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting("encoder")
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    damped = A + 0.05 * torch.eye(setting.p, dtype=A.dtype)
    if preconditioner == "function":
        L = torch.linalg.cholesky(damped)
        preconditioner = lambda r: torch.cholesky_solve(r.reshape(len(r), -1), L).reshape(r.shape)  # noqa: E731
    for b in (setting.V[:, 0], setting.V * torch.tensor([1.0, 0.0, 1e-6])):
        x, report = op.solve(b, 0.05, tolerance=1e-10, preconditioner=preconditioner)
        assert x.shape == b.shape
        torch.testing.assert_close(x, torch.linalg.solve(damped, b), rtol=1e-6, atol=1e-8 * b.abs().max().item())
        residual = (b - damped @ x).norm(dim=0) / b.norm(dim=0).clamp_min(1e-300)
        assert report.relative_residual == pytest.approx(residual.max().item(), rel=1e-3)
        assert report.converged and not report.negative_curvature
        assert 0 < report.iterations <= (2 if callable(preconditioner) else 150)
        assert report.method == "conjugate_gradients"


def test_solve_of_nothing_is_nothing() -> None:
    setting = Setting()
    x, report = setting.operator(GaussNewtonOperator).solve(torch.zeros(setting.p).double(), 0.1)
    assert not x.any()
    assert (report.converged, report.iterations, report.relative_residual) == (True, 0, 0.0)


def test_solve_takes_and_gives_dicts() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    b = {name: torch.ones_like(p) for name, p in setting.point.items()}
    x, _ = op.solve(b, 0.1)
    flat, _ = op.solve(torch.ones(setting.p).double(), 0.1)
    assert torch.equal(torch.cat([x[name].reshape(-1) for name in setting.names]), flat)


def test_solve_reports_what_it_did_not_reach() -> None:
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    b = setting.V[:, 0]
    with pytest.warns(UserWarning, match="1 of 1 right-hand sides ended above tolerance") as caught:
        x, report = op.solve(b, 1e-3, tolerance=1e-12, max_iterations=2)
    assert caught[0].filename == __file__
    assert (report.converged, report.iterations) == (False, 2)
    residual = b - A @ x - 1e-3 * x
    assert report.relative_residual == pytest.approx((residual.norm() / b.norm()).item(), rel=1e-6)
    # Less than rounding allows.
    single = setting.model.float()
    op = GaussNewtonOperator(single, (setting.inputs.float(), setting.target), "cross_entropy", progress=False)
    with pytest.warns(UserWarning, match="above tolerance"):
        x, report = op.solve(b.float(), 1e-3, tolerance=1e-12)
    assert not report.converged and report.relative_residual < 1e-3 and report.iterations < 250


@pytest.mark.parametrize("dense", [True, False])
def test_indefinite_systems_raise_or_are_solved_by_minres(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
        monkeypatch.setattr("onestep.curvature._solve.MOST_FORMED", 0)
    setting = Setting()
    op, H = setting.operator(HessianOperator), setting.dense(HessianOperator)
    least = torch.linalg.eigvalsh(H)[0].item()
    assert least < -0.01
    # An eigenvalue of -0.0005, as close to 0 as in issue 15.16.
    damping = -least - 0.0005
    with pytest.raises(torch.linalg.LinAlgError, match=r"not positive definite.*indefinite='minres'"):
        op.solve(setting.V, damping)
    x, report = op.solve(setting.V, damping, tolerance=1e-9, indefinite="minres")
    expected = torch.linalg.solve(H + damping * torch.eye(setting.p, dtype=H.dtype), setting.V)
    assert report.converged and report.negative_curvature and len(report.relative_residuals) == 3
    assert report.method == ("dense" if dense else "minres")
    assert (x - expected).norm() < 1e-4 * expected.norm()
    x, report = op.solve(setting.V[:, 0], 2.0)
    assert report.converged and not report.negative_curvature


def test_solve_reports_each_right_hand_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    easy = torch.linalg.eigh(A).eigenvectors[:, -1]
    with pytest.warns(UserWarning, match="1 of 2 right-hand sides"):
        _, report = op.solve(torch.stack([easy, setting.V[:, 0]], 1), 1e-3, max_iterations=2)
    assert report.relative_residuals[0] < 1e-5 < report.relative_residuals[1] == report.relative_residual
    assert report.negative_curvatures == (False, False) and not report.converged


@pytest.mark.parametrize("form", ["dense", "products"])
@pytest.mark.parametrize(("size", "damping"), [(1e38, 0.1), (1e-38, 1e9)])
def test_a_solution_beyond_the_range_is_no_convergence(size: float, damping: float, form: str) -> None:
    """It was infinite, or zeros, with converged=True."""
    torch.manual_seed(0)
    width = 3 if form == "dense" else 40
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
    op = GaussNewtonOperator(model, (torch.randn(9, 3), torch.randn(9, 1)), "mse")
    b = torch.ones(op.shape[1], 2)
    b[:, 0] *= size
    with pytest.warns(UserWarning, match=r"solve: 1 of 2 .*the solution is beyond the range of torch.float32"):
        _, report = op.solve(b, damping)
    assert not report.converged and math.isinf(report.relative_residual)
    assert report.relative_residuals[1] <= 1e-5


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_solve_does_not_depend_on_the_size_of_the_right_hand_side(
    size: float, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15.9: in float32, b of 1e-25 or 1e20 gave x = 0, converged."""
    if not dense:
        monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    setting = Setting()
    A, b = setting.dense(GaussNewtonOperator), setting.V[:, 0]
    op = GaussNewtonOperator(
        setting.model.float(), (setting.inputs.float(), setting.target), "cross_entropy", progress=False
    )
    x, report = op.solve(b.float() * size, 0.1)
    expected = torch.linalg.solve(A + 0.1 * torch.eye(setting.p, dtype=A.dtype), b)
    assert report.converged and (x.double() / size - expected).norm() < 1e-4 * expected.norm()


def test_blocks_in_the_form_of_vmap_are_refused_with_the_right_shape() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    first = {name: torch.ones(20, *p.shape, dtype=p.dtype) for name, p in setting.point.items()}
    with pytest.raises(ValueError, match=r"has shape \(20, .*expected \(.*20\).*movedim\(0, -1\)"):
        op @ first
    last = {name: part.movedim(0, -1) for name, part in first.items()}
    assert (op @ last)[setting.names[0]].shape == last[setting.names[0]].shape


def test_small_matrices_have_an_exact_diagonal_and_trace() -> None:
    setting = Setting()
    A, op = setting.dense(GaussNewtonOperator), setting.operator(GaussNewtonOperator)
    diagonal, trace = op.diagonal(), op.trace()
    torch.testing.assert_close(diagonal.value, A.diagonal(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trace.value, A.trace(), rtol=1e-9, atol=1e-12)
    assert (diagonal.value >= 0).all() and not diagonal.standard_error.any() and trace.samples == 0


def bent(outputs: Tensor, target: Tensor) -> Tensor:
    """Not convex in the outputs."""
    return (outputs.sin() * (target + 1.0).unsqueeze(1)).mean()


@pytest.mark.parametrize(
    ("kind", "loss", "options"),
    [
        (GaussNewtonOperator, "cross_entropy", {}),
        (GaussNewtonOperator, "poisson", {}),
        (FisherOperator, "mse", {"mc_samples": 2}),
        (FisherOperator, "cross_entropy", {"kind": "empirical"}),
        (GaussNewtonOperator, bent, {"chunk_size": 2}),
    ],
)
def test_diagonals_of_larger_matrices_are_exact_by_rows(
    monkeypatch: pytest.MonkeyPatch, kind: Any, loss: Any, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("onestep.curvature._operator.MOST_DENSE", 0)
    setting = Setting("mlp", loss if isinstance(loss, str) else "cross_entropy")
    setting.loss = loss
    op = setting.operator(kind, **options)
    diagonal = op.diagonal()
    expected = (op @ torch.eye(setting.p, dtype=torch.float64)).diagonal()
    torch.testing.assert_close(diagonal.value, expected, rtol=1e-9, atol=1e-14)
    assert diagonal.samples == 0 and not diagonal.standard_error.any()
    assert bool((diagonal.value < 0).any()) == (loss is bent)
    # Where the outputs of a row are many, rows are not cheap.
    monkeypatch.setattr("onestep.curvature.operators._MOST_OUTPUTS", CLASSES - 1)
    estimate = op.diagonal()
    assert estimate.samples == 64
    if loss is not bent:
        assert (estimate.value >= 0).all()
        assert ((estimate.value - expected).abs() <= 5 * estimate.standard_error + 1e-14).all()


@pytest.mark.parametrize(("outputs", "samples"), [(50, None), (70, None), (70, 1024)])
def test_a_diagonal_of_many_outputs_is_exact_or_says_its_error(outputs: int, samples: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(outputs, (40,), generator=generator)
    torch.manual_seed(0)
    model = nn.Linear(6, outputs).double()
    op = GaussNewtonOperator(model, (X, y), "cross_entropy", progress=False)
    # ∂²loss/∂W_cj² = mean x_j² p_c (1 - p_c), and 1 for x_j of the bias.
    p = model(X).softmax(1).detach()
    spread = p * (1 - p)
    exact = torch.cat([(spread.mT @ X.square() / 40).flatten(), spread.mean(0)])
    found = op.diagonal(samples)
    relative = ((found.value - exact) / exact).square().mean().sqrt().item()
    if outputs <= 64:
        assert found.samples == 0 and relative < 1e-12
        return
    told = (found.standard_error / exact).square().mean().sqrt().item()
    assert found.samples == (samples or 64)
    expected = math.sqrt(2 / found.samples)
    assert relative == pytest.approx(expected, rel=0.25) and told == pytest.approx(expected, rel=0.25)


def test_a_newton_step_lowers_the_loss() -> None:
    setting = Setting()
    op = setting.operator(GaussNewtonOperator)
    before, gradient = op.loss_and_gradient()
    step, _ = op.solve(-gradient, 1e-2)
    torch.nn.utils.vector_to_parameters(setting.vector() + step, setting.model.parameters())
    assert op.loss_and_gradient()[0] < before


# ---------------------------------------------------------------------------------------------------------------- scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_finds_the_eigenvalues(dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    setting = Setting()
    values = torch.linalg.eigvalsh(setting.dense(HessianOperator))
    setting.model.to(dtype)
    op = HessianOperator(setting.model, (setting.inputs.to(dtype), setting.target), "cross_entropy", progress=False)
    found = linalg.eigsh(op.to_scipy(), k=3, which="LA", return_eigenvectors=False)
    assert found.dtype == (torch.empty(0, dtype=dtype).numpy().dtype)
    torch.testing.assert_close(torch.tensor(sorted(found)).double(), values[-3:], rtol=1e-4, atol=1e-5)
    matrix = op.to_scipy() @ setting.V.to(dtype).numpy()
    torch.testing.assert_close(torch.tensor(matrix), op @ setting.V.to(dtype))


def test_without_scipy_an_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
        return real(name, *args, **kwargs)

    op = Setting().operator(HessianOperator)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy.*pip install scipy"):
        op.to_scipy()


@pytest.mark.parametrize("columns", [1, 2])
def test_larger_indefinite_systems_are_decomposed_where_that_is_cheaper(columns: int) -> None:
    """Issue 15: 502 iterations of MINRES at p = 241, wrong by 99 %. A block as a dict, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    op = HessianOperator(net, (torch.randn(200, 4).double(), torch.randn(200, 1).double()), "mse", progress=False)
    p = op.shape[0]
    b, identity = torch.randn(p, columns).double(), torch.eye(p).double()
    H = op @ identity
    expected = torch.linalg.solve(H + 0.1 * identity, b)
    x, report = op.solve(b, 0.1, indefinite="minres")
    assert (report.method, report.converged, report.negative_curvature) == ("dense", True, True)
    assert report.iterations < 10 and (x - expected).norm() < 1e-6 * expected.norm()
    parts = b.split([t.numel() for t in net.parameters()])
    as_dict = {name: v.reshape(*t.shape, columns) for (name, t), v in zip(net.named_parameters(), parts, strict=True)}
    given, _ = op.solve(as_dict, 0.1, indefinite="minres")
    assert torch.equal(torch.cat([given[name].reshape(-1, columns) for name in as_dict]), x)
    # Of a definite matrix that iterations do not solve.
    shift = 1e-4 - torch.linalg.eigvalsh(H)[0].item()
    x, report = op.solve(b, shift, tolerance=1e-9)
    expected = torch.linalg.solve(H + shift * identity, b)
    assert report.method == "dense" and report.iterations < p / 2 and (x - expected).norm() < 1e-6 * expected.norm()


def test_minres_that_does_not_converge_is_followed_by_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onestep.curvature._solve.MOST_DENSE", 0)
    monkeypatch.setattr("onestep.curvature._solve._BLOCK_COST", 1.0)
    setting = Setting()
    op, H = setting.operator(HessianOperator), setting.dense(HessianOperator)
    damping = -torch.linalg.eigvalsh(H)[0].item() - 0.0005
    most = setting.p // 3
    x, report = op.solve(setting.V[:, 0], damping, tolerance=1e-9, max_iterations=most, indefinite="minres")
    expected = torch.linalg.solve(H + damping * torch.eye(setting.p, dtype=H.dtype), setting.V[:, 0])
    assert report.method == "dense" and report.iterations > most and report.converged
    assert (x - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("solvable", [True, False])
def test_a_singular_matrix_in_single_precision_gives_the_shortest_solution(solvable: bool) -> None:
    """Not one of the size of its rounding; where there is none, the one of least squares, and a warning."""
    torch.manual_seed(0)
    X = torch.randn(60, 20) @ torch.randn(20, 40)
    op = GaussNewtonOperator(nn.Linear(40, 1, bias=False), (X, torch.randn(60, 1)), "mse", progress=False)
    A = X.double().T @ X.double() / 30
    b = (A @ torch.randn(40).double()).float() if solvable else torch.randn(40)
    with contextlib.nullcontext() if solvable else pytest.warns(UserWarning, match="singular, or near it"):
        x, report = op.solve(b, 0.0)
    expected = torch.linalg.pinv(A, rtol=1e-5) @ b.double()
    assert report.converged == solvable and (x - expected).norm() < 1e-3 * expected.norm()


def test_right_hand_sides_near_the_greatest_number() -> None:
    """The power of two above 3e38 is infinite in float32."""
    torch.manual_seed(0)
    operator = GaussNewtonOperator(nn.Linear(4, 1), (torch.randn(40, 4), torch.randn(40, 1)), "mse", progress=False)
    b = torch.full((5,), 3e38)
    x, report = operator.solve(b, 10.0)
    assert report.converged
    torch.testing.assert_close(x, operator.solve(b / 2**20, 10.0)[0] * 2**20)
