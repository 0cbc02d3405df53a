"""The methods of ``fit``, each in a file of its own or with others of its kind.

``METHODS`` is the table that ``fit(method=...)`` looks into; ``method="auto"`` takes the first that suits. To add a
method, write a ``Method`` with its ``Run`` in a new file and name it here.
"""

from __future__ import annotations

from onestep.training.methods.base import Method
from onestep.training.methods.closed_form import ClosedForm
from onestep.training.methods.damped import (
    GaussNewtonCG,
    GradientDescentBaseline,
    LevenbergMarquardtMatrix,
    NewtonCGSteps,
)
from onestep.training.methods.polar import PolarSteps
from onestep.training.methods.quasi_newton import QuasiNewton

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        ClosedForm(),
        QuasiNewton(),
        LevenbergMarquardtMatrix(),
        NewtonCGSteps(),
        PolarSteps(),
        GaussNewtonCG(),
        GradientDescentBaseline(),
    )
}
