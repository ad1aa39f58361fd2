"""mole-mega data preview RUN.yaml [key.path=value ...]: a run's data as training will see it, without Megatron-Core."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mole_mega import config
from mole_mega.errors import ConfigError, quiet_libraries, report_errors
from mole_mega.outputs import check_file
from mole_mega.wording import number_of

if TYPE_CHECKING:
    from mole_mega.data.loader import RunData
    from mole_mega.data.preview import SourceView


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mole-mega data",
        description="preview: the first samples that training draws of each source, with what is learned marked, and "
        "counts over many rows: places, images, samples that cannot be used.",
    )
    parser.add_argument("kind", choices=["preview"])
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="samples to show of each source")
    parser.add_argument("--rows", type=int, default=200, metavar="N", help="rows to count of each source")
    parser.add_argument("--all", action="store_true", help="count every row, in the order of the first epoch")
    parser.add_argument("--source", metavar="NAME", help="only this source")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the pictures")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, read, print. Returns the exit code."""
    args = arguments(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        _preview(args)
    return outcome.code


def _preview(args: argparse.Namespace) -> None:
    for name, low in (("samples", 0), ("rows", 1)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    if args.html is not None:
        check_file(args.html, "--html")
    run = config.load(args.run, args.overrides)
    names = [source.name for source in run.data.sources]
    if args.source is not None and args.source not in names:
        raise ConfigError(f"--source: data.sources has no {args.source!r}; there are {', '.join(names)}")

    from mole_mega.data import preview
    from mole_mega.data.loader import open_run_data
    from mole_mega.data.page import page
    from mole_mega.models.sizes import MODEL_JSON, LlavaSize

    size = LlavaSize.from_json(Path(run.model.base) / MODEL_JSON)
    data = open_run_data(
        run.data,
        run.model.base,
        run.train.seed,
        size.vision.num_places,
        size.image_token_id,
        run.train.global_batch_size,
    )
    chosen = [index for index, name in enumerate(names) if args.source in (None, name)]
    views = [_look_at(data, index, args) for index in chosen]
    described, shares = data.plan.describe(run.train.steps), data.plan.asked_shares(run.train.steps)
    plan = [described[index] for index in chosen]
    facts = (
        f"prompts: {data.encoder.prompts}; seed {run.train.seed}; an image takes {size.vision.num_places} places; "
        f"samples above data.max_length {run.data.max_length} are left out whole, none is cut"
    )
    for line in (*plan, facts, *preview.table(views)):
        print(line)
    for view in views:
        for message in view.messages:
            print(f"  for example: {message}")
    colour = sys.stdout.isatty() if args.color == "auto" else args.color == "always"
    for view in views:
        for shown in view.shown:
            images = f", {number_of(len(shown.pixels), 'image')}" if len(shown.pixels) else ""
            print(f"\n{view.name}, sample {shown.sample_id}: {shown.places} places, {shown.learned} learned{images}")
            print("  " + preview.as_text(shown, colour=colour).replace("\n", "\n  "))
    if args.html is not None:
        title = f"Data of {Path(args.run).name}"
        args.html.write_text(page(title, views, [shares[i] for i in chosen], plan, facts, data.image_spec))
        print(f"\nwrote {args.html}")
    data.plan.check(run.train.steps)


def _look_at(data: RunData, index: int, args: argparse.Namespace) -> SourceView:
    """The rows that training draws first from a source: all of its first epoch, or so many."""
    from mole_mega.data.preview import look_at

    source, row = data.sources[index], data.plan.mixture.row
    count = len(source) if args.all else min(args.rows, len(source))
    return look_at(source, (row(index, draw) for draw in range(count)), data.encoder, data.image_spec, args.samples)


if __name__ == "__main__":
    sys.exit(main())
