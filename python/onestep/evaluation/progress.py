"""The bar that shows how long work gets on."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from onestep.evaluation.distributed import share

# Seconds after which a pass is long.
_LONG = 2.0


def can_show_progress(stacklevel: int) -> bool:
    """Whether this process shows bars: the first one, if it has tqdm; else a warning says what to do."""
    if share().rank != 0:
        return False
    try:
        import tqdm.auto  # noqa: F401
    except ModuleNotFoundError:
        warnings.warn(
            "progress=True needs tqdm, which is not installed: pip install tqdm, or pass progress=False",
            stacklevel=stacklevel + 1,
        )
        return False
    return True


class Progress:
    """tqdm's bar on the first process; nothing where tqdm is missing, with a warning that says so.

    A bar of a pass, one of many, waits until the pass proves to be long, and goes when it is over.
    """

    def __init__(
        self,
        total: int | None,
        *,
        enabled: bool,
        done: int = 0,
        what: str = "onestep.fit",
        unit: str = "step",
        of_a_pass: bool = False,
    ) -> None:
        self._bar: Any = None
        if enabled and can_show_progress(stacklevel=4):
            from tqdm.auto import tqdm

            delay = _LONG if of_a_pass else 0
            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, delay=delay, leave=not of_a_pass)

    def __enter__(self) -> Progress:
        return self

    def update(self, steps: int = 1, **shown: float) -> None:
        """So many steps more; shows numbers by name."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(steps)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
