"""The command line: what it fits, prints, saves and predicts, and missing values."""

import fcntl
import json
import os
import pty
import re
import select
import struct
import termios
from itertools import pairwise

import numpy as np
import pytest
import torch
from cli_cases import HOUSES, besides_task, linear_model, pd, r2, safe_open, small, train_test_split, weights, with_line
from processes import Child

import onestep

safetensors_torch = pytest.importorskip("safetensors.torch")


# --- fit ------------------------------------------------------------------------------------------


def test_fit_recovers_an_exact_formula(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    code, out, err = run("fit", csv(small()), "--target", "y", "--save", saved)
    assert (code, besides_task(err)) == (0, "")
    found = weights(saved)
    assert found == pytest.approx({"a": 3, "b": -2, "kind = v": 10, "": 5})
    assert "y per a" in out and "y, against kind = u" in out
    assert re.search(r"kind = v +\+10\.0000", out) and re.search(r"intercept +\+5\.00000", out)
    assert "held out:  R² 1.0000" in out
    assert re.search(r"time: +[\d.]+ (s|ms|µs) to solve", out)
    assert f"saved to {saved}" in out


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_weights_are_those_of_least_squares_on_the_same_split(run, tmp_path, dtype):
    saved = tmp_path / "model.safetensors"
    code, out, _ = run("fit", HOUSES, "--target", "price", "--seed", 3, "--dtype", dtype, "--save", saved)
    frame = pd.read_csv(HOUSES)
    y = frame.pop("price").to_numpy(float)
    X = pd.get_dummies(frame, prefix_sep=" = ").astype(float)
    found = weights(saved)
    bias = found.pop("")
    train, test = train_test_split(np.arange(len(y)), test_size=0.2, random_state=3)
    # The baselines are the most frequent levels of the training rows.
    for column in ("energy_class", "district"):
        assert f"{column} = {frame[column].iloc[train].mode()[0]}" not in found
    X = X[list(found)]
    peer = linear_model.LinearRegression().fit(X.iloc[train], y[train])
    tolerance = 1e-8 if dtype == "float64" else 1e-3
    assert code == 0
    np.testing.assert_allclose(list(found.values()), peer.coef_, rtol=tolerance)
    np.testing.assert_allclose(bias, peer.intercept_, rtol=tolerance)
    assert f"held out:  R² {peer.score(X.iloc[test], y[test]):.4f}" in out


def test_alpha_is_a_penalty_on_standardised_columns(run, tmp_path):
    saved = tmp_path / "model.safetensors"
    only_numbers = ["--ignore", "energy_class", "district"]
    run("fit", HOUSES, "--target", "price", "--alpha", 50, "--test-size", 0, *only_numbers, "--save", saved)
    frame = pd.read_csv(HOUSES).drop(columns=["energy_class", "district"])
    y = frame.pop("price")
    Z = (frame - frame.mean()) / frame.std(ddof=0)
    peer = linear_model.Ridge(alpha=50).fit(Z, y)
    found = weights(saved)
    del found[""]
    np.testing.assert_allclose(list(found.values()), peer.coef_ / frame.std(ddof=0), rtol=1e-8)


def test_categorical_numbers_become_levels_in_their_order(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    rows = "".join(f"{zone},{zone * zone + shift}\n" for zone in (1, 2, 10, 10) for shift in (-1, 1) for _ in range(3))
    code, _, _ = run("fit", csv("zone,y\n" + rows), "--target", "y", "--categorical", "zone", "--save", saved)
    found = weights(saved)
    assert code == 0 and list(found) == ["zone = 1", "zone = 2", ""]


def test_ignored_constant_and_nameless_columns(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    lines = small().splitlines()
    lines = [f",id,{lines[0]},unit,one"] + [f"{i},x{i},{line},m,1" for i, line in enumerate(lines[1:])]
    code, _, err = run("fit", csv("\n".join(lines)), "--target", "y", "--ignore", "id", "--save", saved)
    assert code == 0 and list(weights(saved)) == ["a", "b", "kind = v", ""]
    assert "column 1 has no name" in err and "'unit' is constant" in err and "'one' is constant" in err


def test_dependent_columns_are_fitted_and_told(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    rows = "".join(f"{i},{i},{2 * i + 1}\n" for i in range(30))
    code, _, err = run("fit", csv("a,again,y\n" + rows), "--target", "y", "--save", saved)
    assert code == 0 and "not unique" in err and besides_task(err).count("\n") == 1
    assert weights(saved) == pytest.approx({"a": 1, "again": 1, "": 1})


def test_fewer_rows_than_columns_are_fitted_and_told(run, csv):
    rng = np.random.default_rng(0)
    header = ",".join(f"x{i}" for i in range(8)) + ",y\n"
    rows = "".join(",".join(f"{v:.6f}" for v in rng.normal(size=9)) + "\n" for _ in range(6))
    code, out, err = run("fit", csv(header + rows), "--target", "y", "--test-size", 0)
    assert code == 0 and "6 training rows cannot determine 8 weights" in err
    assert "training:  R² 1.0000" in out and "held out:" not in out


def test_constant_target_has_no_r2(run, csv):
    code, out, _ = run("fit", csv("a,y\n" + "".join(f"{i},7\n" for i in range(20))), "--target", "y")
    assert code == 0 and "R² undefined" in out


def test_a_level_only_among_the_held_out_rows_is_not_scored(run, csv):
    text = small()
    _, test = train_test_split(np.arange(40), test_size=0.2, random_state=0)
    code, out, err = run("fit", csv(with_line(text, int(test[0]) + 2, "1,2,rare,3")), "--target", "y")
    assert code == 0 and "1 held-out row with a category that no training row has" in err
    assert "held out:  R² 1.0000" in out


def test_quotes_line_breaks_spaces_and_separators(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    rows = "".join(f'{i}; "the {"old" if i % 3 else "new"};\nmill" ;{2 * i + (i % 3 > 0)}\n\n' for i in range(30))
    path = csv("\ufeff a ;kind;y\n" + rows)
    code, _, _ = run("fit", path, "--target", "y", "--sep", ";", "--save", saved)
    assert code == 0 and weights(saved) == pytest.approx({"a": 2, "kind = the new;\nmill": -1, "": 1})
    path.write_text(path.read_text() + "zz;q;1\n")
    code, _, err = run("fit", path, "--target", "y", "--sep", ";")
    assert code == 2 and "line 92 has 'zz'" in err and err.count("\n") == 1


def test_booleans_are_categories_as_they_are_written(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    rows = "".join(f"{i},{'TRUE' if i % 3 else 'FALSE'},{i + 4 * (i % 3 > 0)}\n" for i in range(30))
    path = csv("a,pool,y\n" + rows)
    assert run("fit", path, "--target", "y", "--save", saved)[0] == 0
    assert weights(saved) == pytest.approx({"a": 1, "pool = FALSE": -4, "": 4})
    assert run("predict", saved, path)[0] == 0


# --- fit --model mlp ------------------------------------------------------------------------------


def curved(rows: int = 200) -> str:
    """A table without noise that no linear model fits: y = 3|a - 50| + b + 20 where kind is v."""
    rng = np.random.default_rng(0)
    lines = ["a,b,kind,y"]
    for _ in range(rows):
        a, b, kind = int(rng.integers(100)), int(rng.integers(100)), "uuv"[rng.integers(3)]
        lines.append(f"{a},{b / 4},{kind},{3 * abs(a - 50) + b / 4 + 20 * (kind == 'v')}")
    return "\n".join(lines) + "\n"


NETWORK = ["--target", "y", "--model", "mlp"]
SMALL_NETWORK = [*NETWORK, "--hidden", 8, "--max-steps", 15]


def test_a_network_fits_what_no_line_does(run, csv):
    code, out, err = run("fit", csv(curved()), *NETWORK, "--hidden", 16, "--alpha", 0.01)
    assert (code, besides_task(err)) == (0, "")
    assert "network:   3-16-1 with relu, 81 parameters, alpha 0.01" in out
    assert re.search(r"method:    levenberg_marquardt, \d+ steps: ", out)
    assert re.search(r"time: +[\d.]+ (s|ms) to solve \(160 rows, 3 features\)", out)
    network, linear = r2(out, "held out:")
    assert network > 0.98 and linear < 0.3
    assert r2(out, "training:")[0] > 0.98 and "intercept" not in out
    _, plain, _ = run("fit", csv(curved()), "--target", "y")
    held_out = next(line for line in plain.splitlines() if line.startswith("held out:"))
    assert f"           {held_out.removeprefix('held out:  ')} with --model linear" in out.splitlines()


def test_the_network_holds_its_own_on_the_houses(run):
    code, out, err = run("fit", HOUSES, "--target", "price", "--model", "mlp", "--hidden", 16, "--max-steps", 20)
    network, linear = r2(out, "held out:")
    assert (code, besides_task(err)) == (0, "") and network > linear > 0.9
    assert "network:   16-16-1 with relu, 289 parameters, alpha 10" in out


@pytest.mark.parametrize(("dtype", "hidden"), [("float64", [8]), ("float32", [6, 4])])
def test_a_saved_network_is_a_torch_sequential(run, csv, tmp_path, dtype, hidden):
    saved, new = tmp_path / "network.safetensors", csv("kind,b,a\nu,10,80\nv,0,50\nu,25,0\n", "new.csv")
    run("fit", csv(curved()), *NETWORK, "--hidden", *hidden, "--max-steps", 15, "--dtype", dtype, "--save", saved)
    code, out, err = run("predict", saved, new)
    predicted = np.array(out.splitlines()[1:], float)
    assert (code, err, out.splitlines()[0]) == (0, "", "predicted_y")

    with safe_open(saved, framework="pt") as file:
        state, features = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["features"]  # noqa: SIM118
    layers, kind = [], getattr(torch, dtype)
    for inputs, outputs in pairwise([3, *hidden, 1]):
        layers += [torch.nn.Linear(inputs, outputs, dtype=kind), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    network.load_state_dict(state)
    assert json.loads(features) == ["a", "b", "kind = v"]
    outputs = network(torch.tensor([[80, 10, 0], [50, 0, 1], [0, 25, 0]], dtype=kind))[:, 0].detach()
    np.testing.assert_allclose(outputs, predicted, rtol=1e-12 if dtype == "float64" else 1e-4)


def test_a_network_is_scored_as_it_predicts(run, csv, tmp_path):
    saved, path = tmp_path / "network.safetensors", csv(curved())
    _, out, _ = run("fit", path, *SMALL_NETWORK, "--test-size", 0, "--save", saved)
    assert "held out:" not in out
    _, _, err = run("predict", saved, path)
    assert f"score: {out[out.index('training:') + 11 :].splitlines()[0]} (200 rows)" in err


def test_the_seed_decides_the_network(run, csv, tmp_path):
    saved, path = tmp_path / "network.safetensors", csv(curved())
    first, again, other = (
        run("fit", path, *SMALL_NETWORK, "--seed", seed, "--test-size", 0, "--save", saved)
        and safetensors_torch.load_file(saved)["2.weight"]
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_alpha_is_a_penalty_on_all_parameters_of_the_network(run, csv, tmp_path):
    saved, path, alpha = tmp_path / "network.safetensors", csv(curved()), 1
    run("fit", path, *NETWORK, "--hidden", 16, "--alpha", alpha, "--test-size", 0, "--max-steps", 100, "--save", saved)
    frame = pd.read_csv(path)
    X = np.column_stack([frame["a"], frame["b"], frame["kind"] == "v"]).astype(float)
    y = frame["y"].to_numpy()
    # Back to the standardised columns and target, on which the penalty weighs.
    state = {name: tensor.numpy() for name, tensor in safetensors_torch.load_file(saved).items()}
    W, b = state["0.weight"] * X.std(0), state["0.bias"] + state["0.weight"] @ X.mean(0)
    w, c = state["2.weight"][0] / y.std(), (state["2.bias"][0] - y.mean()) / y.std()
    hidden = np.maximum((X - X.mean(0)) / X.std(0) @ W.T + b, 0)
    error = hidden @ w + c - (y - y.mean()) / y.std()
    # At the minimum of squares + alpha ‖θ‖² its slopes in the last layer are 0, and each unit's two sides in balance.
    np.testing.assert_allclose(error.sum(), -alpha * c, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(hidden.T @ error, -alpha * w, rtol=0.02, atol=0.02 * alpha)
    np.testing.assert_allclose((W**2).sum(1) + b**2, w**2, rtol=0.05, atol=0.01)
    assert abs(c) > 0.01


def test_few_rows_for_a_network_are_told(run, csv):
    code, out, err = run("fit", csv(small()), *NETWORK, "--max-steps", 3)
    assert code == 0 and "held out:" in out and besides_task(err).count("\n") == 1
    assert besides_task(err).startswith("note: 32 training rows cannot settle the 321 parameters of the network")


def test_a_network_of_a_constant_target(run, csv):
    code, out, _ = run("fit", csv("a,y\n" + "".join(f"{i},7\n" for i in range(40))), *SMALL_NETWORK)
    assert code == 0 and "R² undefined" in out


def test_a_large_network_is_fitted_without_a_matrix(run, csv):
    code, out, _ = run("fit", csv(curved()), *NETWORK, "--hidden", 64, 64, "--max-steps", 5)
    assert code == 0 and "method:    gauss_newton, 5 steps" in out


def test_a_network_fills_missing_values_as_the_linear_model_does(run, csv, tmp_path):
    saved, holes = tmp_path / "network.safetensors", csv("a,b,kind\n,1,\n", "holes.csv")
    code, _, err = run("fit", csv(with_line(curved(), 4, ",1,u,2")), *SMALL_NETWORK, "--impute", "median")
    assert code == 0 and "1 missing value of a filled with the median" in err
    run("fit", csv(curved()), *SMALL_NETWORK, "--impute", "median", "--save", saved)
    with safe_open(saved, framework="numpy") as file:
        fill = json.loads(file.metadata()["columns"])[0]["fill"]
    filled = run("predict", saved, csv(f"a,b,kind\n{fill},1,u\n", "filled.csv"))
    assert filled[0] == 0 and run("predict", saved, holes) == filled


def test_damaged_networks(run, csv, tmp_path):
    table, saved = csv(curved()), tmp_path / "network.safetensors"
    run("fit", table, *SMALL_NETWORK, "--save", saved)
    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors_torch.load_file(saved)
    cases = [
        (tensors | {"0.weight": torch.ones(8, 2)}, metadata, "is damaged"),
        (tensors | {"2.weight": torch.ones(2, 8), "2.bias": torch.ones(2)}, metadata, "is damaged"),
        (tensors | {"2.bias": torch.tensor([torch.nan])}, metadata, "is damaged"),
        ({name: tensors[name] for name in ("0.weight", "2.weight", "2.bias")}, metadata, "is damaged"),
        ({}, metadata, "is damaged"),
        (tensors, metadata | {"model": "linear"}, "is damaged"),
        (tensors, metadata | {"model": "forest"}, "another version of onestep"),
    ]
    for changed, data, message in cases:
        safetensors_torch.save_file(changed, saved, data)
        code, out, err = run("predict", saved, table)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_an_interrupted_or_too_large_network_ends_in_one_line(run, csv, tmp_path, monkeypatch):
    saved = tmp_path / "network.safetensors"

    def interrupted(model: torch.nn.Module, *_: object, **__: object) -> object:
        return onestep.FitResult(model, 1.0, False, "levenberg_marquardt", "", "interrupted", 1.0)

    def too_large(*_: object, **__: object) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")

    for function, code, message in ((interrupted, 130, "interrupted"), (too_large, 2, "not enough memory")):
        monkeypatch.setattr(onestep, "fit", function)
        found, out, err = run("fit", csv(curved()), *NETWORK, "--save", saved)
        assert (
            (found, out) == (code, "") and message in err and besides_task(err).count("\n") == 1 and not saved.exists()
        )


ON_A_TERMINAL = """
import os, sys
sys.stderr = os.fdopen(os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY), "w")
from onestep.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.long
def test_a_bar_is_shown_on_a_terminal_only(csv):
    pytest.importorskip("tqdm")
    reader, writer = pty.openpty()
    # A new terminal is 0 columns wide: no room for a bar.
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    child = Child(ON_A_TERMINAL, os.ttyname(writer), "fit", csv(curved()), *SMALL_NETWORK)
    shown = b""
    while child.running or select.select([reader], [], [], 0)[0]:
        if select.select([reader], [], [], 0.05)[0]:
            shown += os.read(reader, 1 << 16)
    os.close(writer)
    os.close(reader)
    done = child.finish()
    assert done.returncode == 0 and "network:" in done.output and b"onestep.fit: 100%" in shown


# --- missing values -------------------------------------------------------------------------------


def test_missing_values_need_impute(run, csv, tmp_path):
    text = with_line(with_line(with_line(small(), 5, ",1,u,2"), 6, "3,n/a,,9"), 7, "NaN,1,v,")
    path, saved = csv(text), tmp_path / "model.safetensors"
    code, out, err = run("fit", path, "--target", "y", "--save", saved)
    assert (code, out) == (2, "") and not saved.exists()
    assert "a (2), b (1), kind (1), y (1)" in err and "--impute median" in err and err.count("\n") == 1

    code, out, err = run("fit", path, "--target", "y", "--impute", "median", "--test-size", 0, "--save", saved)
    assert code == 0 and "1 row without y dropped" in err and "1 missing value of kind filled with 'u'" in err
    frame = pd.read_csv(path).dropna(subset="y")
    frame = frame.fillna({"a": frame["a"].median(), "b": frame["b"].median(), "kind": "u"})
    X = frame[["a", "b"]].assign(v=(frame["kind"] == "v").astype(float))
    peer = linear_model.LinearRegression().fit(X, frame["y"])
    assert list(weights(saved).values()) == pytest.approx([*peer.coef_, peer.intercept_])


def test_the_median_is_that_of_the_training_rows(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    text = with_line(small(), 3, ",1,u,2")
    run("fit", csv(text), "--target", "y", "--impute", "median", "--save", saved)
    train, _ = train_test_split(np.arange(40), test_size=0.2, random_state=0)
    with safe_open(saved, framework="numpy") as file:
        columns = json.loads(file.metadata()["columns"])
    assert columns[0]["fill"] == pd.read_csv(csv(text))["a"].iloc[train].median()


def test_predict_fills_with_what_fit_learned_or_says_that_it_cannot(run, csv, tmp_path):
    saved, holes = tmp_path / "model.safetensors", csv("a,b,kind\n,1,\n", "holes.csv")
    run("fit", csv(small()), "--target", "y", "--save", saved)
    code, _, err = run("predict", saved, holes)
    # The row is empty, and counted for each column.
    assert code == 0 and err.count("1 row without a prediction") == 2 and err.count("--impute median") == 2
    run("fit", csv(small()), "--target", "y", "--impute", "median", "--save", saved)
    with safe_open(saved, framework="numpy") as file:
        median = json.loads(file.metadata()["columns"])[0]["fill"]
    code, out, _ = run("predict", saved, holes)
    assert code == 0 and float(out.splitlines()[1]) == pytest.approx(3 * median - 2 + 5)


# --- predict and the saved model ------------------------------------------------------------------


def test_predictions_of_a_saved_model(run, tmp_path):
    saved, new, output = tmp_path / "model.safetensors", tmp_path / "new.csv", tmp_path / "predictions.csv"
    run("fit", HOUSES, "--target", "price", "--save", saved)
    frame = pd.read_csv(HOUSES)
    # Other columns, in another order, and without the target.
    frame.drop(columns="price").assign(agent="x").iloc[:, ::-1].to_csv(new, index=False)
    code, out, err = run("predict", saved, new)
    assert code == 0 and err == "note: not used by the model: agent\n"
    lines = out.splitlines()
    found = weights(saved)
    X = pd.get_dummies(frame, prefix_sep=" = ").astype(float)
    expected = sum(weight * (X[name] if name else 1.0) for name, weight in found.items())
    assert lines[0] == "predicted_price"
    np.testing.assert_allclose(np.array(lines[1:], float), expected, rtol=1e-12)

    code, out, err = run("predict", saved, HOUSES, "--output", output)
    assert (code, out) == (0, "") and output.read_text().splitlines() == lines
    assert re.fullmatch(r"score: R² 0\.9\d+, RMSE [\d,.]+ price \(2,000 rows\)\n", err)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_saved_model_is_a_torch_linear(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    run("fit", csv(small()), "--target", "y", "--save", saved)
    layer = torch.nn.Linear(3, 1, dtype=torch.float64)
    layer.load_state_dict(safetensors_torch.load_file(saved))
    row = torch.tensor([[2.0, 4.0, 1.0]], dtype=torch.float64)
    assert layer(row).item() == pytest.approx(3 * 2 - 2 * 4 + 10 + 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "has no column 'kind' (the model was fitted on it)"),
        ("a,b,kind\nx,2,u\nz,2,v\n", "column 'a' should hold numbers, but line 2 has 'x', and 1 more like it"),
        ("a,b,kind\n", "has a header but no rows"),
    ],
)
def test_bad_rows_to_predict(run, csv, tmp_path, content, message):
    saved = tmp_path / "model.safetensors"
    run("fit", csv(small()), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, csv(content, "new.csv"))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_target_that_cannot_be_scored_does_not_stop_predict(run, csv, tmp_path):
    saved = tmp_path / "model.safetensors"
    run("fit", csv(small()), "--target", "y", "--save", saved)
    code, out, err = run("predict", saved, csv("a,b,kind,y\n1,2,u,unknown\n", "new.csv"))
    assert code == 0 and len(out.splitlines()) == 2 and err.startswith("note: not scored")
    code, out, err = run("predict", saved, csv("a,b,kind,y\n1,2,u,\n", "new.csv"))
    assert code == 0 and err == ""


def test_files_that_are_not_saved_models(run, csv, tmp_path):
    table, saved = csv(small()), tmp_path / "model.safetensors"
    run("fit", table, "--target", "y", "--save", saved)
    whole = saved.read_bytes()
    other = tmp_path / "other.safetensors"
    safetensors_torch.save_file({"weight": torch.ones(1, 3, dtype=torch.bfloat16)}, other)
    cases = [
        (tmp_path, "is a directory"),
        (tmp_path / "none", "no such file"),
        (table, "is not a model saved by onestep"),
        (csv(b"", "empty"), "is not a model saved by onestep"),
        (csv(whole[: len(whole) // 2], "half"), "is not a model saved by onestep"),
        (csv(whole.replace(b"onestep 4", b"onestep 9"), "later"), "another version of onestep"),
        (csv(whole.replace(b"number", b"nomber"), "damaged"), "is damaged"),
        (csv(whole[:-8] + np.array([np.nan]).tobytes(), "nan"), "is damaged"),
        (other, "not a model saved by"),
    ]
    for path, message in cases:
        code, out, err = run("predict", path, table)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, path


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_outputs_that_cannot_be_written(run, csv, tmp_path, command):
    table, saved = csv(small()), tmp_path / "model.safetensors"
    run("fit", table, "--target", "y", "--save", saved)
    words = ["fit", table, "--target", "y", "--save"] if command == "fit" else ["predict", saved, table, "--output"]
    for path, message in ((tmp_path, "it is a directory"), (tmp_path / "no" / "x", "there is no directory")):
        code, out, err = run(*words, path)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
