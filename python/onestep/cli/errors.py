"""How the command line speaks on stderr: one line per error or note."""

import sys

# A message that quotes a text of the file is cut to so many characters.
_LONGEST = 2000


class CliError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


class Interrupted(Exception):
    """Ctrl-C, after which what had been reached was reported and saved."""


def say(kind: str, message: str) -> None:
    """Writes one line to stderr. A cell or a path may hold line breaks: they must not split it.

    Where stderr is closed it is None, which print would take for stdout, where results are.
    """
    if sys.stderr is None:
        return
    message = " ".join(message.split())
    if len(message) > _LONGEST:
        # What to do stands at the end.
        message = f"{message[: _LONGEST // 2]} \u2026 {message[-_LONGEST // 2 :]}"
    print(f"{kind}: {message}", file=sys.stderr)


def note(message: str) -> None:
    """Tells the user about something that was decided for them."""
    say("note", message)


def listed(names: list[str], limit: int = 12) -> str:
    """Names joined by commas, cut short where there are many."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def count(n: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")
