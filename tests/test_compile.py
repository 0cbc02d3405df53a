"""torch.compile and torch.export: one graph, the eager result, and the eager errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import onestep
from onestep.curvature import GaussNewtonOperator, glm
from onestep.functional import linear_cross_entropy
from onestep.linalg import cholesky, cholesky_solve, gram, solve_normal, solve_normal_ex, solve_spd


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def rows(*batch, n=12, d=4, k=2):
    """X, Y, weight, and a ridge per feature."""
    return torch.randn(*batch, n, d), torch.randn(*batch, n, k), torch.rand(*batch, n) + 0.5, torch.rand(d) + 0.1


def spd(*batch, d=4):
    root = torch.randn(*batch, d, d)
    return root @ root.mT + torch.eye(d)


def run(function, inputs):
    """The outputs, and the gradients of all inputs through ``loss.backward()``."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(output.sin().sum() for output in outputs if output.requires_grad).backward()
    return [output.detach() for output in outputs], [leaf.grad for leaf in leaves]


def model_of(W, V):
    """A multinomial model of fixed rows."""
    X = torch.arange(48.0).reshape(12, 4).cos()
    point = glm(X, torch.arange(12) % 3, W, "softmax", intercept=True)
    return point.loss, point.grad, point.hvp(V), point.gram()


FUNCTIONS = {
    "solve_normal": (lambda X, Y: solve_normal(X, Y), lambda: rows(3)[:2]),
    "solve_normal, float ridge": (lambda X, Y, w: solve_normal(X, Y, weight=w, ridge=0.3), lambda: rows(3)[:3]),
    "solve_normal, tensor ridge": (lambda X, Y, w, r: solve_normal(X, Y, weight=w, ridge=r), lambda: rows(3)),
    "solve_normal, dual": (lambda X, Y: solve_normal(X, Y, ridge=0.3), lambda: rows(2, n=3, d=36)[:2]),
    "solve_normal, vector": (lambda X, y: solve_normal(X, y, refine=1), lambda: (torch.randn(9, 3), torch.randn(9))),
    "solve_normal_ex": (
        lambda X, Y, w, r: tuple(solve_normal_ex(X, Y, weight=w, ridge=r, jitter=1e-6)),
        lambda: rows(3),
    ),
    "gram": (lambda X, Y, w: gram(X, Y, weight=w), lambda: rows(3)[:3]),
    "cholesky": (cholesky, lambda: (spd(3),)),
    "cholesky_solve": (cholesky_solve, lambda: (torch.randn(4, 2), torch.linalg.cholesky(spd(3)))),
    "linear_cross_entropy": (
        lambda H, W, b: linear_cross_entropy(H, W, torch.tensor([1, 0, -100]), b),
        lambda: (torch.randn(3, 4), torch.randn(6, 4), torch.randn(6)),
    ),
    "solve_spd": (solve_spd, lambda: (spd(3), torch.randn(3, 4, 2))),
    "glm": (model_of, lambda: (torch.randn(5, 3), torch.randn(2, 5, 3))),
}


# A second each.
USUAL = (
    "solve_normal, tensor ridge",
    "solve_normal, dual",
    "solve_normal_ex",
    "cholesky_solve",
    "linear_cross_entropy",
    "glm",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.long) for name in FUNCTIONS]
)
def test_compiled_equals_eager_with_backward(name):
    function, inputs = FUNCTIONS[name]
    inputs = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, inputs), run(function, inputs))


def test_inductor():
    """Forward and backward hold our ops alone, so that no C++ has to be compiled: seconds instead of half a minute."""
    inputs = rows(3)
    function = FUNCTIONS["solve_normal, tensor ridge"][0]
    inputs = (*inputs[:3], inputs[3].expand(3, 4).contiguous())
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    torch.testing.assert_close(run(compiled, inputs), run(function, inputs))


def test_dynamic_batch_size_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")

    def function(X, Y):
        return solve_normal(X, Y, ridge=0.1)

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    for batch in (5, 3, 7):
        inputs = rows(batch)[:2]
        torch.testing.assert_close(run(compiled, inputs), run(function, inputs))
    assert counter.frame_count == 1


