"""python -m mole_mega.evaluate RUN.yaml [key.path=value ...]: scores and answers of a checkpoint, by domain."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from mole_mega import config
from mole_mega.config import RunConfig
from mole_mega.errors import ConfigError, quiet_libraries, report_errors
from mole_mega.outputs import check_file, check_folder

KINDS = ("loss", "perplexity", "token_accuracy", "accuracy", "exact_match", "contains", "anls")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mole-mega eval",
        description="Loss, accuracy and greedy answers of a run's newest checkpoint on its data.validation sources.",
    )
    parser.add_argument("run", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--checkpoint", type=Path, help="a step_<n> folder, instead of the run's newest")
    parser.add_argument("--base", action="store_true", help="the frozen base alone, without adapters")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--answers",
        type=Path,
        help="where the answers go (default: RUN_DIR/eval/step_<n>_eval.jsonl; of another run's checkpoint, beside "
        "--json)",
    )
    parser.add_argument("--max-new-tokens", type=int, help="default: the run's validation.max_new_tokens")
    parser.add_argument("--no-generate", action="store_true", help="score without writing answers, which is faster")
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
        if args.max_new_tokens is not None:
            run = replace(run, validation=replace(run.validation, max_new_tokens=args.max_new_tokens))
            config.validate(run)
        if args.base and args.checkpoint:
            raise ConfigError("--base and --checkpoint exclude each other")
        if args.answers and args.no_generate:
            raise ConfigError("--answers and --no-generate exclude each other")
        checkpoint = None if args.base else args.checkpoint or _newest(run)
        if not run.data.validation:
            raise ConfigError("data.validation is empty: there is nothing to evaluate on")
        answers = None if args.no_generate else args.answers or _answers_file(run, checkpoint, args.json)
        if args.json:
            check_file(args.json, "--json")
        if answers:
            check_folder(answers.parent, "--answers")
            if answers.parent.is_dir():
                check_file(answers, "--answers")
        from mole_mega.checkpoint.store import computed_otherwise
        from mole_mega.models.backend import on_local_backend
        from mole_mega.platform import parallel as platform
        from mole_mega.platform.meeting import versions
        from mole_mega.training.evaluation import write_answers
        from mole_mega.training.trainer import evaluate_checkpoint

        asked = {"--no-generate": str(args.no_generate), "what is evaluated": str(checkpoint or "the base")}
        facts = versions() | config.flat(run) | asked
        run = on_local_backend(run)  # answers want a cache, which Transformer Engine's attention has not
        parallel = platform.initialize(run.parallel, run.train.seed, facts=facts)
        found = evaluate_checkpoint(run, parallel, checkpoint, generate=not args.no_generate)
        if parallel.is_main:
            print(f"evaluated {checkpoint or f'the base alone, {run.model.base}'}")
            if checkpoint and (changes := computed_otherwise(checkpoint, run)):
                print(f"computed otherwise than it was trained: {', '.join(changes)}")
            print(_table(found.scores))
            for line in found.left_out:
                print(line)
            if args.json:
                args.json.write_text(json.dumps(_facts(checkpoint) | found.scores, indent=1) + "\n")
            if not args.no_generate:
                for source in run.data.validation:
                    own = [answer for answer in found.answers if answer.source == source.name]
                    if cut := sum(answer.cut for answer in own):
                        limit = run.validation.max_new_tokens
                        print(f"{cut} of {len(own)} answers of {source.name} were cut off at {limit} tokens")
                if answers:
                    write_answers(found.answers, answers)
                    print(f"answers: {answers}")
                else:
                    print(f"answers: not written, {checkpoint} is no checkpoint of {run.run_dir} (--answers FILE)")
        platform.shutdown()
    return outcome.code


def _newest(run: RunConfig) -> Path:
    from mole_mega.checkpoint.store import latest_checkpoint

    found = latest_checkpoint(Path(run.run_dir) / "checkpoints")
    if found is None:
        raise ConfigError(f"{run.run_dir} has no complete checkpoint; --base evaluates the base alone")
    return found


def _answers_file(run: RunConfig, checkpoint: Path | None, figures: Path | None) -> Path | None:
    """Where answers go that no one named a file for. In the run's folder only its own may lie, apart from those that
    training wrote, of other settings maybe: the report shows them. None: nowhere."""
    folder = Path(run.run_dir)
    if checkpoint is None:
        return folder / "eval" / "base.jsonl"
    if checkpoint.resolve().parent == (folder / "checkpoints").resolve():
        return folder / "eval" / f"{checkpoint.resolve().name}_eval.jsonl"
    return figures and figures.with_name(f"{figures.stem}_answers.jsonl")


def _facts(checkpoint: Path | None) -> dict[str, str | int | None]:
    """What was evaluated, for the file of figures; both None: the base alone."""
    if checkpoint is None:
        return {"checkpoint": None, "step": None}
    state = json.loads((checkpoint / "state.json").read_text())
    return {"checkpoint": str(checkpoint), "step": state["step"]}


def _table(row: dict[str, int | float]) -> str:
    kinds = [kind for kind in KINDS if any(key.startswith(f"{kind}/") for key in row)]
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
