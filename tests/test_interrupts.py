"""Ctrl-C at any point: the user's model, and what torch keeps for a thread, are as they were."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.overrides import TorchFunctionMode

import onestep
from onestep import _forward_mode, _torch_private, layerwise
from onestep._interrupts import undisturbed
from onestep._restored import eval_mode, hooked, own_modes, replaced
from onestep._torch_private import function_modes, level_is_ours, transform_depth
from onestep.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, Laplace, hvp
from onestep.optim import PolarGrad


class Interrupt(KeyboardInterrupt):
    pass


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.1), nn.BatchNorm1d(5), nn.Linear(5, 3))
    net[1].eval()
    return net


def state(net: nn.Module) -> list[Any]:
    """What an interrupt must not change; parameters are the very same objects."""
    own: list[Any] = [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for module in net.modules()
    ]
    own += [id(parameter) for parameter in net.parameters()]
    levels = (eager_transforms.JVP_NESTING, torch.autograd.forward_ad._current_level, transform_depth())
    return [*own, levels, function_modes(), torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()]


def interrupted_at(
    work: Callable[[], Any], point: int, among: Callable[[Any], bool] = lambda frame: True
) -> BaseException | None:
    """Runs work, interrupted at the point-th place where a Ctrl-C can come; None: it has fewer.

    Python looks for signals where a function of Python begins, and where one of C has returned to Python. Counted are
    those of frames that are ``among`` some.
    """
    left = point

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal left
        if event not in ("call", "c_return") or not among(frame):
            return
        left -= 1
        if left == 0:
            sys.setprofile(None)
            raise Interrupt

    sys.setprofile(profile)
    try:
        work()
    except Interrupt as stop:
        return stop
    finally:
        sys.setprofile(None)
    return None


def points_of(work: Callable[[], Any], among: Callable[[Any], bool]) -> int:
    """How many points the work has."""
    found = 0

    def never(frame: Any) -> bool:
        nonlocal found
        found += among(frame)
        return False

    interrupted_at(work, 1, never)
    return found


def jobs() -> Iterator[tuple[str, Callable[[nn.Module], Callable[[], Any]]]]:
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    for kind in (HessianOperator, GaussNewtonOperator, FisherOperator):

        def product(net: nn.Module, kind: Any = kind) -> Callable[[], Any]:
            op = kind(net, (x, y), "cross_entropy", progress=False)
            v = torch.randn(op.shape[0], 2)
            return lambda: op @ v

        yield kind.__name__, product
    yield (
        "Laplace",
        lambda net: lambda: Laplace(net, (x, y), "cross_entropy", structure="kronecker"),
    )
    yield "LayerStatistics", lambda net: lambda: layerwise.LayerStatistics(net, "*").update(x)
    yield "quantize", lambda net: lambda: layerwise.quantize(net, x, progress=False)

    def step(net: nn.Module) -> Callable[[], Any]:
        (net(x) ** 2).sum().backward()
        return PolarGrad(net.parameters(), lr=1e-3).step

    yield "PolarGrad", step


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "job"), list(jobs()), ids=[name for name, _ in jobs()])
def test_an_interrupt_leaves_the_model_as_it_was(name: str, job: Callable[[nn.Module], Callable[[], Any]]) -> None:
    """At points spread over the work, and at all where levels are counted.

    The traceback is kept, as an interactive session does; another thread is alive, as a progress bar's may be.
    """
    net, ended = model(), threading.Event()
    beside = threading.Thread(target=ended.wait)
    beside.start()
    work = job(net)
    work()
    before, kept = state(net), []
    total, levels = (points_of(work, among) for among in (lambda frame: True, counts_jvp))
    try:
        for among, points in (
            (lambda frame: True, range(1, total, max(1, total // 36))),
            (counts_jvp, range(1, levels + 1)),
        ):
            for point in points:
                kept = [interrupted_at(work, point, among)]
                assert state(net) == before, (name, among, point)
    finally:
        ended.set()
        beside.join()
    assert total > 15 and kept is not None
    work()


def counts_jvp(frame: Any) -> bool:
    """Whether torch.func or onestep counts a jvp there, or contextlib does for them."""
    code = frame.f_code
    if code.co_filename in (_forward_mode.__file__, _torch_private.__file__):
        return True
    if code.co_name.endswith(("jvp_nesting", "jvp_increment_nesting", "_jvp_with_argnums")):
        return True
    return code.co_filename == contextlib.__file__ and frame.f_back.f_code.co_name == "_jvp_with_argnums"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beside", ["nobody", "a thread that does something else", "a jvp of the user's"])
def test_an_interrupt_while_torch_counts_its_jvp(beside: str) -> None:
    """At every point of it. A progress bar has a thread, and so may have a user."""
    before, z, t = (0, -1, transform_depth()), torch.randn(5), torch.randn(5)

    def levels() -> tuple[int, int, int]:
        return (eager_transforms.JVP_NESTING, torch.autograd.forward_ad._current_level, transform_depth())

    for point in range(1, 500):
        inside, release, found = threading.Event(), threading.Event(), []

        def held(z: Tensor, inside: Any = inside, release: Any = release) -> Tensor:
            inside.set()
            release.wait(10)
            return (z**3).sum()

        def user(held: Any = held, found: Any = found) -> None:
            found.append(torch.func.jvp(held, (z,), (t,))[1] if beside.startswith("a jvp") else held(z))

        other = threading.Thread(target=user)

        def loss(p: dict[str, Tensor], other: Any = other, inside: Any = inside) -> Tensor:
            # Begun inside of ours, which has opened the level.
            if beside != "nobody" and not inside.is_set():
                other.start()
                inside.wait(10)
            return (p["z"] ** 3).sum()

        stop = interrupted_at(lambda loss=loss: hvp(loss, {"z": z}, {"z": t}), point, counts_jvp)
        uses = int(beside.startswith("a jvp") and inside.is_set())
        assert levels()[0] in (uses, 2 * uses), (beside, point)
        release.set()
        if inside.is_set() and beside != "nobody":
            other.join()
            torch.testing.assert_close(found[0], (3 * z**2 * t).sum() if uses else (z**3).sum())
        deadline = time.monotonic() + 5
        while levels() != before and time.monotonic() < deadline:
            time.sleep(0.001)
        assert levels() == before, (beside, point)
        if stop is None:
            break
    assert 10 < point < 499


def test_fit_keeps_what_was_reached() -> None:
    """The model is a step of the fit, in its own modes, wherever the interrupt comes."""
    x, y = torch.randn(40, 4), torch.randn(40, 3)

    def fit(net: nn.Module) -> onestep.FitResult:
        return onestep.fit(net, (x, y), method="gauss_newton", max_steps=3, tol=0.0, progress=False)

    start = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    whole = copy.deepcopy(start)
    fit(whole)
    total = 1
    while interrupted_at(lambda: fit(copy.deepcopy(start)), total) is not None and total < 2**17:
        total *= 2
    reached = 0
    for point in range(500, total, total // 16):
        net = copy.deepcopy(start)
        before, first = state(net), [p.detach().clone() for p in net.parameters()]
        result: list[Any] = []
        interrupted_at(lambda net=net, result=result: result.append(fit(net)), point)
        assert state(net) == before
        if not (result and result[0].history):
            assert all(map(torch.equal, net.parameters(), first))
        reached += bool(result)
    assert reached > 0


def test_what_torch_keeps_for_a_thread_is_put_back() -> None:
    """As where an interrupt comes at the first instruction of an __exit__: nothing else ends these contexts."""
    net = model()
    before = state(net)

    class Mode(TorchFunctionMode):
        pass

    @undisturbed
    def work() -> None:
        torch._C._set_grad_enabled(False)
        torch._C._set_fwd_grad_enabled(False)
        Mode().__enter__()
        torch._C._functorch._grad_increment_nesting()
        raise Interrupt

    @undisturbed
    def hidden() -> None:
        try:
            raise Interrupt
        finally:
            raise RuntimeError("torch.func found another level than its own")

    for function in (work, hidden):
        with pytest.raises(Interrupt):
            function()
        assert state(net) == before


def test_an_interrupt_that_torch_made_an_error_of_is_one_again() -> None:
    """Its decompositions run as compiled code, which hands on the text alone. The operator's route stays."""

    class Net(nn.Linear):
        stop = False

        def forward(self, x: Tensor) -> Tensor:
            if self.stop:
                raise RuntimeError("The following operation failed in the TorchScript interpreter. KeyboardInterrupt: ")
            return super().forward(x)

    net = Net(4, 3)
    op = HessianOperator(net, (torch.randn(12, 4), torch.randint(3, (12,))), "cross_entropy", progress=False)
    v = torch.randn(op.shape[0])
    expected = op @ v
    net.stop = True
    with pytest.raises(KeyboardInterrupt):
        op @ v
    net.stop = False
    assert torch.equal(op @ v, expected) and not op._passes.route.reverse_twice


