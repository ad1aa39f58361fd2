"""python -m mole_mega.evaluate RUN.yaml [key.path=value ...]: scores of a checkpoint, by domain."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mole_mega import config
from mole_mega.config import RunConfig
from mole_mega.errors import ConfigError, quiet_libraries, report_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mole-mega eval",
        description="Loss and accuracy of a run's newest checkpoint on its data.validation sources.",
    )
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--checkpoint", type=Path, help="a step_<n> folder, instead of the run's newest")
    parser.add_argument("--base", action="store_true", help="the frozen base alone, without adapters")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    parser.epilog = "--nproc N starts N processes on this host under torchrun"
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, build, evaluate, print. Returns the exit code."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        run = config.load(args.run, args.overrides)
        if args.base and args.checkpoint:
            raise ConfigError("--base and --checkpoint exclude each other")
        checkpoint = None if args.base else args.checkpoint or _newest(run)
        if not run.data.validation:
            raise ConfigError("data.validation is empty: there is nothing to evaluate on")
        from mole_mega.platform import parallel as platform
        from mole_mega.training.trainer import evaluate_checkpoint

        parallel = platform.initialize(run.parallel, run.train.seed)
        row = evaluate_checkpoint(run, parallel, checkpoint)
        if parallel.is_main:
            print(_table(row))
            if args.json:
                args.json.write_text(json.dumps(row, indent=1) + "\n")
        platform.shutdown()
    return outcome.code


def _newest(run: RunConfig) -> Path:
    from mole_mega.checkpoint.store import complete_checkpoints

    found = complete_checkpoints(Path(run.run_dir) / "checkpoints")
    if not found:
        raise ConfigError(f"{run.run_dir} has no complete checkpoint; --base evaluates the base alone")
    return found[-1]


def _table(row: dict[str, int | float]) -> str:
    kinds = ("loss", "token_accuracy", "accuracy")
    domains = [key.split("/", 1)[1] for key in row if key.startswith("loss/")]
    width = max(map(len, ("domain", *domains)))
    lines = ["  ".join([f"{'domain':<{width}}", *(f"{kind:>14}" for kind in kinds)])]
    lines += [
        "  ".join([f"{domain:<{width}}", *(f"{row[f'{kind}/{domain}']:>14.4f}" for kind in kinds)])
        for domain in domains
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
