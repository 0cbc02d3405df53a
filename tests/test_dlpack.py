"""onestep.linalg and the estimators on arrays of other libraries: no copy in, and out as what was given."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

import onestep
from onestep import linalg

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(3, 20, 4)), RANDOM.normal(size=(3, 20, 2))
A = np.eye(4) + X.swapaxes(1, 2) @ X


class Capsule:
    """An array of a library that knows DLPack alone."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()


class Array(Capsule):
    """An array of a library that knows DLPack and the array API standard."""

    def __array_namespace__(self) -> Any:
        class Namespace:
            @staticmethod
            def from_dlpack(value: Any) -> Array:
                return Array(np.from_dlpack(value))

        return Namespace


def plain(value: Any) -> Any:
    return value.data if isinstance(value, Capsule) else value


@pytest.mark.parametrize("kind", [np.asarray, Array, Capsule])
def test_every_function(kind: Any) -> None:
    """Against the same call with tensors; a kind that does not say how it is made comes back as numpy."""
    returned = np.ndarray if kind is Capsule else type(kind(X))
    x, y, a = torch.from_numpy(X), torch.from_numpy(Y), torch.from_numpy(A)
    calls = {
        linalg.solve_normal: (x, y),
        linalg.solve_normal_ex: (x, y),
        linalg.gram: (x, y),
        linalg.moments: (x[0], y[0]),
        linalg.cholesky: (a,),
        linalg.cholesky_ex: (a,),
        linalg.cholesky_solve: (y[:, :4], a),
        linalg.solve_spd: (a, y[:, :4]),
        linalg.solve_spd_ex: (a, y[:, :4]),
        linalg.inverse_cholesky: (a,),
        linalg.solve_normal_segments: (x[0], y[0], torch.tensor([0, 8, 20])),
        linalg.solve_normal_segments_ex: (x[0], y[0], torch.tensor([0, 8, 20])),
        linalg.polar: (x,),
        linalg.polar_ex: (x,),
        linalg.inverse_cholesky: (a,),
        linalg.solve_normal_segments: (x[0], y[0], torch.tensor([0, 8, 20])),
        linalg.solve_normal_segments_ex: (x[0], y[0], torch.tensor([0, 8, 20])),
    }
    for function, arguments in calls.items():
        expected, found = function(*arguments), function(*(kind(value.numpy()) for value in arguments))
        assert type(found) is (type(expected) if isinstance(expected, tuple) else returned)
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        for of_tensors, of_arrays in pairs:
            if isinstance(of_tensors, torch.Tensor):
                assert type(of_arrays) is returned
                np.testing.assert_array_equal(plain(of_arrays), of_tensors.numpy(), err_msg=function.__name__)
                assert plain(of_arrays).flags.writeable or kind is Array


def test_accumulated_equations() -> None:
    """The last chunk's kind, also after a pickle."""
    x, y = torch.from_numpy(X[0]), torch.from_numpy(Y[0])
    expected = linalg.NormalEquations(4, 2, intercept=True, dtype=torch.float64).update(x, y).solve(0.5)
    equations = linalg.NormalEquations(4, 2, intercept=True, dtype=torch.float64)
    equations.update(Array(X[0, :9]), Array(Y[0, :9]), Array(np.ones(9))).update(X[0, 9:], Y[0, 9:])
    found = pickle.loads(pickle.dumps(equations)).solve(0.5)
    assert isinstance(found, linalg.LinearSolution) and type(found.W) is np.ndarray
    np.testing.assert_allclose(found.W, expected.W.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.intercept, expected.intercept.numpy(), rtol=1e-12)
    assert type(equations.update(Array(X[1]), Array(Y[1])).sweep([0.1, 1.0]).W) is Array
    assert isinstance(equations.update(x, y).solve().W, torch.Tensor)