def test_changes_are_put_back_in_any_order() -> None:
    """Two threads' contexts may end in the order in which they began."""
    net = model()
    before = state(net)
    one, two = eval_mode(net), eval_mode(net)
    one.__enter__()
    two.__enter__()
    with own_modes(net):
        assert [m.training for m in net.modules()] == [True, True, False, True, True, True]
    assert not any(m.training for m in net.modules())
    one.__exit__(None, None, None)
    assert not any(m.training for m in net.modules())
    two.__exit__(None, None, None)
    assert state(net) == before
    calls: list[str] = []
    first = hooked([(net[0], lambda *args: calls.append("after"))])
    second = hooked([(net[0], lambda layer, args, kwargs: calls.append("before"))], before=True)
    first.__enter__()
    second.__enter__()
    net[0](torch.zeros(1, 4))
    first.__exit__(None, None, None)
    net[0](torch.zeros(1, 4))
    second.__exit__(None, None, None)
    assert calls == ["before", "after", "before"] and state(net) == before
    table = {"a": 1}
    with pytest.raises(TypeError), replaced([(table, "a", 2), (table, "b", 3), ([], "no index", 4)]):
        pass
    assert table == {"a": 1}


class Stubborn(nn.Linear):
    """Its mode is a property, whose n-th change is interrupted."""

    changes, stop = 0, 0

    @property  # type: ignore[misc]
    def training(self) -> bool:
        return self.mode

    @training.setter
    def training(self, mode: bool) -> None:
        Stubborn.changes += 1
        if Stubborn.changes == Stubborn.stop:
            raise Interrupt
        self.__dict__["mode"] = mode


