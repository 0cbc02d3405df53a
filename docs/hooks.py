"""Steps of the documentation's build that MkDocs has no plugin for: formulas as MathML, and what stands for lists."""

import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
DOCS = Path(__file__).resolve().parent
# Code on the pages imports `docs.plots` and `docs.shell`, as it does when it is typed in the repository's folder.
sys.path.insert(0, str(DOCS.parent))

from docs import plots  # noqa: E402
from docs.lists import LIST, RESULTS, TITLES, in_sources, names  # noqa: E402

plots.INTO_PAGES = True


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
    if page.file.src_path == "changelog.md" and FORMULA.search(text):
        raise PluginError("changelog.md: what stands between two $ became a formula")
    # What stands before a colon in "Returns:" is shown as it is, with its quotes.
    text = re.sub(r"``([^`<]*)``", r"\1", text)
    return FORMULA.sub(_mathml, text)


def _members(path: str, heading_level: int) -> str:
    """An entry for each public name of a module: none can be forgotten."""
    options = f"\n    options:\n      heading_level: {heading_level}"
    return "\n\n".join(f"::: {in_sources(name)}{options}" for name in names(path))


def _results() -> str:
    """Pictures and tables of every machine, as they lie under bench/results/; the picture's own table first."""
    parts = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        parts.append(f"## {folder.name}")
        parts += [
            f'<div class="wide-picture" markdown>![{TITLES.get(picture.stem, picture.stem)}]'
            f"(assets/results/{folder.name}-{picture.name})</div>"
            for picture in sorted(folder.glob("*.png"))
        ]
        for file in sorted(folder.glob("*.md"), key=lambda file: (file.stem != "table", file.stem)):
            # A first heading among theirs would end the page's table of contents.
            table = re.sub(r"^#+ ", "### ", file.read_text(), flags=re.MULTILINE)
            # Of a whole run's rows, those who want them open the table; a table without a picture is open.
            if file.stem in TITLES and any(folder.glob("*.png")):
                table = f"<details markdown>\n<summary>{TITLES[file.stem]}</summary>\n\n{table}\n\n</details>"
            parts.append(table)
    return "\n\n".join(parts)


def _decisions() -> str:
    files = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    # Some titles begin with the number.
    titles = [re.sub(r"^[#\s]*(?:\d+[.:]\s*)?", "", file.read_text().splitlines()[0]) for file in files]
    return "\n".join(
        f"- [{file.stem[:4]}: {title[0].upper()}{title[1:]}]({file.name})"
        for file, title in zip(files, titles, strict=True)
    )


def no_formulas(text: str) -> str:
    """A text in which $ is a currency: outside code it is escaped, so that what stands between two is no formula."""
    return re.sub(r"(`+)(?:(?!\1).)*?\1|\$", lambda found: found[0] if found[1] else r"\$", text, flags=re.DOTALL)


def on_page_markdown(text: str, **_: object) -> str:
    """Puts in place of each list for readers of a clone what the site has there; the list of ops stays."""

    def block(found: re.Match[str]) -> str:
        if found[2]:
            return _members(found[2], 3 if "\n## " in text[: found.start()] else 2)
        if found[1] == "changelog":
            return no_formulas((DOCS.parent / "CHANGELOG.md").read_text())
        return {"ops": lambda: found[3], "results": _results, "decisions": _decisions}[found[1]]()

    return LIST.sub(block, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures of benchmarks, which lie beside their figures under bench/results/."""
    for picture in sorted(RESULTS.glob("*/*.png")):
        name = f"assets/results/{picture.parent.name}-{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files
