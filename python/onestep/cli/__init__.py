"""The command line, `python -m onestep`: `info`, `fit` and `predict`."""

from .app import main

__all__ = ["main"]
