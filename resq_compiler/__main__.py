"""`python -m resq_compiler` is `resq`."""

from __future__ import annotations

import sys

from resq_compiler.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
