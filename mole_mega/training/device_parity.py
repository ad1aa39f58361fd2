"""Proof that a device computes what the CPU computes: one process on it in each precision against one on the CPU in
fp32, the oracle, on the same weights and batches: the losses, the gradient of every trainable tensor, and the weights
after optimizer steps.

Rounding is not an error, but looks like one. So beside the distance of a gradient from the oracle's stands its gain,
the share of the oracle's gradient that is found along it, <g, g0> / <g0, g0>. Rounding leaves it near 1, since its
errors point anywhere; a sum that a part is missing from, or that counts one twice, does not.

A token whose two best experts are nearly as good goes to the other one after rounding, and its whole gradient with it.
So in half precision and below, the configured gate is held to less, and the same run with gate `dense`, in which
nothing is chosen, to more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from mole_mega import config as run_config
from mole_mega.config import ConfigError, Fp8Config, ParallelConfig, RunConfig, ValidationConfig
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.platform import parallel as platform
from mole_mega.platform.launch import WITHOUT_GPUS, launch_worker
from mole_mega.platform.processor import Device
from mole_mega.platform.recipes import RECIPES, dotted
from mole_mega.training import parity

_WORKER = "mole_mega.training.device_parity"
# Of a record's losses, those of the steps: counts of correct tokens and chosen experts jump with rounding.
_LOSSES = (*(f"loss/{step}" for step in range(parity.STEPS)), "loss/grad_norm_0")


@dataclass(frozen=True)
class Tolerance:
    """How far a device may be from the oracle: of the losses, and of each tensor's norm; `gain` from 1."""

    loss: float
    gradient: float
    gain: float
    weight: float


Precision = Literal["fp32", "bf16", "fp8"]

# By precision, and whether rounding can make a token choose another expert. In fp32 devices differ in the order of sums
# alone. The others are two to three times what was seen of the tiny model on the CPU in bf16 (gradients 0.05, and 0.24
# where tokens choose) and with products rounded as FP8's are, e4m3 forward and e5m2 backward (0.37 and 0.66; gains 0.10
# and 0.22).
TOLERANCES: dict[tuple[Precision, bool], Tolerance] = {
    ("fp32", False): Tolerance(loss=1e-5, gradient=1e-4, gain=1e-4, weight=1e-3),
    ("fp32", True): Tolerance(loss=1e-5, gradient=1e-4, gain=1e-4, weight=1e-3),
    ("bf16", False): Tolerance(loss=0.01, gradient=0.15, gain=0.05, weight=0.01),
    ("bf16", True): Tolerance(loss=0.02, gradient=0.6, gain=0.2, weight=0.02),
    ("fp8", False): Tolerance(loss=0.03, gradient=0.9, gain=0.25, weight=0.02),
    ("fp8", True): Tolerance(loss=0.05, gradient=1.5, gain=0.5, weight=0.03),
}


@dataclass(frozen=True)
class Setting:
    """One way to compute: what it changes in a run's config, what it is held to, and what it needs: a GPU's capability,
    and so many GPUs, each of a process."""

    name: str
    precision: Precision
    changes: Mapping[str, Any]
    capability: tuple[int, int] = (0, 0)
    processes: int = 1

    def why_not(self, devices: Sequence[Device], te_error: str) -> str:
        """Why these devices cannot compute so, in words; empty if they can. `te_error`: why Transformer Engine cannot
        be used. No devices: the CPU stands in for one."""
        if self.changes.get("model.backend") == "transformer_engine":
            if not devices:
                return "Transformer Engine computes on CUDA alone"
            if te_error:
                return f"needs Transformer Engine, which {te_error}"
        if devices and len(devices) < self.processes:
            return f"needs {self.processes} GPUs, and there is {len(devices)}"
        for device in devices[:1]:
            recipe = RECIPES.get(self.changes.get("fp8.recipe", ""))
            why = recipe.why_not(device.capability, device.cuda) if recipe else ""
            if device.capability < self.capability:
                why = f"needs compute capability {dotted(self.capability)}"
            if why:
                return f"{why}; this is {device.name} of {dotted(device.capability)}"
        return ""

    def of(self, run: RunConfig) -> RunConfig:
        """The run computed so. Raises ConfigError where its config does not allow that."""
        tree = run_config.to_dict(run)
        for key, value in self.changes.items():
            section, name = key.split(".")
            tree[section][name] = value
        return run_config.from_dict(tree)


def _te(precision: str, **fp8: Any) -> dict[str, Any]:
    changes = {"model.backend": "transformer_engine", "train.precision": precision}
    return changes | {f"fp8.{key}": value for key, value in fp8.items()}


