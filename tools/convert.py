"""`mole-mega convert` for those who work from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mole_mega.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
