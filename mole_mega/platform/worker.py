"""`python -m mole_mega.platform.worker MODULE ARGUMENT...`: the module's `main`, whose libraries warn of nothing, not
even while they are imported."""

from __future__ import annotations

import importlib
import sys

from mole_mega.errors import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))
