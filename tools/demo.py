"""The demo: LLaVA-MoLE against plain LoRA on three real-image domains that contradict one another, on this machine.

    tiny Hugging Face LLaVA -> base checkpoint -> train on 2 processes -> accuracy by domain, before and after
        -> a folder that transformers loads -> the answer to a question about a picture

Everything is computed in this run; nothing is downloaded. The steps are the commands that a user would type.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny_cpu"
OUT = ROOT / "demo_out"
METHODS = {
    "mole": ["parallel.expert=2"],
    "lora": ["adapter.method=lora", "parallel.expert=1"],
}
DOMAINS = ("digits", "photos", "scans")


def main() -> int:
    """Run the demo; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the run, as in mole-mega train")
    args = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()

    say("1. a tiny Hugging Face LLaVA becomes a base checkpoint")
    command("convert", "hf-to-megatron", "--hf", EXAMPLE / "base_hf", "--out", OUT / "base")
    say("2. three domains from the pictures that scikit-learn and scikit-image ship")
    run(sys.executable, ROOT / "tools" / "make_demo_data.py", "--out", OUT / "data")
    say("3. what the base answers before training")
    scores = {"base": evaluate("base", "--base", *args.overrides)}
    for number, (method, layout) in enumerate(METHODS.items(), start=4):
        say(f"{number}. train {method} on the mix, 2 processes, {' '.join(layout)}")
        overrides = [f"run_dir={OUT / method}", *layout, *args.overrides]
        command("train", EXAMPLE / "run.yaml", "--nproc", 2, *overrides)
        scores[method] = evaluate(method, "--nproc", 2, *overrides)
    say(f"{4 + len(METHODS)}. export the mixture, prove it equal, and ask it about a held-out picture")
    command("convert", "megatron-to-hf", "--checkpoint", OUT / "mole", "--format", "mole", "--out", OUT / "mole_hf")
    ask(DOMAINS[0])

    print("\nAnswers that are right word for word, on held-out pictures, measured in this run:\n")
    print(table(scores))
    print(f"\ntook {time.monotonic() - started:.0f} s. Where to look next:")
    print(f"  {Path(sys.executable).parent / 'tensorboard'} --logdir {OUT}      losses by domain, expert load by layer")
    print(f"  {OUT / 'mole' / 'metrics.jsonl'}      the same figures, a JSON object a step")
    print(f"  {OUT / 'mole_hf'}      the model as transformers loads it, mole_mega not needed; its README.md says how")
    print("  mole-mega verify-parallel examples/tiny_cpu/run.yaml      the same run in other layouts, proved equal")
    return 0


def evaluate(name: str, *arguments: object) -> dict[str, float]:
    path = OUT / f"scores_{name}.json"
    command("eval", EXAMPLE / "run.yaml", "--no-generate", "--json", path, *arguments)
    return json.loads(path.read_text())


def ask(domain: str) -> None:
    """The exported model's answer to the first question of a domain's held-out pictures, beside the true one."""
    (sample, *_) = json.loads((OUT / "data" / f"{domain}_test.json").read_text())
    question, answer = (turn["value"] for turn in sample["conversations"])
    print(f"{domain}: {question.removeprefix('<image>').strip()!r} -> true: {answer!r}; the export says:", flush=True)
    command("generate", "--model", OUT / "mole_hf", "--image", OUT / "data" / sample["image"], "--prompt", question)


def table(scores: dict[str, dict[str, float]]) -> str:
    """Exact-match accuracy by method and domain, with the mean over domains."""
    domains = [key.removeprefix("accuracy/") for key in scores["base"] if key.startswith("accuracy/")]
    lines = ["  ".join([f"{'':<6}", *(f"{domain:>10}" for domain in domains), f"{'mean':>10}"])]
    for name, row in scores.items():
        values = [row[f"accuracy/{domain}"] for domain in domains]
        cells = [*values, sum(values) / len(values)]
        lines.append("  ".join([f"{name:<6}", *(f"{value:>10.3f}" for value in cells)]))
    return "\n".join(lines)


def command(*arguments: object) -> None:
    run(sys.executable, "-m", "mole_mega.cli", *arguments)


def run(*arguments: object) -> None:
    """Run a step; a step that fails ends the demo with its exit code."""
    code = subprocess.run([str(argument) for argument in arguments], check=False).returncode
    if code:
        sys.exit(code)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
