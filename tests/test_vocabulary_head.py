"""Whole language models under cross-entropy: loss and curvature without the scores of all words."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import onestep
from onestep.evaluation.data import Chunk
from onestep.evaluation.losses import LOSSES
from onestep.evaluation.parameters import ParameterVector
from onestep.training.objective import DataObjective
from onestep.training.structures import vocabulary_head
from onestep.training.structures.base import Mismatch
from onestep.training.structures.vocabulary_head import VocabularyObjective, find_vocabulary_head

WORDS, WIDTH, ROWS, CONTEXT = 1100, 12, 6, 5
CROSS_ENTROPY = LOSSES["cross_entropy"]


class LanguageModel(nn.Module):
    """Words (n,T) → scores of the next one (n,T,V)."""

    def __init__(self, *, bias: bool = True, tied: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, dtype=dtype)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True, dtype=dtype
        )
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(words)))


class ClassesSecond(LanguageModel):
    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words).mT


class Shifted(LanguageModel):
    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words) + 1.0


@pytest.fixture
def chunk() -> Chunk:
    words = torch.randint(0, WORDS, (ROWS, CONTEXT + 1))
    target = words[:, 1:].clone()
    target[0, :3] = -100
    return Chunk(words[:, :-1], target)


def both(model: nn.Module, chunk: Chunk) -> tuple[VocabularyObjective, DataObjective, ParameterVector]:
    layer = find_vocabulary_head(model, CROSS_ENTROPY, chunk)
    assert not isinstance(layer, Mismatch), layer
    arguments: Any = (model, CROSS_ENTROPY, lambda: [chunk], lambda: [chunk])
    ours = VocabularyObjective(*arguments, fixed=True, layer=layer, kept_rows=ROWS)
    parameters = ParameterVector([p for p in model.parameters() if p.requires_grad])
    return ours, DataObjective(*arguments, fixed=True, kept_rows=ROWS), parameters


@pytest.mark.parametrize("frozen", ["", "head", "body"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tied": True}], ids=str)
def test_like_torch(chunk: Chunk, options: dict[str, bool], frozen: str) -> None:
    """Value, gradient, Gauss-Newton and Hessian products are those through the scores."""
    model = LanguageModel(**options)
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    ours, torchs, parameters = both(model, chunk)
    v = torch.randn(len(parameters), dtype=torch.float64)
    torch.testing.assert_close(ours.value(parameters), torchs.value(parameters), rtol=1e-12, atol=0)
    for mine, theirs in zip(ours.gradient(parameters), torchs.gradient(parameters), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-10, atol=1e-12)
    for hessian in (False, True):
        product = ours.curvature(parameters, hessian=hessian)(v)
        expected = torchs.curvature(parameters, hessian=hessian)(v)
        torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-11)


class WithoutAttention(LanguageModel):
    """With gradient checkpointing if asked for, which torch.func does not take."""

    def __init__(self, *, checkpointed: bool, **options: Any) -> None:
        super().__init__(**options)
        self.checkpointed = checkpointed
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh())

    def forward(self, words: Tensor) -> Tensor:
        h = self.embedding(words)
        return self.head(checkpoint(self.body, h, use_reentrant=False) if self.checkpointed else self.body(h))


@pytest.mark.parametrize("frozen", ["", "head", "body"])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tied": True}], ids=str)
def test_checkpointing(chunk: Chunk, options: dict[str, bool], frozen: str) -> None:
    """Products by reverse mode twice, as for any other model; expected is that of the model without checkpoints."""
    model, plain = (WithoutAttention(checkpointed=checkpointed, **options) for checkpointed in (True, False))
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        if frozen:
            each.get_submodule(frozen).requires_grad_(False)
    (ours, _, parameters), (_, torchs, plain_parameters) = both(model, chunk), both(plain, chunk)
    product, expected = ours.curvature(parameters, hessian=False), torchs.curvature(plain_parameters, hessian=False)
    for _ in range(2):
        v = torch.randn(len(parameters), dtype=torch.float64)
        torch.testing.assert_close(product(v), expected(v), rtol=1e-9, atol=1e-11)
    assert ours.route.reverse_twice


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_no_scores_in_memory() -> None:
    """No tensor has as many elements as there are scores; torch's way has."""
    words = torch.randint(0, WORDS, (40, CONTEXT + 1))
    chunk = Chunk(words[:, :-1], words[:, 1:].contiguous())
    ours, torchs, parameters = both(LanguageModel(dtype=torch.float32), chunk)
    scores = 40 * CONTEXT * WORDS
    assert scores > 2 * len(parameters)
    for objective, holds_scores in ((ours, False), (torchs, True)):
        with Largest() as largest:
            objective.gradient(parameters)
            objective.curvature(parameters, hessian=False)(torch.ones(len(parameters)))
        assert (largest.elements >= scores) == holds_scores


def test_found_only_where_it_ends_the_model(chunk: Chunk) -> None:
    assert not isinstance(find_vocabulary_head(LanguageModel(), CROSS_ENTROPY, chunk), Mismatch)
    assert isinstance(find_vocabulary_head(LanguageModel(), LOSSES["mse"], chunk), Mismatch)
    assert isinstance(find_vocabulary_head(Shifted(), CROSS_ENTROPY, chunk), Mismatch)
    assert isinstance(find_vocabulary_head(ClassesSecond(), CROSS_ENTROPY, chunk), Mismatch)
    hooked = LanguageModel()
    hooked.head.register_forward_hook(lambda _layer, _args, scores: 2 * scores)
    assert isinstance(find_vocabulary_head(hooked, CROSS_ENTROPY, chunk), Mismatch)


@pytest.mark.parametrize("method", ["gauss_newton", "newton_cg", "gradient_descent"])
def test_fit(chunk: Chunk, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fit takes it, and ends where it ends without it, through the scores."""
    model = LanguageModel()
    other = copy.deepcopy(model)
    data = torch.randint(0, WORDS, (ROWS, CONTEXT)), torch.randint(0, WORDS, (ROWS, CONTEXT))
    calls = []
    chunk_loss = VocabularyObjective.chunk_loss
    monkeypatch.setattr(
        VocabularyObjective, "chunk_loss", lambda self, *args: calls.append(self) or chunk_loss(self, *args)
    )
    options: dict[str, Any] = {"method": method, "max_steps": 1, "progress": False}
    if method != "gradient_descent":
        options["cg_iterations"] = 4
    result = onestep.fit(model, data, "cross_entropy", **options)
    assert calls
    monkeypatch.setattr(vocabulary_head, "find_vocabulary_head", lambda *args: Mismatch("switched off"))
    expected = onestep.fit(other, data, "cross_entropy", **options)
    # Newton's starts where the loss is not convex: where the direction of negative curvature leads too far, what
    # conjugate gradients had before it is tried, not a shorter step of more damping.
    assert result.loss < math.log(WORDS)
    assert result.loss == pytest.approx(expected.loss, rel=1e-7)
