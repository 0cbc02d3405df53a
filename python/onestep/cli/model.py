"""The models: predicting with them, and the file that keeps them."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

import onestep

from .columns import Category, Column, Date, Number
from .errors import CliError
from .output import replacing
from .source import Conventions

FORMAT = 4
# A network's layers between are large: so many rows are predicted together.
ROWS_AT_A_TIME = 1 << 16


@dataclass(frozen=True)
class Model(ABC):
    """What predicts a target from columns of a file: how it is applied, and how it is kept as tensors.

    A target of `classes` has one output for each, whose softmax is the probability of the class; a number has one.
    `unit` is what stands beside the target's numbers, such as % or $, empty for nothing; None: its classes are texts.
    """

    kind: ClassVar[str]
    target: str
    columns: tuple[Column, ...]
    classes: tuple[str, ...]
    unit: str | None

    @property
    def features(self) -> list[str]:
        """The names of the features, in the order of the matrix that `predict` takes."""
        return [feature for column in self.columns for feature in column.features]

    @property
    def outputs(self) -> int:
        """How many outputs it has."""
        return len(self.classes) or 1

    @abstractmethod
    def scores(self, features: np.ndarray) -> np.ndarray:
        """The outputs for each row of a matrix of features, (rows, outputs)."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The number that is predicted for each row of a matrix of features."""
        return self.scores(features)[:, 0]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """The probability of each class, (rows, classes)."""
        scores = self.scores(features)
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """The state_dict of the torch module that predicts the same."""

    @classmethod
    @abstractmethod
    def restore(
        cls,
        target: str,
        columns: tuple[Column, ...],
        classes: tuple[str, ...],
        unit: str | None,
        tensors: dict[str, np.ndarray],
    ) -> Model:
        """The model that `tensors` was taken from; KeyError or ValueError for tensors of anything else."""


@dataclass(frozen=True)
class LinearModel(Model):
    """outputs = features · weightᵀ + bias, every weight in the units of its own column."""

    kind = "linear"
    weight: np.ndarray
    bias: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        return np.asarray(features @ self.weight.T.astype(np.float64) + self.bias)

    def tensors(self) -> dict[str, np.ndarray]:
        """`weight` (outputs, d) and `bias` (outputs,), as torch.nn.Linear(d, outputs) has them."""
        return {"weight": self.weight, "bias": self.bias}

    @classmethod
    def restore(
        cls,
        target: str,
        columns: tuple[Column, ...],
        classes: tuple[str, ...],
        unit: str | None,
        tensors: dict[str, np.ndarray],
    ) -> LinearModel:
        model = cls(target, columns, classes, unit, tensors["weight"], tensors["bias"])
        if model.weight.shape != (model.outputs, len(model.features)) or model.bias.shape != (model.outputs,):
            raise ValueError(f"weights of shape {model.weight.shape} for {len(model.features)} features")
        return model


@dataclass(frozen=True)
class NetworkModel(Model):
    """A relu network. Its layers (weight, bias) take the raw features in and give the outputs in the target's units."""

    kind = "mlp"
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def parameters(self) -> int:
        """How many weights and biases it has."""
        return sum(weight.size + bias.size for weight, bias in self.layers)

    def scores(self, features: np.ndarray) -> np.ndarray:
        layers = [(weight.T.astype(np.float64), bias.astype(np.float64)) for weight, bias in self.layers]
        scores = np.empty((len(features), self.outputs))
        for begin in range(0, len(features), ROWS_AT_A_TIME):
            rows = slice(begin, begin + ROWS_AT_A_TIME)
            values = features[rows]
            for weight, bias in layers[:-1]:
                values = np.maximum(values @ weight + bias, 0)
            weight, bias = layers[-1]
            scores[rows] = values @ weight + bias
        return scores

    def tensors(self) -> dict[str, np.ndarray]:
        """`0.weight`, `0.bias`, `2.weight` ..., as torch.nn.Sequential(Linear, ReLU, Linear ...) has them."""
        return {
            f"{2 * place}.{name}": np.ascontiguousarray(part)
            for place, layer in enumerate(self.layers)
            for name, part in zip(("weight", "bias"), layer, strict=True)
        }

    @classmethod
    def restore(
        cls,
        target: str,
        columns: tuple[Column, ...],
        classes: tuple[str, ...],
        unit: str | None,
        tensors: dict[str, np.ndarray],
    ) -> NetworkModel:
        # Two tensors a layer, and a relu that has none between one layer and the next.
        places = range(0, len(tensors), 2)
        layers = tuple((tensors[f"{at}.weight"], tensors[f"{at}.bias"]) for at in places)
        model = cls(target, columns, classes, unit, layers)
        widths = [len(model.features), *(len(bias) for _, bias in model.layers)]
        shapes = [weight.shape for weight, _ in model.layers]
        if widths[-1] != model.outputs or shapes != [(after, before) for before, after in pairwise(widths)]:
            raise ValueError(f"layers of shapes {shapes} for {len(model.features)} features")
        return model


