"""What a process that takes a core costs: time beside a spinning process over quiet time, the peer's ratio beside ours.

Half of a two-core machine is gone for part of the work: a call that uses both cores can take up to twice its time, and
1.5 times where the scheduler shares two cores fairly among three threads. What the last call beside that process gave
is compared with the peer's result, or with float64. Run it on a machine that is quiet otherwise;
``python bench/test_speed_busy_neighbour.py [words of a name]`` prints the table, ``--write FILE`` adds it to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse
import torch
from agreement import agree
from sklearn import linear_model
from test_speed_logistic_regression import objective
from torch import Tensor

import onestep
from onestep import curvature, linalg
from onestep.functional import linear_cross_entropy, scaled_dot_product_attention

GOAL = 1.7
# Enough rounds that a median says something, and no more time than a table of thirty cases allows.
LEAST_ROUNDS = 5
MOST_ROUNDS = 25
SECONDS = 0.8
TRIALS = 4


class Case(NamedTuple):
    """What is timed, the peer, if there is one that has the same task, and what raises where the result is wrong.

    ``check`` is called after timing, with the last result of ours and the peer's (None without a peer).
    """

    ours: Callable[[], Any]
    peer: Callable[[], Any] | None = None
    check: Callable[[Any, Any], None] = agree


def classes(n: int, d: int, k: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((n, d)).astype(dtype)
    return X, (X[:, :k] + generator.gumbel(size=(n, k))).argmax(1)


def estimator(ours: Any, peer: Any, X: Any, y: Any, check: Callable[[Any, Any], None] = agree) -> Case:
    return Case(lambda: ours().fit(X, y), lambda: peer().fit(X, y), check)


def logistic(ours: Any, peer: Any, X: Any, y: Any) -> Case:
    """Both have tolerances: ours may end a thousandth above the peer's objective."""

    def is_no_worse(found: Any, expected: Any) -> None:
        assert objective(found, X, y) <= (1 + 1e-3) * objective(expected, X, y)

    return estimator(ours, peer, X, y, is_no_worse)


def logistic_regression(n: int, d: int, k: int) -> Case:
    X, y = classes(n, d, k)
    return logistic(onestep.LogisticRegression, lambda: linear_model.LogisticRegression(max_iter=1000), X, y)


def logistic_regression_cv() -> Case:
    X, y = classes(5_000, 32, 3)

    def same_scores(found: Any, expected: Any) -> None:
        """Accuracies of every fold and C, by which C is chosen: of a fold's 1,666 rows three may be on the border."""
        scores = next(iter(expected.scores_.values()))  # scikit-learn repeats them for every class
        assert np.abs(found.scores_ - scores).max() <= 3 / 1666, "scores of folds differ"

    return estimator(
        lambda: onestep.LogisticRegressionCV(Cs=4, cv=3),
        lambda: linear_model.LogisticRegressionCV(Cs=4, cv=3, max_iter=1000),
        X,
        y,
        same_scores,
    )


def sparse_logistic_regression() -> Case:
    X = scipy.sparse.random(20_000, 2_000, 0.01, format="csr", random_state=0, dtype=np.float64)
    y = np.asarray(X @ np.random.default_rng(0).standard_normal(2_000) > 0, dtype=np.int64)
    return logistic(onestep.LogisticRegression, lambda: linear_model.LogisticRegression(max_iter=1000), X, y)


def ridge(name: str, n: int, **options: Any) -> Case:
    X, y = classes(n, 64, 5, np.float64)
    target = y if name == "RidgeClassifier" else X[:, 0] + y
    return estimator(
        lambda: getattr(onestep, name)(**options), lambda: getattr(linear_model, name)(**options), X, target
    )


def poisson() -> Case:
    generator = np.random.default_rng(0)
    X = generator.standard_normal((100_000, 32))
    y = generator.poisson(np.exp(0.2 * X[:, 0])).astype(float)

    def is_no_worse(found: Any, expected: Any) -> None:
        assert found.score(X, y) >= expected.score(X, y) - 1e-6

    return estimator(onestep.PoissonRegressor, lambda: linear_model.PoissonRegressor(max_iter=1000), X, y, is_no_worse)


