"""Estimators on features that are read as they are stored: 16-bit floats, and numpy memmaps of any numbers."""

import sys

import numpy as np
import pytest
import torch
from processes import Child
from sklearn.base import clone

from onestep import LogisticRegression, LogisticRegressionCV, PoissonRegressor, Ridge, RidgeClassifier, RidgeCV
from onestep.estimators import _path

N, D = 300, 6


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("onestep.linalg.narrow._CHUNK", 100 * D)
    monkeypatch.setattr("onestep.estimators._indicators._CONVERTED", 100 * D)
    monkeypatch.setattr("onestep.estimators._indicators._WINDOW", 100 * D)
    monkeypatch.setattr("onestep.solvers.coordinates._BLOCK", 100 * D)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


MODELS = {
    "Ridge": Ridge(),
    "RidgeCV": RidgeCV([0.1, 10.0], alpha_per_target=True),
    "RidgeCV by folds": RidgeCV([0.1, 10.0], cv=3),
    "RidgeClassifier": RidgeClassifier(),
    "LogisticRegression of two": LogisticRegression(tol=1e-5),
    "LogisticRegression": LogisticRegression(tol=1e-5),
    "LogisticRegression by L-BFGS": LogisticRegression(tol=1e-5),
    "LogisticRegressionCV": LogisticRegressionCV(Cs=[0.1], cv=2, tol=1e-5),
    "PoissonRegressor": PoissonRegressor(alpha=0.1),
}


def targets(rng, name, X):
    scores = X.astype(np.float64) @ rng.standard_normal((D, 3)) / 2
    if "of two" in name:
        return scores[:, 0] + rng.logistic(size=len(X)) > 0
    if "Logistic" in name or "Classifier" in name:
        return (scores + rng.gumbel(size=scores.shape)).argmax(1)
    if name == "PoissonRegressor":
        return rng.poisson(np.exp(np.minimum(scores[:, 0] / 4, 3.0)))
    return (scores + rng.standard_normal(scores.shape))[:, :2]


def assert_agreement(name, monkeypatch, rng, X, converted):
    """The same coefficients, predictions and score as of a converted copy."""
    if "L-BFGS" in name:
        monkeypatch.setattr(_path, "newton_pays", lambda n, shape: False)
    y, weight = targets(rng, name, np.asarray(converted)), rng.uniform(0.1, 2.0, size=N)
    ours, theirs = clone(MODELS[name]).fit(X, y, weight), clone(MODELS[name]).fit(converted, y, weight)
    assert type(ours.coef_) is type(theirs.coef_)
    assert ours.coef_.dtype == converted.dtype
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if "Ridge" in name else {"rtol": 1e-3, "atol": 1e-3}
    np.testing.assert_allclose(ours.coef_, theirs.coef_, **tolerance)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, **tolerance)
    assert ours.predict(X).dtype == theirs.predict(converted).dtype
    np.testing.assert_allclose(ours.predict(X), ours.predict(converted), rtol=1e-5, atol=1e-5)
    assert ours.score(X, y) == pytest.approx(ours.score(converted, y), rel=1e-6)


