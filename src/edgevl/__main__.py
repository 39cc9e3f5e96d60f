"""``python -m edgevl`` is the ``edgevl`` command."""

import sys

from edgevl.cli import main

if __name__ == "__main__":
    sys.exit(main())
