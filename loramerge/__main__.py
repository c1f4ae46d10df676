"""`python -m loramerge`."""

from __future__ import annotations

import sys

from loramerge.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
