"""`python -m fwp_lightning`: the same as the command `fwp`."""

import sys

from fwp_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
