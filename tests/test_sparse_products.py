"""Products with sparse matrices, against SciPy in float64: sizes around vectors, types, chunks, threads, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor
from torch.library import opcheck

import onestep
from onestep.ops.sparse import sparse_multiply
from onestep.solvers.sparse_products import SparseProducts

# Columns around a vector of each target, and around four of them.
COLUMNS = (0, 1, 3, 4, 5, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130)


def matrix(n: int, d: int, density: float, dtype: str = "float64") -> sparse.csr_array:
    generator = np.random.default_rng(0)
    dense = generator.standard_normal((n, d)) * (generator.random((n, d)) < density)
    return sparse.csr_array(dense.astype(dtype))


def operands(X: sparse.csr_array, V: np.ndarray, index: str = "int32") -> tuple[Tensor, ...]:
    offsets, indices = (torch.from_numpy(array.astype(index)) for array in (X.indptr, X.indices))
    return offsets, indices, torch.from_numpy(X.data), torch.from_numpy(V)


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(0, 5, 0.1), (1, 1, 1.0), (50, 40, 0.1), (300, 1000, 0.03)])
def test_product_against_scipy(shape: tuple[int, int, float], dtype: str, index: str) -> None:
    X = matrix(*shape, dtype)
    for k in COLUMNS:
        V = np.random.default_rng(k).standard_normal((X.shape[1], k)).astype(dtype)
        found = sparse_multiply(*operands(X, V, index))
        close = 1e-5 if dtype == "float32" else 1e-12
        np.testing.assert_allclose(found, X.astype(np.float64) @ V.astype(np.float64), rtol=close, atol=close)


def test_elements_in_any_order_that_come_twice() -> None:
    """(2·v₂ + 3·v₀ + 4·v₂, nothing, v₁)."""
    V = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    offsets, indices = torch.tensor([0, 3, 3, 4]), torch.tensor([2, 0, 2, 1])
    found = sparse_multiply(offsets, indices, torch.tensor([2.0, 3.0, 4.0, 1.0]), V)
    assert found.tolist() == [[21.0, 210.0], [0.0, 0.0], [2.0, 20.0]]


def test_a_row_with_nan_leaves_the_others() -> None:
    X = matrix(20, 30, 0.2)
    V = np.random.default_rng(0).standard_normal((30, 5))
    found = sparse_multiply(*operands(X, V))
    X.data[X.indptr[3]] = np.nan
    spoilt = sparse_multiply(*operands(X, V))
    others = [row for row in range(20) if row != 3]
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[others], found[others])


@pytest.mark.parametrize("k", [1, 7, 40])
def test_threads_do_not_change_a_bit(k: int) -> None:
    X = matrix(2000, 500, 0.05)
    V = np.random.default_rng(0).standard_normal((500, k))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(sparse_multiply(*operands(X, V)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("chunk", [None, 1, 7, 64, 1000])
def test_both_products_chunk_by_chunk(chunk: int | None) -> None:
    X = matrix(100, 60, 0.3)
    products = SparseProducts(X, chunk)
    generator = np.random.default_rng(0)
    V, Z = generator.standard_normal((60, 6)), generator.standard_normal((100, 6))
    count = range(len(products.chunks))
    assert len(count) == -(-100 // (chunk or 100))
    np.testing.assert_allclose(np.concatenate([products.multiply(V, c) for c in count]), X @ V, atol=1e-12)
    summed = sum(products.transposed_multiply(Z[products.chunks[c]], c) for c in count)
    np.testing.assert_allclose(summed, X.T @ Z, atol=1e-12)
    np.testing.assert_allclose(SparseProducts(X).multiply(V[:, 0]), X @ V[:, 0], atol=1e-12)
    np.testing.assert_allclose(SparseProducts(X).transposed_multiply(Z[:, 0]), X.T @ Z[:, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.tensor([0, 5])}, ValueError, "offsets or indices are out of range"),
        ({"indices": torch.tensor([0, -1])}, ValueError, "offsets or indices are out of range"),
        ({"offsets": torch.tensor([0, 3])}, ValueError, "offsets or indices are out of range"),
        ({"offsets": torch.tensor([0, 2, 1])}, ValueError, "offsets or indices are out of range"),
        ({"offsets": torch.tensor([-1, 2])}, ValueError, "offsets or indices are out of range"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, r"offsets has shape \(0,\); expected n \+ 1"),
        ({"indices": torch.tensor([0])}, ValueError, "indices has 1 elements, values has 2; expected as many"),
        ({"indices": torch.tensor([0, 1]).int()}, TypeError, r"indices has dtype torch\.int32; expected torch\.int64"),
        ({"values": torch.ones(2).half()}, TypeError, r"values has dtype torch\.float16"),
        ({"V": torch.ones(5, 2).double()}, TypeError, r"V has dtype torch\.float64; expected torch\.float32"),
        ({"V": torch.ones(5)}, ValueError, r"V has shape \(5,\); expected \(d, k\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {
        "offsets": torch.tensor([0, 2]),
        "indices": torch.tensor([0, 1]),
        "values": torch.ones(2),
        "V": torch.ones(5, 2),
    } | change
    with pytest.raises(error, match=message):
        sparse_multiply(*given.values())


def test_the_op_is_one_of_torch() -> None:
    X = matrix(6, 5, 0.5)
    given = operands(X, np.ones((5, 3)))
    opcheck(torch.ops.onestep.sparse_multiply.default, given)
    with pytest.raises(NotImplementedError, match="sparse_multiply has no derivative"):
        torch.ops.onestep.sparse_multiply(*given[:3], given[3].requires_grad_())


@pytest.mark.parametrize("weighted", [False, True])
def test_estimators_agree_with_dense_rows(weighted: bool) -> None:
    """Of a matrix that is large enough to stay sparse."""
    X = matrix(700, 200, 0.1)
    generator = np.random.default_rng(1)
    y = (X @ generator.standard_normal((200, 4))).argmax(1)
    weight = generator.random(700) if weighted else None
    for model in (onestep.LogisticRegression(tol=1e-8), onestep.RidgeClassifier(), onestep.Ridge()):
        thin = model.fit(X, y, sample_weight=weight)
        found = thin.coef_.copy(), np.asarray(thin.intercept_).copy()
        dense = model.fit(X.toarray(), y, sample_weight=weight)
        np.testing.assert_allclose(found[0], dense.coef_, atol=1e-4)
        np.testing.assert_allclose(found[1], dense.intercept_, atol=1e-4)