@pytest.mark.parametrize("kind", ["numpy float16", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_sixteen_bits_are_float32(name, kind, monkeypatch, rng):
    X = torch.from_numpy(rng.standard_normal((N, D)) * 2 + 1)
    X[:, 5] = (X[:, 5] > 3).to(X.dtype)
    X = X.to(torch.bfloat16 if kind == "bfloat16" else torch.float16)
    if kind == "numpy float16":
        assert_agreement(name, monkeypatch, rng, X.numpy(), X.float().numpy())
    else:
        assert_agreement(name, monkeypatch, rng, X, X.float())


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
@pytest.mark.parametrize("name", ["Ridge", "RidgeClassifier", "LogisticRegression", "LogisticRegression by L-BFGS"])
def test_memmaps(name, dtype, monkeypatch, rng, tmp_path):
    values = (rng.standard_normal((N, D)) * 3 + 1).astype(dtype)
    np.save(tmp_path / "X.npy", values)
    X = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert_agreement(name, monkeypatch, rng, X, values.astype(np.float32 if dtype == np.float32 else np.float64))


WHOLE = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool", ">i4", ">u2"]


@pytest.mark.parametrize("kept", ["memory", "file"])
@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize(
    "model",
    [Ridge(), RidgeCV(), RidgeClassifier(), LogisticRegression(), LogisticRegressionCV(Cs=2), PoissonRegressor()],
)
def test_whole_numbers_are_float64(rng, tmp_path, model, dtype, kept):
    """As for scikit-learn: features of any integer type, in memory or in a file, are what their float64 copy is."""
    X = rng.integers(0, 2 if dtype == "bool" else 9, (80, 4)).astype(dtype)
    right = X.astype(np.float64)
    y = (right @ [1, -1, 0.5, 0] + rng.standard_normal(80) > 0.3).astype(int)
    if kept == "file":
        np.save(tmp_path / "X.npy", X)
        X = np.load(tmp_path / "X.npy", mmap_mode="r")
    ours, theirs = clone(model).fit(X, y), clone(model).fit(right, y)
    assert ours.coef_.dtype == np.float64
    # Sums over chunks of a file come in another order.
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(right), rtol=1e-6)
    assert ours.score(X, y) == pytest.approx(theirs.score(right, y))


@pytest.mark.parametrize("dtype", [">i4", ">f8", ">u2"])
@pytest.mark.parametrize("model", [RidgeClassifier(), LogisticRegression(), LogisticRegressionCV(Cs=2)])
def test_labels_of_another_byte_order(rng, model, dtype):
    X, y = rng.standard_normal((60, 3)), rng.integers(0, 3, 60)
    ours, theirs = clone(model).fit(X, y.astype(dtype)), clone(model).fit(X, y)
    assert ours.classes_.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ridge_of_few_rows_of_chunks_and_with_deviations(rng, dtype):
    X = torch.from_numpy(rng.standard_normal((40, 60))).to(dtype)
    y = rng.standard_normal(40)
    ours, theirs = Ridge().fit(X, y), Ridge().fit(X.float(), y)
    assert ours.solver_path_ == "dual_cholesky"
    torch.testing.assert_close(ours.coef_, theirs.coef_)
    X = X[:, :5]
    ours, theirs = Ridge().fit(X, y), Ridge().fit(X.float(), y)
    for mine, right in zip(ours.predict(X, return_std=True), theirs.predict(X.float(), return_std=True), strict=True):
        torch.testing.assert_close(mine, right)
    ours, theirs = Ridge(), Ridge()
    for rows in (slice(0, 25), slice(25, 40)):
        ours.partial_fit(X[rows], y[rows])
        theirs.partial_fit(X[rows].float(), y[rows])
    torch.testing.assert_close(ours.coef_, theirs.coef_)


@pytest.mark.parametrize("model", [Ridge(), RidgeCV(), LogisticRegression(), PoissonRegressor()])
def test_bad_values_and_shapes(rng, model):
    X, y = rng.standard_normal((N, D)).astype(np.float16), np.arange(N) % 2
    model.fit(X, y)
    with pytest.raises(ValueError, match=f"expecting {D} features"):
        model.predict(X[:, 1:])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X[1:], y)
    X[200, 3] = np.nan
    with pytest.raises(ValueError, match="X contains NaN"):
        model.predict(torch.from_numpy(X).bfloat16())
    with pytest.raises(ValueError, match="X contains NaN"):
        model.fit(X, y)


# Pages of a file are resident but not allocated: for it a limit of allocations is set, below the 146 MiB of a copy.
MEMORY = """
import pathlib, resource, sys
import numpy as np, torch
from onestep import LogisticRegression, PoissonRegressor, Ridge, RidgeClassifier, RidgeCV

torch.set_num_threads(1)
kind = sys.argv[1]
n, d = 300_000 if kind == "memmap" else 200_000, 128
y = np.arange(n) % 5
models = [Ridge(), RidgeClassifier(), LogisticRegression(max_iter=3)]
if kind == "memmap":
    X = np.memmap(sys.argv[2], np.float32, "r", shape=(n, d))
    tables = [X, X.view(np.int8)[:, :d]]
else:
    models += [RidgeCV(), PoissonRegressor(max_iter=3)]
    X = torch.empty(n, d, dtype=getattr(torch, kind))
    for rows in X.split(4000):
        rows.copy_(torch.randn(rows.shape))
    tables = [X.numpy() if kind == "float16" else X]

def status(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def fit(rows):
    for X in tables:
        for model in models:
            model.fit(X[:rows], y[:rows]).predict(X[:rows])

fit(2000)
if kind == "memmap":
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + (132 << 20),) * 2)
before = status("VmRSS")
fit(n)
print(max(0, status("VmHWM") - before) if kind != "memmap" else 0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "kind",
    [pytest.param("float16", marks=pytest.mark.long), "bfloat16", pytest.param("memmap", marks=pytest.mark.long)],
)
def test_x_is_not_copied(kind, tmp_path):
    if kind == "memmap":
        X = np.memmap(tmp_path / "X", np.float32, "w+", shape=(300_000, 128))
        X[:] = np.tile(np.random.default_rng(0).standard_normal((2000, 128), dtype=np.float32), (150, 1))
        # Columns that do not vary in a sample of the rows are looked at in all of them.
        X[:, 10:] = 1.0
        X[1, 10:] = 2.0
    done = Child(MEMORY, kind, tmp_path / "X").finish()
    assert done.output, done.errors
    assert int(done.output) < 72 << 20, "X has 98 MiB as float32; what five fits leave is counted, too"
