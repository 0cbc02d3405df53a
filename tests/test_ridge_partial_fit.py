"""Ridge.partial_fit against fit on all rows."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from ridge_cases import minimum_norm, problem, rank_deficient, tolerance
from scipy.linalg import LinAlgWarning
from sklearn import linear_model
from sklearn.base import clone

from onestep import Ridge

# --------------------------------------------------------------------------------------------------------- partial_fit


def stream(model, X, y, weight=None, sizes=(7,)):
    """partial_fit on chunks, of these sizes over and over."""
    start = index = 0
    while start < len(X):
        rows = slice(start, start + sizes[index % len(sizes)])
        model.partial_fit(X[rows], y[rows], None if weight is None else weight[rows])
        start, index = rows.stop, index + 1
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize(("n", "d", "sizes"), [(60, 1, (7,)), (60, 7, (1,)), (300, 7, (100, 1, 50)), (6, 40, (2, 4))])
def test_partial_fit_agrees_with_fit(rng, n, d, sizes, k, fit_intercept, weighted, dtype):
    X, y = problem(rng, n, d, k, dtype)
    weight = rng.uniform(0.1, 2.0, size=n).astype(dtype) if weighted else None
    alpha = 0.7 if k is None else np.arange(1.0, k + 1.0)
    expected = Ridge(alpha, fit_intercept=fit_intercept).fit(X, y, weight)
    ours = stream(Ridge(alpha, fit_intercept=fit_intercept), X, y, weight, sizes)
    for name in ("coef_", "intercept_"):
        np.testing.assert_allclose(
            getattr(ours, name), getattr(expected, name), rtol=tolerance(dtype), atol=tolerance(dtype)
        )
        assert np.shape(getattr(ours, name)) == np.shape(getattr(expected, name))
    assert ours.coef_.dtype == ours.predict(X).dtype == dtype
    assert ours.n_features_in_ == d
    assert ours.solver_path_ == "cholesky"


def test_partial_fit_is_up_to_date_after_each_call(rng):
    X, y = problem(rng, 40, 6)
    ours = Ridge(0.5)
    for start in range(0, 40, 4):
        assert ours.partial_fit(X[start : start + 4], y[start : start + 4]) is ours
        expected = Ridge(0.5).fit(X[: start + 4], y[: start + 4])
        np.testing.assert_allclose(ours.predict(X), expected.predict(X), rtol=1e-9)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_partial_fit_without_ridge_is_of_minimum_norm_until_there_are_rows_enough(rng, fit_intercept):
    X, y = problem(rng, 8, 5, 2)
    ours = Ridge(0.0, fit_intercept=fit_intercept)
    for n in range(1, 9):
        rank = min(5, n - fit_intercept)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.partial_fit(X[n - 1 : n], y[n - 1 : n])
        expected = minimum_norm(X[:n], y[:n], None, fit_intercept)
        np.testing.assert_allclose(ours.coef_, expected, rtol=1e-6, atol=1e-9)
        if rank < 5:
            assert ours.solver_path_ == "minimum_norm"
            assert [(w.category, w.filename) for w in caught] == [(LinAlgWarning, __file__)]
            assert f"rank {rank} of 5 features" in str(caught[0].message)
        else:
            assert ours.solver_path_ == "cholesky"
            assert not caught


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("case", ["duplicate", "constant", "sum", "zero"])
def test_partial_fit_without_ridge_rank_deficient_is_minimum_norm(rng, case, fit_intercept, dtype):
    X, y = rank_deficient(rng, 500, case)
    X, y = X.astype(dtype), y.astype(dtype)
    weight = rng.uniform(0.5, 2.0, size=len(X)).astype(dtype)
    with pytest.warns(LinAlgWarning, match=r"rank \d of 6 features.*minimum norm"):
        ours = stream(Ridge(0.0, fit_intercept=fit_intercept), X, y, weight, (90, 30))
    assert ours.solver_path_ == "minimum_norm"
    expected = minimum_norm(*(a.astype(np.float64) for a in (X, y, weight)), fit_intercept)
    np.testing.assert_allclose(ours.coef_, expected, rtol=tolerance(dtype), atol=tolerance(dtype))


def test_partial_fit_with_tiny_ridge_on_collinear_features_is_accurate(rng):
    X, y = problem(rng, 80, 4)
    X[:, 3] = X[:, 2]
    ours = stream(Ridge(1e-7), X, y)
    assert ours.solver_path_ == "eigh"
    np.testing.assert_allclose(ours.coef_, minimum_norm(X, y[:, None], None, True)[0], rtol=1e-6)
    alphas = stream(Ridge([1e-7, 1.0]), X, np.column_stack([y, y]))
    assert alphas.solver_path_ == "eigh+cholesky"
    np.testing.assert_allclose(alphas.coef_, [ours.coef_, Ridge(1.0).fit(X, y).coef_], rtol=1e-9)


def test_partial_fit_of_nearly_dependent_features_keeps_what_sums_can(rng):
    X, y = problem(rng, 400, 4)
    X[:, 3] = X[:, 2] + 1e-5 * X[:, 3]
    ours = stream(Ridge(0.0), X, y)
    assert ours.solver_path_ == "eigh"
    np.testing.assert_allclose(ours.coef_, Ridge(0.0).fit(X, y).coef_, rtol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1e-3])
@pytest.mark.parametrize("closeness", [1e-1, 1e-2, 1e-3, 1e-4])
def test_partial_fit_in_fp32_on_nearly_collinear_features_is_accurate(rng, closeness, alpha, weighted):
    X, y = problem(rng, 3000, 5)
    X[:, 4] = X[:, 3] + closeness * X[:, 4]
    X, y = X.astype(np.float32), y.astype(np.float32)
    weight = rng.uniform(0.5, 2.0, size=len(X)).astype(np.float32) if weighted else None
    ours = stream(Ridge(alpha), X, y, weight, (1000, 400))
    theirs = linear_model.Ridge(alpha, solver="svd").fit(X.astype(np.float64), y.astype(np.float64), weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-4, atol=1e-5)


def test_partial_fit_sums_fp32_rows_in_fp64_only_where_they_need_it(rng, monkeypatch):
    from onestep.linalg import _accumulate

    seen = []
    moments = _accumulate.moments

    def spy(X, Y, **options):
        seen.append((X.data_ptr(), X.dtype))
        return moments(X, Y, **options)

    monkeypatch.setattr(_accumulate, "moments", spy)
    X, y = problem(rng, 1000, 4, dtype=np.float32)
    good, bad, constant = X, X.copy(), X.copy()
    bad[:, 3] = bad[:, 2]
    constant[:, 3] = 5.0
    ours = Ridge().partial_fit(good, y)
    assert seen == [(good.ctypes.data, torch.float32)]
    ours.partial_fit(constant, y)
    assert seen[1:] == [(constant.ctypes.data, torch.float32)]
    ours.partial_fit(bad, y)
    assert [dtype for _, dtype in seen[2:]] == [torch.float32, torch.float64]


@pytest.mark.parametrize("closeness", [2e-6, 1e-4])
def test_partial_fit_judges_the_rank_of_fp32_rows_as_fit_does(rng, closeness):
    X, y = problem(rng, 500, 60)
    X[:, 3] = X[:, 2] + closeness * X[:, 3]
    X, y = X.astype(np.float32), y.astype(np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        paths = Ridge(0.0).fit(X, y).solver_path_, stream(Ridge(0.0), X, y, sizes=(500,)).solver_path_
    few = closeness == 2e-6
    assert paths == (("minimum_norm", "minimum_norm") if few else ("least_squares", "eigh"))
    assert ["rank 59 of 60" in str(w.message) for w in caught] == ([True, True] if few else [])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("constant", [1 / 3, 12345.678])
def test_partial_fit_gives_a_constant_feature_no_say(rng, constant, dtype):
    X, y = problem(rng, 1000, 3, dtype=dtype)
    X[:, 1] = constant
    weight = rng.uniform(0.5, 2.0, size=len(X)).astype(dtype)
    with pytest.warns(LinAlgWarning, match="rank 2 of 3"):
        ours = stream(Ridge(0.0), X, y, weight, (64,))
    assert ours.coef_[1] == 0.0
    expected = Ridge(0.0).fit(X[:, [0, 2]], y, weight)
    np.testing.assert_allclose(ours.coef_[[0, 2]], expected.coef_, rtol=tolerance(dtype))


@pytest.mark.parametrize("shape", [(200, 5), (20, 30)])
def test_partial_fit_with_large_offsets_does_not_cancel(rng, shape):
    X = rng.normal(size=shape).astype(np.float32) + np.float32(1e4)
    w = rng.normal(size=shape[1])
    y = X.astype(np.float64) @ w
    y = (y - y.mean() + 1e4).astype(np.float32)
    ours = stream(Ridge(0.1), X, y)
    theirs = linear_model.Ridge(0.1, solver="svd").fit(X.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-5)


def test_partial_fit_on_a_feature_that_varies_between_chunks_only(rng):
    X, y = problem(rng, 90, 3)
    X[:, 1] = np.repeat([0.1, 0.7, 0.3], 30)
    np.testing.assert_allclose(stream(Ridge(0.1), X, y, sizes=(30,)).coef_, Ridge(0.1).fit(X, y).coef_, rtol=1e-12)


def test_partial_fit_follows_alpha(rng):
    X, y = problem(rng, 30, 4)
    ours = Ridge(1.0).partial_fit(X[:10], y[:10]).set_params(alpha=0.1).partial_fit(X[10:], y[10:])
    np.testing.assert_allclose(ours.coef_, Ridge(0.1).fit(X, y).coef_, rtol=1e-12)


@pytest.mark.parametrize("first", [np.float32, np.float64])
def test_partial_fit_takes_rows_of_either_type(rng, first):
    X, y = problem(rng, 60, 4, dtype=np.float32)
    second = np.float64 if first == np.float32 else np.float32
    ours = Ridge().partial_fit(X[:30].astype(first), y[:30].astype(first))
    ours.partial_fit(X[30:].astype(second), y[30:].astype(second))
    assert ours.coef_.dtype == second
    np.testing.assert_allclose(ours.coef_, Ridge().fit(X, y).coef_, rtol=1e-5)


@pytest.mark.parametrize("k", [None, 2])
def test_partial_fit_on_tensors(rng, k):
    X, y = (torch.from_numpy(a) for a in problem(rng, 30, 4, k))
    weight = torch.rand(30, dtype=torch.float64)
    ours = stream(Ridge(), X.clone().requires_grad_(), y.clone().requires_grad_(), weight.clone().requires_grad_())
    expected = stream(Ridge(), X.numpy(), y.numpy(), weight.numpy())
    for value, other in [(ours.coef_, expected.coef_), (ours.intercept_, expected.intercept_)]:
        assert isinstance(value, torch.Tensor)
        assert not value.requires_grad
        np.testing.assert_array_equal(value.numpy(), other)


def test_partial_fit_goes_on_after_pickling(rng):
    X, y = problem(rng, 30, 4)
    ours = Ridge().partial_fit(X[:20], y[:20])
    loaded = pickle.loads(pickle.dumps(ours)).partial_fit(X[20:], y[20:])
    np.testing.assert_array_equal(loaded.coef_, ours.partial_fit(X[20:], y[20:]).coef_)
    np.testing.assert_allclose(loaded.coef_, Ridge().fit(X, y).coef_, rtol=1e-9)


def test_fit_and_clone_forget_what_partial_fit_saw(rng):
    X, y = problem(rng, 30, 4)
    ours = Ridge().partial_fit(X[:20] + 5, y[:20])
    expected = Ridge().partial_fit(X[20:], y[20:])
    np.testing.assert_array_equal(clone(ours).partial_fit(X[20:], y[20:]).coef_, expected.coef_)
    np.testing.assert_array_equal(ours.fit(X, y).coef_, Ridge().fit(X, y).coef_)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.partial_fit(X[20:, :3], y[20:]).partial_fit(X[20:, :3], y[20:])
    assert [(str(w.message)[:27], w.filename) for w in caught] == [("fit keeps no sums of its ro", __file__)]
    np.testing.assert_allclose(
        ours.coef_, Ridge().fit(np.tile(X[20:, :3], (2, 1)), np.tile(y[20:], 2)).coef_, rtol=1e-9
    )


def test_partial_fit_on_data_frames(rng):
    pandas = pytest.importorskip("pandas")
    X, y = problem(rng, 20, 3)
    frame = pandas.DataFrame(X, columns=["a", "b", "c"])
    ours = stream(Ridge(), frame, pandas.Series(y))
    assert list(ours.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_allclose(ours.coef_, Ridge().fit(X, y).coef_, rtol=1e-9)
    with pytest.raises(ValueError, match="feature names should match"):
        ours.partial_fit(frame.rename(columns={"a": "z"}), y)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        ours.partial_fit(X, y)
    assert list(ours.feature_names_in_) == ["a", "b", "c"]


def hole(X):
    return np.where(np.arange(X.size).reshape(X.shape) == 4, np.nan, X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("params", "change", "error", "message"),
    [
        ({}, {"X": hole}, ValueError, "Input X contains NaN"),
        ({}, {"X": lambda X: X / 0}, ValueError, "Input X contains infinity"),
        ({}, {"X": lambda X: X * 1e38 * X * 1e38 * 1e100}, ValueError, "products overflow|Input X contains infinity"),
        ({}, {"X": lambda X: X[:, :2]}, ValueError, "X has 2 features, but Ridge is expecting 3"),
        ({}, {"X": lambda X: X[:-1]}, ValueError, "inconsistent numbers of samples"),
        ({}, {"X": lambda X: X[:0], "y": lambda y: y[:0]}, ValueError, "0 sample"),
        ({}, {"y": lambda y: y * np.nan}, ValueError, "Input y contains NaN"),
        ({}, {"y": lambda y: np.column_stack([y, y])}, ValueError, "y has 2 targets; expected 1, as in the first call"),
        ({}, {"sample_weight": lambda _: [-1.0] * 9}, ValueError, "sample_weight must not be negative"),
        ({}, {"sample_weight": lambda _: [0.0] * 9}, ValueError, "sample_weight is zero for every row"),
        ({}, {"sample_weight": lambda _: [1.0]}, ValueError, r"sample_weight has shape \(1,\)"),
        ({"fit_intercept": False}, {}, ValueError, "fit_intercept is False; expected True, as in the first call"),
        ({"fit_intercept": 1}, {}, TypeError, "fit_intercept must be True or False"),
        ({"alpha": -1.0}, {}, ValueError, "alpha must be non-negative"),
        ({"alpha": [1.0, 2.0]}, {}, ValueError, "alpha holds 2 penalties for 1 targets"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow", "ignore:invalid value")
def test_a_bad_partial_fit_raises_and_adds_nothing(rng, params, change, error, message, dtype):
    X, y = problem(rng, 18, 3, dtype=dtype)
    ours = Ridge().partial_fit(X[:9], y[:9])
    before = ours.coef_.copy()
    arguments = {"X": X[9:], "y": y[9:], "sample_weight": None}
    bad = {name: change.get(name, lambda value: value)(value) for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        ours.set_params(**params).partial_fit(**bad)
    np.testing.assert_array_equal(ours.coef_, before)
    ours.set_params(alpha=1.0, fit_intercept=True).partial_fit(**arguments)
    np.testing.assert_array_equal(ours.coef_, Ridge().partial_fit(X[:9], y[:9]).partial_fit(X[9:], y[9:]).coef_)


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_a_warning_that_is_an_error_adds_nothing(rng):
    X, y = problem(rng, 6, 4)
    ours = Ridge(0.0).partial_fit(X[:2], y[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", LinAlgWarning)
        with pytest.raises(LinAlgWarning):
            ours.partial_fit(X[2:3] + 1, y[2:3])
    ours.partial_fit(X[2:], y[2:])
    np.testing.assert_array_equal(ours.coef_, Ridge(0.0).partial_fit(X[:2], y[:2]).partial_fit(X[2:], y[2:]).coef_)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
@pytest.mark.parametrize(("n", "d"), [(20, 40), (30, 30), (5, 100)])
def test_a_large_mean_does_not_pass_for_a_rank(n: int, d: int, mean: float, weighted: bool) -> None:
    """Centred rows have rank n - 1; what rounding the mean leaves of it is not one more."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((n, d)) + mean, rng.standard_normal(n)
    weight = rng.uniform(0.5, 2.0, n) if weighted else None
    with pytest.warns(LinAlgWarning, match=f"rank {n - 1} of {d}"):
        model = Ridge(alpha=0.0).fit(X, y, weight)
    centred = X - X.mean(axis=0)
    centred -= centred.mean(axis=0)
    # The least norm among those that interpolate, with an intercept that is free.
    coef = np.linalg.pinv(centred, rcond=1e-13) @ (y - y.mean())
    np.testing.assert_allclose(model.coef_, coef, rtol=1e-6, atol=1e-8 * (1 + mean * 1e-3))
