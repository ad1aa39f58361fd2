"""`mole-mega convert`: the command line of this room. Every conversion ends with the proof that it lost nothing."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mole_mega.errors import CheckFailedError, ConfigError, ExitCode, quiet_libraries, report_errors

if TYPE_CHECKING:
    from mole_mega.checkpoint.trained import Trained
    from mole_mega.config import AdapterConfig
    from mole_mega.convert.folders import Counterpart


def parser() -> argparse.ArgumentParser:
    """The arguments of all kinds; `run` of the parsed ones is the function that does it."""
    top = argparse.ArgumentParser(prog="mole-mega convert", description="Checkpoints to and from Hugging Face.")
    kinds = top.add_subparsers(dest="kind", required=True)

    hf = kinds.add_parser("hf-to-megatron", help="a Hugging Face LLaVA, or its parts, becomes a base for training")
    hf.add_argument("--hf", type=Path, required=True, help="folder of a LLaVA, or of a Llama, with config.json")
    hf.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    hf.add_argument("--dtype", choices=["fp32", "bf16"], help="default: as stored")
    _add_parts(hf)
    hf.add_argument("--image-token", default="<image>", help="what a tokenizer that has none is to call an image")
    hf.add_argument("--seed", type=int, default=0, help="of a projector that starts fresh")
    hf.set_defaults(run=_hf_to_megatron)

    megatron = kinds.add_parser("megatron-to-hf", help="a base, a run or a step becomes a Hugging Face folder")
    megatron.add_argument("--checkpoint", type=Path, required=True, help="a base, a run directory, or a step of one")
    megatron.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    megatron.add_argument(
        "--format",
        choices=["mole", "peft", "merged", "llava"],
        help="of a run: mole, a model with its experts and their code; peft, adapters; merged, where that is exact; "
        "of a base: llava, one LlavaForConditionalGeneration; default: as it came",
    )
    megatron.add_argument("--base", type=Path, help="where the run's base is now")
    megatron.add_argument("--base-reference", help="format mole: load the base from this folder or hub name instead")
    megatron.set_defaults(run=_megatron_to_hf)

    peft = kinds.add_parser("peft-to-megatron", help="PEFT adapters become what checkpoint.init_from starts a run from")
    peft.add_argument("--peft", type=Path, required=True, nargs="+", help="adapter folders, one an expert, or one")
    peft.add_argument("--base", type=Path, required=True, help="the base that they are adapters of")
    peft.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    peft.add_argument("--num-experts", type=int, help="copy one adapter to so many experts; default: plain LoRA")
    peft.add_argument("--noise", type=float, default=0.0, help="on the copies, relative to each factor's own spread")
    peft.add_argument("--attention-from", type=int, help="whose attention LoRA to take where adapters differ in it")
    peft.add_argument("--seed", type=int, default=0)
    peft.set_defaults(run=_peft_to_megatron)

    verify = kinds.add_parser("verify", help="prove that a base or a run and a Hugging Face folder are the same model")
    verify.add_argument("--checkpoint", type=Path, required=True, help="a base, a run directory, or a step of one")
    verify.add_argument("--hf", type=Path, required=True, help="where the base came from, or an export")
    verify.add_argument("--base", type=Path, help="where the run's base is now")
    _add_parts(verify)
    for axis in ("tensor", "pipeline", "expert"):
        verify.add_argument(f"--{axis}", type=int, default=1, help=f"{axis}-parallel size of our side")
    verify.add_argument("--nproc", type=int, default=1, help="processes to start on this host, under torchrun")
    verify.set_defaults(run=_verify)

    for kind in (hf, megatron, peft, verify):
        kind.add_argument("--logits-limit", type=float, default=1e-5, metavar="SHARE", help=argparse.SUPPRESS)
        kind.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    return top


def main(argv: list[str] | None = None) -> int:
    """Parse, convert, prove. Returns the exit code: 3 when the proof fails."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        if getattr(args, "nproc", 1) > 1:
            outcome.code = _launch(argv, args.nproc)
        else:
            args.run(args)
    return outcome.code


