"""What stands beside numbers: units that are left out, since it is known what they mean, and others."""

from __future__ import annotations

import re
from typing import Any

# Signs of currencies, as in $5, US$5 and 5 €: the characters of Unicode 15 whose category is Sc, in ranges.
_CURRENCIES = (
    "\u0024\u00a2-\u00a5\u058f\u060b\u07fe-\u07ff\u09f2-\u09f3\u09fb\u0af1\u0bf9\u0e3f\u17db"
    "\u20a0-\u20c0\ua838\ufdfc\ufe69\uff04\uffe0-\uffe1\uffe5-\uffe6\U00011fdd-\U00011fe0\U0001e2ff"
    "\U0001ecb0"
)
# The codes of ISO 4217 that are no words of English or names of software.
_CODES = (
    "AED ARS AUD BDT BGN BRL CAD CHF CLP CNY CZK DKK EGP EUR GBP HKD HUF IDR ILS INR ISK JPY KES KRW KWD KZT LKR MXN "
    "MYR NGN NOK NZD PKR PLN QAR RUB SAR SEK SGD THB TWD UAH USD VND ZAR"
)
_CODE = f"(?i:{_CODES.replace(' ', '|')})"
_MINUS = "\u2212"  # of typesetters
# Parts of a hundred or a thousand.
_PARTS = "%\u2030\uff05"
_UNIT = rf"[A-Z]{{0,3}}[{_CURRENCIES}]|{_CODE}|[{_PARTS}]"
# Words that mean the same. Before a number they are few: Euro 5 is a class of exhaust, RS5 a car.
_WORDS_BEFORE = r"[Rr]s\.?|RS\.|[Kk]r\.?|S?Fr\."
_WORDS_AFTER = (
    r"(?i:per ?cent|pct\.?|prozent|pour ?cent|por ?ciento|per ?cento"
    r"|euros?|dollars?|rupees?|rs\.?|kr\.?|z\u0142|k\u010d)"
)
_BEFORE = re.compile(rf"^([-+]?)\s*(?:{_UNIT}|{_WORDS_BEFORE})\s*(?=[-+.,\d])")
# In India an amount may end in /-, in Europe a price in ,- where there are no cents.
_AFTER = re.compile(
    rf"(?:(?<=[\d.,])|(?<=[.,][-\u2013\u2014])|(?<=[.,]--))\s*(?:(?:{_UNIT}|{_WORDS_AFTER})(?:\s*/-)?|/-)$"
)
_SAME = {
    **dict.fromkeys(("PERCENT", "PER CENT", "PCT", "PROZENT", "POURCENT", "POUR CENT"), "%"),
    **dict.fromkeys(("PORCIENTO", "POR CIENTO", "PERCENTO", "PER CENTO"), "%"),
    **dict.fromkeys(("EURO", "EUROS"), "EUR"),
    **dict.fromkeys(("RS", "RUPEE", "RUPEES"), "Rs"),
    **dict.fromkeys(("DOLLAR", "DOLLARS"), "dollars"),
    "SFR": "CHF",
    "KR": "kr",
}
# Signs and words of currencies beside which a code says the same, as in $5 USD.
_CODES_OF = {
    "$": "USD CAD AUD HKD SGD NZD MXN ARS CLP TWD dollars",
    "\u20ac": "EUR",
    "\u00a3": "GBP EGP",
    "\u00a5": "JPY CNY",
    "\u20b9": "INR Rs",
    "Rs": "INR PKR LKR",
    "kr": "SEK NOK DKK ISK",
    "FR": "CHF",
    "Z\u0141": "PLN",
    "K\u010c": "CZK",
    "\u20bd": "RUB",
    "\u20a9": "KRW",
    "\u20b4": "UAH",
    "\u20ab": "VND",
    "\u20aa": "ILS",
    "\u20a6": "NGN",
    "\u20b8": "KZT",
    "\u0e3f": "THB",
    "\u09f3": "BDT",
}

# What a mark stands for where it stands alone. There is none for \u00a5, of Japan and China, and for kr.
_MEANINGS = {
    **{sign: code for sign, code in _CODES_OF.items() if " " not in code},
    **dict.fromkeys(("$", "US$", "USD$", "dollars"), "USD"),
    **dict.fromkeys(("C$", "CA$", "CAD$"), "CAD"),
    **dict.fromkeys(("A$", "AU$", "AUD$"), "AUD"),
    **dict.fromkeys(("S$", "SG$"), "SGD"),
    **dict.fromkeys(("\u20b9", "Rs"), "INR"),
    "HK$": "HKD",
    "NZ$": "NZD",
    "NT$": "TWD",
    "MX$": "MXN",
    "R$": "BRL",
    "\u00a3": "GBP",
    "JP\u00a5": "JPY",
    "CN\u00a5": "CNY",
}
# Signs that take the place of a letter of East Asia, and the plain ones.
_PLAIN = str.maketrans("\uff04\ufe69\uffe1\uffe5\uffe6\uff05", "$$\u00a3\u00a5\u20a9%")

# Texts of these alone have no unit. To look costs a hundredth of what the patterns do.
_BARE = frozenset("0123456789.,+-eE")

