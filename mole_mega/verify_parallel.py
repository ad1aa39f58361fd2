"""mole-mega verify-parallel RUN.yaml: the standard layouts and the run's own against one process."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

from mole_mega import config
from mole_mega.errors import ConfigError, ExitCode, quiet_libraries, report_errors
from mole_mega.outputs import check_file


def main(argv: list[str]) -> int:
    """Parse, compare, print the table. Returns the exit code (3 when a layout differs, 77 when none can be tried)."""
    parser = argparse.ArgumentParser(
        prog="mole-mega verify-parallel",
        description="Prove on a scaled-down model that layouts compute what one process computes.",
    )
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--max-processes", type=int, default=4, help="largest world size to try (default 4)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    args = parser.parse_intermixed_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        if args.max_processes < 2:
            raise ConfigError(f"--max-processes must be at least 2, got {args.max_processes}: there is no other layout")
        if args.json:
            check_file(args.json, "--json")
        from mole_mega.checkpoint.base import read_size
        from mole_mega.training import parity
        from mole_mega.training.parity import Case, layout_name, scaled_down, standard_layouts, table

        user_run = config.load(args.run, args.overrides)
        run, size = scaled_down(user_run, read_size(Path(user_run.model.base)))
        layouts = standard_layouts(args.max_processes)
        own = user_run.parallel
        own_world = own.tensor * own.pipeline * own.context * own.expert
        if own_world <= args.max_processes and own_world > 1 and own not in [layout for layout, _ in layouts]:
            layouts.append((own, own_world))
        cases, skipped = [], []
        for layout, world in layouts:
            try:
                candidate = replace(run, parallel=layout)
                config.validate(candidate)
                cases.append(Case(layout_name(layout, world), candidate, world))
            except ConfigError as error:
                skipped.append(f"left out {layout_name(layout, world)}: {error}")
        try:
            comparisons = parity.verify(cases, size, debug=args.debug)
        except parity.RecordingError as error:
            if args.debug:
                raise
            if error.code in (ExitCode.STOPPED_ON_SIGNAL, ExitCode.INTERRUPTED):
                raise KeyboardInterrupt from None
            return error.code  # the process that recorded has said why
        print(table(comparisons))
        for line in skipped:
            print(line)
        if args.json:
            rows = [{"case": c.case.name, "processes": c.case.world_size, "loss": _plain(c.loss),
                     "gradient": _plain(c.gradient), "weight": _plain(c.weight), "equal": c.equal}
                    for c in comparisons]  # fmt: skip
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        if not comparisons:
            outcome.code = ExitCode.NOTHING_CHECKED
        if not all(c.equal for c in comparisons):
            outcome.code = ExitCode.CHECK_FAILED
    return outcome.code


def _plain(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)
