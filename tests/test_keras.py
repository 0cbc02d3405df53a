"""Keras 3 on the torch backend: fit, files, the callback and the command line; models of other backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docstrings import gaps_of_integration
from processes import Child

import onestep
from onestep.cli import main


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """Imports Keras, which takes seconds, only in the process that runs these tests."""
    global keras, Solve
    # Keras reads it when it is imported, once for the process.
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    if keras.backend.backend() != "torch":
        pytest.skip(f"Keras runs on {keras.backend.backend()}")
    from onestep.integrations.keras import Solve


def friedman(rows: int = 300) -> tuple[Any, Any]:
    X = np.random.default_rng(0).random((rows, 10))
    y = 10 * np.sin(np.pi * X[:, 0] * X[:, 1]) + 20 * (X[:, 2] - 0.5) ** 2 + 10 * X[:, 3] + 5 * X[:, 4]
    return X.astype(np.float32), y.astype(np.float32)


def network(units: int = 16, outputs: int = 1, activation: str | None = None) -> Any:
    """The project's first example, 10 inputs → relu → outputs, with fewer units."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    return keras.Sequential(
        [layers.Input((10,)), layers.Dense(units, "relu"), layers.Dense(outputs, activation, name="last")]
    )


def test_fit_save_and_load(tmp_path: Path) -> None:
    """Without compile(); the loss is that of predict, and the file predicts the same."""
    X, y = friedman()
    model = network()
    before = ((model.predict(X, verbose=0)[:, 0] - y) ** 2).mean()
    result = onestep.fit(model, (X, y), "mse", max_steps=25, progress=False)
    predicted = model.predict(X, verbose=0)
    assert result.method == "levenberg_marquardt"
    assert result.loss == pytest.approx(((predicted[:, 0] - y) ** 2).mean(), rel=1e-4)
    assert result.loss < 0.02 * before
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict(X, verbose=0), predicted)


@pytest.mark.parametrize("from_logits", [True, False])
def test_the_callback_takes_the_compiled_loss(from_logits: bool) -> None:
    X, y = friedman()
    classes = (y > 12).astype(np.int64) + (y > 17)
    model = network(4, 3, None if from_logits else "softmax")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=loss)
    callback = Solve((X, classes), max_steps=15)
    history = model.fit(X, classes, epochs=1, batch_size=300, verbose=0, callbacks=[callback])
    (result,) = callback.results
    assert result.loss < 0.3 * result.initial_loss
    # The epoch afterwards sees what was solved for.
    assert history.history["loss"][0] == pytest.approx(result.loss, rel=1e-3)


def test_a_head_in_closed_form() -> None:
    X, y = friedman()
    model = network()
    model.layers[0].trainable = False
    model.compile(loss="mse")
    callback = Solve((X, y), "after")
    model.fit(X, y, epochs=1, verbose=0, callbacks=[callback])
    assert callback.results[0].method == "closed_form"
    body = keras.Model(model.inputs, model.layers[0].output)
    features = np.column_stack([body.predict(X, verbose=0), np.ones(len(X))]).astype(np.float64)
    residual = y - features @ np.linalg.lstsq(features, y, rcond=None)[0]
    assert callback.results[0].loss == pytest.approx((residual**2).mean(), rel=1e-4)


COMMAND = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
assert "keras" not in sys.modules
from onestep.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever backend the environment names; several inputs by their names; the loss that was compiled."""
    X, y = friedman()
    keras.utils.set_random_seed(0)
    left, right = keras.Input((4,), name="left"), keras.Input((6,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    model = keras.Model([left, right], keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(joined)))
    model.compile(loss="mse")
    file, data, output = (str(tmp_path / name) for name in ("model.keras", "data.npz", "fitted.keras"))
    model.save(file)
    np.savez(data, right=X[:, 4:], y=y, left=X[:, :4])
    words = ["keras", file, "--data", data, "--target", "y", "--output", output, "--max-steps", "15"]
    done = Child(COMMAND, *words).finish()
    assert done.returncode == 0, done.errors
    assert "300 rows, levenberg_marquardt, 15 steps" in done.output
    fitted = keras.saving.load_model(output).predict([X[:, :4], X[:, 4:]], verbose=0)[:, 0]
    loss = float(done.output.rpartition("-> ")[2].partition(",")[0])
    assert loss == pytest.approx(((fitted - y) ** 2).mean(), rel=1e-4)
    assert loss < 0.15 * y.var()
    np.savez(data, z=y)
    for arguments, told in (
        ((file, "--data", data, "--target", "y"), "has no array 'y'; it holds z"),
        ((str(tmp_path / "none.keras"), "--data", data, "--target", "z"), "there is no such file"),
    ):
        assert main(["keras", *arguments]) == 2
        assert told in capsys.readouterr().err


def test_tensorflow_predicts_the_same(tmp_path: Path) -> None:
    """A file that is fitted under torch, read under TensorFlow."""
    pytest.importorskip("tensorflow", reason="tensorflow is not installed")
    X, y = friedman()
    model = network()
    onestep.fit(model, (X, y), "mse", max_steps=3, progress=False)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "X.npy", X)
    script = (
        "import keras, numpy as np, sys; model = keras.saving.load_model(sys.argv[1] + '/model.keras'); "
        "np.save(sys.argv[1] + '/p.npy', model.predict(np.load(sys.argv[1] + '/X.npy'), verbose=0))"
    )
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), model.predict(X, verbose=0), rtol=1e-4, atol=1e-4)


def test_models_of_other_backends_are_told_what_to_do() -> None:
    kind = type("Sequential", (), {"__module__": "keras.src.models.sequential"})
    with pytest.raises(TypeError, match=r"KERAS_BACKEND=torch, .* python -m onestep keras model.keras --data"):
        onestep.fit(kind(), friedman())
    with pytest.raises(TypeError, match=r"model is object; expected a torch.nn.Module$"):
        onestep.fit(object(), friedman())  # type: ignore[arg-type]


def test_public_names_are_documented() -> None:
    from onestep.integrations import keras as module

    assert gaps_of_integration(module) == {}
