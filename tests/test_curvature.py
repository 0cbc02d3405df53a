"""hvp and ggnvp against dense matrices and finite differences, for the kinds of modules that people train."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import onestep
from onestep.curvature import ggnvp, hvp
from onestep.curvature.kernels import differentiable_kernels

Named = dict[str, Tensor]


class LastStep(nn.Module):
    """Scores from a recurrent network's last output."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.body, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class SelfAttention(nn.Module):
    """Scores from attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (2, 6, 6),
    ),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, activation="gelu"), Mean(), nn.Linear(4, 3)
        ),
        (5, 4),
    ),
    "attention": (SelfAttention, (5, 4)),
    "lstm": (lambda: LastStep(nn.LSTM), (4, 3)),
    "gru": (lambda: LastStep(nn.GRU), (4, 3)),
}


class Setting:
    """A model in float64, its data, and directions in the space of its parameters."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        make, shape = MODELS[name]
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = make().to(dtype).eval()
        self.x = torch.randn(6, *shape, generator=generator, dtype=torch.float64).to(dtype)
        self.classes = torch.tensor([0, 1, 2, 2, 1, 0])
        self.params = {name: p.detach() for name, p in self.model.named_parameters()}
        self.u, self.v = (
            {name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for name, p in items}
            for items in (self.params.items(), self.params.items())
        )

    def outputs(self, p: Named) -> Tensor:
        return functional_call(self.model, p, (self.x,))

    def loss_of(self, outputs: Tensor) -> Tensor:
        return cross_entropy(outputs, self.classes)

    def loss(self, p: Named) -> Tensor:
        return self.loss_of(self.outputs(p))

    def moved(self, step: float) -> Named:
        return {name: (p + step * self.v[name]).requires_grad_() for name, p in self.params.items()}


def dot(a: Named, b: Named) -> Tensor:
    return sum(((a[name] * b[name]).sum() for name in a), torch.tensor(0.0))


def flat(p: Named) -> Tensor:
    return torch.cat([part.reshape(-1) for part in p.values()])