SETTINGS = (
    Setting("fp32", "fp32", {"train.precision": "fp32"}),
    Setting("bf16", "bf16", {"train.precision": "bf16"}, (8, 0)),
    Setting("bf16, base kept in FP8", "fp8", {"train.precision": "bf16", "fp8.store_base": True}, (8, 0)),
    Setting("bf16, Transformer Engine", "bf16", _te("bf16"), (8, 0)),
    Setting("fp8 delayed", "fp8", _te("fp8", recipe="delayed")),
    Setting("fp8 tensorwise", "fp8", _te("fp8", recipe="tensorwise")),
    Setting("fp8 blockwise", "fp8", _te("fp8", recipe="blockwise")),
    Setting("fp8 mxfp8", "fp8", _te("fp8", recipe="mxfp8")),
    Setting("fp8 tensorwise, base stored in FP8", "fp8", _te("fp8", recipe="tensorwise", store_base=True)),
    # what verify-parallel, in fp32 and by torch alone, cannot look at
    Setting("bf16, Transformer Engine, CP 2", "bf16", _te("bf16") | {"parallel.context": 2}, (8, 0), 2),
    Setting("fp8 tensorwise, TP 2 + SP", "fp8", _te("fp8", recipe="tensorwise") | {"parallel.tensor": 2}, processes=2),
)


@dataclass(frozen=True)
class Case:
    """One comparison: a run on a size, computed in one setting. `why_not`: the reason why it is left out."""

    model: str
    setting: Setting
    gate: str
    run: RunConfig
    size: LlavaSize
    why_not: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}, {self.setting.name}, {self.gate}"

    @property
    def tolerance(self) -> Tolerance:
        adapter = self.run.adapter
        chooses = adapter.method == "mole" and adapter.gate != "dense" and adapter.router_scope != "task"
        return TOLERANCES[self.setting.precision, chooses and adapter.top_k < adapter.num_experts]


Status = Literal["equal", "differs", "failed", "skipped"]


@dataclass(frozen=True)
class Result:
    """What came of a case. Figures are the worst of their kind, with the tensor that has it; infinite where not finite.
    `reason` says why a case was skipped, or how it failed."""

    case: Case
    status: Status
    reason: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    gradient_tensor: str = ""
    gain: float = 0.0
    gain_tensor: str = ""
    weight: float = 0.0
    weight_tensor: str = ""
    num_tensors: int = 0


