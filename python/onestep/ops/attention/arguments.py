"""Keyword arguments that all native entries of attention have, on the CPU and on CUDA (csrc/attention/bind.hpp)."""

from __future__ import annotations

from typing import Any

from onestep.ops.attention.schema import Sizes

# Operands of an entry without tangents.
NO_TANGENTS: dict[str, Any] = {
    f"{name}_tangent": None for name in ("q", "k", "v", "mask", "out", "lse", "grad", "grad_lse")
}


def as_tangents(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments under the names of tangents."""
    return {f"{name}_tangent": value for name, value in arguments.items()}


def plain_arguments(sizes: Sizes, scale: float, causal: bool) -> dict[str, Any]:
    return {
        "batch": sizes.batch,
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "queries": sizes.queries,
        "keys": sizes.keys,
        "d": sizes.d,
        "dv": sizes.dv,
        "scale": scale,
        "causal": causal,
    }
