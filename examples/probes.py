"""Probes on every layer of a pretrained encoder: what does it know of a file, and where?

    pip install magika onnxruntime onnx      # the encoder's weights come with the package, 3 MB
    python examples/probes.py [--quick]

Magika is Google's network that tells a file's type from its first and last 1,024 bytes: an embedding of bytes, a layer
norm, a convolution, a pooling, a second norm and 214 scores. It was never told which library a Python file is from.
Linear probes show how much of that each layer knows all the same: the files are those of this Python installation, the
label is the library and its part, such as "torch.distributed".

Each layer's features are computed once. `onestep.LogisticRegressionCV` chooses C for each layer out of ten by
cross-validation; scikit-learn's does the same for the widest layer, to compare with. `onestep.fit` fits that layer's
probe to soft labels, too: nine parts the file's own label, one part those of its library's other parts.

Writes examples/output/probes.png: accuracy on held-out files by layer.
"""

import argparse
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.linear_model import LogisticRegressionCV as SklearnLogisticRegressionCV
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn

import onestep

HERE = Path(__file__).resolve().parent
HERE = HERE.relative_to(Path.cwd()) if HERE.is_relative_to(Path.cwd()) else HERE
PICTURE = HERE / "output" / "probes.png"
# Bytes from either end of a file, the network's own preparation; what is missing counts as byte 256.
END, PADDING = 1024, 256
# Output of a node of the network, and how its positions become one row.
LAYERS = {
    "embedding": ("ApplyActivation_0/Mul_5:0", "mean"),
    "norm": ("LayerNorm_0/AddV2_1:0", "mean"),
    "convolution": ("Max_Squeeze__213:0", ""),
    "second norm": ("LayerNorm_1/AddV2_1:0", ""),
    "scores": ("Dense_1/AddV2:0", ""),
}
BATCH = 32


def collect(most_labels: int, per_label: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Bytes (n, 2048) and labels (n,) of Python files, as many for each label, and the labels' names."""
    root = Path(torch.__file__).parents[1]
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 2 and path.stat().st_size > END:
            files.setdefault(".".join(parts[:2]), []).append(path)
    counts = Counter({label: len(paths) for label, paths in files.items() if len(paths) >= per_label})
    names = sorted(label for label, _ in counts.most_common(most_labels))
    if len(names) < 2:
        raise SystemExit(f"{root} has fewer than two libraries of {per_label} files; install some, such as scipy")
    generator = np.random.default_rng(0)
    rows, labels = [], []
    for number, name in enumerate(names):
        for index in generator.permutation(len(files[name]))[:per_label]:
            text = files[name][index].read_bytes().strip()
            row = np.full(2 * END, PADDING, np.int32)
            first, last = np.frombuffer(text[:END], np.uint8), np.frombuffer(text[-END:], np.uint8)
            row[: len(first)] = first
            row[2 * END - len(last) :] = last
            rows.append(row)
            labels.append(number)
    return np.stack(rows), np.array(labels), names


def features(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What every layer gives for the rows, (n, d) float32 each, from one run of the network."""
    try:
        import magika
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install magika onnxruntime onnx") from error
    path = next((Path(magika.__file__).parent / "models").glob("*/model.onnx"))
    network: Any = onnx.load(path)
    outputs = [node.output[0] for node in network.graph.node]
    names = [next(output for output in outputs if output.endswith(end)) for end, _ in LAYERS.values()]
    network.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in LAYERS}
    for start in range(0, len(rows), BATCH):
        found = session.run(names, {"bytes": rows[start : start + BATCH]})
        for (layer, (_, pooling)), values in zip(LAYERS.items(), found, strict=True):
            parts[layer].append(values.mean(1) if pooling == "mean" else values)
    return {layer: np.concatenate(values) for layer, values in parts.items()}


def soft_labels(y: np.ndarray, names: list[str]) -> torch.Tensor:
    """Nine parts the label, one part shared by the labels of its library."""
    libraries = np.array([name.split(".")[0] for name in names])
    alike = (libraries[:, None] == libraries).astype(np.float32)
    return torch.from_numpy(0.9 * np.eye(len(names), dtype=np.float32) + 0.1 * alike / alike.sum(1, keepdims=True))[y]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer files")
    quick = parser.parse_args().quick
    rows, y, names = collect(*((6, 30) if quick else (25, 60)))
    started = time.perf_counter()
    layers = features(rows)
    print(f"{len(rows)} files of {len(names)} labels; the network ran in {time.perf_counter() - started:.1f} s")
    train, test = train_test_split(np.arange(len(y)), test_size=0.25, stratify=y, random_state=0)
    folds = StratifiedKFold(3 if quick else 5)
    accuracy, seconds = {}, {}
    print(f"{'layer':12} {'width':>5} {'C':>8} {'accuracy':>8} {'seconds':>7}")
    for layer, X in layers.items():
        # One scale for a layer, the same for both libraries.
        layers[layer] = X = (X - X[train].mean(0)) / X[train].std()
        started = time.perf_counter()
        probe = onestep.LogisticRegressionCV(Cs=10, cv=folds).fit(X[train], y[train])
        seconds[layer] = time.perf_counter() - started
        accuracy[layer] = probe.score(X[test], y[test])
        print(f"{layer:12} {X.shape[1]:5} {probe.C_:8.2g} {accuracy[layer]:8.3f} {seconds[layer]:7.2f}")
    X = layers["second norm"]
    with warnings.catch_warnings():
        # Some of its fits end at max_iter: said below by the count of iterations.
        warnings.simplefilter("ignore")
        started = time.perf_counter()
        peer: Any = SklearnLogisticRegressionCV(Cs=10, cv=folds, max_iter=100)
        peer.fit(X[train], y[train])
        peer_seconds = time.perf_counter() - started
    capped = int((np.asarray(peer.n_iter_) >= 100).sum())
    print(
        f"scikit-learn, second norm: accuracy {peer.score(X[test], y[test]):.3f} in {peer_seconds:.2f} s, "
        f"{peer_seconds / seconds['second norm']:.1f} times as long; {capped} of its fits ended at max_iter"
    )
    head = nn.Linear(X.shape[1], len(names))
    started = time.perf_counter()
    result = onestep.fit(
        head,
        (torch.from_numpy(X[train]), soft_labels(y[train], names)),
        "cross_entropy",
        weight_decay=1e-2,
        progress=False,
    )
    with torch.no_grad():
        right = (head(torch.from_numpy(X[test])).argmax(1).numpy() == y[test]).mean()
    print(
        f"fit to soft labels by {result.method}: loss {result.loss:.4f}, accuracy {right:.3f}, "
        f"{time.perf_counter() - started:.2f} s"
    )
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.bar(list(accuracy), list(accuracy.values()), color="0.4")
    axes.axhline(1 / len(names), color="C3", linestyle="--", label="chance")
    axes.set(ylabel="accuracy on held-out files", title=f"Which of {len(names)} libraries a Python file is from")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
