"""The CUDA kernels: an optional native module, and where its kernels run.

``onestep._native_cuda`` is built with ``-DONESTEP_CUDA=ON``. Without it the package works on the CPU, and an op on a
CUDA tensor raises NotImplementedError.

With ``ONESTEP_CUDA_EMULATE=1`` the module is ``onestep._native_cuda_emulated``: the same CUDA sources, compiled for the
CPU against the emulator in tests/cpp/simt. The implementations in ``ops/<family>/cuda.py`` are then registered for CPU
tensors in place of the CPU kernels, so that the Python tests run them. Import fails if the module is missing: a test
run that was meant for the emulator must not pass on the CPU kernels.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from onestep._program import refused
from onestep._torch_private import cuda_stream

EMULATE_VARIABLE = "ONESTEP_CUDA_EMULATE"

#: Whether CUDA kernels run on the CPU, on CPU tensors.
EMULATED = os.environ.get(EMULATE_VARIABLE, "0") not in ("", "0")


def _load() -> tuple[ModuleType | None, str]:
    """The native module or None, and in words what was found."""
    if EMULATED:
        try:
            module = importlib.import_module("onestep._native_cuda_emulated")
        except ModuleNotFoundError as error:
            raise refused(
                f"{EMULATE_VARIABLE} is set, but onestep._native_cuda_emulated is not built; "
                "build it with -DONESTEP_CUDA_EMULATE=ON"
            ) from error
        return module, "emulated: CUDA kernels run on the CPU, slowly, in place of the CPU kernels"
    try:
        module = importlib.import_module("onestep._native_cuda")
    except ModuleNotFoundError as error:
        if error.name != "onestep._native_cuda":
            raise
        return None, "none (CPU kernels only)"
    except ImportError as error:
        # The CUDA runtime's libraries are not there: a CUDA build on a machine without CUDA.
        return None, f"built, but it cannot be loaded: {error}"
    return module, f"built for sm_{module.architectures.replace(' ', ', sm_')}"


#: The native module of CUDA kernels, or None; and in words what was found.
native, status = _load()


def build() -> str:
    """What CUDA kernels this build has, in words.

    Returns:
        "built for sm_80, sm_90", "none (CPU kernels only)", that the module was built and cannot be loaded and why, or
        that it is emulated.

    Examples:
        >>> from onestep.ops import cuda_build
        >>> isinstance(cuda_build(), str)
        True
    """
    return status


# How the native module's names end, by the dtype that is read.
_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


@functools.cache
def entry(name: str, dtype: torch.dtype) -> Any:
    """The native module's function or class for a dtype."""
    return getattr(native, f"{name}_{_SUFFIX[dtype]}")


def runs_on_cuda(tensor: Tensor) -> bool:
    """Whether a tensor's ops run on the CUDA kernels: on a GPU, or in emulation."""
    return EMULATED or tensor.is_cuda


def place(tensor: Tensor) -> dict[str, int]:
    """Where the kernels of a tensor run: its ``device`` and torch's current ``stream`` there; 0 and 0 in emulation.

    Every entry of the native module takes these two by keyword. It makes the device current and restores the caller's.
    """
    if EMULATED:
        return {"device": 0, "stream": 0}
    device = tensor.get_device()
    return {"device": device, "stream": cuda_stream(device)}


def workspace(tensor: Tensor, size: int) -> Tensor:
    """``size`` bytes of scratch memory on the tensor's device, from torch's allocator; keep it during the call.

    It may be freed when the call returns: torch hands the memory to later work on the same stream only.
    """
    return tensor.new_empty(size, dtype=torch.uint8)
