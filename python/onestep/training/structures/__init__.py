"""What fit recognises in a model.

- A ``Structure`` is a kind of model that has an objective of its own for the iterative methods, by kernels or formulas:
  ``perceptron.py``, ``glm_head.py``, ``vocabulary_head.py``. ``OBJECTIVES`` lists them, in order of preference. To add
  one, write a ``Structure`` in a new file and name it here.
- Two properties of a model are asked for by several methods and structures: whether outputs are affine in what is
  trained (``affine.py``), and which linear layer holds all of it and ends the model (``affine_head.py``). They have no
  objective. Who plans asks ``Facts`` for them (``not_affine``, ``head``); a run that reads other rows asks again there.
- ``softmax_rows.py`` and ``kept_rows.py`` keep what a head is given for all rows, for the methods that solve for it.
"""

from __future__ import annotations

from onestep.training.structures.base import Structure
from onestep.training.structures.glm_head import GLMHead
from onestep.training.structures.perceptron import SmallPerceptron
from onestep.training.structures.vocabulary_head import VocabularyHead

OBJECTIVES: tuple[Structure, ...] = (SmallPerceptron(), GLMHead(), VocabularyHead())
