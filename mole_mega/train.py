"""python -m mole_mega.train RUN.yaml [key.path=value ...]: one process of a run, alone or under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path

from mole_mega import config
from mole_mega.errors import ConfigError, quiet_libraries, report_errors
from mole_mega.outputs import check_folder, holding

# torch counts a store's milliseconds in 32 bits
_LONGEST_PATIENCE = 1_000_000


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mole-mega train", description="Train a run, or go on with one.")
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--dry-run", action="store_true", help="build every rank's part of the model without memory")
    parser.add_argument("--world-size", type=int, metavar="N", help="--dry-run: for how many processes")
    parser.add_argument("--size", metavar="NAME", help="--dry-run: a size by name, where model.base is not at hand")
    parser.add_argument(
        "--rendezvous-timeout", type=float, default=300, metavar="SECONDS",
        help="how long processes wait for one another at the start (default 300)",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    parser.epilog = "--nproc N starts N processes on this host under torchrun"
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run. Returns the exit code: 0 done; 2 input; 3 failed check; 4 stopped itself; 75 stopped on a
    signal; 130 by Ctrl-C."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        run = config.load(args.run, args.overrides)
        if args.dry_run or args.world_size is not None or args.size is not None:
            _dry_run(args, run)
            return outcome.code
        if not 0 < args.rendezvous_timeout <= _LONGEST_PATIENCE:  # NaN lies nowhere
            raise ConfigError(
                f"--rendezvous-timeout must be above 0 and at most {_LONGEST_PATIENCE:,} seconds, got "
                f"{args.rendezvous_timeout:g}"
            )
        check_folder(Path(run.run_dir), "run_dir")
        if not args.debug:
            quiet_libraries()
        from mole_mega.platform import parallel as platform
        from mole_mega.platform.meeting import versions
        from mole_mega.training.trainer import Trainer

        parallel = platform.initialize(
            run.parallel,
            run.train.seed,
            patience_seconds=args.rendezvous_timeout,
            facts=versions() | config.flat(run),
        )
        with holding(Path(run.run_dir), "run_dir") if parallel.is_main else contextlib.nullcontext():
            outcome.code = Trainer(run, parallel).train()
        platform.shutdown()
    return outcome.code


def _dry_run(args: argparse.Namespace, run: config.RunConfig) -> None:
    if not args.dry_run or args.world_size is None:
        raise ConfigError("--dry-run and --world-size N go together, and --size with them")
    if args.world_size not in (bounds := config.Range(1, config.LARGEST_COUNT)):
        raise ConfigError(f"--world-size must be {bounds}, got {args.world_size}")
    if "RANK" in os.environ:
        raise ConfigError("--dry-run stands for all processes in one: leave --nproc or torchrun out")
    if not args.debug:
        quiet_libraries()
    from mole_mega.models.sizes import find_size
    from mole_mega.training.dry_run import dry_run

    base = None if args.size else Path(run.model.base)
    size = find_size(Path(run.model.base), args.size)
    for line in dry_run(run, size, args.world_size, base).describe():
        print(line)


if __name__ == "__main__":
    sys.exit(main())
