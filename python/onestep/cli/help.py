"""How help is laid out: prose as wide as the terminal, examples line by line."""

import argparse
import textwrap


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps each paragraph of a description to the terminal's width; one with indented lines stays as it is written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            textwrap.indent(
                paragraph
                if any(line.startswith(" ") for line in paragraph.splitlines())
                else textwrap.fill(" ".join(paragraph.split()), width - len(indent), break_on_hyphens=False),
                indent,
            )
            for paragraph in text.strip("\n").split("\n\n")
        )