def _add_parts(command: argparse.ArgumentParser) -> None:
    command.add_argument("--vision-tower", type=Path, help="folder of the CLIP model, where --hf holds none")
    command.add_argument("--projector", type=Path, help="mm_projector weights for a Llama; default: a fresh projector")


def _hf_to_megatron(args: argparse.Namespace) -> None:
    from mole_mega.checkpoint.trained import find_trained
    from mole_mega.convert.folders import find_counterpart
    from mole_mega.convert.hf_export import missing_files
    from mole_mega.convert.hf_import import import_hf

    with _proved(args.out) as unproved:
        base_hash = import_hf(
            args.hf,
            unproved,
            args.dtype,
            vision_tower=args.vision_tower,
            projector=args.projector,
            image_token=args.image_token,
            seed=args.seed,
        )
        trained = find_trained(unproved)
        for warning in missing_files(unproved):
            print(f"warning: {warning}", file=sys.stderr)
        _prove(args, trained, lambda: find_counterpart(trained, args.hf, args.vision_tower, args.projector))
    print(f"wrote {args.out}, hash {base_hash}")


def _megatron_to_hf(args: argparse.Namespace) -> None:
    from mole_mega.checkpoint.trained import find_trained
    from mole_mega.convert import hf_export, mole_folder, peft
    from mole_mega.convert.folders import find_counterpart

    trained = find_trained(args.checkpoint, args.base)
    if trained.step is not None and args.format is None:
        raise ConfigError(f"{args.checkpoint} has adapters: say how to write them, --format mole, peft or merged")
    if (trained.step is None) != (args.format in (None, "llava")):
        raise ConfigError(f"{args.checkpoint} is {'a run' if trained.step else 'a base'}: no --format {args.format}")
    if args.base_reference is not None and args.format != "mole":
        raise ConfigError("--base-reference is for --format mole")
    export: dict[str | None, Callable[[Path], hf_export.Exported]] = {
        "mole": lambda out: mole_folder.export_mole(trained, out, args.base_reference),
        "peft": lambda out: peft.export_peft(trained, out),
        "merged": lambda out: hf_export.export_merged(trained, out),
        "llava": lambda out: hf_export.export_llava(trained, out),
        None: lambda out: hf_export.export_base(trained, out),
    }
    with _proved(args.out) as unproved:
        exported = export[args.format](unproved)
        if trained.run.fp8.store_base:
            print(
                "the run kept its base in FP8; the export holds the base as it was before, so its logits differ from "
                "training's by what e4m3 rounds off",
                file=sys.stderr,
            )
        for warning in exported.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        if exported.merge is not None:
            overall = exported.merge["overall"]
            print(
                f"merged: the change that the base's dtype took has {overall['survived']:.4g} of the norm of the "
                f"trained one; {overall['unchanged']:.2%} of the numbers that this changes stayed as they were"
            )
            if trained.run.fp8.store_base:
                print(
                    f"in FP8, as training kept the base, {overall['survived_in_fp8']:.4g} of the trained change would "
                    f"be left, with an error of {overall['error_in_fp8']:.3g} times its norm: nothing is merged into it"
                )
        _prove(args, trained, lambda: find_counterpart(trained, unproved))
    print(f"wrote {args.out}, which is {trained.step or trained.base}")


def _peft_to_megatron(args: argparse.Namespace) -> None:
    from mole_mega.checkpoint.trained import find_trained
    from mole_mega.convert.folders import adapters_counterpart
    from mole_mega.convert.peft_import import peft_to_megatron

    with _proved(args.out) as unproved:
        imported = peft_to_megatron(
            args.peft,
            args.base,
            unproved,
            num_experts=args.num_experts,
            noise=args.noise,
            seed=args.seed,
            attention_from=args.attention_from,
        )
        if args.noise:
            print("the experts were given noise: they are no longer the adapter, and are not compared with it")
        else:
            trained = find_trained(unproved, args.base)
            _prove(args, trained, lambda: adapters_counterpart(trained, args.peft, imported.filled))
    print(f"wrote {args.out}: start a run from it with {_settings(imported.adapter, args.out)}")
    routes = imported.adapter.method == "mole" and imported.adapter.router_scope != "task"
    started_anew = ["the routers"] if routes and not imported.has_router else []
    started_anew += ["the projector (the base's)"] if not imported.has_projector else []
    if started_anew:
        print(f"not in the adapters, so that a run starts them by itself: {' and '.join(started_anew)}")
    if imported.filled:
        print(f"filled with fresh factors (B = 0): {len(imported.filled)} modules, first {imported.filled[0]}")


