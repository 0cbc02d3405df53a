"""No two kernel families share a name in C++: host code has one namespace for all of them (decision 289).

The linker tells of two functions of one name, but not of two structs, or of inline functions and templates: it keeps
one of these, whichever it meets first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
# Every family overloads these by its own arguments.
OVERLOADED = {"plan", "run"}
# Declared where the module is made, csrc/bindings, too.
BINDINGS = "register_"

# Comments, strings, characters, lines of the preprocessor, and macros that declare something.
IGNORED = re.compile(
    r"//[^\n]*|/\*.*?\*/"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'"
    r"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|^ONESTEP_\w+\([^\n]*\)$",
    re.DOTALL | re.MULTILINE,
)
TYPE = re.compile(r"(?:struct|class|enum class|enum|union)\s+(?:\[\[\w+\]\]\s*)?(\w+)\s*(?::[^:].*)?$")
ALIAS = re.compile(r"using (\w+)\s*=")
CONSTANT = re.compile(r"\bconstexpr\b[^=({]*?\b(\w+)\s*(?:<[^=]*>)?\s*(?:\[[^=]*\])?\s*=")
FUNCTION = re.compile(r"\b(\w+)\s*\(")


def name_of(declaration: str) -> str | None:
    """What a declaration at the level of a namespace declares; None of what declares no new name."""
    text = " ".join(declaration.split())
    if re.match(r"(using namespace|namespace|static_assert|extern template|template (?!<))", text) or not text:
        return None
    while (template := re.match(r"template <(?:[^<>]|<[^<>]*>)*> ?", text)) is not None:
        if text.startswith("template <>"):
            return None  # a specialisation of what is declared elsewhere
        text = text[template.end() :]
    for kind in (ALIAS, CONSTANT, TYPE, FUNCTION):
        found = kind.search(text) if kind in (CONSTANT, FUNCTION) else kind.match(text)
        if found is not None:
            return found[1]
    return None


def declarations(text: str) -> Iterator[tuple[str, str]]:
    """(namespace, name) of all that stands outside of functions and types; "" is an unnamed namespace's."""
    text = IGNORED.sub(" ", text)
    spaces: list[str] = []
    begin = position = depth = 0
    while position < len(text):
        character = text[position]
        if depth == 0 and character in "{;":
            declaration = text[begin:position]
            opened = re.search(r"(?:^|\s)namespace\s*([\w:]*)\s*$", declaration)
            if character == "{" and opened is not None:
                spaces.append(opened[1])
                begin = position + 1
            else:
                name = name_of(declaration + (character if character == "{" else ""))
                name = name_of(declaration) if name is None else name
                if name is not None:
                    yield "" if "" in spaces else "::".join(spaces), name
                depth += character == "{"
                begin = position + 1
        elif character == "{":
            depth += 1
        elif character == "}":
            if depth == 0:
                spaces.pop()
            else:
                depth -= 1
            begin = position + 1
        position += 1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("namespace onestep { struct A { int b; }; }", [("onestep", "A")]),
        (
            "namespace onestep {\nnamespace {\nconstexpr int kA = 1;\n}\nint f(int a) { return a; }\n}",
            [("", "kA"), ("onestep", "f")],
        ),
        ("namespace onestep { template <class T, class... O> Status g(const T& a, O... o); }", [("onestep", "g")]),
        ("namespace onestep { template <> inline constexpr int k<double> = 1; }", []),
        (
            "namespace onestep { inline constexpr int64_t kA = int64_t{1} << 20; using B = int; }",
            [("onestep", "kA"), ("onestep", "B")],
        ),
        (
            "namespace onestep::a::b { enum class [[nodiscard]] E : int { ok }; class F : public G { void h(); }; }",
            [("onestep::a::b", "E"), ("onestep::a::b", "F")],
        ),
        (
            "// struct A;\nnamespace onestep {\nONESTEP_TABLE(a, b<c>)\nstatic_assert(x(1));\nextern T t;\nint h();\n}",
            [("onestep", "h")],
        ),
    ],
)
def test_declarations_are_found(code: str, expected: list[tuple[str, str]]) -> None:
    assert list(declarations(code)) == expected


def test_no_name_of_two_families() -> None:
    found: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for path in sorted(SOURCES.rglob("*.[ch]pp")) + sorted(SOURCES.rglob("*.cu*")):
        family = path.relative_to(SOURCES).parts[0]
        for namespace, name in declarations(path.read_text()):
            if (
                namespace in ("onestep", "onestep::reference", "onestep::cuda")
                and name not in OVERLOADED
                and not name.startswith(BINDINGS)
            ):
                found[namespace, name].add(family)
    assert {"GramArgs", "glm_point", "kMostMlpLayers", "AttentionPlan"} <= {name for _, name in found}
    assert not {name: families for name, families in found.items() if len(families) > 1}