KINDS: dict[str, type[Model]] = {model.kind: model for model in (LinearModel, NetworkModel)}


def save_model(model: Model, conventions: Conventions, path: Path) -> None:
    """Writes the model: its tensors as a torch module's state_dict, all else as metadata."""
    metadata = {
        "format": f"onestep {FORMAT}",
        "model": model.kind,
        "target": model.target,
        "columns": json.dumps([{"kind": type(column).__name__.lower(), **asdict(column)} for column in model.columns]),
        "features": json.dumps(model.features),
        "classes": json.dumps(model.classes),
        "unit": json.dumps(model.unit),
        "conventions": json.dumps(asdict(conventions)),
        "versions": json.dumps({"onestep": onestep.__version__, "numpy": np.__version__}),
    }
    with replacing(path) as file:
        file.write(safetensors.numpy.save(model.tensors(), metadata))


def _column(entry: dict[str, Any]) -> Column:
    name, fill = str(entry["name"]), entry["fill"]
    if entry["kind"] == "number":
        return Number(name, None if fill is None else float(fill), str(entry["unit"]))
    if entry["kind"] == "date":
        return Date(name, tuple(map(str, entry["parts"])), entry["format"], fill)
    levels = tuple(map(str, entry["levels"]))
    return Category(name, str(entry["baseline"]), levels, None if fill is None else str(fill))


@contextlib.contextmanager
def _in_a_file(path: Path) -> Iterator[Path]:
    """The path of a regular file with the same content: of a pipe, as <(command) gives one, a copy."""
    if path.is_file():
        yield path
    elif path.is_fifo():
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
            with path.open("rb") as pipe:
                shutil.copyfileobj(pipe, copy)
            copy.flush()
            yield Path(copy.name)
    else:
        raise CliError(f"{path} is not a file, nor a pipe")


def load_model(path: Path) -> tuple[Model, Conventions]:
    """Reads what `save_model` wrote, and how numbers were written in the file it was fitted on."""
    if path.is_dir():
        raise CliError(f"{path} is a directory, not a saved model")
    if not path.exists():
        raise CliError(f"no such file: {path}")
    try:
        with _in_a_file(path) as regular, safe_open(regular, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise CliError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, TypeError, AttributeError) as error:
        # TypeError and AttributeError: element types that numpy does not have, such as bfloat16.
        raise CliError(f"{path} is not a model saved by onestep ({error})") from None
    kind, _, version = metadata.get("format", "").partition(" ")
    if kind != "onestep":
        raise CliError(f"{path} is a safetensors file, but not a model saved by python -m onestep fit --save")
    if version != str(FORMAT) or metadata.get("model") not in KINDS:
        raise CliError(f"{path} was saved by another version of onestep (format {version!r}): fit and save it again")
    try:
        columns = tuple(map(_column, json.loads(metadata["columns"])))
        classes = tuple(map(str, json.loads(metadata["classes"])))
        unit = json.loads(metadata["unit"])
        unit = None if unit is None else str(unit)
        model = KINDS[metadata["model"]].restore(metadata["target"], columns, classes, unit, tensors)
        written = json.loads(metadata["conventions"])
        missing = None if written["missing"] is None else tuple(written["missing"])
        conventions = Conventions(written["thousands"], written["decimal"], missing)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CliError(f"{path} is damaged: its description of the model cannot be read ({error!r})") from None
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise CliError(f"{path} is damaged: its weights are not all finite")
    return model, conventions
