"""Checks that the objects of one CPU target share no weak symbol with other targets. Usage: NM TARGET OBJECT...

The linker keeps one copy of a weak symbol, which may be the one compiled for a higher instruction set: nothing but
what lives in the target's own namespace, of base or of a family, may be weak.
"""

import re
import subprocess
import sys


def main() -> int:
    nm, target, *objects = sys.argv[1:]
    own = re.compile(rf"\bonestep::(\w+::)?{target}::")
    foreign = []
    for path in objects:
        listing = subprocess.check_output([nm, "-C", "--defined-only", path], text=True)
        for line in listing.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WVu" and not own.search(name):
                foreign.append(f"{path}: {name}")
    print("\n".join(foreign) or f"{target}: no foreign weak symbols in {len(objects)} objects")
    return 1 if foreign or not objects else 0


if __name__ == "__main__":
    sys.exit(main())
