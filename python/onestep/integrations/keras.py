"""Keras 3 on the torch backend: a callback that fits a model by ``onestep.fit``, and the losses that Keras compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

try:
    import keras
except ModuleNotFoundError as error:
    if error.name != "keras":
        raise ImportError(
            f"keras cannot be imported ({error}); its backend is the one that KERAS_BACKEND names, or TensorFlow. Set "
            "KERAS_BACKEND=torch in the environment before keras is imported"
        ) from error
    raise ModuleNotFoundError(
        "onestep.integrations.keras needs keras, which is not installed: pip install keras", name="keras"
    ) from error

from onestep.integrations.head import check_when
from onestep.training import FitResult, fit

if keras.backend.backend() != "torch":
    raise ImportError(
        f"Keras runs on {keras.backend.backend()!r}; expected KERAS_BACKEND=torch in the environment before keras is "
        "imported, or the command line, which takes files of every backend: python -m onestep keras model.keras --data "
        "data.npz --target y"
    )


class Solve(keras.callbacks.Callback):
    """Fits the model by ``onestep.fit`` when ``model.fit`` begins or ends.

    ``onestep.fit(model, (X, y), "mse")`` does the same without Keras' loop: on the torch backend a Keras model is a
    torch module. Here it is one of the callbacks, beside those that log, stop early or save.

    Args:
        data: as for ``onestep.fit``: a pair (X, y) of arrays or tensors, or a loader of such pairs. X is (n, …) in the
            shape that the model takes, in the dtype of its weights (float32, unless Keras was told otherwise); y is
            (n,) int64 for classes, else (n,) or (n, k) in the dtype of the outputs. Several inputs are a tuple or a
            dict.
        when: "before" or "after" the epochs, or "both".
        loss: as for ``onestep.fit``; None for the one that the model was compiled with, by ``as_loss``.
        options: of ``onestep.fit``; progress is False unless it is given.

    Attributes:
        results: a ``FitResult`` for each fit.

    Raises:
        ValueError: ``when`` is none of these; when training begins or ends: the model has no loss, or an argument is
            not what it should be.

    Examples:
        >>> import keras, numpy as np  # a model that is solved for, without an epoch of Adam
        >>> from onestep.integrations.keras import Solve
        >>> X = np.arange(12, dtype=np.float32).reshape(6, 2) % 5
        >>> y = X @ np.array([[1], [2]], dtype=np.float32)
        >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> history = model.fit(X, y, epochs=0, verbose=0, callbacks=[Solve((X, y), progress=False)])
        >>> bool(abs(model.predict(X, verbose=0) - y).max() < 1e-4)
        True
    """

    def __init__(
        self,
        data: Any,
        when: Literal["before", "after", "both"] = "before",
        loss: str | Callable[[Tensor, Any], Tensor] | None = None,
        **options: Any,
    ) -> None:
        check_when(when)
        super().__init__()
        self.data, self.when, self.loss, self.options = data, when, loss, options
        self.results: list[FitResult] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Fits, if when is "before" or "both"."""
        if self.when in ("before", "both"):
            self._fit()

    def on_train_end(self, logs: Any = None) -> None:
        """Fits, if when is "after" or "both"."""
        if self.when in ("after", "both"):
            self._fit()

    def _fit(self) -> None:
        loss = as_loss(self.model.loss) if self.loss is None else self.loss
        self.results.append(fit(self.model, self.data, loss, **{"progress": False, **self.options}))


def as_loss(loss: Any) -> str | Callable[[Tensor, Any], Tensor]:
    """A loss of Keras as one of ``onestep.fit``: by name where fit knows it, which is faster, else as a function.

    Args:
        loss: what ``model.compile(loss=...)`` takes: a name, an object of ``keras.losses``, or a function of targets
            and outputs. Its value is averaged over the rows.

    Returns:
        "mse", "cross_entropy" or "bce", the latter two of scores alone (``from_logits=True``); else a function
        (outputs, target) → the mean, a scalar in the outputs' dtype: outputs (n, …), target (n, …), or (n,) where
        outputs are (n, 1).

    Raises:
        ValueError: there is none, or Keras does not know the name.

    Examples:
        >>> import keras
        >>> from onestep.integrations.keras import as_loss
        >>> as_loss("mse"), as_loss(keras.losses.BinaryCrossentropy(from_logits=True))
        ('mse', 'bce')
    """
    if loss is None:
        raise ValueError("the model has no loss: compile it with one, or give loss=")
    found = keras.losses.get(loss)
    name = getattr(found, "name", None) or getattr(found, "__name__", "")
    if name == "mean_squared_error":
        return "mse"
    logits = bool(getattr(found, "_fn_kwargs", {}).get("from_logits", False))
    if name == "sparse_categorical_crossentropy" and logits:
        return "cross_entropy"
    if name == "binary_crossentropy" and logits:
        return "bce"

    def of_rows(outputs: Tensor, target: Any) -> Tensor:
        if isinstance(target, Tensor) and target.dim() == outputs.dim() - 1 and outputs.shape[-1] == 1:
            # Keras would broadcast (n,) against (n,1).
            target = target.unsqueeze(-1)
        value: Tensor = torch.as_tensor(found(target, outputs)).mean()
        return value

    return of_rows


def load(path: Any) -> nn.Module:
    """The model of a ``.keras`` file, saved under any backend.

    Args:
        path: the file.

    Returns:
        The model, which on the torch backend is an ``nn.Module`` that ``onestep.fit`` takes. Its weights are float32
        unless the file says otherwise.

    Raises:
        ValueError, TypeError: there is no such file, it is no Keras model, or it has layers that Keras does not know.

    Examples:
        >>> import pathlib, tempfile, keras, torch, onestep
        >>> from onestep.integrations.keras import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "model.keras"  # as any backend may have saved it
        ...     keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)]).save(file)
        ...     model = load(file)
        ...     result = onestep.fit(model, (torch.eye(2), torch.ones(2, 1)), "mse", progress=False)
        ...     model.save(file)
        >>> result.converged
        True
    """
    model: nn.Module = keras.saving.load_model(path)
    return model