def test_modes_that_are_properties_are_put_back() -> None:
    """Python code runs where they change, so an interrupt comes there, too: when they are set, and when put back."""
    net = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2), nn.Linear(2, 2), Stubborn(2, 2))
    for stop in range(1, 6):
        Stubborn.changes, Stubborn.stop = 0, stop
        try:
            with eval_mode(net):
                assert not any(module.training for module in net.modules())
        except Interrupt:
            assert stop < 5
        else:
            assert stop == 5
        assert all(module.training for module in net.modules()), stop


def test_a_forked_child_has_the_modes_that_other_threads_had_changed() -> None:
    net, inside, release = model(), threading.Event(), threading.Event()
    before = state(net)

    def hold() -> None:
        with eval_mode(net):
            inside.set()
            release.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    inside.wait(20)
    child = os.fork()
    if child == 0:
        os._exit(0 if state(net) == before else 1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert not any(module.training for module in net.modules())
    release.set()
    other.join()
    assert code == 0 and state(net) == before


@pytest.mark.filterwarnings("ignore")
def test_signals_in_products() -> None:
    """A real signal comes between any two bytecodes, which no trace function does."""
    net = model()
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    op = HessianOperator(net, (x, y), "cross_entropy", progress=False)
    v = torch.randn(op.shape[0])
    expected, before = op @ v, state(net)
    begin = time.perf_counter()
    for _ in range(3):
        op @ v
    seconds = (time.perf_counter() - begin) / 3

    armed = False

    def interrupt(*_: Any) -> None:
        if armed:
            raise Interrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    stops: list[BaseException] = []
    try:
        for k in range(40):
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, seconds * (k + 0.5) / 40)
                op @ v
                armed = False
            except Interrupt as stop:
                stops.append(stop)
            # Of a product that was faster than those before.
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert state(net) == before
    finally:
        signal.signal(signal.SIGALRM, old)
    assert stops
    torch.testing.assert_close(op @ v, expected)


def test_a_users_own_forward_mode_in_another_thread() -> None:
    """Products and the user's jvp are right side by side, and the level is closed in the end."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    operators = [kind(net, (x, y), "cross_entropy", progress=False) for kind in (HessianOperator, GaussNewtonOperator)]
    v = torch.randn(operators[0].shape[0])
    expected = [op @ v for op in operators]
    z, t = torch.randn(500), torch.randn(500)

    def function(z: Tensor) -> Tensor:
        return (z.sin() ** 2).sum()

    right = torch.func.jvp(function, (z,), (t,))[1]
    end, wrong, count = threading.Event(), [], 0

    def user() -> None:
        nonlocal count
        while not end.is_set():
            try:
                torch.testing.assert_close(torch.func.jvp(function, (z,), (t,))[1], right)
                count += 1
            except Exception as error:
                wrong.append(error)

    other = threading.Thread(target=user)
    other.start()
    try:
        for _ in range(12):
            for op, product in zip(operators, expected, strict=True):
                torch.testing.assert_close(op @ v, product)
    finally:
        end.set()
        other.join()
    assert not wrong and count > 0
    deadline = time.monotonic() + 5
    while level_is_ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (eager_transforms.JVP_NESTING, torch.autograd.forward_ad._current_level) == (0, -1)
    # One that has begun first and does not end: reverse mode twice, for this product alone.
    inside, release = threading.Event(), threading.Event()

    def long(z: Tensor) -> Tensor:
        inside.set()
        release.wait(10)
        return function(z)

    found: list[Tensor] = []
    other = threading.Thread(target=lambda: found.append(torch.func.jvp(long, (z,), (t,))[1]))
    other.start()
    inside.wait(10)
    for op, product in zip(operators, expected, strict=True):
        torch.testing.assert_close(op @ v, product)
        assert not op._passes.route.reverse_twice
    release.set()
    other.join()
    torch.testing.assert_close(found[0], right)
    assert all(map(torch.equal, [op @ v for op in operators], expected))
