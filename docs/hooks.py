"""Steps of the documentation's build that MkDocs has no plugin for: formulas as MathML, and the list of decisions."""

import html
import importlib
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
MEMBERS = re.compile(r"<!-- members of (\S+) -->")
RESULTS = Path(__file__).parents[1] / "bench" / "results"
DECISIONS = Path(__file__).parent / "decisions"


def _mathml(found: re.Match[str]) -> str:
    latex = html.unescape(found[2]).strip()
    display = "block" if latex.startswith("\\[") else "inline"
    return convert(latex[2:-2].strip(), display=display)


def on_page_content(text: str, page: Page, **_: object) -> str:
    """Browsers draw MathML by themselves, so no script is needed. A picture that a page draws must be on it."""
    drawn, shown = (page.markdown or "").count("show(figure"), text.count('class="plot"')
    if drawn > shown:
        raise PluginError(
            f"{page.file.src_path}: of {drawn} pictures {shown} are on the page; print(show(...)) shows one"
        )
    return FORMULA.sub(_mathml, text)


def _members(found: re.Match[str]) -> str:
    """An entry for each public name of a module: none can be forgotten."""
    module = importlib.import_module(found[1])
    return "\n\n".join(f"::: {found[1]}.{name}" for name in module.__all__ if name != "__version__")


def _results() -> str:
    """Pictures and tables of every machine, as they lie under bench/results/."""
    parts = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        parts.append(f"## {folder.name}")
        parts += [
            f"![{picture.stem}](assets/results/{folder.name}-{picture.name})"
            for picture in sorted(folder.glob("*.png"))
        ]
        # A first heading among theirs would end the page's table of contents.
        tables = (table.read_text() for table in sorted(folder.glob("*.md")))
        parts += [re.sub(r"^#+ ", "### ", table, flags=re.MULTILINE) for table in tables]
    return "\n\n".join(parts)


def on_page_markdown(text: str, **_: object) -> str:
    """Writes out public names and the list of decisions, one line a file, where a page asks for them."""
    text = MEMBERS.sub(_members, text)
    text = text.replace("<!-- results -->", _results())
    if "<!-- decisions -->" not in text:
        return text
    files = sorted(DECISIONS.glob("[0-9]*.md"))
    lines = [f"- [{file.stem[:4]}: {file.read_text().splitlines()[0].lstrip('# ')}]({file.name})" for file in files]
    return text.replace("<!-- decisions -->", "\n".join(lines))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures of benchmarks, which lie beside their figures under bench/results/."""
    for picture in sorted(RESULTS.glob("*/*.png")):
        name = f"assets/results/{picture.parent.name}-{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_config(config: MkDocsConfig) -> None:
    """Lets code on the pages import docs/plots.py and docs/shell.py."""
    sys.path.insert(0, str(Path(__file__).parent))
