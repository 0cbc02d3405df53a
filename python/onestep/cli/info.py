"""`python -m onestep info`: needs none of the extras."""

import argparse

import onestep


def run(args: argparse.Namespace) -> None:
    """Prints `onestep.info()` as an aligned table."""
    facts = onestep.info()
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        print(f"{name:<{width}}  {text}")