def _settings(adapter: AdapterConfig, out: Path) -> str:
    """What a run's config has to say to start from converted adapters: what they are, and what of their use is not as
    it is by default."""
    always = {"method", "num_experts", "rank", "alpha", "gate", "router_bias", "attention", "layers"}
    values = {
        field.name: getattr(adapter, field.name)
        for field in dataclasses.fields(adapter)
        if field.name not in adapter.without_effect | {"methods"}
        and (field.name in always or getattr(adapter, field.name) != field.default)
    }
    if adapter.layers != "all":
        values["layers"] = f"[{','.join(map(str, adapter.layers))}]"
    settings = [f"adapter.{key}={str(value).lower()}" for key, value in values.items()]
    return " ".join([f"checkpoint.init_from={out}", *settings])


def _verify(args: argparse.Namespace) -> None:
    from mole_mega.checkpoint.trained import find_trained
    from mole_mega.convert.folders import find_counterpart

    trained = find_trained(args.checkpoint, args.base)
    if not _compare(args, trained, lambda: find_counterpart(trained, args.hf, args.vision_tower, args.projector)):
        raise CheckFailedError(f"{args.checkpoint} and {args.hf} are not the same model")


def _compare(args: argparse.Namespace, trained: Trained, find: Callable[[], Counterpart]) -> bool:
    """Verify and print the table; whether all of it is equal."""
    from mole_mega.config import ParallelConfig
    from mole_mega.convert.verify import table, verify
    from mole_mega.platform import parallel as platform

    layout = ParallelConfig(**{axis: getattr(args, axis, 1) for axis in ("tensor", "pipeline", "expert")})
    parallel = platform.initialize(layout, seed=0)
    checks = verify(trained, find, parallel, layout, limit=args.logits_limit)
    if parallel.is_main:
        print(table(checks))
    platform.shutdown()
    return all(check.equal for check in checks)


def _prove(args: argparse.Namespace, trained: Trained, find: Callable[[], Counterpart]) -> None:
    if not _compare(args, trained, find):
        raise CheckFailedError("the two sides differ")


@contextlib.contextmanager
def _proved(out: Path) -> Iterator[Path]:
    """Where to write what becomes `out` once it is proved, in the same block. What a block that raises has written
    stays as `out.failed`; what a killed one has, under a name that nobody takes for a result."""
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder or remove it")
    for folder in out.absolute().parents:
        if (folder / "manifest.json").is_file() and (folder / ".metadata").is_file():
            raise ConfigError(f"{out} lies in the checkpoint {folder}, which must stay as it is; choose another folder")
    unproved, failed = out.with_name(f".{out.name}.unproved"), out.with_name(f"{out.name}.failed")
    shutil.rmtree(unproved, ignore_errors=True)
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        yield unproved
    except BaseException:
        if unproved.exists():
            shutil.rmtree(failed, ignore_errors=True)
            unproved.rename(failed)
            print(f"not proved equal: what was written is now {failed}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    unproved.rename(out)


def _launch(argv: list[str], nproc: int) -> ExitCode | int:
    from mole_mega.platform.launch import launch

    index = next(i for i, word in enumerate(argv) if word.startswith("--nproc"))
    rest = argv[:index] + argv[index + (1 if "=" in argv[index] else 2) :]
    return launch("mole_mega.convert.command", rest, nproc)


if __name__ == "__main__":
    sys.exit(main())
