"""onestep.linalg on arrays of other libraries: no copy in, and out as what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onestep import linalg

RANDOM = np.random.default_rng(0)
X, Y = RANDOM.normal(size=(3, 20, 4)), RANDOM.normal(size=(3, 20, 2))
A = np.eye(4) + X.swapaxes(1, 2) @ X


class Array:
    """An array of a third library that knows DLPack and the array API standard alone."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __dlpack__(self, **options: Any) -> Any:
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        class Namespace:
            @staticmethod
            def from_dlpack(value: Any) -> Array:
                return Array(np.from_dlpack(value))

        return Namespace


@pytest.mark.parametrize("kind", [np.asarray, Array])
def test_every_function(kind: Any) -> None:
    """Against the same call with tensors."""
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
        linalg.polar: (x,),
        linalg.polar_ex: (x,),
        linalg.inverse_cholesky: (a,),
        linalg.solve_normal_segments: (x[0], y[0], torch.tensor([0, 8, 20])),
        linalg.solve_normal_segments_ex: (x[0], y[0], torch.tensor([0, 8, 20])),
    }
    for function, arguments in calls.items():
        expected, found = function(*arguments), function(*(kind(value.numpy()) for value in arguments))
        assert type(found) is (type(expected) if isinstance(expected, tuple) else type(kind(X)))
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        for of_tensors, of_arrays in pairs:
            if isinstance(of_tensors, torch.Tensor):
                assert isinstance(of_arrays, type(kind(X)))
                plain = of_arrays.data if isinstance(of_arrays, Array) else of_arrays
                np.testing.assert_array_equal(plain, of_tensors.numpy(), err_msg=function.__name__)


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
