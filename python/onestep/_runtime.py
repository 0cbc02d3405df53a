"""Loads the compiled kernels, chooses the CPU target, and lets them ask for torch's number of threads."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from onestep import _native
from onestep._program import refused

__all__ = ["info"]

TARGET_VARIABLE = "ONESTEP_TARGET"


def own_version() -> str:
    """The installed package's version; in a clone where nothing is installed (`make native`), pyproject.toml's."""
    try:
        return version("onestep")
    except PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        if not project.is_file():
            raise
        found: list[str] = re.findall(r'^version = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        return found[0]


def _select_target() -> None:
    name = os.environ.get(TARGET_VARIABLE)
    if name is None:
        return
    try:
        _native.select_target(name)
    except ValueError as error:
        raise refused(
            f"{TARGET_VARIABLE}={name!r}: {error}, which this machine supports. Unset {TARGET_VARIABLE}, and the last "
            "of these is chosen"
        ) from None


def _follow_torchs_threads() -> None:
    """Hands over ``torch_get_num_threads`` of libtorch's stable C shim; without it the kernels stay serial."""
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    library = Path(torch.__file__).parent / "lib" / name
    try:
        function = ctypes.CDLL(str(library)).torch_get_num_threads
    except (OSError, AttributeError):
        return
    address = ctypes.cast(function, ctypes.c_void_p).value
    if address is not None:
        _native.set_thread_count(address)


_select_target()
_follow_torchs_threads()


def info() -> dict[str, str | int | list[str]]:
    """What runs here: version, CPU target, thread source, CUDA build and devices.

    Returns:
        A dict with ``version``, ``cpu_target``, ``cpu_targets_supported``, ``threads`` (torch's setting),
        ``thread_source`` (``"pool"``: onestep's own threads, as many as torch's setting allows; ``"serial"``: this
        torch has no C shim to ask for it; ``"serial (forked child)"``),
        ``torch``; ``cuda_build`` (onestep's CUDA kernels: built or not, for which architectures, emulated),
        ``cuda_devices`` (the name and compute capability of each) and ``cuda_driver`` (its version, or "none").

    Examples:
        >>> import onestep
        >>> found = onestep.info()
        >>> found["cpu_target"] in found["cpu_targets_supported"]
        True
    """
    from onestep import __version__
    from onestep.ops import cuda_build

    return {
        "version": __version__,
        "cpu_target": _native.active_target(),
        "cpu_targets_supported": _native.supported_targets(),
        "threads": torch.get_num_threads(),
        "thread_source": _native.thread_source(),
        "torch": str(torch.__version__),
        "cuda_build": cuda_build(),
        "cuda_devices": [_described(index) for index in range(torch.cuda.device_count())],
        "cuda_driver": _driver_version(),
    }


def _described(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def _driver_version() -> str:
    """The NVIDIA kernel driver's version; its own file says it without starting CUDA in this process."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "none"
    found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", text)
    return found[1] if found else "unknown"
