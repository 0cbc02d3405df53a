"""Which parameters are hidden matrices, and how a parameter is cut into matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names of tables that are looked up and of learned positions and tokens, and of the last layer.
_TABLES = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|pos\w*|place|token\w*|cls\w*|query_tokens|latents?)([._]|$)")
_HEADS = re.compile(r"(^|[._])(head\w*|\w+_head|classifier|score|logits|output|out_layer|unembed\w*)([._]|$)")
_LAYERS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
# A weight of this many times as many rows as columns is taken for those of queries, keys and values.
_FUSED = 3


class Layout(NamedTuple):
    """A parameter as matrices: ``blocks`` of (rows, columns), cut from it along its first dimension or its second."""

    rows: int
    columns: int
    blocks: int = 1
    by_columns: bool = False

    @property
    def scale(self) -> float:
        """The size of a step's elements: 0.2 is about that of Adam's steps at the same rate."""
        return 0.2 * math.sqrt(max(self.rows, self.columns))

    def matrices(self, tensor: Tensor) -> Tensor:
        """A view (blocks, rows, columns) of a contiguous tensor of the parameter's shape, which may be written to."""
        if self.by_columns:
            return tensor.view(self.rows, self.blocks, self.columns).transpose(0, 1)
        return tensor.view(self.blocks, self.rows, self.columns)


def layout(parameter: Tensor, blocks: int | None, transposed: bool) -> Layout:
    """How to cut a parameter; a kernel (out, in, …) of a convolution is a matrix of ``out`` rows.

    Args:
        blocks: how many; None to see it from the shape.
        transposed: whether the layer computes xW, W (in, out), so that blocks are of columns.

    Raises:
        ValueError: the dimension is no multiple of ``blocks``.
    """
    n, m = len(parameter), parameter[0].numel()
    length, other = (m, n) if transposed else (n, m)
    if blocks is None:
        blocks = _FUSED if parameter.dim() == 2 and length == _FUSED * other else 1
    if blocks < 1 or length % blocks:
        raise ValueError(f"blocks={blocks} of a parameter of shape {tuple(parameter.shape)}; expected a divisor")
    return Layout(n, m // blocks, blocks, True) if transposed else Layout(n // blocks, m, blocks)


class Known(NamedTuple):
    """What a module or names tell of parameters, by their identity.

    Attributes:
        names: of all.
        others: of those that are not hidden matrices.
        transposed: of those of layers that compute xW.
    """

    names: dict[int, str]
    others: set[int]
    transposed: set[int]


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer with its weight transposed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def can_be_matrix(parameter: Tensor) -> bool:
    """Whether it has two or more rows and columns, flattened."""
    return parameter.dim() >= 2 and len(parameter) >= 2 and parameter[0].numel() >= 2


def of_module(model: nn.Module) -> Known:
    """Embeddings, the head and what is no weight of a layer are told from the rest by the modules they are in."""
    known = of_names(model.named_parameters())
    others: set[int] = set()
    transposed: set[int] = set()
    last: Tensor | None = None
    for module in model.modules():
        table = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        layer = isinstance(module, _LAYERS) or is_transposed(module)
        for name, parameter in module.named_parameters(recurse=False):
            matrix = can_be_matrix(parameter) and "bias" not in name
            # A matrix in a module that we do not know is judged by its name; more dimensions may be positions.
            named_so = id(parameter) in known.others
            if table or not matrix or (not layer and (parameter.dim() != 2 or named_so)):
                others.add(id(parameter))
            if layer and parameter.dim() >= 2:
                last = parameter
            if is_transposed(module) and matrix:
                transposed.add(id(parameter))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", last)
    if isinstance(weight, Tensor):
        others.add(id(weight))
    return Known(known.names, others, transposed)


def of_names(named: Iterable[tuple[str, Tensor]]) -> Known:
    """Embeddings and the head are told by their names; where none is named so, the head is the last matrix."""
    names: dict[int, str] = {}
    others: set[int] = set()
    matrices: list[int] = []
    heads = 0
    for name, parameter in named:
        names[id(parameter)] = name
        is_head = bool(_HEADS.search(name))
        if not can_be_matrix(parameter) or _TABLES.search(name) or is_head:
            others.add(id(parameter))
            heads += is_head
        else:
            matrices.append(id(parameter))
    if matrices and not heads:
        others.add(matrices[-1])
    return Known(names, others, set())


def of_tensors(tensors: Iterable[Tensor]) -> Known:
    """With neither module nor names, every matrix is hidden."""
    return Known({}, {id(tensor) for tensor in tensors if not can_be_matrix(tensor)}, set())


def blocks_by_identity(blocks: Mapping[str, int], names: Mapping[int, str]) -> dict[int, int]:
    """Blocks of parameters by their identity.

    Raises:
        ValueError: there is no parameter of that name.
    """
    identities = {name: identity for identity, name in names.items()}
    unknown = [name for name in blocks if name not in identities]
    if unknown:
        raise ValueError(f"blocks names {', '.join(map(repr, unknown))}; expected names of parameters")
    return {identities[name]: count for name, count in blocks.items()}


def known_of(params: Any) -> tuple[Known, list[Any], nn.Module | None]:
    """What there is to know of parameters given as a module, by name, as groups or as tensors; and their groups.

    Raises:
        TypeError, ValueError: it is none of these, or empty.
    """
    if isinstance(params, nn.Module):
        named = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("params is a module without a parameter that has requires_grad=True")
        return of_module(params), [{"params": named}], params
    if isinstance(params, Tensor):
        raise TypeError(
            "params is a tensor; expected a module, or an iterable of parameters, of (name, parameter) or of groups"
        )
    given = list(params)
    if not given:
        raise ValueError("params is empty; expected at least one parameter")
    groups = [dict(group) for group in given] if isinstance(given[0], dict) else [{"params": given}]
    members: list[Any] = []
    for group in groups:
        own = group["params"]
        group["params"] = [own] if isinstance(own, Tensor) else list(own)
        members += group["params"]
    if members and all(isinstance(member, tuple) for member in members):
        return of_names(members), groups, None
    tensors = [member for member in members if isinstance(member, torch.Tensor)]
    if len(tensors) != len(members):
        raise TypeError(
            "params mixes parameters with something else; expected parameters, or (name, parameter) throughout"
        )
    return of_tensors(tensors), groups, None
