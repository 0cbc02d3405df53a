"""Arguments that several functions of the package take."""

from __future__ import annotations

import math
import os
from numbers import Real
from typing import Any

import torch
from torch import nn


def check_flags(**flags: Any) -> None:
    """Refuses what is neither True nor False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected True or False")


def check_number(name: str, value: Any, *, most: float = math.inf, positive: bool = False) -> None:
    """Refuses what is no finite number from 0 (which ``positive`` leaves out) to ``most``."""
    if most < math.inf:
        expected = f"a number from 0 to {most:g}"
    else:
        expected = "a finite number above 0" if positive else "a finite number of 0 or more"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; expected {expected}")
    number = float(value)
    if number < 0 or (positive and number == 0) or not number <= most or number == math.inf:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_dtype_of_sums(dtype: Any) -> None:
    """Refuses all but the two dtypes that sums have."""
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype}; expected torch.float32 or torch.float64")


def check_path(name: str, path: Any) -> None:
    """Refuses what names no file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} is {path!r}; expected a path")


def check_teacher(model: Any, teacher: Any, *, needed: bool = False) -> None:
    """Refuses a teacher that is no module, or that changes while it teaches.

    Unless it is ``needed``, None is none, and True the model as it is now.
    """
    if not isinstance(teacher, nn.Module) and (needed or not (teacher is None or teacher is True)):
        found = repr(teacher) if isinstance(teacher, bool) else type(teacher).__name__
        others = "" if needed else ", True for the model as it is now, or None"
        raise TypeError(f"teacher is {found}; expected torch.nn.Module{others}")
    if teacher is not None and teacher is model:
        raise ValueError("teacher is model itself; expected another one, such as copy.deepcopy(model) from before")
