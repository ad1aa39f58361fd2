"""python -m mole_mega.train RUN.yaml [key.path=value ...]: one process of a run, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

from mole_mega import config as run_config
from mole_mega.cli import report_errors


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit code (0 done; 2 input; 3 failed check; 4 stopped itself; 75 on a signal)."""
    parser = argparse.ArgumentParser(prog="mole_mega.train", description=__doc__)
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    with report_errors(debug=args.debug) as outcome:
        run = run_config.load(args.run, args.overrides)
        if not args.debug:
            # Megatron-Core and torch warn about optional packages and coming changes on every start
            warnings.filterwarnings("ignore")
            logging.disable(logging.WARNING)
        from mole_mega.platform import parallel as platform
        from mole_mega.training.trainer import Trainer

        parallel = platform.initialize(run.parallel, run.train.seed)
        outcome.code = Trainer(run, parallel).train()
        platform.shutdown()
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
