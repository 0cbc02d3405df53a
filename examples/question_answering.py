"""Answers questions from a passage: a span head solved for, then a small BERT as a whole, against tuned Adam.

    pip install transformers babel pycountry       # the extra "questions"
    python examples/question_answering.py [--quick]

The facts are real: 4,300 provinces, districts and other parts of countries with their kinds, codes and countries from
pycountry (ISO 3166-2), the currencies and languages of these countries from Babel (Unicode's CLDR). A passage tells two
facts of each of two regions in random order; a question asks for one of them. The answer is a span of the passage, for
which two scores of each word say how well it begins and ends there. Held-out passages are on regions that no passage to
train on names: to tell the two regions of a passage apart, a reader must find the question's name in it.

1. The head, two scores from 64 features, on the encoder as it is drawn: least squares on who begins and ends the answer
   in closed form, then Newton's method on the cross-entropy; Adam on the same features.
2. The whole network from there, by onestep.fit and by Adam for the same seconds.

Exact match and F1 (words that the span found and the right one share) are of held-out questions.

Writes examples/output/question_answering.png: held-out loss against seconds, and a passage with the answer's scores.
"""

import argparse
import copy
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from common import Run, adam, draw_runs, print_table, rows_of_step, save, solved, styled
from passages import WORDS, Questions, regions, write
from torch import Tensor, nn

import onestep
from onestep.linalg import gram, solve_spd

try:
    from transformers import BertConfig, BertModel
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install transformers babel pycountry") from error

WIDTH, BATCH = 64, 32
# So many questions serve for the head alone, with 130 numbers to find.
HEAD_ROWS = 500
# Newton's method takes some five.
MOST_STEPS = 30


class Reader(nn.Module):
    """Scores of each place to begin and to end the answer, (n, 2, T), as classes of two choices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            max_position_embeddings=80,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert, self.head = BertModel(config, add_pooling_layer=False), nn.Linear(WIDTH, 2)

    def features(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """(n, T, WIDTH)."""
        return self.bert(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state

    def forward(self, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        return span_scores(self.head(self.features(ids, types, mask)), types)


def span_scores(scores: Tensor, types: Tensor) -> Tensor:
    """(n, T, 2) → (n, 2, T); next to nothing outside the passage."""
    return scores.masked_fill(types[..., None] == 0, -1e4).mT


class SpanHead(nn.Module):
    """A head on features that are kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, features: Tensor, types: Tensor) -> Tensor:
        return span_scores(self.head(features), types)


def entropy(scores: Tensor, spans: Tensor) -> Tensor:
    """Of both ends."""
    return F.cross_entropy(scores.flatten(0, 1), spans.flatten())