def test_dynamic_rows_and_features():
    compiled = torch.compile(solve_normal, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, d in ((12, 3), (20, 5), (60, 40)):
        inputs = rows(2, n=n, d=d)[:2]
        torch.testing.assert_close(run(compiled, inputs), run(solve_normal, inputs))


@pytest.mark.long
def test_float_ridge_may_change():
    compiled = torch.compile(solve_normal, fullgraph=True, backend="aot_eager")
    X, Y, *_ = rows(3)
    wide, targets, *_ = rows(n=3, d=36)
    for ridge in (0.1, 0.2, 3.0):
        torch.testing.assert_close(compiled(X, Y, ridge=ridge), solve_normal(X, Y, ridge=ridge))
        torch.testing.assert_close(compiled(wide, targets, ridge=ridge), solve_normal(wide, targets, ridge=ridge))


def test_tensor_ridge_of_few_rows_and_many_features():
    """Compiled, the values of a tensor cannot choose the dual form; the result is the same."""
    X, Y, _, ridge = rows(n=3, d=36)

    def function(X, Y, ridge):
        return solve_normal(X, Y, ridge=ridge)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, (X, Y, ridge)), run(function, (X, Y, ridge)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_function_raises_for_singular_input(recorded):
    X, Y, *_ = rows(3)
    compiled = torch.compile(solve_normal, fullgraph=True, backend="aot_eager")
    assert compiled(X, Y).isfinite().all()
    X[1, :, 2] = 0
    with pytest.raises(torch.linalg.LinAlgError, match=r"1 of 3 .*\[1\]: info=3"):
        compiled(X.requires_grad_(recorded), Y)


def test_compiled_cholesky_raises_for_indefinite_input():
    compiled = torch.compile(cholesky, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch.linalg.LinAlgError, match="1 of 1 matrices"):
        compiled(-torch.eye(3))


def test_compiled_function_refuses_wrong_shapes():
    compiled = torch.compile(solve_normal, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"Y has shape \(7, 2\)"):
        compiled(torch.randn(8, 3), torch.randn(7, 2))


def test_compiled_failed_problem_has_zero_gradients():
    X, Y, *_ = rows(3)
    X[1] = torch.nan

    def function(X, Y):
        return torch.nan_to_num(solve_normal_ex(X, Y).solution)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs, (grad_x, grad_y) = run(compiled, (X, Y))
    torch.testing.assert_close((outputs, [grad_x, grad_y]), run(function, (X, Y)))
    assert torch.equal(grad_x[1], torch.zeros_like(X[1]))
    assert grad_x[0].abs().max() > 0


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.jacfwd, pytest.param(torch.func.hessian, marks=pytest.mark.long)]
)
def test_compiled_transforms(transform):
    X, Y, *_ = rows(d=3)

    def function(X):
        return transform(lambda X: solve_normal(X, Y).sin().sum())(X)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), function(X))


def test_compiled_vmap():
    X, Y, *_ = rows(3)

    def function(X, Y):
        return torch.func.vmap(solve_normal)(X, Y)

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(X, Y), solve_normal(X, Y))


class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Linear(4, 6)

    def forward(self, X, Y):
        solved = solve_normal_ex(self.features(X).tanh(), Y, ridge=1e-2)
        return solved.solution, solved.info, solved.rcond


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    head = Head()
    X, Y, *_ = rows(3)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(head, (X, Y), dynamic_shapes=(batch, batch), strict=strict)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.onestep.solve_normal_ex.default in calls
    for inputs in ((X, Y), rows(5)[:2]):
        torch.testing.assert_close(program.module()(*inputs), head(*inputs))


def network(compiled: str) -> torch.nn.Module:
    """The same one, with nothing compiled, the whole, or a layer, as a wrapper or in place."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    if compiled == "whole":
        return torch.compile(model, backend="eager")
    if compiled == "whole, in place":
        model.compile(backend="eager")
    if compiled == "layer":
        model[0] = torch.compile(model[0], backend="eager")
    if compiled == "layer, in place":
        model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", ["whole", "whole, in place", "layer", "layer, in place"])
def test_fit_of_a_compiled_model_is_silent_and_that_of_the_model(compiled, capfd, recwarn):
    """torch.func and hooks inside compiled code brought walls of Dynamo's warnings, and K-FAC's hooks saw no layer."""
    data = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    for method in ("gauss_newton", "levenberg_marquardt"):
        losses = []
        for kind in ("nothing", compiled):
            model = network(kind)
            before = [dict(vars(part)) for part in model.modules()]
            result = onestep.fit(model, data, method=method, max_steps=3, progress=False)
            losses.append(result.loss)
            # What was compiled is so again.
            for name in ("forward", "_compiled_call_impl"):
                assert [vars(part).get(name) for part in model.modules()] == [own.get(name) for own in before]
        assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    GaussNewtonOperator(network(compiled), data, progress=False).diagonal()
    assert not [str(warning.message) for warning in recwarn if "deprecated" not in str(warning.message)]
    assert capfd.readouterr().err == ""