def device_sizes(heads_per_group: int = 2, *, mid: bool = True) -> dict[str, LlavaSize]:
    """The made-up models, by name: widths are multiples of 128, which every FP8 recipe takes."""

    def size(width: int, kv_heads: int, ffn: int, vocabulary: int, tower: int) -> LlavaSize:
        heads = kv_heads * heads_per_group
        return LlavaSize(
            vision=VisionSize(
                num_layers=3, hidden_size=tower, ffn_hidden_size=2 * tower, num_heads=4, image_size=16, patch_size=8
            ),
            language=LanguageSize(
                num_layers=4, hidden_size=heads * width, ffn_hidden_size=ffn, num_heads=heads, num_kv_heads=kv_heads,
                vocab_size=vocabulary, max_length=256,
            ),
            image_token_id=4,
        )  # fmt: skip

    sizes = {"tiny": size(32, 4, 512, 256, 128)}
    return sizes | ({"mid-size": size(64, max(4, 16 // heads_per_group), 2816, 4096, 256)} if mid else {})


def device_cases(
    run: RunConfig, sizes: Mapping[str, LlavaSize], devices: Sequence[Device], te_error: str
) -> list[Case]:
    """Every setting of a run (training/parity.py: scaled_down) on every size, with its own gate and, where that chooses
    experts, with all of them. No devices: the CPU stands in for one."""
    gates = {"its own gate": run}
    adapter = run.adapter
    if adapter.method == "mole" and adapter.gate != "dense" and adapter.router_scope in ("block", "linear"):
        all_experts = replace(adapter, gate="dense", top_k=1, renormalize=False, expert_parallel="weights", methods=())
        with contextlib.suppress(ConfigError):  # some mixtures must choose
            run_config.validate(replace(run, adapter=all_experts))
            gates["gate dense"] = replace(run, adapter=all_experts)
    cases = []
    for model, size in sizes.items():
        for setting in SETTINGS:
            for gate, gated in gates.items():
                why_not = setting.why_not(devices, te_error)
                try:
                    computed = setting.of(_plain(gated)) if not why_not else gated
                except ConfigError as error:
                    computed, why_not = gated, str(error)
                cases.append(Case(model, setting, gate, computed, size, why_not))
    return cases


def _plain(run: RunConfig) -> RunConfig:
    """One process, in fp32 by torch alone: the oracle, and what a setting changes."""
    return replace(
        run,
        model=replace(run.model, backend="local", base_hash=""),
        train=replace(run.train, precision="fp32", distributed_optimizer=False, recompute="none"),
        parallel=ParallelConfig(),
        validation=ValidationConfig(),  # Transformer Engine's attention writes no answers
        fp8=Fp8Config(),
    )


def verify(cases: Sequence[Case], *, on_cpu: bool, say: Callable[[str], None] = lambda _: None) -> Iterator[Result]:
    """Record the oracle on the CPU, then the cases on GPUs (`on_cpu`: or on the CPU), a launch a setting, and compare;
    results come in the cases' order. Raises RuntimeError when the oracle itself cannot be recorded."""
    wanted = [case for case in cases if not case.why_not]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        oracles = {case.model + case.gate: replace(case, run=_plain(case.run), setting=SETTINGS[0]) for case in wanted}
        if oracles:
            say(f"recording the oracle on the CPU: {len(oracles)} runs")
            threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
            broken = _record(oracles, folder, "oracle", WITHOUT_GPUS | threads)
            if broken:
                raise RuntimeError(f"the oracle on the CPU failed: {next(iter(broken.values()))}")
        failures: dict[str, str] = {}
        for setting in dict.fromkeys(case.setting.name for case in wanted):
            say(f"recording on the device: {setting}")
            group = {case.name: case for case in wanted if case.setting.name == setting}
            processes = next(iter(group.values())).setting.processes
            failures |= _record(group, folder, "device", WITHOUT_GPUS if on_cpu else {}, processes)
        for case in cases:
            if case.why_not:
                yield Result(case, "skipped", case.why_not)
            elif case.name in failures:
                yield Result(case, "failed", failures[case.name])
            else:
                reference, measured = (
                    load_file(_file(folder, kind, name))
                    for kind, name in (("oracle", case.model + case.gate), ("device", case.name))
                )
                yield compare(case, reference, measured)


def compare(case: Case, reference: Mapping[str, torch.Tensor], measured: Mapping[str, torch.Tensor]) -> Result:
    """Worst differences of a record (training/parity.py: record) from the oracle's. Raises ValueError if they hold
    different tensors."""
    reference, measured = ({k: t for k, t in r.items() if not _jumps(k)} for r in (reference, measured))
    distances = parity.compare(parity.Case(case.name, case.run, 1), reference, measured)
    gains = {
        name.partition("/")[2]: _off_gain(expected, measured[name])
        for name, expected in reference.items()
        if name.startswith("gradient/") and expected.any()
    }
    # a router's bias: a sum that cancels says nothing of gains
    gains = {name: off for name, off in gains.items() if not (".router." in name and name.endswith("bias"))}
    gain_tensor = max(gains, key=gains.__getitem__, default="")
    gain, tolerance = gains.get(gain_tensor, 0.0), case.tolerance
    is_equal = (
        distances.loss <= tolerance.loss
        and distances.gradient <= tolerance.gradient
        and gain <= tolerance.gain
        and distances.weight <= tolerance.weight
    )
    return Result(
        case, "equal" if is_equal else "differs", "", distances.loss, distances.gradient, distances.gradient_tensor,
        gain, gain_tensor, distances.weight, distances.weight_tensor, distances.num_tensors,
    )  # fmt: skip


def _jumps(key: str) -> bool:
    return key.startswith("loss/") and key not in _LOSSES


def _off_gain(expected: torch.Tensor, found: torch.Tensor) -> float:
    """How far <g, g0> / <g0, g0> is from 1."""
    whole = expected.double().flatten()
    off = abs(float(found.double().flatten() @ whole / (whole @ whole)) - 1)
    return off if math.isfinite(off) else math.inf


def _record(
    cases: Mapping[str, Case], folder: Path, kind: str, environment: Mapping[str, str], processes: int = 1
) -> dict[str, str]:
    """Record cases by name in one launch; {name: what went wrong} of those that failed."""
    listing = folder / f"{kind}.json"
    tree = [
        {
            "run": run_config.to_dict(replace(case.run, model=replace(case.run.model, base=str(folder / case.model)))),
            "size": str(_size_file(case, folder)),
            "out": str(_file(folder, kind, name)),
        }
        for name, case in cases.items()
    ]
    listing.write_text(json.dumps(tree))
    code = launch_worker(_WORKER, [str(listing)], processes, environment)
    failures = {}
    for name in cases:
        out = _file(folder, kind, name)
        if out.with_suffix(".error").exists():
            failures[name] = out.with_suffix(".error").read_text()
        elif not out.exists():
            failures[name] = f"the process ended with exit code {code}"
    return failures


def _size_file(case: Case, folder: Path) -> Path:
    path = folder / f"{case.model}.json"
    path.write_text(case.size.to_json())
    return path


def _file(folder: Path, kind: str, name: str) -> Path:
    return folder / f"{kind}_{name.replace('/', '_').replace(' ', '_')}.st"


def main(arguments: list[str]) -> int:
    """The worker: record the cases of a listing; one that fails leaves its reason and not its record."""
    listing = Path(arguments[0])
    for tree in json.loads(listing.read_text()):
        out = Path(tree["out"])
        try:
            run, size = run_config.from_dict(tree["run"]), LlavaSize.from_json(Path(tree["size"]))
            parallel = platform.initialize(run.parallel, run.train.seed)
            base = Path(run.model.base)
            if not base.exists():
                parity.make_base(_plain(run), size, parallel, base)
            measured = parity.record(run, size, parallel)
            if measured is not None:
                save_file(measured, out)
        except Exception as error:  # whatever a library or a driver raises is the result of this case
            out.with_suffix(".error").write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        platform.leave_groups()
    platform.shutdown()
    return 0
