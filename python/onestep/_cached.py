"""Cached properties without a lock, as functools has them from Python 3.12 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
Self = TypeVar("Self", bound="cached_property[Any]")


class cached_property(Generic[T]):
    """`functools.cached_property`, whose lock before Python 3.12 is shared by all objects of a class.

    A forked child, whose parent held it in another thread, would wait for it for ever. Two threads that ask at the same
    time may both compute; the properties here have the same value each time.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self: Self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        # Not a data descriptor: the next look finds the value in the object itself.
        value = instance.__dict__[self.name] = self.function(instance)
        return value
