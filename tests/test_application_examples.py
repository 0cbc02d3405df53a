"""The mathematics of the examples of applications, and that each runs whole by its quick path and draws."""

from __future__ import annotations

import ast
import importlib
import math
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDED = {
    "object_detection": ("sklearn",),
    "molecules": ("sklearn", "rdkit", "chemicals"),
    "code_generation": (),
    "translation": ("num2words",),
    "question_answering": ("transformers", "babel", "pycountry"),
}


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example that the test is parametrised by, imported."""
    for package in ("matplotlib", *NEEDED[request.param]):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("example", [name], indirect=True)


@pytest.mark.long
@pytest.mark.parametrize("example", NEEDED, indirect=True)
def test_the_quick_path_runs_and_draws(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = EXAMPLES / "output" / f"{example.__name__}.png"
    picture.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", [example.__name__, "--quick"])
    example.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "picture:" in capsys.readouterr().out


@of("object_detection")
def test_boxes_and_their_score(example: ModuleType) -> None:
    canvases = sys.modules["canvases"]
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40]])
    # A quarter of 100 is shared: 25 of 175; nothing; half of the second.
    others = torch.tensor([[5.0, 5, 15, 15], [20, 30, 30, 40]])
    torch.testing.assert_close(canvases.overlaps(boxes, others), torch.tensor([[25 / 175, 0], [0, 0.5]]))
    told = torch.tensor([[3.0, 4, 20, 18]]).expand(len(canvases.MIDDLES), 4)
    torch.testing.assert_close(canvases.decode(canvases.encode(told)), told)
    # Right, wrong, right of two: precision 1, 1/2, 2/3, of which the falling envelope is 1, 2/3, 2/3.
    right, sureness = torch.tensor([True, True, False]), torch.tensor([0.9, 0.1, 0.5])
    assert canvases.average_precision(right, sureness, 2) == pytest.approx((1 + 2 / 3) / 2)
    _, held = canvases.load(1, 4)
    truth = [(b, d, torch.ones(len(d))) for b, d in zip(held.boxes, held.digits, strict=True)]
    assert canvases.mean_average_precision(truth, held) == pytest.approx(1.0)
    # The same boxes twice: the second find of each is wrong, but comes after all right ones.
    twice = [(b.repeat(2, 1), d.repeat(2), torch.cat([s, s / 2])) for b, d, s in truth]
    assert canvases.mean_average_precision(twice, held) == pytest.approx(1.0)
    beside = [(b + 30, d, s) for b, d, s in truth]
    assert canvases.mean_average_precision(beside, held) < 0.2


@of("object_detection")
def test_the_box_head_is_the_ridge_regression(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 144, 64, generator=generator)
    targets = torch.randn(3, 144, 5, generator=generator)
    targets[..., 0] = torch.randint(11, (3, 144), generator=generator)
    _, boxes = example.heads_of(features, targets)
    run = boxes.solve()
    near = targets[..., 0] != 10
    X = torch.cat([features[near], torch.ones(int(near.sum()), 1)], 1).double()
    Y = targets[near][:, 1:].double()
    # The slopes of the mean over rows and four numbers each, plus the decay's, are zero.
    A = X.T @ X / (2 * len(X)) + boxes.decay * torch.eye(65, dtype=torch.float64)
    best = torch.linalg.solve(A, X.T @ Y / (2 * len(X)))
    torch.testing.assert_close(run.model.weight.detach().double(), best[:-1].T, rtol=0, atol=1e-4)
    expected = (X @ best - Y).square().mean() + 0.5 * boxes.decay * best.square().sum()
    assert run.last == pytest.approx(expected.item(), rel=1e-5)


@of("object_detection")
def test_the_class_head_is_within_a_thousandth_of_the_minimum(example: ModuleType) -> None:
    """The minimum by torch's L-BFGS in float64; and when a run was first at a goal."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 144, 64, generator=generator)
    directions = torch.randn(64, 11, generator=generator)
    targets = torch.zeros(20, 144, 5)
    targets[..., 0] = (features @ directions + 4 * torch.randn(20, 144, 11, generator=generator)).argmax(-1)
    classes, _ = example.heads_of(features, targets)
    run = classes.solve()
    head = classes.make().double()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = classes.objective(head, classes.rows.double(), classes.targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    lowest = closure().item()
    assert lowest * (1 - 1e-5) < run.last < 1.001 * lowest < 0.999 * run.values[0]
    assert example.first_at([run], 1.001 * lowest) == run.seconds_to(1.001 * lowest)
    assert example.first_at([run], 0.9 * lowest) == math.inf


@of("molecules")
def test_left_out_errors_are_those_of_fits_without_the_row(example: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(12, generator=generator, dtype=torch.float64)
    kernel = example.gaussian(X, X, 0.3)
    errors = example.left_out_errors(kernel, y, 0.1)
    for row in (0, 7):
        rest = [i for i in range(12) if i != row]
        alpha = torch.linalg.solve(kernel[rest][:, rest] + 0.1 * torch.eye(11, dtype=torch.float64), y[rest])
        torch.testing.assert_close(errors[row], y[row] - kernel[row, rest] @ alpha)


@of("code_generation")
def test_lines_of_python(example: ModuleType) -> None:
    for line in ("    return x", "if a:", "else:", "elif a == 1:", "except ValueError:", "for i in b:", "x = [1]"):
        assert example.is_python(line), line
    for line in ("return return", "some words in a text", "f(x", "if a", "else", "\0"):
        assert not example.is_python(line), line
    assert example.share_of_python(["x = 1\n# left out\n\nno python here\nleft ou"]) == 0.5
    model = example.GPT(16, 1).eval()
    codes = torch.randint(256, (1, 20))
    changed = codes.clone()
    changed[0, 12:] = 0
    torch.testing.assert_close(model(codes)[0, :12], model(changed)[0, :12])
    train, held = example.sources()
    ast.parse(Path(ast.__file__).read_text(encoding="utf-8"))
    assert len(train) > 4 * len(held) > 0
    inputs, targets = example.sequences(held)
    assert bytes(inputs.flatten()[1:50].tolist()) == bytes(targets.flatten()[:49].tolist()) == held[1:50]


@of("translation")
def test_pairs_edits_and_no_look_ahead(example: ModuleType) -> None:
    assert [example.edits(a, b) for a, b in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"))] == [3, 3, 2]
    pairs = example.Pairs(1200)
    for row in (0, 43, 1021):
        codes = [code for code in pairs.target[row].tolist() if code != example.IGNORED]
        assert pairs.text(codes) == pairs.english[row]
    assert pairs.german[43] == "dreiundvierzig" and pairs.english[43] == "forty-three"
    assert not set((pairs.train % 1000).tolist()) & set((pairs.held % 1000).tolist())
    torch.manual_seed(0)
    model = example.Translator(len(pairs.letters), len(pairs.words), 60, 1)
    source, given = pairs.source[1021:1022], pairs.given[1021:1022]
    changed = given.clone()
    changed[0, 3:] = 1
    torch.testing.assert_close(model(source, given)[0, :3], model(source, changed)[0, :3])
    # A decoder's looks are probabilities, and are what its attention computes with.
    looks = model.looks(source, given)
    torch.testing.assert_close(looks.sum(-1), torch.ones(looks.shape[:-1]))


@of("question_answering")
def test_spans(example: ModuleType) -> None:
    facts = example.regions()
    assert facts["Bayern"]["code"] == "DE BY" and facts["Bayern"]["language"] == "German"
    assert facts["Kyoto"]["currency"] == "Japanese Yen" and facts["Kyoto"]["country"] == "Japan"
    questions = example.write(facts, 20, 0)
    told = {answer for own in facts.values() for answer in own.values()}
    for (first, last), words in zip(questions.spans.tolist(), questions.words, strict=True):
        assert " ".join(words[first : last + 1]) in told
    scores = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
    for found, (first, last) in zip(example.answers(scores, 4).tolist(), scores, strict=True):
        sums = {(i, j): float(first[i] + last[j]) for i, j in product(range(9), range(9)) if i <= j < i + 4}
        assert tuple(found) == max(sums, key=lambda span: sums[span])
    # Exact; two of three words and one more (F1 2·2/(3 + 3)); none.
    found, right = torch.tensor([[3, 5], [2, 4], [0, 1]]), torch.tensor([[3, 5], [3, 5], [7, 8]])
    exact, f1 = example.exact_and_f1(found, right)
    assert exact == pytest.approx(1 / 3) and f1 == pytest.approx((1 + 4 / 6) / 3)
    # A head that scores all places alike costs log(places of the passage) for each end.
    reader = example.Reader()
    nn.init.zeros_(reader.head.weight)
    nn.init.zeros_(reader.head.bias)
    loss = example.entropy(reader(*questions.inputs()), questions.spans)
    expected = sum(math.log(places) for places in questions.types.sum(1).tolist()) / 20
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@of("question_answering")
def test_the_span_head_is_at_its_minimum(example: ModuleType) -> None:
    """The gradient is zero there by automatic differentiation; places outside the passage count for nothing."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, example.WIDTH, generator=generator)
    types = torch.ones(200, 12, dtype=torch.long)
    types[:, :2], types[::3, 9:] = 0, 0
    first = torch.randint(2, 7, (200,), generator=generator)
    spans = torch.stack([first, first + 2], 1)
    # What a place is like tells something of whether the answer begins or ends there, and not all.
    features[torch.arange(200), spans[:, 0], 0] += 2
    features[torch.arange(200), spans[:, 1], 1] += 2
    run = example.solve_head(features, types, spans)
    weight = run.model.head.weight.detach().double().requires_grad_()
    loss = example.entropy(example.span_scores(features.double() @ weight.T, types), spans)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.norm() < 1e-3
    assert run.last == pytest.approx(loss.item(), rel=1e-5) and loss < 0.9 * math.log(8)
