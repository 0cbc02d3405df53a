"""On how many threads an estimator's fit calls torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from onestep._fork import one_thread_after_fork
from onestep._serial_torch import serial_torch

Fit = TypeVar("Fit", bound=Callable[..., Any])

# Up to so many features torch's part of a fit takes a few milliseconds. With 512 the QR and SVD of a rank-deficient X
# took 1.4 times as long on one thread as on two.
_NARROW = 128


def kernels_have_the_threads(fit: Fit) -> Fit:
    """Decorates ``fit(self, X, …)``: torch is serial where X is tall and narrow, as our kernels do the work there.

    In a forked child torch is serial in any case; see ``onestep._fork``.
    """

    @wraps(fit)
    def fit_on_threads(self: Any, X: Any, *args: Any, **options: Any) -> Any:
        shape = tuple(getattr(X, "shape", ()))
        with one_thread_after_fork():
            if len(shape) == 2 and shape[1] <= min(shape[0], _NARROW):
                with serial_torch():
                    return fit(self, X, *args, **options)
            return fit(self, X, *args, **options)

    return fit_on_threads  # type: ignore[return-value]
