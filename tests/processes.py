"""Scripts in processes of their own, which are forked from a server that has imported torch and onestep once.

A fresh interpreter takes seconds of CPU time to import them. The server never computes: its children are as fresh.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# torch.func imports torch._dynamo when it first differentiates. The command line's own modules are not here: a test
# hides the packages that they need.
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "torch._dynamo",
        "torch.distributed",
        "onestep.training",
        "onestep.optim",
        "pandas",
        "sklearn.model_selection",
    ]
)


@dataclass(frozen=True)
class Finished:
    """What became of a process: its exit status (of a signal, minus its number) and what it wrote."""

    returncode: int
    output: str
    errors: str


def _run(script: str, arguments: tuple[str, ...], written: str) -> None:
    for descriptor, name in ((1, "output"), (2, "errors")):
        file = os.open(Path(written) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


class Child:
    """Runs ``script`` with ``sys.argv[1:]`` as given. Only one that says so may start processes of its own."""

    def __init__(self, script: str, *arguments: object, has_children: bool = False) -> None:
        self._written = tempfile.TemporaryDirectory()
        named = tuple(map(str, arguments))
        self._process = _CONTEXT.Process(target=_run, args=(script, named, self._written.name), daemon=not has_children)
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def written(self) -> str:
        """What it has written to its standard output until now."""
        path = Path(self._written.name) / "output"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self, timeout: float = 400) -> Finished:
        """Waits for the end; a process that does not come to it is killed, and TimeoutError is raised."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"the script ran for more than {timeout} s")
        assert self._process.exitcode is not None
        path = Path(self._written.name) / "errors"
        output, errors = self.written(), path.read_text(encoding="utf-8") if path.exists() else ""
        self._written.cleanup()
        return Finished(self._process.exitcode, output, errors)


def finish_all(children: list[Child]) -> list[Finished]:
    """Waits for processes that run side by side; where one hangs, none is left."""
    try:
        return [child.finish() for child in children]
    finally:
        for child in children:
            if child.running:
                child.send(signal.SIGKILL)
