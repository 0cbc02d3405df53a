"""Structures of models that fit has kernels or formulas for, each recognised in a file of its own.

``OBJECTIVES`` lists those that replace the objective of the iterative methods, in order of preference. To add one,
write a ``Structure`` in a new file and name it here.
"""

from __future__ import annotations

from onestep.training.structures.base import Structure
from onestep.training.structures.glm_head import GLMHead
from onestep.training.structures.perceptron import SmallPerceptron
from onestep.training.structures.vocabulary_head import VocabularyHead

OBJECTIVES: tuple[Structure, ...] = (SmallPerceptron(), GLMHead(), VocabularyHead())
