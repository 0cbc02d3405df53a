"""The start of `python -m onestep` and `onestep`, which import the package before they run a line of it.

Ctrl-C meanwhile ends the program quietly, as it does later. An import that onestep refuses ends it with one line on
stderr, without a traceback. Nothing is imported here but what is there already, and nothing happens where onestep is a
library.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def _is_program() -> bool:
    """Whether this process was started as the command line, which imports the package before it runs a line of it."""
    arguments = getattr(sys, "orig_argv", [])
    as_module = sys.argv[:1] == ["-m"] and ["-m", "onestep"] in (arguments[at : at + 2] for at in range(len(arguments)))
    return as_module or os.path.basename(sys.argv[0] if sys.argv else "") == "onestep"


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(130)


if _is_program() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)


def leave_interrupts_to_main() -> None:
    """From here on an interrupt is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def refused(message: str) -> ImportError:
    """The error to raise where onestep cannot be imported, for a reason that the user can mend.

    The command line ends here: its users get the message as a line on stderr and exit code 2, as for other errors.
    """
    if _is_program():
        if sys.stderr is not None:  # print takes None for stdout
            print(f"error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)
    return ImportError(message)
