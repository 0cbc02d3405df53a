"""What was done to each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from onestep.layerwise.export import QuantizedWeight


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: its name in the model.
        rows: rows of data that reached it, padding not counted; 0: none did, and nothing could be made up for.
        features: of its inputs.
        dead: inputs that were 0 in all rows.
        rank: how many of the other inputs are independent, at most ``rows``: the eigenvalues of their Gram matrix,
            scaled to a diagonal of 1, that are above ε times their number, ε of the sums' dtype. Under ``features`` −
            ``dead``, the data do not determine the weights, and the damping does; the printed report says "rank
            deficient". Sums of float32 cannot tell inputs that depend on each other from inputs that nearly do.
        info: the status of its Gram matrix with the damping that was asked for already added
            (``linalg.inverse_cholesky``): 0: it could be factored so, which it mostly can at the default damping
            whatever its rank; positive: it could not, and ``damping`` is more than was asked for.
        damping: what was added to the diagonal in the end, in means of the diagonal.
        error_before: Σ‖t − Ŵx‖² / Σ‖t‖² over the rows without the solve: rounded to nearest, pruned by size, as it was.
            A fraction without a unit: 0.01 is one percent of the outputs' energy.
        error: the same with it. Both are of weights as the layer has them, rounded to its dtype.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import quantize
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.eye(2)
        >>> report = quantize(model, [x], bits=8, progress=False)["0"]
        >>> report.rows, report.dead, report.rank, report.error <= report.error_before
        (2, 0, 2, True)
    """

    name: str
    rows: int
    features: int
    dead: int
    rank: int
    info: int
    damping: float
    error_before: float
    error: float

    @property
    def rank_deficient(self) -> bool:
        """Whether the data leave some of the weights to the damping: rank < features − dead."""
        return self.rank < self.features - self.dead


@dataclass
class Report:
    """All layers, in the order in which they were solved.

    Attributes:
        layers: one report each.
        quantized: the codes (uint8) and grids of those that were quantised, by name; empty where none was.

    Examples:
        >>> import torch
        >>> from onestep.layerwise import quantize
        >>> report = quantize(torch.nn.Sequential(torch.nn.Linear(2, 2)), [torch.eye(2)], bits=8, progress=False)
        >>> [layer.name for layer in report.layers], list(report.quantized)
        (['0'], ['0'])
    """

    layers: list[LayerReport] = field(default_factory=list)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of a name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"{name!r} is none of the layers {[layer.name for layer in self.layers][:8]}")

    def __str__(self) -> str:
        """A table."""
        width = max([5, *(len(layer.name) for layer in self.layers)])
        head = (
            f"{'layer':<{width}} {'rows':>9} {'features':>8} {'dead':>5} {'rank':>6} {'damping':>8} {'before':>9} "
            f"{'error':>9}"
        )
        return "\n".join(
            [head]
            + [
                f"{layer.name:<{width}} {layer.rows:>9,} {layer.features:>8,} {layer.dead:>5} {layer.rank:>6,} "
                f"{layer.damping:>8.1e} {layer.error_before:>9.2e} {layer.error:>9.2e}"
                + (" rank deficient" if layer.rank_deficient else "")
                for layer in self.layers
            ]
        )
