"""The bar that shows how a fit gets on."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from onestep.evaluation.distributed import share


class Progress:
    """tqdm's bar on the first process; nothing where tqdm is missing, with a warning that says so."""

    def __init__(self, total: int, *, enabled: bool, done: int = 0) -> None:
        self._bar: Any = None
        if not enabled or share().rank != 0:
            return
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError:
            warnings.warn(
                "progress=True needs tqdm, which is not installed: pip install 'onestep[fit]', or pass progress=False",
                stacklevel=4,
            )
            return
        self._bar = tqdm(total=total, initial=done, desc="onestep.fit", unit="step")

    def __enter__(self) -> Progress:
        return self

    def update(self, **shown: float) -> None:
        """One step more; shows numbers by name."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
