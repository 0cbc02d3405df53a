"""`python -m onestep`: see `onestep.cli`."""

import sys

from onestep.cli import main

if __name__ == "__main__":
    sys.exit(main())