def normal_equations() -> Case:
    X, Y = torch.randn(20_000, 128), torch.randn(20_000, 4)

    def stream() -> Any:
        equations = linalg.NormalEquations(128, 4, dtype=torch.float32)
        for begin in range(0, 20_000, 2_000):
            equations.update(X[begin : begin + 2_000], Y[begin : begin + 2_000])
        return equations.solve(ridge=1.0)

    def is_exact(found: Any, _: None) -> None:
        x, y = X.double(), Y.double()
        agree(found.W, torch.linalg.solve(x.mT @ x + torch.eye(128), x.mT @ y), 1e-5)

    return Case(stream, check=is_exact)


def composite(X: Tensor, Y: Tensor) -> Tensor:
    A = X.mT @ X + torch.eye(X.shape[-1])
    return torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky_ex(A).L)


def solve_normal(B: int, n: int, d: int, k: int) -> Case:
    X, Y = torch.randn(B, n, d), torch.randn(B, n, k)
    return Case(lambda: linalg.solve_normal(X, Y, ridge=1.0), lambda: composite(X, Y))


def solve_normal_backward() -> Case:
    X, Y = torch.randn(2048, 64, 16, requires_grad=True), torch.randn(2048, 64, 4)

    def gradient(solve: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(solve(X, Y).sum(), X)

    return Case(lambda: gradient(lambda X, Y: linalg.solve_normal(X, Y, ridge=1.0)), lambda: gradient(composite))


def gram() -> Case:
    X = torch.randn(20_000, 256)
    return Case(lambda: linalg.gram(X)[0], lambda: X.mT @ X)


def positive_definite(*batch: int, d: int) -> Tensor:
    X = torch.randn(*batch, d, d)
    return X @ X.mT + d * torch.eye(d)


def cholesky(*batch: int, d: int) -> Case:
    A = positive_definite(*batch, d=d)
    return Case(lambda: linalg.cholesky(A), lambda: torch.linalg.cholesky(A))


def solve_spd() -> Case:
    A, B = positive_definite(512, d=64), torch.randn(512, 64, 8)
    return Case(lambda: linalg.solve_spd(A, B), lambda: torch.cholesky_solve(B, torch.linalg.cholesky(A)))


def polar() -> Case:
    M = torch.randn(4, 256, 512)

    def is_polar(found: Tensor, _: None) -> None:
        left, _values, right = torch.linalg.svd(M.double(), full_matrices=False)
        agree(found, left @ right, 5e-3)

    return Case(lambda: linalg.polar(M), check=is_polar)


def glm(n: int, d: int, k: int, family: str) -> Case:
    X = torch.randn(n, d)
    y = torch.randint(k, (n,)) if family == "softmax" else (torch.rand(n) > 0.5).float()
    W = torch.zeros(d, k) if family == "softmax" else torch.zeros(d)
    point = curvature.glm(X, y, W, family)
    V = torch.randn_like(W)

    def torchs() -> Tensor:
        Z = X @ V
        return X.mT @ (Z - Z.mean(-1, keepdim=True)) / k if family == "softmax" else X.mT @ (0.25 * Z)

    return Case(lambda: point.hvp(V), torchs)


def perceptron() -> Case:
    torch.manual_seed(0)
    X = torch.randn(5_000, 16)
    Y = X[:, :1].sin()

    def train() -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        return onestep.fit(model, (X, Y), "mse", max_steps=5, tol=0.0, progress=False)

    def has_its_loss(found: Any, _: None) -> None:
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(found.model(X), Y).item()
        assert math.isclose(found.loss, loss, rel_tol=1e-4)
        assert loss < 0.1 * Y.var().item(), "five steps leave a tenth of the variance"

    return Case(train, check=has_its_loss)


def attention(T: int, backward: bool) -> Case:
    q, k, v = (torch.randn(2, 8, T, 64, requires_grad=backward) for _ in range(3))

    def run(function: Callable[..., Tensor]) -> Any:
        out = function(q, k, v, is_causal=True)
        return torch.autograd.grad(out.sum(), (q, k, v)) if backward else out

    return Case(
        lambda: run(scaled_dot_product_attention), lambda: run(torch.nn.functional.scaled_dot_product_attention)
    )


def lm_head(backward: bool) -> Case:
    hidden, weight, target = torch.randn(1024, 256), torch.randn(8000, 256), torch.arange(1024)
    hidden.requires_grad_(backward)

    def run(loss: Callable[[], Tensor]) -> Any:
        return torch.autograd.grad(loss(), hidden) if backward else loss()

    return Case(
        lambda: run(lambda: linear_cross_entropy(hidden, weight, target)),
        lambda: run(lambda: torch.nn.functional.cross_entropy(hidden @ weight.T, target)),
    )


CASES: dict[str, Callable[[], Case]] = {
    "LogisticRegression, 2,000 × 64, 10 classes": lambda: logistic_regression(2_000, 64, 10),
    "LogisticRegression, 200,000 × 64, 10 classes": lambda: logistic_regression(200_000, 64, 10),
    "LogisticRegression, 50,000 × 32, 2 classes": lambda: logistic_regression(50_000, 32, 2),
    "LogisticRegression, sparse 20,000 × 2,000": sparse_logistic_regression,
    "LogisticRegressionCV, 5,000 × 32": logistic_regression_cv,
    "PoissonRegressor, 100,000 × 32": poisson,
    "Ridge, 200,000 × 64": lambda: ridge("Ridge", 200_000),
    "Ridge, 5,000 × 64": lambda: ridge("Ridge", 5_000),
    "RidgeCV, 20,000 × 64": lambda: ridge("RidgeCV", 20_000),
    "RidgeClassifier, 100,000 × 64": lambda: ridge("RidgeClassifier", 100_000),
    "NormalEquations, 10 × 2,000 × 128": normal_equations,
    "fit, perceptron, 5,000 rows, 5 steps": perceptron,
    "solve_normal, 4,096 × (64, 16, 4)": lambda: solve_normal(4096, 64, 16, 4),
    "solve_normal, 256 × (256, 128, 8)": lambda: solve_normal(256, 256, 128, 8),
    "solve_normal, 1 × (20,000, 64, 1)": lambda: solve_normal(1, 20_000, 64, 1),
    "solve_normal, gradient, 2,048 × (64, 16, 4)": solve_normal_backward,
    "gram, 20,000 × 256": gram,
    "cholesky, 1 × 1024²": lambda: cholesky(d=1024),
    "cholesky, 256 × 128²": lambda: cholesky(256, d=128),
    "solve_spd, 512 × 64²": solve_spd,
    "polar, 4 × (256 × 512)": polar,
    "GLMPoint.hvp, logistic 200,000 × 64": lambda: glm(200_000, 64, 1, "logistic"),
    "GLMPoint.hvp, softmax 20,000 × 64 × 10": lambda: glm(20_000, 64, 10, "softmax"),
    "GLMPoint.hvp, softmax 2,000 × 256 × 300": lambda: glm(2_000, 256, 300, "softmax"),
    "attention, T 512": lambda: attention(512, False),
    "attention, gradient, T 256": lambda: attention(256, True),
    "linear_cross_entropy, 1,024 × 256 × 8,000": lambda: lm_head(False),
    "linear_cross_entropy, gradient": lambda: lm_head(True),
}


@contextmanager
def neighbour() -> Iterator[None]:
    """A process that spins on one core; cores beyond two have one each, so that one core is left free."""
    spinning = [
        subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"])
        for _ in range(max(1, len(os.sched_getaffinity(0)) - 1))
    ]
    try:
        time.sleep(0.1)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def busy_seconds() -> float:
    """CPU seconds of all processes but this one and its children, since the machine started."""
    fields = [int(number) for number in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    ours = sum(os.times()[:2])
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with suppress(FileNotFoundError):
            ours += sum(map(int, Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) / 100
    return sum(fields[:3] + fields[5:]) / 100 - ours


def median_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """The median of calls, and the last result. No pause is between them: the scheduler prefers a process that sleeps.

    Where other processes take more than a twentieth of a core meanwhile, it is measured again, a few times.
    """
    result = call()
    best = (math.inf, 0.0)
    for _ in range(TRIALS):
        seconds: list[float] = []
        others = busy_seconds()
        while len(seconds) < LEAST_ROUNDS or (len(seconds) < MOST_ROUNDS and sum(seconds) < SECONDS):
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
        disturbed = (busy_seconds() - others - 0.02) / sum(seconds)
        best = min(best, (disturbed, statistics.median(seconds)))
        if disturbed < 0.05:
            break
    else:
        print(f"disturbed: other processes took {best[0]:.0%} of a core", flush=True)
    return best[1], result


def measure(name: str) -> dict[str, float]:
    torch.manual_seed(0)
    case = CASES[name]()
    calls = {"ours": case.ours} | ({} if case.peer is None else {"peer": case.peer})
    quiet = {who: median_seconds(call)[0] for who, call in calls.items()}
    with neighbour():
        timed = {who: median_seconds(call) for who, call in calls.items()}
    case.check(timed["ours"][1], timed["peer"][1] if "peer" in timed else None)
    busy = {who: seconds for who, (seconds, _) in timed.items()}
    result = {"quiet_seconds": quiet["ours"], "busy_over_quiet": busy["ours"] / quiet["ours"]}
    if "peer" in calls:
        result |= {"peer_quiet_seconds": quiet["peer"], "peer_busy_over_quiet": busy["peer"] / quiet["peer"]}
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(group="busy neighbour")
def test_busy_neighbour(benchmark: Any, name: str) -> None:
    result = measure(name)
    benchmark.pedantic(CASES[name]().ours, rounds=LEAST_ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(result, busy_goal=GOAL)


def row(name: str, result: dict[str, Any]) -> str:
    peer = f"{result['peer_busy_over_quiet']:.2f}" if "peer_busy_over_quiet" in result else "–"
    runs = ", ".join(f"{ratio:.2f}" for ratio in result["runs"])
    return f"| {name} | {1e3 * result['quiet_seconds']:.2f} | {result['busy_over_quiet']:.2f} | {runs} | {peer} |"


def median_of_runs(name: str, runs: int) -> dict[str, Any]:
    """The run whose ratio is the median, and the ratios of all: what the scheduler does differs from run to run."""
    results = sorted((measure(name) for _ in range(runs)), key=lambda result: result["busy_over_quiet"])
    return results[runs // 2] | {"runs": [result["busy_over_quiet"] for result in results]}


def write(path: Path, results: dict[str, Any]) -> None:
    """Adds the results to a JSON file, and writes the table of all that it holds beside it."""
    known = (json.loads(path.read_text()) if path.exists() else {}) | results
    path.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    head = f"onestep {onestep.info()['cpu_target']}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
    head += f"goal ≤ {GOAL}\n\n"
    head += "| case | quiet, ms | busy / quiet | of each run | peer's |\n| --- | --- | --- | --- | --- |\n"
    path.with_suffix(".md").write_text(head + "".join(row(n, known[n]) + "\n" for n in CASES if n in known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="cases whose name holds one of them; all without any")
    parser.add_argument("--write", type=Path, help="a JSON file to add the figures to; their table goes beside it")
    parser.add_argument("--runs", type=int, default=1, help="how often each case is measured; the median is shown")
    given = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # scikit-learn's, of its next version
    for name in CASES:
        if not given.words or any(word in name for word in given.words):
            result = median_of_runs(name, given.runs)
            print(row(name, result), flush=True)
            if given.write is not None:
                write(given.write, {name: result})


if __name__ == "__main__":
    main()
