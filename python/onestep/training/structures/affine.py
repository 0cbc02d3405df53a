"""Whether a model's outputs are affine in the parameters that are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onestep.evaluation.data import Chunk
from onestep.evaluation.layers import spread
from onestep.evaluation.module import call_model
from onestep.evaluation.parameters import ParameterVector

# Random directions are tried at these multiples of the parameters' size.
_SCALES = (1.0, 30.0)
# Outputs count as the same if they differ by at most this many ε of the largest.
_ROUNDINGS = 1e3
NOT_AFFINE = "the outputs are not affine in the trained parameters"


def explained(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0].strip() else type(error).__name__


def why_not_affine(module: nn.Module, parameters: ParameterVector, chunk: Chunk) -> str:
    """Why outputs are not affine in the parameters; empty if they are.

    Tests f(θ + a u + b v) = f(θ) + a (f(θ+u) - f(θ)) + b (f(θ+v) - f(θ)) on a few rows, in random directions at two
    scales; the closed form tests all rows. NaN or infinity tells nothing against it: whoever reads the rows finds that.
    A model that refuses parameters which nobody asked for, as one that checks its own does, counts as not affine.
    """
    start = parameters.read()
    few = spread(chunk)
    generator = torch.Generator().manual_seed(0)
    size = start.square().mean().sqrt().clamp_min(0.1)

    def outputs(vector: Tensor) -> Tensor:
        parameters.write(vector)
        return call_model(module, few.inputs).double()

    with torch.no_grad():
        base = call_model(module, few.inputs).double()
        if not base.isfinite().all():
            return ""
        try:
            for scale in _SCALES:
                u, v = (torch.randn(2, len(start), generator=generator).to(start) * (scale * size)).unbind()
                along_u, along_v = outputs(start + u) - base, outputs(start + v) - base
                combined = outputs(start + 0.5 * u - 2.0 * v) - base
                largest = torch.stack([t.abs().max() for t in (base, along_u, along_v)]).max()
                error = (combined - (0.5 * along_u - 2.0 * along_v)).abs().max()
                if not error <= _ROUNDINGS * torch.finfo(parameters.dtype).eps * largest:
                    return NOT_AFFINE
        except Exception as error:
            return f"the model raises at other parameters than its own ({explained(error)})"
        finally:
            parameters.write(start)
    return ""


def is_affine_between(
    module: nn.Module, parameters: ParameterVector, chunk: Chunk, start: Tensor, before: Tensor
) -> bool:
    """Whether the outputs halfway from start to the present parameters are the mean of those at both ends.

    Args:
        before: the outputs at ``start``.
    """
    end = parameters.read()
    after = call_model(module, chunk.inputs)
    parameters.write(torch.lerp(start, end, 0.5))
    halfway = call_model(module, chunk.inputs)
    parameters.write(end)
    scale = torch.stack([before.abs().max(), after.abs().max()]).max().clamp_min(torch.finfo(after.dtype).tiny)
    error = (halfway - (before + after) / 2).abs().max()
    return bool(error <= _ROUNDINGS * torch.finfo(after.dtype).eps * scale)
