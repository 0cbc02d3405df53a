"""A short text that tells one tree of tensors from another."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, uint8

from onestep._torch_private import tree_leaves


def digest(tree: Any) -> str:
    """A hash of the shapes, types and values of all tensors in a tree, and of what else it holds as it is printed."""
    result = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            result.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
            result.update(plain.reshape(-1).view(uint8).numpy().tobytes())
        else:
            result.update(repr(leaf).encode())
    return result.hexdigest()
