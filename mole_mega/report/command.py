"""mole-mega report RUN: one HTML page and a Markdown twin about a run directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from mole_mega.errors import report_errors
from mole_mega.outputs import check_file, check_folder
from mole_mega.report.document import to_html, to_markdown
from mole_mega.report.run_folder import read_run
from mole_mega.report.sections import describe


def main(argv: list[str]) -> int:
    """Parse, read, write. Returns the exit code (2 for a folder that is no run, or a run without metrics)."""
    parser = argparse.ArgumentParser(
        prog="mole-mega report",
        description="Write report.html, self-contained, and report.md about a run: losses by source, which expert "
        "serves what, load over time, alarms, throughput, checks, config.",
    )
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run's directory)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        run = read_run(args.run)
        out = args.out or args.run
        check_folder(out, "--out")
        out.mkdir(parents=True, exist_ok=True)
        writers = {"report.html": to_html, "report.md": to_markdown}
        for name in writers:
            check_file(out / name, "--out")
        document = describe(run)
        for name, text in ((name, write(document)) for name, write in writers.items()):
            (out / name).write_text(text, encoding="utf-8")
            print(f"wrote {out / name}")
        for problem in run.problems:
            print(f"not read: {problem}")
    return outcome.code
