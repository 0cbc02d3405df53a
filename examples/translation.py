"""Translates German numbers in words into English with an encoder-decoder Transformer: onestep.fit against tuned Adam.

    pip install num2words              # the extra "translation"
    python examples/translation.py [--quick]

num2words writes the numbers from 0 to 9,999 in both languages. German says "dreiundvierzig", three-and-forty, in one
word without spaces: the network reads letters, joined two by two, and writes English words. Held out are all numbers
that end in one of a seventh of the three-digit endings, so that their longest part was never seen.

The Transformer's attention is onestep.functional's. Adam runs at each of several rates for the same seconds from the
same weights; onestep.fit has no setting but the seconds. Told are the held-out loss, the share of held-out numbers that
are translated exactly, and wrong characters (edits) for each hundred of the right text.

Writes examples/output/translation.png: held-out loss against seconds, and where the decoder looks.
"""

import argparse
import re

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from common import Run, adam, draw_runs, print_table, rows_of_step, save, solved
from torch import Tensor, nn

import onestep
from onestep.functional import scaled_dot_product_attention

try:
    from num2words import num2words
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install num2words") from error

WIDTH, HEADS, BATCH = 64, 4, 64
PADDING, BEGIN, END = 0, 1, 2
IGNORED = -100


class Attention(nn.Module):
    """Multi-head attention of x (n, T, WIDTH) to what it is given (n, S, WIDTH), after a norm, added to x."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.query, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> Tensor:
        """(n, heads, T, WIDTH / heads)."""
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        memory = y if memory is None else memory
        q, k, v = self.heads(self.query(y)), self.heads(self.key(memory)), self.heads(self.value(memory))
        found = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(found.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, memory: Tensor) -> Tensor:
        """How much each place of x looks at each of memory, (n, T, S), the mean of the heads."""
        q, k = self.heads(self.query(self.norm(x))), self.heads(self.key(memory))
        return (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1).mean(1)


class Dense(nn.Module):
    """Two layers after a norm, added to x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Translator(nn.Module):
    """Letters (n, S) and the words so far (n, T) → scores of the next word after each of them (n, T, words)."""

    def __init__(self, letters: int, words: int, longest: int, layers: int) -> None:
        super().__init__()
        self.letter, self.word = nn.Embedding(letters, WIDTH), nn.Embedding(words, WIDTH)
        self.place, self.join = nn.Embedding(longest, WIDTH), nn.Conv1d(WIDTH, WIDTH, 4, stride=2, padding=1)
        self.encoder = nn.Sequential(*(nn.Sequential(Attention(), Dense()) for _ in range(layers)))
        self.decoder = nn.ModuleList(
            nn.ModuleList([Attention(causal=True), Attention(), Dense()]) for _ in range(layers)
        )
        self.norm, self.read = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, words)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)

    def encode(self, source: Tensor) -> Tensor:
        """(n, S / 2, WIDTH)."""
        x = self.join(self.letter(source).mT).mT
        return self.read(self.encoder(x + self.place.weight[: x.shape[1]]))

    def decode(self, words: Tensor, memory: Tensor) -> Tensor:
        """(n, T, WIDTH)."""
        x = self.word(words) + self.place.weight[: words.shape[1]]
        for own, other, dense in self.decoder:
            x = dense(other(own(x), memory))
        return x

    def forward(self, source: Tensor, words: Tensor) -> Tensor:
        return self.head(self.norm(self.decode(words, self.encode(source))))

    def looks(self, source: Tensor, words: Tensor) -> Tensor:
        """Attention of the last layer's decoder to the joined letters (n, T, S / 2)."""
        memory = self.encode(source)
        x = self.word(words) + self.place.weight[: words.shape[1]]
        for own, other, dense in self.decoder[:-1]:
            x = dense(other(own(x), memory))
        own, other, _ = self.decoder[-1]
        return other.weights(own(x), memory)


class Pairs:
    """Numbers below ``count`` in German letters (n, S) and English words (n, T), split by their last three digits."""

    def __init__(self, count: int) -> None:
        self.german = [num2words(i, lang="de") for i in range(count)]
        self.english = [num2words(i, lang="en") for i in range(count)]
        # "forty-three" is three words: the hyphen is one.
        cut = [re.findall(r"[a-z]+|[-,]", text) for text in self.english]
        self.letters = ["", *sorted(set("".join(self.german)))]
        self.words = ["", "<begin>", "<end>", *sorted({word for words in cut for word in words})]
        letter, word = ({name: i for i, name in enumerate(names)} for names in (self.letters, self.words))
        self.source = pad([[letter[c] for c in text] for text in self.german], PADDING)
        self.given = pad([[BEGIN, *(word[w] for w in words)] for words in cut], PADDING)
        self.target = pad([[*(word[w] for w in words), END] for words in cut], IGNORED)
        endings = torch.arange(count) % 1000
        held = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 1 / 7
        self.train, self.held = (torch.nonzero(mask)[:, 0] for mask in (~held[endings], held[endings]))

    def text(self, codes: list[int]) -> str:
        """English from words' numbers, up to the end."""
        codes = codes[: codes.index(END)] if END in codes else codes
        joined = " ".join(self.words[code] for code in codes)
        return joined.replace(" - ", "-").replace(" ,", ",")


