"""mole-mega verify-gpu [RUN.yaml]: what only a machine with GPUs can prove, in one command and one file to send."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole_mega import config
from mole_mega.errors import ConfigError, ExitCode, quiet_libraries, report_errors
from mole_mega.outputs import check_file

if TYPE_CHECKING:  # imported where needed: it starts Megatron-Core
    from mole_mega.models.sizes import LlavaSize
    from mole_mega.platform.processor import Device
    from mole_mega.training.device_parity import Result

PARTS = ("precision", "layouts", "speed")
FORMAT = 1  # of the file
SPEED_SIZE = "llava15_7b"  # without a run file
_SENT = ("adapter.", "train.", "parallel.", "fp8.", "model.backend")  # of a run's keys


def main(argv: list[str]) -> int:
    """Parse, compare, write, print. Returns the exit code: 3 when something differs or fails, and 77 when nothing could
    be looked at, as without a GPU: whoever asks whether a cluster is sound must not read "done" where nothing was
    done. 77 is what test harnesses take for "skipped"."""
    parser = argparse.ArgumentParser(
        prog="mole-mega verify-gpu",
        description="On a machine with GPUs: one process in each precision against the CPU in fp32, layouts over NCCL, "
        "memory and throughput. What cannot run here is skipped, and the reason said.",
    )
    parser.add_argument(
        "run", nargs="?", help="a run's YAML file, whose adapters and widths are taken; else made-up ones"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"which, with commas between (default {','.join(PARTS)})"
    )
    parser.add_argument("--gpus", type=int, help="GPUs to use (default: all of this host)")
    parser.add_argument(
        "--size", metavar="NAME", help=f"whose layers are timed, by name (default: the base's, or {SPEED_SIZE})"
    )
    parser.add_argument("--json", type=Path, default=Path("verify_gpu.json"), help="default verify_gpu.json")
    parser.add_argument(
        "--rehearse", action="store_true",
        help="let the CPU stand in for the GPU: proves this command, and nothing of a GPU",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    args = parser.parse_intermixed_args(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        check_file(args.json, "--json")
        if args.gpus is not None and args.gpus < 1:
            raise ConfigError(f"--gpus must be at least 1, got {args.gpus}")
        parts = args.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ConfigError(f"--parts has {unknown[0]!r}; there are {', '.join(PARTS)}")
        run = config.load(args.run, args.overrides) if args.run else made_up_run()
        report = examine(run, args, from_file=bool(args.run))
        args.json.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        print("\n".join(describe(report)))
        print(f"wrote {args.json}")
        outcome.code = exit_code(report)
    return outcome.code


def made_up_run() -> config.RunConfig:
    """LLaVA-MoLE as published in size (arXiv 2401.16160), on no data: batches are made."""
    return config.RunConfig(
        run_dir="unused",
        model=config.ModelConfig(base="unused"),
        train=config.TrainConfig(steps=1),
        data=config.DataConfig(sources=(config.SourceConfig(name="made", path="made"),)),
    )


def examine(run: config.RunConfig, args: argparse.Namespace, *, from_file: bool) -> dict[str, Any]:
    """Look at every part that was asked for; the file as plain data."""
    from mole_mega.models.sizes import MODEL_JSON, LlavaSize, find_size
    from mole_mega.platform.meeting import versions
    from mole_mega.platform.processor import cuda_devices
    from mole_mega.platform.te import why_unusable
    from mole_mega.training.device_parity import TOLERANCES

    devices = [] if args.rehearse else cuda_devices()[: args.gpus]
    te_error = why_unusable()
    base = Path(run.model.base)
    base_size = LlavaSize.from_json(base / MODEL_JSON) if from_file and (base / MODEL_JSON).is_file() else None
    timed = base_size if base_size and not args.size else find_size(base, args.size or SPEED_SIZE)
    report: dict[str, Any] = {
        "format": FORMAT,
        "device": "cpu" if args.rehearse else "cuda" if devices else None,
        "rehearsal": args.rehearse,
        "gpus": [dataclasses.asdict(device) for device in devices],
        "versions": versions(),
        "transformer_engine": te_error or "usable",
        # what was computed, and nothing of whose data it was meant for
        "run": {key: value for key, value in config.flat(run).items() if key.startswith(_SENT)} if from_file else None,
        "tolerances": {
            f"{precision}{', experts chosen' if chosen else ''}": dataclasses.asdict(tolerance)
            for (precision, chosen), tolerance in TOLERANCES.items()
        },
    }
    for part in PARTS:
        if part not in args.parts.split(","):
            report[part] = [_skipped("left out by --parts")]
        elif not devices and not args.rehearse:
            report[part] = [_skipped(_why_no_gpu())]
        elif part == "precision":
            report[part] = _precision(run, base_size, devices, te_error)
        elif part == "layouts":
            report[part] = _layouts(run, base_size, devices)
        else:
            report[part] = _speed(run, timed, devices, te_error)
    return report


def exit_code(report: dict[str, Any]) -> ExitCode:
    """What the rows of all parts come to."""
    found = {row["status"] for part in PARTS for row in report[part]}
    if found & {"differs", "failed"}:
        return ExitCode.CHECK_FAILED
    return ExitCode.DONE if found & {"equal", "measured"} else ExitCode.NOTHING_CHECKED


def describe(report: dict[str, Any]) -> list[str]:
    """The file for people."""
    names = ", ".join(gpu["name"] for gpu in report["gpus"])
    lines = [f"on {names}" if names else "rehearsal on the CPU" if report["rehearsal"] else "on no GPU"]
    for part in PARTS:
        lines.append(f"{part}:")
        for row in report[part]:
            lines.append(f"  {row['status']:8}  {row.get('case', part)}{_figures(row)}")
            if row["reason"]:
                lines.append(f"{'':12}{row['reason']}")
    return lines


def _figures(row: dict[str, Any]) -> str:
    if row["status"] == "measured":
        share = "" if row["share_of_peak"] is None else f", {row['share_of_peak']:.1%} of {row['gpu']}'s peak"
        return (
            f": {row['tokens_per_second']:,.0f} tokens/s, {row['tflops_per_second']:.1f} TFLOP/s{share}; peak "
            f"{row['peak_bytes'] / 1e9:.2f} GB (estimate {row['estimated_bytes'] / 1e9:.2f})"
        )
    if row["status"] not in ("equal", "differs"):
        return ""
    parts = [f"loss {row['loss']:.1e}" if isinstance(row["loss"], float) else f"loss {row['loss']}"]
    for kind in ("gradient", "gain", "weight"):
        if kind in row:
            value = row[kind]
            parts.append(f"{kind} {value:.1e}" if isinstance(value, float) else f"{kind} {value}")
    worst = f" (worst gradient {row['gradient_tensor']})" if row["status"] == "differs" else ""
    return ": " + ", ".join(parts) + worst


def _precision(
    run: config.RunConfig, base_size: LlavaSize | None, devices: Sequence[Device], te_error: str
) -> list[dict[str, Any]]:
    from mole_mega.training.device_parity import device_cases, device_sizes, verify
    from mole_mega.training.parity import scaled_down

    small, _ = scaled_down(run, base_size)
    group = base_size.language.num_heads // base_size.language.num_kv_heads if base_size else 2
    # on a CPU without bf16 products the larger model takes minutes, and proves no more of this command
    sizes = device_sizes(group, mid=bool(devices))
    cases = device_cases(small, sizes, devices, te_error)
    return [_as_row(result) for result in verify(cases, on_cpu=not devices, say=_say)]


def _layouts(run: config.RunConfig, base_size: LlavaSize | None, devices: Sequence[Device]) -> list[dict[str, Any]]:
    """The standard layouts over NCCL, each rank on a GPU of its own, against one process on one GPU, in fp32."""
    from mole_mega.training import parity

    number = len(devices)
    if not devices:
        return [_skipped("a rehearsal has no NCCL; mole-mega verify-parallel compares layouts on the CPU")]
    if number == 1:
        return [_skipped("a layout needs 2 GPUs at least, and there is 1")]
    small, size = parity.scaled_down(run, base_size)
    rows, cases = [], []
    for layout, world in parity.standard_layouts(8):
        name = parity.layout_name(layout, world)
        try:
            candidate = dataclasses.replace(small, parallel=layout)
            config.validate(candidate)
            if world > number:
                raise ConfigError(f"needs {world} GPUs, and there are {number}")
            cases.append(parity.Case(name, candidate, world))
        except ConfigError as error:
            rows.append(_skipped(str(error), name))
    _say(f"{len(cases)} layouts on up to {number} processes")
    try:
        comparisons = parity.verify(cases, size)
    except RuntimeError as error:
        return [*rows, {"case": "layouts", "status": "failed", "reason": str(error)}]
    for one in comparisons:
        figures = {kind: _plain(getattr(one, kind)) for kind in ("loss", "gradient", "weight")}
        rows.append({
            "case": one.case.name, "processes": one.case.world_size, "status": "equal" if one.equal else "differs",
            "reason": "", **figures, "gradient_tensor": one.gradient_tensor, "tensors": one.num_tensors,
        })  # fmt: skip
    return rows


def _speed(run: config.RunConfig, size: LlavaSize, devices: Sequence[Device], te_error: str) -> list[dict[str, Any]]:
    from mole_mega.models.sizes import SIZES
    from mole_mega.training.device_speed import speed_cases, time_all

    size = size if devices else SIZES["tiny"]
    return list(time_all(speed_cases(run, size, devices, te_error), devices, _say))


def _as_row(result: Result) -> dict[str, Any]:
    case = result.case
    row: dict[str, Any] = {"case": case.name, "status": result.status, "reason": result.reason}
    if result.status in ("equal", "differs"):
        tree = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.name != "case"}
        row |= {key: _plain(value) for key, value in tree.items()}
        row["tolerance"] = dataclasses.asdict(case.tolerance)
    return row


def _skipped(reason: str, case: str = "all") -> dict[str, Any]:
    return {"case": case, "status": "skipped", "reason": reason}


def _why_no_gpu() -> str:
    """What `doctor` found of CUDA."""
    from mole_mega.doctor import cuda

    finding = cuda()
    return f"no GPU: {finding.found}; {finding.fix}"


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    print(text, flush=True)
