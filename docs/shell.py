"""Commands of the command line, run by pages while they are built (see `docs/hooks.py`)."""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

_folder = tempfile.TemporaryDirectory()
# Where the commands run: it has the repository's examples, and what the commands write.
FOLDER = Path(_folder.name)
(FOLDER / "examples").symlink_to(Path(__file__).resolve().parents[1] / "examples")


def onestep(arguments: str) -> str:
    """`python -m onestep` with its arguments, and what it writes."""
    done = subprocess.run(
        [sys.executable, "-m", "onestep", *shlex.split(arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=FOLDER,
        env=os.environ | {"NO_COLOR": "1"},
    )
    lines = [line.rstrip() for line in done.stdout.rstrip().splitlines()]
    return "\n".join([f"$ python -m onestep {arguments}", *lines])
