"""Random calls of ops, functions, estimators and the command line: none may crash, hang or raise a foreign error.

``python tests/fuzz.py --calls 10000`` prints its seed; ``--seed`` repeats a run. ``tests/test_fuzz.py`` makes a few
hundred of the same calls in ``make test``. Hypothesis draws the arguments: sizes around zero and around the kernels'
tiles, strides, dtypes, NaN and Inf, mostly shapes that fit and now and then one that does not.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import inspect
import io
import itertools
import random
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import onestep
from onestep import curvature, functional, linalg
from onestep.cli import main

# A call that runs longer hangs: the sizes are small.
SECONDS_PER_CALL = 30
ALLOWED = (ValueError, TypeError, torch.linalg.LinAlgError, np.linalg.LinAlgError, NotImplementedError, MemoryError)
SIZES = (0, 1, 2, 3, 5, 8, 9, 16, 17, 33)
FLOATS = (torch.float32, torch.float64)
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool, torch.complex64)
LINALG = (
    "solve_normal",
    "solve_normal_ex",
    "gram",
    "moments",
    "cholesky",
    "cholesky_ex",
    "cholesky_solve",
    "solve_spd",
)
LINALG += ("solve_spd_ex", "equations")
FAMILIES = ("gaussian", "logistic", "softmax", "poisson")


class ForeignError(AssertionError):
    """An error that a user cannot act on."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Raises in a call that does not end; faulthandler shows where a call that cannot be interrupted is."""

    def stop(*_: object) -> None:
        raise ForeignError(f"no answer after {SECONDS_PER_CALL} s")

    faulthandler.dump_traceback_later(2 * SECONDS_PER_CALL, exit=True)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_CALL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def attempt(function: Callable[..., Any], arguments: dict[str, Any], names: tuple[str, ...] = ()) -> Any:
    """Calls the function; an error must be one of ALLOWED and name an argument."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(**arguments)
    except ALLOWED as error:
        known = {*arguments, *names}
        if not isinstance(error, MemoryError) and not any(re.search(rf"\b{name}\b", str(error)) for name in known):
            raise ForeignError(f"{type(error).__name__} names no argument of {sorted(known)}: {error}") from error
    except ForeignError:
        raise
    except Exception as error:
        raise ForeignError(f"{type(error).__name__}: {error}") from error
    return None


# ------------------------------------------------------------------------------------------------------------- tensors


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], *, positive: bool = False, classes: int | None = None) -> torch.Tensor:
    """A tensor of this shape, one time in eight of another one or of a dtype that is not taken; of any strides."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    odd = draw(st.integers(0, 15))
    if odd == 0:
        shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=4)))
    dtype = draw(st.sampled_from(OTHER_DTYPES)) if odd == 1 else draw(st.sampled_from(FLOATS))
    layout = draw(st.sampled_from(("contiguous", "transposed", "sliced", "expanded")))
    if layout == "expanded" and shape:
        values = torch.randn(*shape[:-1], 1, generator=generator, dtype=torch.float64).expand(shape)
    elif layout == "transposed" and len(shape) >= 2:
        values = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator, dtype=torch.float64).mT
    elif layout == "sliced" and shape:
        values = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator, dtype=torch.float64)[..., 1::2]
    else:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if classes is not None and odd != 1:
        return torch.randint(-1 if odd == 2 else 0, max(classes, 1) + (odd == 3), shape, generator=generator)
    if positive and odd != 4:
        values = values.abs()
    if odd == 5 and values.numel():
        values = values.contiguous().clone()
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(
            st.sampled_from((float("nan"), float("inf"), 1e300, -1e300))
        )
    if odd == 6:
        values = values * 1e-30
    return values.to(dtype)


def maybe(draw: Any, strategy: Any) -> Any:
    return draw(strategy) if draw(st.booleans()) else None