def answers(scores: Tensor, longest: int = 8) -> Tensor:
    """The best spans (n, 2) of at most ``longest`` words: the highest sum of both scores."""
    first, last = scores.unbind(1)
    T = scores.shape[-1]
    sums = first[:, :, None] + last[:, None, :]
    allowed = torch.ones(T, T).triu().tril(longest - 1).bool()
    best = sums.masked_fill(~allowed, float("-inf")).flatten(1).argmax(1)
    return torch.stack([best // T, best % T], 1)


def exact_and_f1(found: Tensor, right: Tensor) -> tuple[float, float]:
    """Shares of spans (n, 2) that are exact, and the mean F1 of the places in them."""
    shared = (torch.minimum(found[:, 1], right[:, 1]) - torch.maximum(found[:, 0], right[:, 0]) + 1).clamp_min(0)
    lengths = (found[:, 1] - found[:, 0] + 1) + (right[:, 1] - right[:, 0] + 1)
    return (found == right).all(1).double().mean().item(), (2 * shared / lengths).double().mean().item()


def solve_head(features: Tensor, types: Tensor, spans: Tensor) -> Run:
    """Least squares for who begins and who ends the answer, then Newton steps on the cross-entropy.

    A constant cancels, so the slopes w of each end are all there is to find. With p the chances of a passage's places
    and m = Σ p x, the gradient is the mean of m - x of the right place, the Hessian that of Σ p xxᵀ - mmᵀ: weighted
    Gram matrices (McFadden 1974).
    """
    began = time.perf_counter()
    inside = types > 0
    ends, rows = F.one_hot(spans, features.shape[1]).mT.float(), features[inside]
    model = SpanHead()
    onestep.fit(model.head, (rows, ends[inside]), "mse", method="closed_form", progress=False)
    right = features.gather(1, spans[..., None].expand(-1, -1, WIDTH)).transpose(0, 1)
    W, best = model.head.weight.detach(), float("inf")
    move, length = torch.zeros_like(W), 1.0
    for _ in range(MOST_STEPS):
        chances = span_scores(features @ (W + length * move).T, types).softmax(-1)
        loss = -chances.gather(2, spans[..., None]).log().mean().item()
        if loss > best:
            length /= 2
            continue
        W, done, best, length = W + length * move, best - loss < 1e-4 * loss, loss, 1.0
        if done:
            break
        means = (chances @ features).transpose(0, 1)
        hessian = gram(rows, weight=chances.transpose(0, 1)[:, inside])[0] - gram(means)[0]
        hessian.diagonal(dim1=-2, dim2=-1).add_(1e-6 * hessian.diagonal(dim1=-2, dim2=-1).mean())
        move = solve_spd(hessian, (right - means).sum(1))
    model.head.weight.data.copy_(W)
    run = Run("solved: closed form, Newton", model)
    run.note(time.perf_counter() - began, best)
    return run


def compare_heads(reader: Reader, train: Questions, rates: tuple[float, ...], budgets: tuple[float, ...]) -> nn.Module:
    """Prints what either way takes; the solved head."""
    with torch.no_grad():
        features = reader.features(*train.inputs(slice(HEAD_ROWS)))
    types, spans = train.types[:HEAD_ROWS], train.spans[:HEAD_ROWS]
    ours = solve_head(features, types, spans)
    goal = 1.01 * ours.last

    def step_loss(model: nn.Module, step: int) -> Tensor:
        rows = rows_of_step(len(features), BATCH, step)
        return entropy(model(features[rows], types[rows]), spans[rows])

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return entropy(model(features, types), spans).item()

    for seconds in budgets:
        theirs = adam(SpanHead, step_loss, value, rates=rates, seconds=seconds)
        if theirs.last <= goal:
            break
    print("the head, on the encoder as it is drawn:")
    print_table("loss", [ours, theirs], ".4f")
    soon = theirs.seconds_to(goal)
    told = f"after {soon:.1f} s" if soon is not None else f"not in {theirs.seconds[-1]:.1f} s"
    print(f"within one percent of the solved head's loss: Adam {told}\n")
    return ours.model.head


def race(
    start: Reader, train: Questions, held: Questions, seconds: float, rates: tuple[float, ...], every: int
) -> list[Run]:
    """The whole network by either method, the lower first."""

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return entropy(model(*held.inputs()), held.spans).item()

    def step_loss(model: nn.Module, step: int) -> Tensor:
        rows = rows_of_step(len(train.ids), BATCH, step)
        return entropy(model(*train.inputs(rows)), train.spans[rows])

    model = copy.deepcopy(start)
    run, callback, finish = solved("onestep.fit (polar)", model, lambda: value(model), every=every)
    options = {"batch_size": BATCH, "max_seconds": seconds, "progress": False, "callback": callback}
    onestep.fit(model, (train.inputs(), train.spans), "cross_entropy", method="polar", **options)
    finish()
    runs = [run, adam(lambda: copy.deepcopy(start), step_loss, value, rates=rates, seconds=seconds, every=every)]
    return sorted(runs, key=lambda run: run.last)


def draw(runs: list[Run], held: Questions, row: int) -> None:
    """The picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained", width_ratios=(1, 1.5))
    draw_runs(left, runs, title="Questions on unseen regions: held-out loss")
    with torch.no_grad():
        chances = runs[0].model(*held.inputs(slice(row, row + 1)))[0].softmax(-1).numpy()
    words = held.words[row]
    places = torch.nonzero(held.types[row])[:, 0].tolist()
    right.bar([p - 0.2 for p in places], chances[0, places], 0.4, color="#2c6fbb", label="begins")
    right.bar([p + 0.2 for p in places], chances[1, places], 0.4, color="#c0392b", label="ends")
    right.set_xticks(places, [words[p] for p in places], rotation=90, fontsize=7)
    styled(right, title=" ".join(words[: places[0]]), ylabel="probability").legend(frameon=False)
    save(figure, "question_answering.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few passages and steps")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run of the whole network")
    arguments = parser.parse_args()
    quick = arguments.quick
    facts = regions()
    names = np.random.default_rng(0).permutation(sorted(facts))
    new = set(names[: len(names) // 5])
    train = write({name: told for name, told in facts.items() if name not in new}, 64 if quick else 16_000, 1)
    held = write({name: told for name, told in facts.items() if name in new}, 20 if quick else 500, 2)
    known = len(facts) - len(new)
    print(f"{len(train.ids):,} questions on {known:,} regions, {len(held.ids)} on {len(new)} others held out")
    reader = Reader()
    reader.head = compare_heads(
        reader, train, *(((1e-2,), (0.1,)) if quick else ((1e-2, 3e-2, 1e-1), (0.5, 1.0, 2.0, 4.0)))
    )
    runs = race(reader, train, held, *((0.5, (1e-3,), 3) if quick else (arguments.seconds, (2e-3, 4e-3, 8e-3), 25)))
    print_table("whole network: held-out loss", runs, ".4f")
    for run in runs:
        with torch.no_grad():
            exact, f1 = exact_and_f1(answers(run.model(*held.inputs())), held.spans)
        print(f"{run.method}: exact match {exact:.1%}, F1 {f1:.1%}")
    ours, theirs = sorted(runs, key=lambda run: run.method.startswith("Adam"))
    soon = ours.seconds_to(theirs.last)
    told = f"in {soon / theirs.seconds[-1]:.2f} of its seconds" if soon is not None else "never"
    print(f"Adam's last held-out loss was reached by onestep.fit {told}")
    draw(runs, held, 0)


if __name__ == "__main__":
    main()
