"""The command line, `python -m onestep`: `info`, `fit`, `predict` and `bench`."""

from .app import main

__all__ = ["main"]
