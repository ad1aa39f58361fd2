"""python -m mole_mega.train RUN.yaml [key.path=value ...]: one process of a run, alone or under torchrun."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mole_mega import config
from mole_mega.errors import quiet_libraries, report_errors
from mole_mega.outputs import check_folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mole-mega train", description="Train a run, or go on with one.")
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    parser.epilog = "--nproc N starts N processes on this host under torchrun"
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit code (0 done; 2 input; 3 failed check; 4 stopped itself; 75 on a signal)."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        run = config.load(args.run, args.overrides)
        check_folder(Path(run.run_dir), "run_dir")
        if not args.debug:
            quiet_libraries()
        from mole_mega.platform import parallel as platform
        from mole_mega.training.trainer import Trainer

        parallel = platform.initialize(run.parallel, run.train.seed)
        outcome.code = Trainer(run, parallel).train()
        platform.shutdown()
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
