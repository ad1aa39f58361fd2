"""`mole-mega convert`: the command line of this room."""

from __future__ import annotations

import argparse
from pathlib import Path

from mole_mega.errors import quiet_libraries, report_errors


def main(argv: list[str]) -> int:
    """Parse, convert, say the hash. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="mole-mega convert", description="Checkpoints from Hugging Face.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    to_megatron = kinds.add_parser("hf-to-megatron", help="a Hugging Face LLaVA becomes a base for training")
    to_megatron.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    to_megatron.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    to_megatron.add_argument("--dtype", choices=["fp32", "bf16"], help="default: as stored")
    to_megatron.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        from mole_mega.convert.hf_import import import_hf

        base_hash = import_hf(args.hf, args.out, args.dtype)
        print(f"wrote {args.out}, hash {base_hash}")
    return outcome.code
