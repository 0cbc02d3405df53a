"""The protocol of structures: each finds itself in a model, or says why it is not there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

from onestep.training.objective import DataObjective

if TYPE_CHECKING:
    from onestep.training.facts import Facts

ObjectiveType: TypeAlias = Callable[..., DataObjective]


class Mismatch(NamedTuple):
    """Something does not apply.

    Attributes:
        why: a clause in plain words, such as "the loss is 'poisson', not 'mse'".
    """

    why: str


class Structure(ABC):
    """A kind of model for which there is more than the general objective."""

    name: ClassVar[str]

    @abstractmethod
    def objective(self, facts: Facts, method: str) -> ObjectiveType | Mismatch:
        """The objective for a model of this structure, with the arguments of ``DataObjective``; or why it is not one.

        Args:
            facts: model, parameters, loss and first rows.
            method: which method will use it.
        """
