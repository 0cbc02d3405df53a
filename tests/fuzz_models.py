"""Random calls of what fits models: estimators, ``onestep.fit``, curvature operators."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import scipy.sparse
import torch
from fuzz_draws import FLOATS, Call, array, maybe, sizes, tensors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import onestep
from onestep import curvature

CLASSIFIERS = ("RidgeClassifier", "LogisticRegression", "LogisticRegressionCV")
ESTIMATORS = ("Ridge", "RidgeCV", "PoissonRegressor", *CLASSIFIERS)
# What scikit-learn's own checks call them.
SKLEARN_WORDS = ("alpha", "sample", "samples", "feature", "features", "class", "classes", "Input", "label", "array")
SKLEARN_WORDS += ("data", "n_splits", "members", "Sparse", "sparse")
METHODS = ("auto", "closed_form", "levenberg_marquardt", "gauss_newton", "newton_cg", "gradient_descent", "adam")
LOSSES = ("mse", "cross_entropy", "poisson", "hinge")
OPERATORS = (curvature.HessianOperator, curvature.GaussNewtonOperator, curvature.FisherOperator)


@st.composite
def estimator_calls(draw: Any) -> Call:
    _, n, d, k = draw(sizes())
    name = draw(st.sampled_from(ESTIMATORS))
    y = tensors((n,), positive=True, classes=draw(st.sampled_from((1, 2, 3))) if name in CLASSIFIERS else None)
    if name in ("Ridge", "RidgeCV") and draw(st.booleans()):
        y = tensors((n, k))
    weight = maybe(draw, tensors((n,), positive=True))
    X: Any = array(draw(tensors((n, d))))
    if X.ndim == 2 and draw(st.integers(0, 3)) == 0:
        with contextlib.suppress(ValueError, TypeError):  # scipy has no sparse float16
            X = getattr(scipy.sparse, draw(st.sampled_from(("csr_array", "csc_array", "coo_array", "csr_matrix"))))(X)
    arguments = {
        "X": X,
        "y": array(draw(y)),
        "sample_weight": None if weight is None else array(weight),
    }
    options: dict[str, Any] = {"fit_intercept": draw(st.booleans())}
    if name in ("Ridge", "RidgeClassifier", "PoissonRegressor"):
        options["alpha"] = draw(st.sampled_from((0.0, 1.0, 1e-12, -1.0)))
    elif name == "LogisticRegression":
        options["C"] = draw(st.sampled_from((1.0, 1e6, np.inf, 0.0, -1.0)))
    elif name == "LogisticRegressionCV":
        options |= {"Cs": draw(st.sampled_from((1, 2, [0.1, 1.0], [])))} | {"cv": draw(st.sampled_from((2, 3)))}

    def fitted(X: Any, y: Any, sample_weight: Any) -> Any:
        model = getattr(onestep, name)(**options).fit(X, y, sample_weight=sample_weight)
        return model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)

    return fitted, arguments, (*SKLEARN_WORDS, *options)


def network(kind: str, inputs: int, outputs: int) -> nn.Module:
    """Nothing trained, affine, a perceptron, one that no structure recognises, one with an embedding."""
    torch.manual_seed(0)
    if kind == "frozen":
        return nn.Linear(inputs, outputs).requires_grad_(False)
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=bool(outputs % 2))
    body = nn.Linear(inputs, 4)
    middle = {"perceptron": nn.Tanh(), "normed": nn.LayerNorm(4), "dropped": nn.Dropout(0.5)}[kind]
    return nn.Sequential(body, middle, nn.Linear(4, outputs))


@st.composite
def rows(draw: Any) -> tuple[nn.Module, Any, str]:
    """A model, data that mostly suits it, and a loss."""
    _, n, d, k = draw(sizes())
    loss = draw(st.sampled_from(LOSSES))
    # torch warns of layers without inputs, and has none with 0 classes.
    inputs, outputs = max(d, 1), max(k, 1)
    model = network(draw(st.sampled_from(("frozen", "linear", "perceptron", "normed", "dropped"))), inputs, outputs)
    x = draw(tensors((n, inputs)))
    if x.dim() != 2 or x.shape[1] != inputs or x.dtype not in FLOATS:
        x = torch.ones(n, inputs)  # what the model cannot take is not onestep's to explain
    target = draw(tensors((n,), classes=outputs) if loss == "cross_entropy" else tensors((n, outputs), positive=True))
    model = model.to(x.dtype)
    data: Any = (x, target.to(x.dtype) if target.is_floating_point() and draw(st.integers(0, 7)) else target)
    kind = draw(st.integers(0, 7))
    if kind == 0 and target.dim() and len(x) == len(target) > 0:
        data = DataLoader(TensorDataset(*data), batch_size=3)
    elif kind == 1:
        data = draw(st.sampled_from((data[0], [data], None, 3, {"x": data[0]})))
    return model, data, loss


# What an error of a fit may speak of.
FIT_WORDS = (
    "row",
    "rows",
    "batch",
    "outputs",
    "target",
    "parameters",
    "parameter",
    "classes",
    "loss",
    "step",
    "gradient",
)


@st.composite
def fit_calls(draw: Any) -> Call:
    model, data, loss = draw(rows())
    options = {
        "method": draw(st.sampled_from(METHODS)),
        "max_steps": draw(st.sampled_from((1, 2, 2, 0, -1))),
        "tol": draw(st.sampled_from((0.0, 1e-6, -1.0, float("nan")))),
        "damping": draw(st.sampled_from((None, None, 1.0, -1.0))),
        "weight_decay": draw(st.sampled_from((0.0, 0.1, -0.1))),
        "batch_size": draw(st.sampled_from((None, None, 2, 100, 0))),
        "chunk_size": draw(st.sampled_from((None, 1, 7, 0))),
        "initialize": draw(st.booleans()),
        "progress": False,
    }
    return onestep.fit, {"model": model, "data": data, "loss": loss, **options}, FIT_WORDS


@st.composite
def operator_calls(draw: Any) -> Call:
    model, data, loss = draw(rows())
    kind = draw(st.sampled_from(OPERATORS))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    v = draw(tensors(draw(st.sampled_from(((count,), (count, 2), (count, 0), (count + 1,))))))
    use = draw(st.sampled_from(("product", "diagonal", "trace", "solve", "scipy")))
    damping = draw(st.sampled_from((1.0, 0.1, 0.0, -1.0)))
    samples = draw(st.sampled_from((1, 2, 0)))

    def used(model: nn.Module, data: Any, loss: Any, v: Any) -> Any:
        operator = kind(model, data, loss, progress=False)
        uses: dict[str, Callable[[], Any]] = {
            "product": lambda: operator @ v,
            "diagonal": lambda: operator.diagonal(samples),
            "trace": lambda: operator.trace(samples),
            "solve": lambda: operator.solve(v, damping=damping, max_iterations=5),
            # numpy has no bfloat16.
            "scipy": lambda: operator.to_scipy() @ (v.float() if v.dtype == torch.bfloat16 else v).numpy(),
        }
        return uses[use]()

    words = (*FIT_WORDS, "damping", "samples", "b", "dimension", "dimensions", "shape", "array")
    return used, {"model": model, "data": data, "loss": loss, "v": v}, words


@st.composite
def polar_calls(draw: Any) -> Call:
    batch, n, d, _ = draw(sizes())
    arguments = {
        "M": draw(tensors((*batch, n, d))),
        "iterations": draw(st.sampled_from((1, 2, 3, 0, -1))),
        "lower": draw(st.sampled_from((1e-2, 1e-6, 1.0, 0.0, float("nan")))),
    }
    function = draw(st.sampled_from((onestep.linalg.polar, onestep.linalg.polar_ex)))
    return function, arguments, ("matrices", "matrix", "info")
