"""Products taken by several Python threads at a time, and the settings of torch that they leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import onestep
from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, ggnvp, hvp
from onestep.optim import LevenbergMarquardt

THREADS = 4


def settings() -> list[Any]:
    return [
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
    ]


def in_threads(work: Callable[[int], None]) -> None:
    """work(0) … work(3) side by side; the first error is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(THREADS)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, None].expand(-1, 3, -1))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.TransformerEncoderLayer(4, 2, 4, 0.1, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[:, :4].reshape(-1, 1, 4)).mean(1))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def problem(make: Callable[[], nn.Module], number: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(number)
    return make().eval(), torch.randn(12, 5), torch.randint(3, (12,))


@pytest.mark.parametrize(
    ("kind", "make", "products"),
    [
        (HessianOperator, network, 50),
        (GaussNewtonOperator, network, 10),
        (FisherOperator, network, 10),
        (HessianOperator, Recurrent, 5),
        (GaussNewtonOperator, Encoder, 5),
    ],
)
def test_each_thread_has_its_own_products(kind: Any, make: Callable[[], nn.Module], products: int) -> None:
    before = settings()
    operators = []
    for number in range(THREADS):
        model, x, y = problem(make, number)
        operators.append(kind(model, (x, y), "cross_entropy", progress=False))
    vectors = [torch.randn(op.shape[0]) for op in operators]
    expected = [op @ v for op, v in zip(operators, vectors, strict=True)]

    def work(number: int) -> None:
        for _ in range(products):
            assert torch.equal(operators[number] @ vectors[number], expected[number])
            assert settings() == before

    in_threads(work)
    assert settings() == before


def test_threads_may_share_a_model_and_its_data() -> None:
    model, x, y = problem(network, 0)
    model.train()
    loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    op = HessianOperator(model, loader, "cross_entropy", progress=False)
    v = torch.randn(op.shape[0])
    loss, gradient = op.loss_and_gradient()
    product, random = op @ v, torch.get_rng_state()

    def work(number: int) -> None:
        for _ in range(8):
            if number % 2:
                assert torch.equal(op @ v, product)
            else:
                again = op.loss_and_gradient()
                assert again[0] == loss and torch.equal(again[1], gradient)

    in_threads(work)
    assert model.training and all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_may_build_operators_of_a_shared_model() -> None:
    """The constructor looks at parameters that another thread's product may have swapped."""
    model, x, y = problem(network, 0)
    op = HessianOperator(model, (x, y), "cross_entropy", progress=False)
    v = torch.randn(op.shape[0])
    product = op @ v

    def work(number: int) -> None:
        for _ in range(8):
            assert torch.equal(HessianOperator(model, (x, y), "cross_entropy", progress=False) @ v, product)

    in_threads(work)


METHODS = ["levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent"]


@pytest.mark.parametrize("loss", ["mse", pytest.param("cross_entropy", marks=pytest.mark.long)])
def test_fits_in_threads(loss: str) -> None:
    """Each thread fits models of its own by another method: the losses and parameters of a fit without company."""
    before, random = settings(), torch.get_rng_state()

    def fitted(number: int) -> list[Any]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(60, 5, generator=generator)
        y = torch.randn(60, 3, generator=generator) if loss == "mse" else torch.randint(3, (60,), generator=generator)
        model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        result = onestep.fit(model, (x, y), loss, method=METHODS[number], max_steps=3, tol=0.0, progress=False)
        return [[record.loss for record in result.history], *(p.detach() for p in model.parameters())]

    with torch.random.fork_rng():
        expected = [fitted(number) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(3):
            losses, *parameters = fitted(number)
            assert losses == expected[number][0]
            assert all(map(torch.equal, parameters, expected[number][1:]))
            assert settings() == before

    with torch.random.fork_rng():
        in_threads(work)
    assert settings() == before and torch.equal(torch.get_rng_state(), random)


def test_functions_and_optimisers_in_threads() -> None:
    """``hvp``, ``ggnvp`` and the Jacobian that Levenberg-Marquardt forms in forward mode."""
    points = [torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(THREADS)]

    def compute(number: int) -> list[Tensor]:
        p = points[number]
        start = p.clone().requires_grad_()
        LevenbergMarquardt([start]).step(lambda: torch.cat([start.sin() * start.flip(0), start - 1]))
        return [
            hvp(lambda p: (p.sin() * p.flip(0)).sum().exp(), p, p),
            ggnvp(lambda p: p.sin() * p.flip(0), lambda z: z.square().sum(), p, p),
            start.detach(),
        ]

    expected = [compute(number) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(8):
            assert all(map(torch.equal, compute(number), expected[number]))

    in_threads(work)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 2}, {"bias": False}])
def test_the_lstm_of_products_is_torchs(options: dict[str, Any], packed: bool) -> None:
    from onestep.curvature.kernels import differentiable_kernels

    torch.manual_seed(0)
    model = nn.LSTM(3, 4, batch_first=True, **options).double()
    x: Any = torch.randn(4, 6, 3, dtype=torch.float64)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]), batch_first=True)
    out, state = model(x)
    with differentiable_kernels():
        again, composed = model(x)
    torch.testing.assert_close(again[0] if packed else again, out[0] if packed else out)
    torch.testing.assert_close(composed, state)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_that_onestep_does_not_take_is_torchs_mathematical_form(causal: bool) -> None:
    """float16 on the CPU: values of torch's own function, and a Hessian-vector product, which its kernel lacks."""
    from onestep.curvature.kernels import differentiable_kernels

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 4, dtype=torch.float16) for _ in range(3))
    mask = None if causal else torch.rand(5, 5) > 0.3
    expected = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    with differentiable_kernels():
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)

    def loss(p: Tensor, wide: bool) -> Tensor:
        p = p.double() if wide else p
        return F.scaled_dot_product_attention(p, p, p, mask, is_causal=causal).float().square().sum()

    product = hvp(lambda p: loss(p, False), q, k)
    exact = hvp(lambda p: loss(p, True), q.double(), k.double())
    assert (product - exact).abs().max() < 0.05 * exact.abs().max()
