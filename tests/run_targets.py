"""The kernel tests once more under every other CPU target that this machine has: `make test-targets`."""

import os
import subprocess
import sys
from pathlib import Path

import onestep

TESTS = (
    "test_solve_normal.py",
    "test_gram.py",
    "test_cholesky.py",
    "test_failures.py",
    "test_refine.py",
    "test_derivatives.py",
    "test_glm.py",
    "test_mlp.py",
    "test_linear_cross_entropy.py",
    "test_attention.py",
)


def main() -> int:
    """Runs the tests target by target; 0 if all passed."""
    facts = onestep.info()
    active = facts["cpu_target"]
    others = [target for target in facts["cpu_targets_supported"] if target != active]
    if not others:
        print(f"No CPU target but {active} on this machine: nothing more to test.")
        return 0
    folder = Path(__file__).parent
    files = [str(folder / name) for name in TESTS]
    failed = []
    for target in others:
        print(f"== CPU target {target}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", *files]
        run = subprocess.run(command, cwd=folder.parent, env=os.environ | {"ONESTEP_TARGET": target}, check=False)
        if run.returncode != 0:
            failed.append(target)
    if failed:
        print(f"Failed under: {', '.join(failed)}")
        return 1
    print(f"Passed under: {', '.join(others)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
