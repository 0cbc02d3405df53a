"""Prints the bytes of peak RSS that streaming rows through NormalEquations adds; run in a fresh process. Usage: N D."""

from __future__ import annotations

import sys

import torch
from agreement import agree
from ridge_memory import status
from test_speed_streaming import chunks, solution_in

from onestep.linalg import NormalEquations


def main() -> None:
    n, d = int(sys.argv[1]), int(sys.argv[2])
    stream = chunks(n, d)
    equations = NormalEquations(d, 1, dtype=torch.float32)
    X, Y = stream[0]
    NormalEquations(d, 1, dtype=torch.float32).update(X[:1000], Y[:1000]).solve()  # loads what is loaded on first use
    before = status("VmRSS")
    for X, Y in stream:
        equations.update(X, Y)
    solution = equations.solve()
    print(max(0, status("VmHWM") - before))
    agree(solution.W, solution_in(torch.float64, stream), 1e-6)


if __name__ == "__main__":
    main()
