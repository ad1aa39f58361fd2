"""mole-mega conflict RUN.yaml [key.path=value ...]: do the sources fight over one LoRA, and would experts help?"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from mole_mega import config
from mole_mega.errors import ConfigError, quiet_libraries, report_errors
from mole_mega.outputs import check_file, check_folder


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mole-mega conflict",
        description="Before a long run: train one plain LoRA for a few steps on the mix and on each source alone, "
        "compare the sources' gradients and losses, and say whether a mixture of experts is likely to help.",
    )
    parser.add_argument("run", help="the run's YAML file; adapter.method lora is used whatever it says")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--steps", type=int, default=50, help="of each source alone (default 50)")
    parser.add_argument("--warm", type=int, help="steps on the mix before gradients are taken (default: --steps)")
    parser.add_argument("--repeats", type=int, default=2, help="of all runs, with rows in another order (default 2)")
    parser.add_argument("--batches", type=int, default=6, help="batches of gradient a source, at least 3 (default 6)")
    parser.add_argument("--chunks", type=int, default=8, help="batches of held-out rows a source, from 2 (default 8)")
    parser.add_argument("--cosine", type=float, default=0.1, help="opposed is a cosine below minus this (default 0.1)")
    parser.add_argument("--margin", type=float, default=0.02, help="a source loses by more than this (default 0.02)")
    parser.add_argument("--out", type=Path, help="folder for conflict.html, conflict.md and the maps as SVG")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    parser.epilog = "--nproc N starts N processes on this host under torchrun"
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print. Returns the exit code: 0 whatever the verdict."""
    args = parse(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        lows = {"steps": 1, "warm": 1, "repeats": 1, "batches": 3, "chunks": 2, "cosine": 0, "margin": 0}
        for name, low in lows.items():
            value = getattr(args, name)
            if value is not None and not value >= low:
                raise ConfigError(f"--{name} must be at least {low}, got {value}")
            if value == math.inf:
                raise ConfigError(f"--{name} must be a finite number, got {value}")
        if args.out is not None:
            check_folder(args.out, "--out")
        if args.json is not None:
            check_file(args.json, "--json")
        run = config.load(args.run, args.overrides)
        from mole_mega.conflict.measure import Plan, measure, set_aside, shared_adapter
        from mole_mega.conflict.statistics import Rule, find
        from mole_mega.platform import parallel as platform
        from mole_mega.platform.meeting import versions

        plan = Plan(args.steps, args.warm or args.steps, repeats=args.repeats, batches=args.batches, chunks=args.chunks)
        shared = shared_adapter(run, plan)
        asked = {f"--{name}": str(getattr(args, name)) for name in lows}
        parallel = platform.initialize(shared.parallel, shared.train.seed, facts=versions() | config.flat(run) | asked)

        def say(line: str) -> None:
            if parallel.is_main:
                print(line, flush=True)

        for line in set_aside(run):
            say(line)
        measured = measure(shared, plan, parallel, lambda line: say(f"measured {line}"))
        if parallel.is_main:
            rule = Rule(cosine=args.cosine, margin=args.margin)
            _write(measured, find(measured, rule), rule, args.out, args.json)
        platform.shutdown()
    return outcome.code


def _write(measured, found, rule, out: Path | None, json_file: Path | None) -> None:  # type: ignore[no-untyped-def]
    from mole_mega.conflict import describe
    from mole_mega.report.document import to_html, to_markdown
    from mole_mega.report.svg import standalone

    print(f"\n{describe.text(measured, found, rule, colour=sys.stdout.isatty())}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        page = describe.document(measured, found, rule)
        files = {"conflict.html": to_html(page), "conflict.md": to_markdown(page)}
        for group in describe.groups(found):
            files[f"conflict_{group}.svg"] = standalone(describe.cosine_map(measured, found, group))
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
        print(f"\nwrote {', '.join(files)} in {out}")
    if json_file is not None:
        json_file.write_text(json.dumps(describe.rows(measured, found, rule), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