@pytest.fixture(params=MODELS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(request.param)


def test_hvp_is_the_slope_of_the_gradient(setting: Setting) -> None:
    step = 1e-5
    gradients = []
    for at in (step, -step):
        p = setting.moved(at)
        gradients.append(torch.autograd.grad(setting.loss(p), list(p.values())))
    expected = [(ahead - behind) / (2 * step) for ahead, behind in zip(*gradients, strict=True)]
    product = hvp(setting.loss, setting.params, setting.v)
    assert list(product) == list(setting.params)
    for got, want in zip(product.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert flat(product).abs().max() > 1e-3


def test_hvp_is_symmetric_and_linear(setting: Setting) -> None:
    Hu, Hv = (hvp(setting.loss, setting.params, v) for v in (setting.u, setting.v))
    torch.testing.assert_close(dot(setting.v, Hu), dot(setting.u, Hv), rtol=1e-11, atol=1e-13)
    both = {name: 2 * setting.u[name] - setting.v[name] for name in setting.u}
    torch.testing.assert_close(flat(hvp(setting.loss, setting.params, both)), 2 * flat(Hu) - flat(Hv))


def test_ggnvp_is_its_three_factors(setting: Setting) -> None:
    step = 1e-5
    Jv = (setting.outputs(setting.moved(step)) - setting.outputs(setting.moved(-step))).detach() / (2 * step)
    p = setting.moved(0.0)
    z = setting.outputs(p)
    P = torch.softmax(z.detach(), 1)
    HJv = (P * Jv - P * (P * Jv).sum(1, keepdim=True)) / len(P)
    expected = torch.autograd.grad(z, list(p.values()), HJv)
    product = ggnvp(setting.outputs, setting.loss_of, setting.params, setting.v)
    for got, want in zip(product.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_ggnvp_is_symmetric_and_semidefinite(setting: Setting) -> None:
    Gu, Gv = (ggnvp(setting.outputs, setting.loss_of, setting.params, v) for v in (setting.u, setting.v))
    torch.testing.assert_close(dot(setting.v, Gu), dot(setting.u, Gv), rtol=1e-11, atol=1e-13)
    assert dot(setting.u, Gu) > 0
    assert dot(setting.v, Gv) > 0


def test_ggnvp_is_semidefinite_where_the_hessian_is_not() -> None:
    setting = Setting("mlp")
    size = len(flat(setting.params))
    names = [(name, p.shape, p.numel()) for name, p in setting.params.items()]

    def named(vector: Tensor) -> Named:
        parts = vector.split([count for *_, count in names])
        return {name: part.reshape(shape) for (name, shape, _), part in zip(names, parts, strict=True)}

    unit = torch.eye(size, dtype=torch.float64)
    H = torch.stack([flat(hvp(setting.loss, setting.params, named(e))) for e in unit])
    G = torch.stack([flat(ggnvp(setting.outputs, setting.loss_of, setting.params, named(e))) for e in unit])
    assert torch.linalg.eigvalsh(H)[0] < -1e-3
    assert torch.linalg.eigvalsh(G)[0] > -1e-14


def test_products_are_those_of_the_dense_matrices() -> None:
    setting = Setting("mlp")
    point, v = flat(setting.params), flat(setting.v)
    sizes = [p.numel() for p in setting.params.values()]

    def outputs(vector: Tensor) -> Tensor:
        parts = zip(setting.params.items(), vector.split(sizes), strict=True)
        return setting.outputs({name: part.reshape(p.shape) for (name, p), part in parts})

    dense = hessian(lambda p: setting.loss_of(outputs(p)))(point)
    torch.testing.assert_close(hvp(lambda p: setting.loss_of(outputs(p)), point, v), dense @ v)
    J = jacrev(outputs)(point).reshape(-1, len(point))
    P = torch.softmax(outputs(point), 1)
    blocks = [torch.diag(row) - torch.outer(row, row) for row in P]
    H = torch.block_diag(*blocks) / len(P)
    torch.testing.assert_close(ggnvp(outputs, setting.loss_of, point, v), J.mT @ (H @ (J @ v)))


def test_least_squares_without_residuals_has_one_matrix() -> None:
    """Where all residuals are zero the Hessian is the Gauss-Newton matrix."""
    setting = Setting("mlp")
    target = setting.outputs(setting.params)

    def loss(z: Tensor) -> Tensor:
        return (z - target).square().mean()

    full = hvp(lambda p: loss(setting.outputs(p)), setting.params, setting.v)
    part = ggnvp(setting.outputs, loss, setting.params, setting.v)
    torch.testing.assert_close(flat(full), flat(part), rtol=1e-11, atol=1e-13)
    assert flat(full).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["lstm", "attention", "transformer"])
def test_float32_gives_the_same_products(name: str) -> None:
    """Other kernels run in float32: oneDNN's LSTM and flash attention have no forward mode."""
    single, double = Setting(name, torch.float32), Setting(name)
    for product in (
        lambda s: hvp(s.loss, s.params, s.v),
        lambda s: ggnvp(s.outputs, s.loss_of, s.params, s.v),
    ):
        torch.testing.assert_close(flat(product(single)).double(), flat(product(double)), rtol=1e-3, atol=1e-5)


def test_hvp_is_differentiable() -> None:
    x, v = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True), torch.tensor([3.0, 0.5]).double()
    (slope,) = torch.autograd.grad(torch.dot(v, hvp(lambda p: (p**4).sum(), x, v)), x)
    torch.testing.assert_close(slope, 24 * x.detach() * v**2)


def test_the_order_of_names_does_not_matter() -> None:
    p = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    v = {"b": torch.tensor(1.0), "a": torch.tensor([5.0, 7.0])}
    for params in (p, OrderedDict(p)):
        for tangent in (v, OrderedDict(v)):
            product = hvp(lambda q: (q["a"] ** 2).sum() * q["b"], params, tangent)
            assert list(product) == ["a", "b"]
            torch.testing.assert_close(product["a"], torch.tensor([32.0, 46.0]))
            torch.testing.assert_close(product["b"], torch.tensor(38.0))


def test_state_dict_serves_as_parameters() -> None:
    setting = Setting("mlp")
    expected = flat(hvp(setting.loss, setting.params, setting.v))
    assert torch.equal(flat(hvp(setting.loss, setting.model.state_dict(), setting.v)), expected)


def test_torch_is_left_as_it_was() -> None:
    def settings() -> list[bool]:
        return [
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.is_grad_enabled(),
        ]

    def fails(p: Tensor) -> Tensor:
        raise KeyError("in the loss")

    before = settings()
    for name in ("attention", "lstm"):
        setting = Setting(name, torch.float32)
        ggnvp(setting.outputs, setting.loss_of, setting.params, setting.v)
        assert settings() == before
    with pytest.raises(KeyError, match="in the loss"):
        hvp(fails, torch.zeros(2), torch.zeros(2))
    assert settings() == before


def test_tangents_that_do_not_fit_are_named() -> None:
    def square(p: Tensor) -> Tensor:
        return p.square().sum()

    with pytest.raises(ValueError, match=r"v has shape \(3,\) and dtype torch.float32.*\(2,\)"):
        hvp(square, torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"dtype torch.float64.*torch.float32"):
        hvp(square, torch.zeros(2), torch.zeros(2).double())
    with pytest.raises(ValueError, match="different names: b"):
        hvp(lambda p: p["a"].sum(), {"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"v\['a'\] has shape \(3,\)"):
        hvp(lambda p: p["a"].sum(), {"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    with pytest.raises(TypeError, match="v is dict; expected a tensor"):
        hvp(square, torch.zeros(2), {"a": torch.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="v is Tensor; expected a dict"):
        hvp(lambda p: p["a"].sum(), {"a": torch.zeros(2)}, torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params is list"):
        hvp(square, [torch.zeros(2)], [torch.zeros(2)])  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"returned shape \(2,\); expected a scalar"):
        hvp(lambda p: p.square(), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"returned shape \(3, 2\); expected a scalar"):
        ggnvp(lambda p: p * torch.ones(3, 2), lambda z: z, torch.zeros(2), torch.zeros(2))


def test_classes_are_weighted_by_their_probabilities() -> None:
    """The Fisher matrix of a softmax, by its definition: the mean of gradients' squares under the model's classes."""
    z, v = torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64), torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    P = torch.softmax(z, 1)[0]
    slopes = P - one_hot(torch.arange(3), 3)
    fisher = (P[:, None, None] * slopes[:, :, None] * slopes[:, None, :]).sum(0)
    product = ggnvp(lambda p: p, lambda p: cross_entropy(p, torch.tensor([1])), z, v)
    torch.testing.assert_close(product[0], fisher @ v[0])


def test_mse_loss_is_a_square_as_any() -> None:
    """torch's own has no usable forward mode."""
    x, y, w, v = (torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4))
    product = hvp(lambda p: mse_loss((x * p).tanh(), y), w, v)
    torch.testing.assert_close(product, hvp(lambda p: ((x * p).tanh() - y).square().mean(), w, v))


NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "layer_norm": lambda x, w, b: F.layer_norm(x, (4, 3), w[:, None].expand(4, 3), b[:, None].expand(4, 3)),
    "torch.layer_norm": lambda x, w, b: torch.layer_norm(x, (3,)) * w[:, None],
    "batch_norm": lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    "torch.batch_norm": lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    "batch_norm on (n,C)": lambda x, w, b: F.batch_norm(x[..., 0], None, None, w, training=True, eps=0.1),
    "instance_norm": lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
    "torch.instance_norm": lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False),
    "group_norm": lambda x, w, b: F.group_norm(x, 2, w, b),
    "batch_norm in eval mode": lambda x, w, b: F.batch_norm(x, torch.zeros(4).to(x), torch.full((4,), 3.0).to(x), w, b),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["hvp", "ggnvp"])
def test_products_through_norms_have_derivatives(kind: str, norm: str) -> None:
    """torch 2.13's own forward mode of three of them is silently wrong when it is differentiated."""
    generator = torch.Generator().manual_seed(0)
    data, params, v, u = torch.randn(4, 5 * 4 * 3 + 8, dtype=torch.float64, generator=generator).unbind()

    def outputs(p: Tensor) -> Tensor:
        x, w, b = p[:60].reshape(5, 4, 3) * data[:60].reshape(5, 4, 3), p[60:64], p[64:]
        return NORMS[norm](x, w, b).sin()

    def product(p: Tensor) -> Tensor:
        if kind == "hvp":
            return hvp(lambda q: outputs(q).square().sum(), p, v)
        return ggnvp(outputs, lambda z: (z**4).sum(), p, v)

    def slope(direction: Tensor) -> Tensor:
        with torch.no_grad():
            ahead, behind = (product(params + step * direction) for step in (1e-5, -1e-5))
        return (ahead - behind) / 2e-5

    expected = slope(u)
    torch.testing.assert_close(jvp(product, (params,), (u,))[1], expected, rtol=1e-6, atol=1e-6)
    # The derivative of either product along u, times v, is linear in u.
    gradient = grad(lambda p: torch.dot(product(p), v))(params)
    torch.testing.assert_close(torch.dot(gradient, u), torch.dot(expected, v), rtol=1e-6, atol=1e-6)
    p = params.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(torch.dot(product(p), v), p)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [lambda: nn.LayerNorm(3), lambda: nn.BatchNorm1d(4), lambda: nn.InstanceNorm1d(4, 1e-2)]
)
def test_composed_norms_are_torchs(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    x = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    layers = make().double(), make().to(dtype)
    expected = layers[0](x.double()).to(dtype)
    with differentiable_kernels(composed_norms=True):
        got = layers[1](x)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(layers[1].buffers(), layers[0].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


def test_composed_norms_refuse_what_torch_refuses() -> None:
    x = torch.ones(1, 4, 1)
    with differentiable_kernels(composed_norms=True):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            F.layer_norm(x, (4,))
        for norm in (F.batch_norm, F.instance_norm):
            with pytest.raises(ValueError, match="Expected more than 1"):
                norm(x, None, None, None, None, True)


def test_products_update_running_statistics_as_torch_does() -> None:
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = [torch.zeros(2, 3, dtype=torch.float64) for _ in range(2)]
    for (mean, variance), enabled in zip(statistics, (True, False), strict=True):
        with torch.set_grad_enabled(enabled):
            hvp(lambda p: F.batch_norm(p, mean, variance, training=True).sin().sum(), x, x)  # noqa: B023
    assert torch.equal(*statistics) and statistics[0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("method", ["gauss_newton", pytest.param("newton_cg", marks=pytest.mark.long)])
def test_recurrent_networks_are_fitted(method: str, kind: type[nn.RNNBase], dtype: torch.dtype) -> None:
    """Products of one step share a pass, and oneDNN's LSTM can be gone back through only once."""
    torch.manual_seed(0)
    model = LastStep(kind).to(dtype)
    x, y = torch.randn(20, 4, 3, dtype=dtype), torch.arange(20) % 3
    result = onestep.fit(model, (x, y), "cross_entropy", method=method, max_steps=4, progress=False)
    assert result.loss < 0.9 * result.initial_loss
    assert max(record.cg_iterations for record in result.history) > 1


# Functions whose gradient torch computes by another kernel where the gradient's own graph is not recorded.
TWO_GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "torch._C._nn.silu": torch._C._nn.silu,
    "aten.silu": torch.ops.aten.silu.default,
    "mish": F.mish,
    "group_norm": lambda x: F.group_norm(x, 2),
    "logit": lambda x: torch.logit(torch.sigmoid(x)),
    "aten.logit": lambda x: torch.ops.aten.logit.default(torch.sigmoid(x)),
    "native_group_norm": lambda x: torch.native_group_norm(x, None, None, 5, 4, 3, 2, 1e-5)[0],
    "linalg.det": lambda x: x * torch.linalg.det(square(x))[:, None, None],
    "Tensor.det": lambda x: x * square(x).det()[:, None, None],
    "linalg.slogdet": lambda x: x * torch.linalg.slogdet(square(x))[1][:, None, None],
    "Tensor.logdet": lambda x: x * square(x).logdet()[:, None, None],
    "linalg.solve": lambda x: torch.linalg.solve(square(x), x.mT).mT,
    "linalg.solve_ex": lambda x: torch.linalg.solve_ex(square(x), x.mT)[0].mT,
    "linalg.tensorsolve": lambda x: x * torch.linalg.tensorsolve(square(x)[0], x[0, 0]),
    "orthogonal by Cayley": lambda x: x @ torch.linalg.solve(square(x - x.mean()), square(x)),
}

# Functions whose derivatives by torch's forward mode are wrong.
REVERSE_MODE_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky_inverse": lambda x: x @ torch.cholesky_inverse(torch.linalg.cholesky(square(x) @ square(x).mT)),
    "Tensor.cholesky_inverse": lambda x: x @ square(x).tril().cholesky_inverse(),
    "triangular_solve": lambda x: torch.triangular_solve(x.mT, square(x).tril(), upper=False)[0].mT,
    "scatter_reduce": lambda x: x * x.new_zeros(5, 4, 1).scatter_reduce(2, ZEROS, x, "prod", include_self=False),
    "scatter_reduce_": lambda x: x * x.new_ones(5, 4, 1).scatter_reduce_(2, ZEROS, x, reduce="prod"),
}
ZEROS = torch.zeros(5, 4, 3, dtype=torch.int64)


def square(x: Tensor) -> Tensor:
    """Invertible matrices (n,3,3) that depend on x (n,4,3)."""
    return x[:, :3].tanh() + 4 * torch.eye(3, dtype=x.dtype)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("name", TWO_GRADIENTS | REVERSE_MODE_ONLY)
@pytest.mark.parametrize("error", ["cross_entropy", "mse"])
def test_products_without_a_graph_of_the_gradient(name: str, error: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, v, x = (torch.randn(12, 12, dtype=torch.float64, generator=generator) for _ in range(3))

    def loss(W: Tensor) -> Tensor:
        z = (TWO_GRADIENTS | REVERSE_MODE_ONLY)[name]((x[:5] @ W).reshape(5, 4, 3))
        return (
            cross_entropy(z, torch.arange(15).reshape(5, 3) % 4)
            if error == "cross_entropy"
            else mse_loss(z, z.new_ones(z.shape))
        )

    def slope(W: Tensor) -> Tensor:
        leaf = W.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    expected = (slope(W + 1e-6 * v) - slope(W - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(hvp(loss, W, v), expected, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(hvp(loss, W, v), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("name", REVERSE_MODE_ONLY)
def test_gauss_newton_products_where_forward_mode_is_wrong(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, v, x = (torch.randn(12, 12, dtype=torch.float64, generator=generator) for _ in range(3))

    def outputs(W: Tensor) -> Tensor:
        return REVERSE_MODE_ONLY[name]((x[:5] @ W).reshape(5, 4, 3)).flatten()

    J = torch.autograd.functional.jacobian(outputs, W).reshape(-1, 144)
    expected = (2 * J.mT @ (J @ v.flatten())).view(12, 12)
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            product = ggnvp(outputs, lambda z: z.square().sum(), W, v)
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", [True, False])
def test_the_loss_is_computed_once(graph: bool) -> None:
    """Also where a gradient has to be computed again: a second loss would draw other random numbers."""
    calls = []
    W = torch.randn(4, dtype=torch.float64)

    def loss(W: Tensor) -> Tensor:
        calls.append(None)
        return torch.ops.aten.silu.default(W).sum()

    with torch.set_grad_enabled(graph):
        hvp(loss, W, W)
    assert len(calls) == 1


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("loss", "dtype"), [(lambda W: (W > 0).sum(), "int64"), (lambda W: (W * 1j).square().sum(), "complex128")]
)
def test_losses_that_are_not_real(graph: bool, loss: Callable[[Tensor], Tensor], dtype: str) -> None:
    W = torch.randn(4, dtype=torch.float64)
    with torch.set_grad_enabled(graph), pytest.raises(TypeError, match=dtype):
        hvp(loss, W, W)
