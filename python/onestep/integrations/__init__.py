"""onestep inside other libraries; each module needs the library that it is named after and is loaded when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onestep.integrations import keras as keras
    from onestep.integrations import lightning as lightning
    from onestep.integrations import trainer as trainer
    from onestep.integrations import transformers as transformers

_MODULES = frozenset({"keras", "lightning", "trainer", "transformers"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"onestep.integrations.{name}")
    raise AttributeError(f"module 'onestep.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
