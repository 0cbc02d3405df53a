"""Products of 16-bit operands with float32 results: on the CPU by value, on a GPU by the op of torch that is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from onestep import _torch_private
from onestep.ops import _products as products

aten = torch.ops.aten


def operands(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Two batches of matrices with few digits, so that products are exact in float32, and one to add to."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (2, 5, 4), (2, 3, 4))
    A, B, total = (torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in shapes)
    return A.to(device), B.to(device), total.float().to(device) + 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values(dtype: torch.dtype) -> None:
    A, B, total = operands(dtype)
    expected = (A.double() @ B.double()).float()
    out = torch.empty(3, 4)
    products.product_into(out, A[0], B[0])
    assert torch.equal(out, expected[0])
    added = total[0].clone()
    products.add_product(added, A[0], B[0])
    assert torch.equal(added, total[0] + expected[0])
    assert torch.equal(products.batched_product(A, B, torch.float32), expected)
    outs = torch.empty(2, 3, 4)
    products.batched_product_into(outs, A, B)
    assert torch.equal(outs, expected)


class Recorder(TorchDispatchMode):
    """Notes which of torch's products are called with which dtypes, and computes none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in (aten.mm, aten.addmm, aten.bmm, aten.add_):
            return func(*args, **(kwargs or {}))
        self.calls.append((func, [arg if isinstance(arg, torch.dtype) else arg.dtype for arg in args]))
        if kwargs and "out" in kwargs:
            return kwargs["out"]
        return args[0] if func is aten.add_.Tensor else torch.empty(3, 4, dtype=args[-1], device="cuda")


@contextmanager
def recorded() -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], list[tuple[Any, list[torch.dtype]]]]]:
    """Fake operands on a GPU, and what is called. torch without CUDA has no views of such operands."""
    with FakeTensorMode(), Recorder() as recorder:
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((3, 5), (5, 4)))
        yield (a, b, torch.empty(3, 4, device="cuda")), recorder.calls


BETWEEN = [torch.bfloat16, torch.bfloat16, torch.float32]


def test_ops_on_a_gpu() -> None:
    with recorded() as ((a, b, out), calls):
        products.product_into(out, a, b)
        assert products.batched_product(a, b, torch.float32).dtype == torch.float32
        products.batched_product_into(out, a, b)
    assert calls == [(aten.mm.dtype_out, BETWEEN), (aten.bmm.dtype, BETWEEN), (aten.bmm.dtype_out, BETWEEN)]


@pytest.mark.parametrize("takes_float32", [False, True])
def test_sums_on_a_gpu(takes_float32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "adds_to_float32", lambda device: takes_float32)
    with recorded() as ((a, b, total), calls):
        products.add_product(total, a, b)
    apart = [(aten.mm.dtype, BETWEEN), (aten.add_.Tensor, [torch.float32] * 2)]
    assert calls == ([(aten.addmm.dtype_out, [torch.float32, *BETWEEN])] if takes_float32 else apart)


def test_what_torch_can_add_to_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each device. On the CPU torch has no such product at all."""
    _torch_private.adds_to_float32.cache_clear()
    assert not _torch_private.adds_to_float32(torch.device("cpu"))
    tried = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: tried.append(options["out_dtype"]))
    assert not _torch_private.adds_to_float32(torch.device("cpu"))
    _torch_private.adds_to_float32.cache_clear()
    assert _torch_private.adds_to_float32(torch.device("cpu"))
    assert tried == [torch.float32]
    _torch_private.adds_to_float32.cache_clear()