_NUMBER = "[-+]?(?:\\d+(?:[.,' \u2019\u00a0\u202f]\\d+)*|[.,]\\d+)(?:[eE][-+]?\\d+)?"
_SUFFIX = r"[^\d\s.,;:+()<>=_/\-][^\d]{0,15}?[23\u00b2\u00b3]?"
_MEASURED = re.compile(rf"{_NUMBER}\s*({_SUFFIX})")
# Less than, more than, about.
_COMPARED = re.compile(
    r"(?:[<>\u2264\u2265~\u2248\u00b1]=?|(?i:ca|circa|approx|about|under|over|above|below|up to)\.?)\s*"
    rf"{_NUMBER}\s*(?:{_SUFFIX})?"
)
_ORDINALS = {"st", "nd", "rd", "th", "\u00ba", "\u00aa"}
# Units that are no letters of codes such as 5A; without the s of a plural.
_MEASURES = re.compile(
    r"[mk\u00b5\u03bc]?g|lb|oz|t|[km\u00b5\u03bcnc]?m|mi|mile|ft|feet|foot|inch|in|yd|ha|acre|sq\.? ?(?:ft|m)"
    r"|(?:[ck]?m|ft)[23\u00b2\u00b3]|[cm]?l|km/?h|[mk]ph|kmpl|mpg|[km]?wh?|[km]?v|ma|hp|ps|bhp|cc|\u00b0[cf]?"
    r"|sec|s|min|h|hr|hour|day|week|month|year|yr|px|mp|[kmgt]b|[kmg]?hz|bar|psi|nm|rpm|mmol/l|mg/dl"
    r"|pc|piece|stk|st\u00fcck|person|people|room|bpm|db|k?cal|kj|bp"
)


def strip(texts: Any) -> Any:
    """A Series of texts without the units that are left out, with plain minuses."""
    if _BARE.issuperset("".join(texts.dropna())):
        return texts
    texts = texts.str.replace(_MINUS, "-", regex=False)
    return texts.str.replace(_BEFORE, r"\1", regex=True).str.replace(_AFTER, "", regex=True)


def with_plain_minus(text: str) -> str:
    """A text with the minus of keyboards in the place of the typesetters'."""
    return text.replace(_MINUS, "-")


def stripped(text: str) -> str:
    """A text without the units that are left out, with plain minuses."""
    return _AFTER.sub("", _BEFORE.sub(r"\1", with_plain_minus(text)))


def without_inner(text: str) -> str:
    """A number in parentheses without the unit that stands inside them, as in ($5)."""
    text = re.sub(rf"^([-+]?)\(([-+]?)\s*(?:{_UNIT}|{_WORDS_BEFORE})\s*", r"\1(\2", with_plain_minus(text))
    return re.sub(rf"\s*(?:{_UNIT}|{_WORDS_AFTER})\)$", ")", text)


def marks(text: str) -> list[str]:
    """What stands beside the number that a text holds, such as $, USD or %, words in one form; "$5 USD" has two."""
    text = with_plain_minus(text)
    found = (match[0].translate(_PLAIN).strip() for match in (_BEFORE.search(text), _AFTER.search(text)) if match)
    names = (mark.lstrip("+-").removesuffix("/-").strip().removesuffix(".").upper() for mark in found)
    return [_SAME.get(name, name) for name in names if name]


def _code_beside(marks: list[str]) -> str:
    """The one of two marks, before and behind a number, that says more: USD of $5 USD. Empty where they differ."""
    before, behind = marks
    for sign, name in ((before, behind), (behind, before)):
        if name in _CODES_OF.get(sign, _CODES_OF.get(sign[-1], "")).split():
            return name
    return ""


def differ(marks: list[str]) -> bool:
    """Whether the marks before and behind a number do not mean the same, as in €5 USD."""
    return len(set(marks)) == 2 and not _code_beside(marks)


def meaning(unit: str) -> str:
    """A unit in the one form of all that mean the same, such as USD for $, US$, dollars and "$ and USD".

    A sign of several currencies is that of its own name, as $ is the dollar of the United States; one that has none,
    such as ¥ and kr, is equal to nothing else, and so is a unit of two marks that differ.
    """
    marks = unit.split(" and ")
    mark = marks[0] if len(marks) == 1 else _code_beside(marks)
    return _MEANINGS.get(mark, mark) or unit


def measure(text: str) -> str:
    """The unit of a text that is a number with a unit, < for one that is compared with a number; else empty."""
    text = with_plain_minus(text)
    if _COMPARED.fullmatch(text):
        return "<"
    found = _MEASURED.fullmatch(text)
    if not found:
        return ""
    unit = found[1].strip().casefold().removesuffix(".")
    return "" if unit in _ORDINALS else unit.removesuffix("s") or unit


def is_measure(unit: str) -> bool:
    """Whether what ``measure`` found can be nothing but a unit, or a comparison."""
    return unit == "<" or bool(_MEASURES.fullmatch(unit))


def holds_number(text: str) -> bool:
    """Whether a text begins or ends with a number, as in zone 3 and 10-20."""
    return bool(re.match(r"[-+]?[.,]?\d", text) or re.search(r"\d$", text))
