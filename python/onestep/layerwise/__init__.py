"""The linear layers of a trained network, solved one by one with the Gram matrices of their inputs.

Every function here solves W ← argmin Σ‖Wx − t‖² + a penalty, for one layer after the other, from one pass of data
through the network each: to compress it (``quantize``, ``prune``), to mend it (``refit``), to leave blocks out
(``replace_blocks``), to put several into one (``merge``), to change what it says (``edit``). On the CPU, or on a CUDA
GPU where the model and its data are there.
"""

from onestep.layerwise.compress import prune, quantize
from onestep.layerwise.editing import edit
from onestep.layerwise.export import QuantizedWeight, save
from onestep.layerwise.loading import load
from onestep.layerwise.merging import merge
from onestep.layerwise.refitting import refit
from onestep.layerwise.replacing import replace_blocks
from onestep.layerwise.report import LayerReport, Report
from onestep.layerwise.statistics import LayerStatistics
from onestep.layerwise.sums import InputSums

__all__ = [
    "InputSums",
    "LayerReport",
    "LayerStatistics",
    "QuantizedWeight",
    "Report",
    "edit",
    "load",
    "merge",
    "prune",
    "quantize",
    "refit",
    "replace_blocks",
    "save",
]