def pad(rows: list[list[int]], filler: int) -> Tensor:
    """(n, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def edits(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements that make b of a (Levenshtein 1966)."""
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
        above = row
    return above[-1]


def translate(model: Translator, pairs: Pairs, rows: Tensor) -> list[str]:
    """The likeliest word at each place."""
    codes = torch.full((len(rows), 1), BEGIN)
    with torch.no_grad():
        memory = model.encode(pairs.source[rows])
        for _ in range(pairs.given.shape[1]):
            scores = model.head(model.norm(model.decode(codes, memory)[:, -1]))
            codes = torch.cat([codes, scores.argmax(1, keepdim=True)], 1)
    return [pairs.text(row) for row in codes[:, 1:].tolist()]


def loss_of(model: nn.Module, pairs: Pairs, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the words."""
    scores = model(pairs.source[rows], pairs.given[rows])
    return F.cross_entropy(scores.flatten(0, 1), pairs.target[rows].flatten(), ignore_index=IGNORED)


def race(pairs: Pairs, layers: int, seconds: float, rates: tuple[float, ...], looks: int) -> list[Run]:
    """Both methods, the lower first; ``looks`` held-out rows are told of along the way."""

    def network() -> Translator:
        torch.manual_seed(0)
        longest = max(pairs.source.shape[1], pairs.given.shape[1])
        return Translator(len(pairs.letters), len(pairs.words), longest, layers)

    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return loss_of(model, pairs, pairs.held[:looks]).item()

    def step_loss(model: nn.Module, step: int) -> Tensor:
        return loss_of(model, pairs, pairs.train[rows_of_step(len(pairs.train), BATCH, step)])

    model = network()
    run, callback, finish = solved("onestep.fit (polar)", model, lambda: value(model), every=25)
    data = ((pairs.source[pairs.train], pairs.given[pairs.train]), pairs.target[pairs.train])
    options = {"batch_size": BATCH, "max_seconds": seconds, "progress": False, "callback": callback}
    onestep.fit(model, data, "cross_entropy", method="polar", **options)
    finish()
    runs = [run, adam(network, step_loss, value, rates=rates, seconds=seconds, every=25)]
    return sorted(runs, key=lambda run: run.last)


def draw(runs: list[Run], pairs: Pairs, row: int) -> None:
    """The picture."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=(1, 1.4))
    draw_runs(left, runs, title="German numbers in words: held-out loss")
    with torch.no_grad():
        looks = runs[0].model.looks(pairs.source[row : row + 1], pairs.given[row : row + 1])[0].numpy()
    words = [pairs.words[code] for code in pairs.target[row].tolist() if code != IGNORED]
    letters = pairs.german[row]
    joined = [letters[i : i + 2] for i in range(0, len(letters), 2)]
    right.imshow(looks[: len(words), : len(joined)], cmap="Blues", aspect="auto")
    right.set_xticks(range(len(joined)), joined)
    right.set_yticks(range(len(words)), words)
    right.set_title("Where the decoder looks while it writes a word")
    save(figure, "translation.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="numbers below 500, a smaller network, few steps")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    arguments = parser.parse_args()
    quick = arguments.quick
    pairs = Pairs(500 if quick else 10000)
    effort = (pairs, 1, 0.5, (3e-3,), 50) if quick else (pairs, 2, arguments.seconds, (5e-4, 1e-3, 2e-3), 500)
    print(f"{len(pairs.train):,} pairs to train on, {len(pairs.held):,} with other endings held out")
    runs = race(*effort)
    print_table("held-out loss", runs, ".4f")
    rows = pairs.held[
        torch.randperm(len(pairs.held), generator=torch.Generator().manual_seed(1))[: 10 if quick else 300]
    ]
    for run in runs:
        found = translate(run.model, pairs, rows)
        right = [pairs.english[row] for row in rows.tolist()]
        exact = sum(map(str.__eq__, found, right)) / len(right)
        wrong = sum(map(edits, found, right)) / sum(map(len, right))
        print(f"{run.method}: {exact:.1%} exact, {100 * wrong:.2f} wrong characters of 100")
    ours, theirs = sorted(runs, key=lambda run: run.method.startswith("Adam"))
    soon = ours.seconds_to(theirs.last)
    told = f"in {soon / theirs.seconds[-1]:.2f} of its seconds" if soon else "never"
    print(f"Adam's last held-out loss was reached by onestep.fit {told}\n")
    for row, text in zip(rows.tolist(), translate(runs[0].model, pairs, rows[:4]), strict=False):
        wanted = pairs.english[row]
        print(f"{pairs.german[row]}\n  {text}" + ("" if text == wanted else f"   (should be {wanted})"))
    draw(runs, pairs, int(rows[0]))


if __name__ == "__main__":
    main()
