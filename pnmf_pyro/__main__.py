"""The command line as `python -m pnmf_pyro`."""

import sys

from pnmf_pyro.command_line.cli import main

if __name__ == "__main__":
    sys.exit(main())
