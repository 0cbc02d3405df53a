"""Passages of facts on regions of the world, with questions: for question_answering.py."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    import pycountry
    from babel import Locale
    from babel.languages import get_official_languages
    from babel.numbers import get_currency_name, get_territory_currencies
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install transformers babel pycountry") from error

WORDS = 4096
# What a fact is called in the passage and asked for by; {} is the region.
FACTS = {
    "currency": ("The currency of {} is the", "What do people pay with in {} ?"),
    "language": ("An official language of {} is", "Which language is spoken in {} ?"),
    "country": ("{} is in", "Where is {} ?"),
    "kind": ("{} is a", "What kind of region is {} ?"),
    "code": ("The code of {} is", "Which code stands for {} ?"),
}


@dataclass
class Questions:
    """Passages with their questions, (n, T) each but ``spans`` (n, 2), the places of the answers' first and last words.

    Attributes:
        ids, types, mask: as BERT takes them; type 1 is the passage.
        words: each row's own.
    """

    ids: Tensor
    types: Tensor
    mask: Tensor
    spans: Tensor
    words: list[list[str]]

    def inputs(self, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        return self.ids[rows], self.types[rows], self.mask[rows]


def regions() -> dict[str, dict[str, str]]:
    """Facts by the name of a part of a country, such as a province, of at most two words that name no other part."""
    english, times = Locale("en"), Counter(part.name for part in pycountry.subdivisions)
    found = {}
    for part in pycountry.subdivisions:
        code = part.country_code
        country, money, spoken = (
            english.territories.get(code),
            get_territory_currencies(code),
            get_official_languages(code),
        )
        if not country or not money or not spoken or spoken[0] not in english.languages:
            continue
        if times[part.name] > 1 or len(part.name.split()) > 2:
            continue
        found[part.name] = {
            "currency": get_currency_name(money[-1], locale="en"),
            "language": english.languages[spoken[0]],
            "country": country,
            "kind": part.type,
            "code": part.code.replace("-", " "),
        }
    return found


def number_of(word: str) -> int:
    """Words share WORDS numbers; 0 is no word."""
    return 1 + zlib.crc32(word.lower().encode()) % (WORDS - 1)


def write(facts: dict[str, dict[str, str]], count: int, seed: int) -> Questions:
    """``count`` passages with a question each."""
    rng, names = np.random.default_rng(seed), sorted(facts)
    rows, spans, passages = [], [], []
    for _ in range(count):
        pair = [names[i] for i in rng.choice(len(names), 2, replace=False)]
        told = [(name, kind) for name in pair for kind in rng.choice(list(FACTS), 2, replace=False)]
        told = [told[i] for i in rng.permutation(len(told))]
        asked = told[rng.integers(len(told))]
        words = FACTS[asked[1]][1].format(asked[0]).split()
        question = len(words)
        for name, kind in told:
            answer = facts[name][kind].split()
            words += FACTS[kind][0].format(name).split()
            if (name, kind) == asked:
                spans.append([len(words), len(words) + len(answer) - 1])
            words += [*answer, "."]
        rows.append((question, words))
        passages.append(words)
    longest = max(map(len, passages))
    ids, types = torch.zeros(count, longest, dtype=torch.long), torch.zeros(count, longest, dtype=torch.long)
    for i, (question, words) in enumerate(rows):
        ids[i, : len(words)] = torch.tensor([number_of(word) for word in words])
        types[i, question : len(words)] = 1
    return Questions(ids, types, (ids > 0).long(), torch.tensor(spans), passages)
