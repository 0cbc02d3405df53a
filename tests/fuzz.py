"""Random calls of ops, functions, estimators and the command line: none may crash, hang or raise a foreign error.

``python tests/fuzz.py --calls 10000`` prints its seed; ``--seed`` repeats a run. ``tests/test_fuzz.py`` makes a few
hundred of the same calls in ``make test``. Hypothesis draws the arguments: sizes around zero and around the kernels'
tiles, strides, dtypes, NaN and Inf, mostly shapes that fit and now and then one that does not.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import random
from collections.abc import Callable, Collection
from typing import Any

import hypothesis.strategies as st
import torch

# torch imports its compiler in the first call of some functions, which may take longer than an answer may.
import torch._dynamo
from fuzz_draws import SIZES, Call, attempt, maybe, same_dtype, sizes, tensors
from fuzz_models import estimator_calls, fit_calls, operator_calls, polar_calls
from fuzz_tables import command_lines
from hypothesis import HealthCheck, Phase, given, seed, settings

from onestep import curvature, functional, linalg

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


# --------------------------------------------------------------------------------------------------------------- calls


@st.composite
def linalg_calls(draw: Any) -> Call:
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
def functional_calls(draw: Any) -> Call:
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
def glm_calls(draw: Any) -> Call:
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
def op_calls(draw: Any) -> Call:
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
        "sparse_multiply": {
            "offsets": torch.tensor(draw(st.lists(st.integers(-1, 8), max_size=9).map(sorted)), dtype=torch.int64),
            "indices": torch.tensor(draw(st.lists(st.integers(-1, d), min_size=n, max_size=n)), dtype=torch.int64),
            "values": draw(tensors((n,))),
            "V": draw(tensors((d, k))),
        },
        "cholesky_solve": {"B": draw(tensors((d, k))), "L": draw(tensors((d, d)))},
    }
    name = draw(st.sampled_from(sorted(calls)))
    names = ("layers", "layer", "activation", "features", "classes", "info")
    return getattr(torch.ops.onestep, name), same_dtype(draw, calls[name]), names


KINDS = {
    "op": op_calls(),
    "linalg": linalg_calls(),
    "polar": polar_calls(),
    "functional": functional_calls(),
    "glm": glm_calls(),
    "operator": operator_calls(),
    "estimator": estimator_calls(),
    "fit": fit_calls(),
    "csv": command_lines(),
}


def run_calls(calls: int, number: int, kinds: Collection[str] = tuple(KINDS)) -> int:
    """Makes so many random calls; raises at the first that ends wrongly, with the smallest arguments that do.

    Returns:
        How many were made.
    """
    made = 0

    @settings(
        max_examples=calls,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(st.one_of(*(KINDS[kind] for kind in kinds)))
    def check(call: Call) -> None:
        nonlocal made
        attempt(*call)
        made += 1

    check()
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="the calls to make")
    given_arguments = parser.parse_args()
    print(f"{given_arguments.calls} calls, --seed {given_arguments.seed}", flush=True)
    run_calls(given_arguments.calls, given_arguments.seed, given_arguments.kinds)
    print("no crash, no hang, no foreign error")