@pytest.mark.parametrize("kind", [Array, Capsule])
def test_estimators(kind: Any) -> None:
    """What is learnt and what is foretold are of the kind of X, classes of that of y; values are those of numpy's."""
    returned = np.ndarray if kind is Capsule else kind
    rows, real = X[0], Y[0]
    binary, three = (real[:, 0] > 0).astype(np.int64), np.digitize(real[:, 0], [-0.5, 0.5])
    weight = RANDOM.random(20)
    cases: list[tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = [
        (onestep.Ridge(), real, ("coef_", "intercept_"), ("predict",)),
        (onestep.RidgeCV(alpha_per_target=True), real, ("coef_", "intercept_", "alpha_"), ("predict",)),
        (onestep.RidgeClassifier(), three, ("coef_", "intercept_", "classes_"), ("predict", "decision_function")),
        (
            onestep.LogisticRegression(warm_start=True),
            binary,
            ("coef_", "intercept_", "classes_"),
            ("predict", "decision_function", "predict_proba", "predict_log_proba"),
        ),
        (onestep.LogisticRegressionCV(3, cv=2), three, ("coef_", "classes_"), ("predict", "predict_proba")),
        (onestep.PoissonRegressor(), np.abs(real[:, 0]), ("coef_", "intercept_"), ("predict",)),
    ]
    for estimator, y, learnt, methods in cases:
        expected = {name: getattr(estimator.fit(rows, y, weight), name) for name in learnt}
        foretold = {name: getattr(estimator, name)(rows) for name in methods}
        score = estimator.score(rows, y, weight)
        # The second fit of the one that starts warm begins with coefficients of this kind.
        estimator.fit(kind(rows), kind(y), kind(weight))
        if getattr(estimator, "warm_start", False):
            estimator.fit(kind(rows), kind(y), kind(weight))
        for name in learnt:
            assert type(getattr(estimator, name)) is returned, (estimator, name)
            np.testing.assert_allclose(plain(getattr(estimator, name)), expected[name], rtol=1e-4, err_msg=name)
        for name in methods:
            found = getattr(estimator, name)(kind(rows))
            assert type(found) is returned, (estimator, name)
            np.testing.assert_allclose(plain(found), foretold[name], rtol=1e-4, err_msg=name)
        assert estimator.score(kind(rows), kind(y), kind(weight)) == pytest.approx(score)
    mean, deviation = onestep.Ridge().fit(kind(rows), kind(real[:, 0])).predict(kind(rows), return_std=True)
    assert type(mean) is type(deviation) is returned
    # Features of one kind, names of classes as numpy has them.
    named = onestep.LogisticRegression().fit(kind(rows), np.array(["no", "yes"])[binary])
    assert set(named.predict(kind(rows))) <= {"no", "yes"} and type(named.coef_) is returned
    assert type(onestep.Ridge().partial_fit(kind(rows), kind(real)).coef_) is returned
    with pytest.raises(ValueError, match="not in the CPU's memory"):

        class Elsewhere(kind):  # type: ignore[misc]
            def __dlpack_device__(self) -> Any:
                return (2, 0)

        onestep.Ridge().fit(Elsewhere(rows), real)


def test_lists() -> None:
    """Where a function takes a list of tensors, a list of arrays gives a list of arrays."""
    expected = linalg.polar([torch.from_numpy(X[0]), torch.from_numpy(Y)])
    for found, of_tensors in zip(linalg.polar([X[0], Y]), expected, strict=True):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, of_tensors.numpy())
    (result,) = linalg.polar_ex((X[0],))
    assert isinstance(result.info, np.ndarray) and result.info == 0
    with pytest.raises(TypeError, match=r"M\[1\] is ndarray; expected torch.Tensor"):
        linalg.polar([torch.from_numpy(X[0]), Y])


def of_records(array: Any) -> Any:
    """A field of records, whose rows begin at odd addresses."""
    records = np.zeros(len(array), dtype=[("flag", "i1"), ("row", array.dtype, array.shape[1:])])
    records["row"] = array
    return records["row"]


@pytest.mark.parametrize(
    "kept",
    [
        lambda array: array[::-1],
        lambda array: Capsule(array[:, ::-1]),
        lambda array: Array(array[::-1]),
        lambda array: array.astype(">f8"),
        lambda array: array.astype(">f4")[:, ::-1],
        of_records,
    ],
    ids=["backwards", "capsule", "array", "big-endian", "both", "records"],
)
def test_arrays_that_torch_cannot_share(kept: Any) -> None:
    """torch ends the process where a stride is negative, and knows no other byte order."""
    given = kept(X[0])
    plainest = np.ascontiguousarray(plain(given), dtype=plain(given).dtype.newbyteorder("="))
    expected = linalg.gram(torch.from_numpy(plainest))
    np.testing.assert_array_equal(plain(linalg.gram(given)[0]), expected[0].numpy())


def test_layouts_weights_and_refusals() -> None:
    """Transposed and read-only arrays, keywords; arrays and tensors are not mixed."""
    fortran, weight = np.asfortranarray(X[0]), RANDOM.random(20)
    expected = linalg.solve_normal(
        torch.from_numpy(X[0]), torch.from_numpy(Y[0]), weight=torch.from_numpy(weight), ridge=0.5
    )
    fortran.flags.writeable = False
    np.testing.assert_array_equal(linalg.solve_normal(X=fortran, Y=Y[0], weight=weight, ridge=0.5), expected.numpy())
    with pytest.raises(TypeError, match="Y is ndarray"):
        linalg.solve_normal(torch.from_numpy(X), Y)
    with pytest.raises(torch.linalg.LinAlgError, match="positive definite"):
        linalg.cholesky(-np.eye(3))

    class Elsewhere(Array):
        def __dlpack_device__(self) -> Any:
            return (2, 0)

    with pytest.raises(ValueError, match="not in the CPU's memory"):
        linalg.cholesky(Elsewhere(A))


@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_other_libraries(library: str) -> None:
    module = pytest.importorskip(f"{library}.numpy" if library == "jax" else library, reason="not installed")
    make = module.asarray if library == "jax" else module.constant
    x, y = (make(value.astype(np.float32)) for value in (X, Y))
    found = linalg.solve_normal(x, y, ridge=0.1)
    assert type(found) is type(x)
    expected = linalg.solve_normal(torch.from_numpy(X).float(), torch.from_numpy(Y).float(), ridge=0.1)
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=1e-5)
    labels = make((Y[0, :, 0] > 0).astype(np.int32))
    model = onestep.LogisticRegression().fit(x[0], labels)
    assert type(model.coef_) is type(model.classes_) is type(x)
    for made, of in ((model.predict, labels.dtype), (model.predict_proba, x.dtype)):
        assert type(made(x[0])) is type(x) and made(x[0]).dtype == of
    assert type(onestep.RidgeCV(alpha_per_target=True).fit(x[0], y[0]).predict(x[0])) is type(x)
    assert model.score(x[0], labels) == onestep.LogisticRegression().fit(X[0], np.asarray(labels)).score(X[0], labels)
