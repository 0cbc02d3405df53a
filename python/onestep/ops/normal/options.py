"""The options of ``solve_normal`` and ``solve_normal_ex``: name, type, default, meaning and check, once each.

Options are the plain arguments after ``uniform_ridge``, which is the penalty where the tensor ``ridge`` is None. The
ops' schemas are written from here, and fakes, kernels and derivatives hand ``Options`` on whole.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Options(NamedTuple):
    """The options of ``solve_normal_ex``, in its order: a new one goes to the end.

    ``solve_normal`` has all of them but those of ``_EX_ALONE``, in the same order.

    Attributes:
        refine: steps of refinement.
        jitter: 0, or which fraction of the mean diagonal a problem that fails gets added first.
        dual: whether to solve in the dual form, which needs ``ridge`` and takes no ``uniform_ridge`` and no ``jitter``.
        rcond: whether the condition is estimated.
        check: whether a problem that fails raises.
    """

    refine: int = 0
    jitter: float = 0.0
    dual: bool = False
    rcond: bool = True
    check: bool = False

    def checked(self) -> Options:
        """Itself; raises ValueError unless the numbers are in range."""
        if self.refine < 0:
            raise ValueError(f"refine={self.refine}; expected a number of steps >= 0")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter={self.jitter}; expected a fraction of the mean diagonal, above 0 and at most 1")
        return self


# The options that ``solve_normal`` has not, with the values that it solves by.
_EX_ALONE: dict[str, Any] = {"jitter": 0.0, "rcond": False}
_IN_SOLVE_NORMAL = tuple(name not in _EX_ALONE for name in Options._fields)
_NAMES_OF_SOLVE_NORMAL = tuple(itertools.compress(Options._fields, _IN_SOLVE_NORMAL))


def _schema(names: Iterable[str]) -> str:
    """The options as an op's schema writes them: "int refine=0, float jitter=0.0". A type is its default's."""
    defaults = Options._field_defaults
    return ", ".join(f"{type(defaults[name]).__name__} {name}={defaults[name]}" for name in names)


SCHEMA_OF_SOLVE_NORMAL = _schema(_NAMES_OF_SOLVE_NORMAL)
SCHEMA_OF_SOLVE_NORMAL_EX = _schema(Options._fields)

_DEFAULTS = (*(Options._field_defaults[name] for name in _NAMES_OF_SOLVE_NORMAL), *_EX_ALONE.values())
_in_order = operator.itemgetter(*((*_NAMES_OF_SOLVE_NORMAL, *_EX_ALONE).index(name) for name in Options._fields))


def of_solve_normal(*plain: Any) -> Options:
    """The options of a call of ``solve_normal``, whose trailing arguments may be missing."""
    return Options(*_in_order(plain + _DEFAULTS[len(plain) :]))


def to_solve_normal(options: Options) -> Iterator[Any]:
    """The arguments of a call of ``solve_normal``."""
    return itertools.compress(options, _IN_SOLVE_NORMAL)


# For kernels: options take few values, and to find the checked ones takes a quarter of the time that making them takes.
@functools.lru_cache(maxsize=64, typed=True)
def checked_of_solve_normal(*plain: Any) -> Options:
    """``of_solve_normal``; raises ValueError unless the numbers are in range."""
    return of_solve_normal(*plain).checked()


@functools.lru_cache(maxsize=64, typed=True)
def checked_of_solve_normal_ex(*plain: Any) -> Options:
    """The options of a call of ``solve_normal_ex``; raises ValueError unless the numbers are in range."""
    return Options(*plain).checked()
