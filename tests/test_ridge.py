"""Ridge: scikit-learn's contract and numbers, tensors, paths, and what happens where X is bad."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from ridge_cases import minimum_norm, problem, rank_deficient, tolerance
from scipy import sparse
from scipy.linalg import LinAlgWarning
from sklearn import linear_model
from sklearn.datasets import load_diabetes
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import onestep.linalg
from onestep import Ridge


@parametrize_with_checks([Ridge(), Ridge(alpha=0.5, fit_intercept=False)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("n", "d"), [(60, 1), (60, 7), (8, 7), (7, 7), (5, 9), (6, 40)])
def test_agrees_with_scikit_learn(rng, n, d, k, fit_intercept, weighted, dtype):
    X, y = problem(rng, n, d, k, dtype)
    weight = rng.uniform(0.1, 2.0, size=n).astype(dtype) if weighted else None
    ours = Ridge(alpha=0.7, fit_intercept=fit_intercept).fit(X, y, weight)
    theirs = linear_model.Ridge(alpha=0.7, fit_intercept=fit_intercept, solver="svd")
    theirs.fit(X.astype(np.float64), y.astype(np.float64), weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=tolerance(dtype), atol=tolerance(dtype))
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=tolerance(dtype), atol=10 * tolerance(dtype))
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-4, atol=20 * tolerance(dtype))
    assert ours.coef_.shape == theirs.coef_.shape
    assert np.shape(ours.intercept_) == np.shape(theirs.intercept_)
    assert ours.coef_.dtype == ours.predict(X).dtype == dtype
    assert ours.solver_path_ == ("dual_cholesky" if n < d else "cholesky")
    assert ours.n_iter_ is None


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0])
def test_diabetes(alpha):
    X, y = load_diabetes(return_X_y=True)
    ours, theirs = Ridge(alpha).fit(X, y), linear_model.Ridge(alpha, solver="svd").fit(X, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), abs=1e-12)


def test_alpha_per_target(rng):
    X, y = problem(rng, 30, 5, 4)
    alphas = np.array([0.0, 1.0, 5.0, 1.0])
    ours = Ridge(alphas).fit(X, y)
    for j, alpha in enumerate(alphas):
        np.testing.assert_allclose(ours.coef_[j], Ridge(alpha).fit(X, y[:, j]).coef_, rtol=1e-10)
    np.testing.assert_array_equal(Ridge(torch.from_numpy(alphas)).fit(X, y).coef_, ours.coef_)


def test_alpha_per_target_names_every_path(rng):
    X, y = problem(rng, 4, 9, 2)
    with pytest.warns(LinAlgWarning):
        assert Ridge([1.0, 0.0]).fit(X, y).solver_path_ == "minimum_norm+dual_cholesky"


@pytest.mark.parametrize(
    "view",
    [
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: np.repeat(a, 3, axis=0)[::3],
        lambda a: a[::-1][::-1],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a[:, ::-1].copy()[:, ::-1],
        lambda a: np.broadcast_to(a, (2, *a.shape))[1],
        lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
        lambda a: a.astype(a.dtype.newbyteorder()),
    ],
    ids=["F", "columns", "rows", "twice", "reversed rows", "reversed columns", "broadcast", "misaligned", "byte order"],
)
@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_any_layout(rng, shape, view):
    X, y = problem(rng, *shape)
    same = view(X)
    np.testing.assert_array_equal(same, X)
    expected = Ridge().fit(X, y)
    ours = Ridge().fit(same, y)
    np.testing.assert_allclose(ours.coef_, expected.coef_, rtol=1e-10)
    np.testing.assert_allclose(ours.predict(same), expected.predict(X), rtol=1e-10)


@pytest.mark.parametrize("kind", ["array", "read-only", "F", "strided", "tensor", "requires grad"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_x_is_not_copied(rng, monkeypatch, dtype, kind):
    X, y = problem(rng, 50, 4, dtype=dtype)
    pointer = X.ctypes.data
    if kind == "read-only":
        X.flags.writeable = False
    elif kind == "F":
        X = np.asfortranarray(X)
        pointer = X.ctypes.data
    elif kind == "strided":
        X = X[::2, ::3]
        y = y[::2]
    elif kind != "array":
        X = torch.from_numpy(X).requires_grad_(kind == "requires grad")
    seen = []
    moments = onestep.linalg.moments

    def spy(X, Y, **options):
        seen.append((X.data_ptr(), tuple(X.shape), X.requires_grad))
        return moments(X, Y, **options)

    monkeypatch.setattr(onestep.linalg.narrow, "moments", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ridge().fit(X, y)
    assert seen == [(pointer, tuple(X.shape), False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [None, 1, 3])
def test_tensors_in_tensors_out(rng, k, dtype):
    X, y = (torch.from_numpy(a).to(dtype) for a in problem(rng, 30, 4, k))
    weight = torch.rand(30, dtype=dtype)
    expected = Ridge().fit(X.numpy(), y.numpy(), weight.numpy())
    ours = Ridge().fit(X.clone().requires_grad_(), y.clone().requires_grad_(), weight.clone().requires_grad_())
    for ours_value, expected_value in [
        (ours.coef_, expected.coef_),
        (ours.intercept_, expected.intercept_),
        (ours.predict(X), expected.predict(X.numpy())),
    ]:
        assert isinstance(ours_value, torch.Tensor)
        assert ours_value.dtype == dtype
        assert not ours_value.requires_grad
        np.testing.assert_array_equal(ours_value.numpy(), expected_value)
    assert isinstance(expected.coef_, np.ndarray)
    assert isinstance(expected.predict(X), torch.Tensor)
    assert isinstance(ours.predict(X.numpy()), np.ndarray)
    assert ours.score(X, y, weight) == ours.score(X.numpy(), y.numpy(), weight.numpy())
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ours)).coef_, ours.coef_)


def test_half_precision_tensors_become_fp32(rng):
    X, y = (torch.from_numpy(a).bfloat16() for a in problem(rng, 30, 4))
    ours = Ridge().fit(X, y)
    assert ours.coef_.dtype == ours.predict(X).dtype == torch.float32
    torch.testing.assert_close(ours.coef_, Ridge().fit(X.float(), y.float()).coef_)


@pytest.mark.parametrize("kind", [int, bool, list])
def test_other_numbers_become_fp64(rng, kind):
    X = rng.integers(0, 2, size=(20, 3))
    y = X @ [1.0, 2.0, 3.0]
    ours = Ridge().fit(X.tolist() if kind is list else X.astype(kind), y)
    assert ours.coef_.dtype == np.float64
    np.testing.assert_array_equal(ours.coef_, Ridge().fit(X.astype(np.float64), y).coef_)


def test_data_frame(rng):
    pandas = pytest.importorskip("pandas")
    X, y = problem(rng, 20, 3)
    ours = Ridge().fit(pandas.DataFrame(X, columns=["a", "b", "c"]), pandas.Series(y))
    assert list(ours.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_allclose(ours.coef_, Ridge().fit(X, y).coef_, rtol=1e-12)


@pytest.mark.parametrize("shape", [(200, 5), (20, 30)])
def test_large_offsets_do_not_cancel(rng, shape):
    X = rng.normal(size=shape).astype(np.float32) + np.float32(1e4)
    w = rng.normal(size=shape[1])
    y = X.astype(np.float64) @ w
    y = (y - y.mean() + 1e4).astype(np.float32)
    ours = Ridge(0.1).fit(X, y)
    theirs = linear_model.Ridge(0.1, solver="svd").fit(X.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 3), (8, 20)])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_weight_is_repetition(rng, fit_intercept, shape):
    X, y = problem(rng, *shape, 2)
    weight = rng.integers(0, 4, size=shape[0])
    ours = Ridge(fit_intercept=fit_intercept).fit(X, y, weight)
    repeated = Ridge(fit_intercept=fit_intercept).fit(X.repeat(weight, axis=0), y.repeat(weight, axis=0))
    np.testing.assert_allclose(ours.coef_, repeated.coef_, rtol=1e-9)
    np.testing.assert_allclose(ours.intercept_, repeated.intercept_, rtol=1e-9)
    scalar = Ridge(3.0, fit_intercept=fit_intercept).fit(X, y, 3.0)
    np.testing.assert_allclose(scalar.coef_, Ridge(1.0, fit_intercept=fit_intercept).fit(X, y).coef_, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("case", ["duplicate", "constant", "sum", "wide", "zero"])
def test_without_ridge_rank_deficient_is_minimum_norm(rng, case, fit_intercept, weighted, dtype):
    X, y = rank_deficient(rng, 4 if case == "wide" else 50, case)
    X, y = X.astype(dtype), y.astype(dtype)
    weight = rng.uniform(0.5, 2.0, size=len(X)).astype(dtype) if weighted else None
    with pytest.warns(LinAlgWarning, match=r"rank \d of 6 features.*minimum norm"):
        ours = Ridge(0.0, fit_intercept=fit_intercept).fit(X, y, weight)
    assert ours.solver_path_ == "minimum_norm"
    expected = minimum_norm(*(a if a is None else a.astype(np.float64) for a in (X, y, weight)), fit_intercept)
    np.testing.assert_allclose(ours.coef_, expected, rtol=tolerance(dtype), atol=tolerance(dtype))


def test_minimum_norm_over_many_blocks_of_rows(rng, monkeypatch):
    monkeypatch.setattr("onestep.estimators._centred._BLOCK", 64)
    X, y = problem(rng, 500, 6, 2)
    X[:, 3] = X[:, 1] + X[:, 2]
    with pytest.warns(LinAlgWarning):
        ours = Ridge(0.0).fit(X, y)
    np.testing.assert_allclose(ours.coef_, minimum_norm(X, y, None, True), rtol=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_ill_conditioned_is_as_accurate_as_orthogonal_factors(rng, offset):
    n, d = 300, 8
    U, _ = np.linalg.qr(rng.normal(size=(n, d)))
    V, _ = np.linalg.qr(rng.normal(size=(d, d)))
    X = (U - U.mean(axis=0)) * np.logspace(0, -7, d) @ V.T + offset
    w = rng.normal(size=d)
    ours = Ridge(0.0).fit(X, (X - offset) @ w)
    assert ours.solver_path_ == "least_squares"
    # Offsets cost their own share of the digits: X rounds to 1e6 ε of its spread.
    np.testing.assert_allclose(ours.coef_, w, rtol=1e-6 if offset == 0.0 else 10.0)
    np.testing.assert_allclose(ours.predict(X), (X - offset) @ w, atol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
@pytest.mark.parametrize("closeness", [1e-1, 1e-2, 1e-3, 1e-4])
def test_fp32_on_nearly_collinear_features_is_accurate(rng, closeness, alpha, weighted):
    X, y = problem(rng, 3000, 5)
    X[:, 4] = X[:, 3] + closeness * X[:, 4]
    X, y = X.astype(np.float32), y.astype(np.float32)
    weight = rng.uniform(0.5, 2.0, size=len(X)).astype(np.float32) if weighted else None
    ours = Ridge(alpha).fit(X, y, weight)
    theirs = linear_model.Ridge(alpha, solver="svd").fit(X.astype(np.float64), y.astype(np.float64), weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-5)


def test_tiny_ridge_on_collinear_features_is_accurate(rng):
    X, y = problem(rng, 80, 4)
    X[:, 3] = X[:, 2]
    ours = Ridge(1e-7).fit(X, y)
    assert ours.solver_path_ == "least_squares"
    expected = minimum_norm(X, y[:, None], None, True)[0]
    np.testing.assert_allclose(ours.coef_, expected, rtol=1e-6)


def test_units_do_not_decide_rank(rng):
    X, y = problem(rng, 100, 4)
    units = np.array([1e-9, 1.0, 1e9, 1e-3])
    ours = Ridge(0.0).fit(X * units, y)
    assert ours.solver_path_ == "cholesky"
    np.testing.assert_allclose(ours.coef_ * units, Ridge(0.0).fit(X, y).coef_, rtol=1e-9)


@pytest.mark.parametrize("constant", [0.1, 1e8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_feature_has_no_say(rng, dtype, constant):
    X, y = problem(rng, 1000, 3, dtype=dtype)
    X[:, 1] = constant
    with pytest.warns(LinAlgWarning, match="rank 2 of 3"):
        ours = Ridge(0.0).fit(X, y)
    assert ours.coef_[1] == 0.0
    np.testing.assert_allclose(ours.coef_[[0, 2]], Ridge(0.0).fit(X[:, [0, 2]], y).coef_, rtol=tolerance(dtype))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_row(alpha):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        for d in (1, 3):
            ours = Ridge(alpha).fit(np.ones((1, d)), [5.0])
            np.testing.assert_array_equal(ours.coef_, np.zeros(d))
            assert ours.predict(np.zeros((2, d))).tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("params", "arguments", "error", "message"),
    [
        ({"alpha": -1.0}, {}, ValueError, "alpha must be non-negative"),
        ({"alpha": np.nan}, {}, ValueError, "alpha must be non-negative and finite"),
        ({"alpha": "big"}, {}, TypeError, "alpha must be a non-negative number"),
        ({"alpha": True}, {}, TypeError, "alpha must be a non-negative number"),
        ({"alpha": [1.0, 2.0]}, {}, ValueError, "alpha holds 2 penalties for 1 targets"),
        ({"alpha": [[1.0]]}, {}, ValueError, r"alpha must be a number or a non-empty 1-D list.*\(1, 1\)"),
        ({"fit_intercept": "no"}, {}, TypeError, "fit_intercept must be True or False, got 'no'"),
        ({}, {"X": np.full((5, 2), np.nan)}, ValueError, "Input X contains NaN"),
        ({}, {"X": np.full((5, 9), np.nan)}, ValueError, "Input X contains NaN"),
        ({}, {"X": np.full((5, 2), np.inf, np.float32)}, ValueError, "Input X contains infinity"),
        ({}, {"X": np.full((5, 2), 1e200) * np.eye(5, 2)}, ValueError, "so large that their products overflow"),
        ({}, {"y": [1, 2, 3, 4, np.nan]}, ValueError, "Input y contains NaN"),
        ({}, {"X": np.ones((5, 2), np.float32), "y": [1e300] * 5}, ValueError, "y holds values too large.*float32"),
        ({}, {"X": np.ones((4, 2))}, ValueError, "inconsistent numbers of samples"),
        ({}, {"X": sparse.csr_array(np.full((5, 2), np.nan))}, ValueError, "Input X contains NaN"),
        ({}, {"X": torch.ones(5, 2, device="meta")}, ValueError, "X is on device 'meta'; expected a CPU tensor"),
        ({}, {"X": torch.eye(5, 2).to_sparse()}, ValueError, "X has layout torch.sparse_coo; expected a dense"),
        ({}, {"X": torch.ones(5, 2, dtype=torch.complex64)}, ValueError, "Complex data not supported"),
        ({}, {"sample_weight": [1, 1, 1, 1, -1]}, ValueError, "sample_weight must not be negative, got -1"),
        ({}, {"sample_weight": np.zeros(5)}, ValueError, "sample_weight is zero for every row"),
        ({}, {"sample_weight": np.ones(4)}, ValueError, r"sample_weight has shape \(4,\); expected.*\(5,\)"),
        ({}, {"sample_weight": [1, 1, 1, 1, np.nan]}, ValueError, "sample_weight contains NaN"),
    ],
)
def test_bad_input(params, arguments, error, message):
    arguments = {"X": np.arange(10.0).reshape(5, 2) ** 2, "y": np.arange(5.0), **arguments}
    with pytest.raises(error, match=message):
        Ridge(**params).fit(**arguments)


def test_bad_predict():
    with pytest.raises(NotFittedError):
        Ridge().predict([[1.0]])
    ours = Ridge().fit(np.eye(3), np.arange(3.0))
    with pytest.raises(ValueError, match="2 features"):
        ours.predict(np.eye(2))
    with pytest.raises(ValueError, match="Input X contains NaN"):
        ours.predict(torch.full((1, 3), torch.nan))
