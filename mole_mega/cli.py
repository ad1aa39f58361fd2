"""The `mole-mega` command: one sub-command a task, each handed to the room that does it."""

from __future__ import annotations

import argparse
import importlib
import sys

from mole_mega import config
from mole_mega.errors import ConfigError, ExitCode, report_errors

# name: (module with `main(argv)`, what it does). A module with `parse(argv)` too can run in several processes.
COMMANDS = {
    "train": ("mole_mega.train", "train a run, or go on with one"),
    "eval": ("mole_mega.evaluate", "loss and accuracy of a checkpoint, by domain"),
    "estimate": ("mole_mega.estimate.command", "memory, bytes sent and step time of a layout, beforehand"),
    "doctor": ("mole_mega.doctor", "what this machine has, what it lacks, and what that switches off"),
    "verify-parallel": ("mole_mega.verify_parallel", "prove that layouts compute what one process computes"),
    "verify-gpu": ("mole_mega.verify_gpu", "on GPUs: each precision against the CPU, NCCL layouts, memory, speed"),
    "data": ("mole_mega.inspect_data", "look at a run's data before training: samples, loss masks, counts"),
    "generate": ("mole_mega.generate", "ask a trained or an exported model about an image"),
    "conflict": ("mole_mega.conflict.command", "do the sources fight over one LoRA, and would experts help?"),
    "report": ("mole_mega.report.command", "an HTML page and a Markdown twin about a run"),
    "convert": ("mole_mega.convert.command", "checkpoints to and from Hugging Face, and the proof that they are equal"),
}


def _run_in_processes(name: str, argv: list[str]) -> int:
    """A command over a run file whose module runs in `--nproc` processes."""
    parser = argparse.ArgumentParser(prog=f"mole-mega {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc", type=int, default=1)
    args, rest = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[name][0])
    if args.nproc == 1:
        return module.main(rest)
    parsed = module.parse(rest)
    with report_errors(debug=parsed.debug) as outcome:
        if args.nproc < 1:
            raise ConfigError(f"--nproc must be at least 1, got {args.nproc}")
        config.load(parsed.run, parsed.overrides)  # a wrong config is told once, before processes start
        from mole_mega.platform.launch import launch

        outcome.code = launch(module.__name__, rest, args.nproc)
    return outcome.code


def main() -> int:
    """Entry point of `mole-mega`."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: mole-mega COMMAND ...\n\n{listing}\n\nmole-mega COMMAND --help says more.")
        return 0 if len(sys.argv) > 1 else ExitCode.INPUT_ERROR
    name = sys.argv[1]
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return ExitCode.INPUT_ERROR
    module = importlib.import_module(COMMANDS[name][0])
    return _run_in_processes(name, sys.argv[2:]) if hasattr(module, "parse") else module.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