def same_dtype(draw: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Seven times in eight all floating tensors get one dtype."""
    if draw(st.integers(0, 7)):
        dtype = draw(st.sampled_from((*FLOATS, torch.bfloat16)))
        arguments = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in arguments.items()
        }
    return arguments


@st.composite
def sizes(draw: Any) -> tuple[tuple[int, ...], int, int, int]:
    """Batch, n, d, k."""
    batch = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3)), max_size=2)))
    return batch, *(draw(st.sampled_from(SIZES)) for _ in range(3))


# --------------------------------------------------------------------------------------------------------------- calls


@st.composite
def linalg_calls(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    batch, n, d, k = draw(sizes())
    X, Y = draw(tensors((*batch, n, d))), draw(tensors((*batch, n, k)))
    A, B = draw(tensors((*batch, d, d))), draw(tensors((*batch, d, k)))
    weight = maybe(draw, tensors((*batch, n), positive=True))
    ridge = draw(st.one_of(st.sampled_from((0.0, 1.0, -1.0, float("nan"))), tensors((d,), positive=True)))
    name = draw(st.sampled_from(LINALG))
    if name == "equations":
        arguments = {"d": d, "k": k, "X": X, "Y": Y, "weight": weight, "ridge": ridge}

        def equations(d: int, k: int, X: Any, Y: Any, weight: Any, ridge: Any) -> Any:
            normal = linalg.NormalEquations(d, k, intercept=bool(n % 2))
            normal.update(X, Y, weight)
            return normal.solve(ridge=ridge)

        return equations, same_dtype(draw, arguments), ("rows", "info")
    values = {
        "X": X,
        "Y": Y,
        "weight": weight,
        "ridge": ridge,
        "A": A,
        "B": B,
        "L": A,
        "refine": draw(st.integers(-1, 2)),
    }
    if draw(st.booleans()) and d and A.is_floating_point() and A.shape[-2:] == (d, d):
        values["A"] = A @ A.mT + torch.eye(d, dtype=A.dtype)
    function = getattr(linalg, name)
    taken = {name: values[name] for name in inspect.signature(function).parameters if name in values}
    # "2 of 6 matrices could not be solved" names them by their info.
    return function, same_dtype(draw, taken), ("info",)


@st.composite
def functional_calls(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    batch, n, d, k = draw(sizes())
    if draw(st.booleans()):
        classes = max(k, 1)
        arguments = {
            "input": draw(tensors((*batch, n, d))),
            "weight": draw(tensors((classes, d))),
            "target": draw(tensors((*batch, n), classes=classes)),
            "bias": maybe(draw, tensors((classes,))),
            "ignore_index": draw(st.sampled_from((-100, 0))),
            "label_smoothing": draw(st.sampled_from((0.0, 0.1, 2.0))),
            "reduction": draw(st.sampled_from(("mean", "sum", "none", "total"))),
        }
        return differentiated(draw, functional.linear_cross_entropy), same_dtype(draw, arguments), ()
    heads = draw(st.sampled_from((0, 1, 2, 4)))
    keys = draw(st.sampled_from(SIZES))
    group = draw(st.sampled_from((1, 1, 2)))
    arguments = {
        "query": draw(tensors((*batch, heads, n, d))),
        "key": draw(tensors((*batch, heads // group, keys, d))),
        "value": draw(tensors((*batch, heads // group, keys, k))),
        "attn_mask": maybe(draw, st.one_of(tensors((n, keys)), tensors((*batch, heads, n, keys)))),
        "is_causal": draw(st.booleans()),
        "enable_gqa": group == 2,
        "scale": draw(st.sampled_from((None, 0.0, -1.0, float("inf")))),
    }
    return differentiated(draw, functional.scaled_dot_product_attention), same_dtype(draw, arguments), ("heads",)


def differentiated(draw: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, or its gradient, or a Hessian-vector product, in all its floating arguments."""
    order = draw(st.integers(0, 2))

    def call(**arguments: Any) -> Any:
        if order == 0:
            return function(**arguments)
        moving = {k: v.detach() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
        rest = {name: value for name, value in arguments.items() if name not in moving}

        def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            return function(**parameters, **rest).float().square().sum()

        # torch's own forward mode takes no expanded tensors.
        moving = {name: value.clone() if order == 2 else value for name, value in moving.items()}
        gradient = torch.func.grad(loss)
        if order == 1 or not moving:
            return gradient(moving)
        return torch.func.jvp(gradient, (moving,), ({k: torch.ones_like(v) for k, v in moving.items()},))[1]

    return call


@st.composite
def glm_calls(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    _, n, d, k = draw(sizes())
    family = draw(st.sampled_from((*FAMILIES, "gamma")))
    intercept = draw(st.booleans())
    shape = (d + intercept, k) if family == "softmax" or draw(st.booleans()) else (d + intercept,)
    arguments = {
        "X": draw(tensors((n, d))),
        "y": draw(tensors((n,), positive=True, classes=k if family == "softmax" else 2)),
        "W": draw(tensors(shape)),
        "family": family,
        "weight": maybe(draw, tensors((n,), positive=True)),
        "intercept": intercept,
    }

    def products(**given: Any) -> Any:
        point = curvature.glm(**given)
        return point.loss, point.grad, point.hvp(torch.ones_like(point.grad)), point.gram()

    return products, same_dtype(draw, arguments), ()


@st.composite
def estimator_calls(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    _, n, d, k = draw(sizes())
    name = draw(st.sampled_from(("Ridge", "RidgeCV", "RidgeClassifier", "LogisticRegression", "PoissonRegressor")))
    classifies = name in ("RidgeClassifier", "LogisticRegression")
    y = tensors((n,), positive=True, classes=draw(st.sampled_from((1, 2, 3))) if classifies else None)
    if name == "Ridge" and draw(st.booleans()):
        y = tensors((n, k))
    weight = maybe(draw, tensors((n,), positive=True))
    arguments = {
        "X": _array(draw(tensors((n, d)))),
        "y": _array(draw(y)),
        "sample_weight": None if weight is None else _array(weight),
    }
    options = (
        {"alpha": draw(st.sampled_from((0.0, 1.0, 1e-12, -1.0)))}
        if name not in ("RidgeCV", "LogisticRegression")
        else {}
    )
    options["fit_intercept"] = draw(st.booleans())

    def fitted(X: Any, y: Any, sample_weight: Any) -> Any:
        return getattr(onestep, name)(**options).fit(X, y, sample_weight=sample_weight).predict(X)

    # What scikit-learn's own checks call them.
    return (
        fitted,
        arguments,
        ("alpha", "sample", "samples", "feature", "features", "class", "classes", "Input", "label", "array", "data"),
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


@st.composite
def op_calls(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    """torch.ops.onestep.* called bare, with plain numbers that nobody has checked."""
    _, n, d, k = draw(sizes())
    X, weight = draw(tensors((n, d))), maybe(draw, tensors((n,), positive=True))
    family, intercept = draw(st.integers(-1, 5)), draw(st.booleans())
    outputs = (k,) if family == FAMILIES.index("softmax") else ()
    y = draw(tensors((n,), positive=True, classes=k if outputs else None))
    W = draw(tensors((d + intercept, *outputs)))
    widths = draw(st.lists(st.sampled_from((-1, 0, 1, 2, 7, 16)), max_size=2))
    widths = [d, *widths, max(k, 1)]
    count = max(0, sum(a * b + b for a, b in itertools.pairwise(widths)))
    layers = {
        "parameters": draw(tensors((count,))),
        "widths": widths,
        "activations": draw(st.lists(st.integers(-1, 4), min_size=len(widths) - 2, max_size=len(widths) - 1)),
        "biased": [True] * (len(widths) - 1),
    }
    calls = {
        "glm_point": {"X": X, "y": y, "W": W, "weight": weight, "family": family, "intercept": intercept},
        "glm_product": {
            "V": draw(tensors(tuple(W.shape))),
            "X": X,
            "W": W,
            "weight": weight,
            "curvature": draw(tensors((n, *outputs))),
            "family": family,
            "intercept": intercept,
        },
        "mlp_gradient": {"X": X, "y": draw(tensors((n, max(k, 1)))), **layers, "wants_gradient": intercept},
        "mlp_product": {"X": X, **layers, "v": maybe(draw, tensors((count,)))},
        "mlp_jacobian": {"X": X, **layers, "scale": 1.0},
        "apply_normal_inverse": {
            "B": draw(tensors((d, k))),
            "X": X,
            "weight": weight,
            "ridge": None,
            "L": draw(tensors((d, d))),
        },
        "cholesky_solve": {"B": draw(tensors((d, k))), "L": draw(tensors((d, d)))},
    }
    name = draw(st.sampled_from(sorted(calls)))
    names = ("layers", "layer", "activation", "features", "classes", "info")
    return getattr(torch.ops.onestep, name), same_dtype(draw, calls[name]), names


CELLS = (
    "1",
    "2.5",
    "-3",
    "0",
    "1e3",
    "",
    "NA",
    "nan",
    "inf",
    "1,5",
    "1,037",
    "$4",
    "7%",
    "u",
    "v",
    "w",
    "a b",
    "2021-03-05",
)
ODD_CELLS = ('"', "\0", "é", "9007199254740993", "x" * 50, "1e999", "\r")


@st.composite
def command_lines(draw: Any) -> tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]:
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(0, 12))
    cells = st.sampled_from(CELLS + ODD_CELLS if draw(st.integers(0, 3)) == 0 else CELLS)
    if draw(st.booleans()):
        cells = st.floats(-100, 100).map(str)
    lines = [[f"c{i}" for i in range(columns)]]
    lines += [[draw(cells) for _ in range(columns - (draw(st.integers(0, 40)) == 0))] for _ in range(rows)]
    quote = draw(st.booleans())
    text = "\n".join(",".join(f'"{c}"' if quote else c for c in line) for line in lines) + "\n"
    options = draw(
        st.lists(
            st.sampled_from(("--impute median", "--alpha 1", "--test-size 0", "--task classification", "--missing"))
            | st.sampled_from(("--thousands ,", "--decimal ,", "--dates c1", "--categorical c1", "--dtype float32")),
            max_size=3,
            unique=True,
        )
    )

    def run(text: str, options: list[str]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.csv"
            path.write_bytes(text.encode())
            model = path.with_suffix(".safetensors")
            words = ["fit", str(path), "--target", "c0", "--save", str(model), *" ".join(options).split()]
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                codes = [main(words)]
                if model.exists():
                    codes.append(main(["predict", str(model), str(path)]))
        if not set(codes) <= {0, 2} or "Traceback" in out.getvalue():
            raise ForeignError(f"exit codes {codes}: {out.getvalue()}")
        return codes

    return run, {"text": text, "options": options}, ()


CALLS = st.one_of(op_calls(), linalg_calls(), functional_calls(), glm_calls(), estimator_calls(), command_lines())


def run_calls(calls: int, number: int) -> None:
    """Makes so many random calls; raises at the first that ends wrongly, with the smallest arguments that do."""

    @settings(
        max_examples=calls,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(CALLS)
    def check(call: tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]) -> None:
        attempt(*call)

    check()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    given_arguments = parser.parse_args()
    print(f"{given_arguments.calls} calls, --seed {given_arguments.seed}", flush=True)
    run_calls(given_arguments.calls, given_arguments.seed)
    print("no crash, no hang, no foreign error")
