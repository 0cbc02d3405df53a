"""The linear model: fitting it, predicting with it, and the file that keeps it."""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError, safe_open

import onestep

from .columns import Category, Column, Number
from .errors import CliError

FORMAT = 1


@dataclass(frozen=True)
class LinearModel:
    """target = features · weight + bias, every weight in the units of its own column."""

    target: str
    columns: tuple[Column, ...]
    weight: np.ndarray
    bias: float

    @property
    def features(self) -> list[str]:
        """The names of the features, one for each weight."""
        return [feature for column in self.columns for feature in column.features]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The prediction for each row of a matrix of features."""
        return np.asarray(features @ self.weight.astype(np.float64) + self.bias)


@dataclass(frozen=True)
class Solve:
    """How a fit went: the path that the estimator took, and its time."""

    path: str
    seconds: float


def fit_linear(
    target: str, columns: Sequence[Column], features: np.ndarray, y: np.ndarray, alpha: float, dtype: str
) -> tuple[LinearModel, Solve]:
    """Fits the weights in one step.

    The columns are standardised for the solve, so that the condition number of the normal equations does not depend
    on the units of the file and `alpha` weighs on every column alike; the weights are then taken back to those units.
    """
    with np.errstate(all="ignore"):
        mean, scale = features.mean(0), features.std(0)
        standard = ((features - mean) / scale).astype(dtype)
        centre, spread = y.mean(), y.std() or 1.0
        response = ((y - centre) / spread).astype(dtype)
        if not all(np.isfinite(part).all() for part in (scale, spread, standard, response)):
            raise CliError(f"the numbers are too large or too close together for {dtype}: rescale the columns")
        begin = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # That the weights are not unique is told by the path, and reported by the caller.
                warnings.simplefilter("ignore", RuntimeWarning)
                estimator = onestep.Ridge(alpha=alpha).fit(standard, response)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise CliError(f"the fit failed ({error}); try a small penalty, such as --alpha 0.001") from None
        seconds = time.perf_counter() - begin
        weight = (np.asarray(estimator.coef_, dtype=np.float64).reshape(-1) * spread / scale).astype(dtype)
        bias = centre + spread * float(np.asarray(estimator.intercept_).item()) - mean @ weight.astype(np.float64)
        bias = np.dtype(dtype).type(bias)
    if not (np.isfinite(weight).all() and np.isfinite(bias)):
        raise CliError(f"the weights are too large for {dtype}: rescale the columns")
    return LinearModel(target, tuple(columns), weight, float(bias)), Solve(estimator.solver_path_, seconds)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` only once it is complete."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises for a path that `replacing` could not write, before any work is done for it."""
    if path.is_dir():
        raise CliError(f"cannot write {path}: it is a directory")
    if not path.parent.is_dir():
        raise CliError(f"cannot write {path}: there is no directory {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise CliError(f"cannot write {path}: no permission to write in {path.parent}")


def save_model(model: LinearModel, path: Path) -> None:
    """Writes the model: `weight` (1, d) and `bias` (1,) as torch.nn.Linear(d, 1) has them, the rest as metadata."""
    tensors = {"weight": model.weight[None, :], "bias": np.array([model.bias], dtype=model.weight.dtype)}
    metadata = {
        "format": f"onestep {FORMAT}",
        "model": "linear",
        "target": model.target,
        "columns": json.dumps([{"kind": type(column).__name__.lower(), **asdict(column)} for column in model.columns]),
        "features": json.dumps(model.features),
        "versions": json.dumps({"onestep": onestep.__version__, "numpy": np.__version__}),
    }
    with replacing(path) as file:
        file.write(safetensors.numpy.save(tensors, metadata))


def _column(entry: dict[str, Any]) -> Column:
    name, fill = str(entry["name"]), entry["fill"]
    if entry["kind"] == "number":
        return Number(name, None if fill is None else float(fill))
    levels = tuple(map(str, entry["levels"]))
    return Category(name, str(entry["baseline"]), levels, None if fill is None else str(fill))


def load_model(path: Path) -> LinearModel:
    """Reads what `save_model` wrote; raises for anything else."""
    if path.is_dir():
        raise CliError(f"{path} is a directory, not a saved model")
    if not path.exists():
        raise CliError(f"no such file: {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, TypeError, AttributeError) as error:
        # TypeError and AttributeError: element types that numpy does not have, such as bfloat16.
        raise CliError(f"{path} is not a model saved by onestep ({error})") from None
    kind, _, version = metadata.get("format", "").partition(" ")
    if kind != "onestep":
        raise CliError(f"{path} is a safetensors file, but not a model saved by python -m onestep fit --save")
    if version != str(FORMAT) or metadata.get("model") != "linear":
        raise CliError(f"{path} was saved by another version of onestep (format {version!r}): fit and save it again")
    try:
        columns = tuple(map(_column, json.loads(metadata["columns"])))
        model = LinearModel(metadata["target"], columns, tensors["weight"][0], float(tensors["bias"].item()))
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CliError(f"{path} is damaged: its description of the model cannot be read ({error!r})") from None
    if model.weight.shape != (len(model.features),) or not np.isfinite([*model.weight, model.bias]).all():
        raise CliError(f"{path} is damaged: its weights do not fit its columns")
    return model
