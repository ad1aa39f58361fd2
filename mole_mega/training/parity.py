"""Proof that a layout computes what one process computes: the same loss, the gradient of every trainable tensor, and
the same weights after optimizer steps.

A case is a run's config on a model that is scaled down but built, fed and stepped by the real code. Each case is run
under torchrun in a process of its own world size and leaves a record; records are compared tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mole_mega import config as run_config
from mole_mega.adapters.methods import method_entries, shorten_methods
from mole_mega.adapters.routing import RoutingSummary
from mole_mega.checkpoint.base import save_base
from mole_mega.checkpoint.store import trainable_entries, weight_entries
from mole_mega.config import AdapterConfig, Fp8Config, ParallelConfig, RunConfig
from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX
from mole_mega.errors import CheckFailedError, report_errors
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LanguageSize, LlavaSize, VisionSize
from mole_mega.monitor.experts import measure_experts
from mole_mega.platform import parallel as platform
from mole_mega.platform.launch import launch_worker
from mole_mega.platform.parallel import Parallel
from mole_mega.platform.recipes import sequence_multiple
from mole_mega.training.loss import SCORE_ROWS
from mole_mega.training.optimizer import build_optimizer, set_lr
from mole_mega.training.step import Stepper
from mole_mega.training.trainer import build_model

# DESIGN section 6: fp32, relative to each tensor's norm; Adam magnifies rounding.
GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
STEPS = 3
# Sources of the two samples of each of four micro-batches: eight, or as few as there are; some micro-batches are of one
# source, and no data-parallel rank has its own alone, or nothing would go from a rank to another's experts.
_SOURCES = ((0, 2), (1, 4), (3, 6), (5, 7))


@dataclass(frozen=True)
class Case:
    """One config to record. `run.parallel` is its layout, `world_size` its processes."""

    name: str
    run: RunConfig
    world_size: int


class RecordingError(RuntimeError):
    """A case could not be recorded; its process has said why, and ended with this exit code."""

    def __init__(self, world_size: int, code: int) -> None:
        super().__init__(f"recording on {world_size} processes ended with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Comparison:
    """How far a case is from its one-process reference, each relative to the reference's norm."""

    case: Case
    loss: float
    gradient: float
    gradient_tensor: str
    weight: float
    weight_tensor: str
    num_tensors: int

    @property
    def equal(self) -> bool:
        return (
            self.loss <= GRADIENT_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE and self.weight <= WEIGHT_TOLERANCE
        )


def standard_layouts(max_world_size: int) -> list[tuple[ParallelConfig, int]]:
    """(layout, world size) of every kind of parallelism and their pairs, as far as `max_world_size` processes go."""
    table = [
        (ParallelConfig(tensor=2), 2),
        (ParallelConfig(pipeline=2), 2),
        (ParallelConfig(expert=2), 2),
        (ParallelConfig(), 2),
        (ParallelConfig(tensor=2, expert=2), 4),
        (ParallelConfig(pipeline=2, expert=2), 4),
        (ParallelConfig(tensor=2, pipeline=2), 4),
        (ParallelConfig(tensor=2, pipeline=2, expert=2), 8),
    ]
    return [(layout, world) for layout, world in table if world <= max_world_size]


def layout_name(layout: ParallelConfig, world_size: int) -> str:
    """For people: TP 2 + SP x EP 2."""
    data = layout.data(world_size)
    parts = [f"TP {layout.tensor} + SP"] * (layout.tensor > 1) + [f"PP {layout.pipeline}"] * (layout.pipeline > 1)
    parts += [f"CP {layout.context}"] * (layout.context > 1)
    parts += [f"EP {layout.expert}"] * (layout.expert > 1) + [f"DP {data}"] * (data > layout.expert)
    return " x ".join(parts) or "one process"


def scaled_down(run: RunConfig, base_size: LlavaSize | None) -> tuple[RunConfig, LlavaSize]:
    """The run in fp32 and without dropout on a model of the same kind, small enough for a laptop.

    The ratio of query to key-value heads, the gate, the losses and the number of experts stay the user's.
    """
    heads_per_group = base_size.language.num_heads // base_size.language.num_kv_heads if base_size else 2
    kv_heads, width = 4, 8
    heads = kv_heads * heads_per_group
    size = LlavaSize(
        vision=VisionSize(
            num_layers=3, hidden_size=32, ffn_hidden_size=64, num_heads=4, image_size=16, patch_size=8
        ),
        language=LanguageSize(
            num_layers=4, hidden_size=heads * width, ffn_hidden_size=96, num_heads=heads, num_kv_heads=kv_heads,
            vocab_size=131, max_length=256,
        ),
        image_token_id=4,
    )  # fmt: skip
    run = shorten_methods(run, STEPS)
    adapter, train = run.adapter, run.train
    if base_size is not None:  # what travels stays the user's too
        adapter = replace(adapter, expert_parallel=expert_parallel(run, base_size).form)
    rank = min(adapter.rank, 8)
    layers: Literal["all"] | tuple[int, ...] = "all" if adapter.layers == "all" else (1, 2)
    return (
        replace(
            run,
            # a laptop has no other
            model=replace(run.model, backend="local"),
            fp8=replace(run.fp8, store_base=run.fp8.store_base and run.train.precision != "fp8"),
            # alpha follows the rank, so that the scale stays the user's
            adapter=replace(adapter, rank=rank, alpha=_scaled_alpha(adapter, rank), dropout=0.0, layers=layers),
            train=replace(
                train, steps=STEPS, schedule_steps=None, precision="fp32", global_batch_size=8, micro_batch_size=2,
                warmup_steps=0,
            ),
            data=replace(run.data, max_length=size.language.max_length),
        ),
        size,
    )  # fmt: skip


def _scaled_alpha(adapter: AdapterConfig, rank: int) -> float:
    return adapter.alpha * adapter.scale / replace(adapter, rank=rank).scale


def batches(size: LlavaSize, step: int, rank: int, world: int, pad_to: int = 8, num_sources: int = 2) -> list[Batch]:
    """This data-parallel rank's two-sample micro-batches of a made global batch: 8 samples of different lengths with 0
    to 3 images, one micro-batch of text alone, in every layout and with any padding the same; as many times 8 as all
    sources need, each of which is seen."""
    number = len(_SOURCES) * math.ceil(num_sources / 8)
    chunks = [_padded(_batch(size, step, chunk, num_sources), pad_to) for chunk in range(number)]
    return chunks[rank::world]


def _num_sources(adapter: AdapterConfig) -> int:
    """Where each source has an expert of its own, as many as those; else two, to be counted apart."""
    return adapter.num_experts if adapter.router_scope == "task" else 2


def _padded(batch: Batch, multiple: int) -> Batch:
    """With places after its samples' ends up to a multiple."""
    more = -batch.tokens.shape[1] % multiple

    def pad(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, more), value=value)

    return replace(
        batch,
        tokens=pad(batch.tokens, 0),
        labels=pad(batch.labels, IGNORE_INDEX),
        padding_mask=pad(batch.padding_mask, False),
        position_ids=torch.arange(batch.tokens.shape[1] + more).expand(len(batch.tokens), -1),
        image_mask=pad(batch.image_mask, False),
    )


def _batch(size: LlavaSize, step: int, chunk: int, num_sources: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + chunk)
    places, image_size = size.vision.num_places, size.vision.image_size
    group, place = divmod(chunk, len(_SOURCES))
    images_B = [(0, 0), (1, 3), (2, 0), (1, 1)][place]
    lengths_B = [int(torch.randint(18, 30, (), generator=generator)) + n * places for n in images_B]
    length = -(-max(lengths_B) // 8) * 8
    tokens = torch.randint(5, size.language.vocab_size, (2, length), generator=generator)
    image_mask = torch.zeros(2, length, dtype=torch.bool)
    padding_mask = torch.arange(length) < torch.tensor(lengths_B)[:, None]
    for row, count in enumerate(images_B):
        for image in range(count):
            start = 2 + image * (places + 1)
            image_mask[row, start : start + places] = True
    labels = tokens.roll(-1, dims=1)
    labels[~padding_mask | (torch.rand(2, length, generator=generator) < 0.5)] = IGNORE_INDEX
    return Batch(
        tokens=tokens.masked_fill(image_mask, size.image_token_id),
        labels=labels,
        padding_mask=padding_mask,
        position_ids=torch.arange(length).expand(2, length),
        pixels=torch.randn(sum(images_B), 3, image_size, image_size, generator=generator),
        image_mask=image_mask,
        domains=torch.tensor([8 * group + source for source in _SOURCES[place]]) % num_sources,
        sample_ids=tuple(f"{step}.{chunk}.{row}" for row in range(2)),
    )


def make_base(run: RunConfig, size: LlavaSize, parallel: Parallel, out: Path) -> None:
    """A base with random weights, of a scale at which every part of the model matters."""
    model = LLaVA(run, size, parallel, adapters=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or "ln_pre" in name
            noise = torch.randn(parameter.shape, generator=_generator(name)) / math.sqrt(parameter.shape[-1])
            parameter.copy_(1 + 0.1 * noise if is_norm and name.endswith("weight") else noise)
    save_base(model, out)


def record(run: RunConfig, size: LlavaSize, parallel: Parallel) -> dict[str, torch.Tensor] | None:
    """Run one case; rank 0 gets {"loss/<which>", "gradient/<tensor>", "weight/<tensor>"}, whole, the others None."""
    model = build_model(run, size, parallel)
    entries = trainable_entries(model)
    _fill_adapters(entries, run.adapter.scale)
    optimizer = build_optimizer(model, run.train)
    num_sources = _num_sources(run.adapter)
    stepper = Stepper(run, model, optimizer, parallel, num_domains=num_sources)
    parameters = dict(model.module.named_parameters())
    rank, world, pad_to = parallel.dp_rank, parallel.dp_size, math.lcm(8, sequence_multiple(run))
    scores = stepper.evaluate(batches(size, 0, rank, world, pad_to, num_sources))
    result = {f"loss/validation_{row}": sums.clone() for row, sums in zip(SCORE_ROWS, scores, strict=True)}
    for step in range(STEPS):
        set_lr(optimizer, step + 1, run.train)
        # whole where they are compared; elsewhere as the run itself has them
        micro_batches = batches(size, step, rank, world, pad_to, num_sources)
        stepper.backward(micro_batches, whole_gradients=step == 0)
        if step == 0:
            gradients = {name: parameters[name].main_grad for name in entries}
            result |= {f"gradient/{key}": tensor for key, tensor in _whole(entries, gradients, parallel).items()}
        outcome = stepper.apply()
        if not outcome.applied:
            raise CheckFailedError(f"step {step + 1} was not applied: its loss or gradients are not finite")
        result[f"loss/{step}"] = torch.tensor(outcome.loss, dtype=torch.float64)
        # Adam hides the size of a gradient from the weights: a norm that counts a part twice would clip unseen
        result[f"loss/grad_norm_{step}"] = torch.tensor(outcome.grad_norm, dtype=torch.float64)
        result |= {f"loss/method/{n}_{step}": torch.tensor(v, dtype=torch.float64) for n, v in outcome.methods.items()}
        if outcome.routing is not None:
            result |= {f"loss/{name}_{step}": value for name, value in _routing_figures(outcome.routing).items()}
    if run.adapter.method == "mole":
        layers, blocks = stepper.router_plan.layers, model.module.mole_layers()
        experts = measure_experts(blocks, layers, run.adapter.num_experts, parallel.groups, parallel.device)
        result["loss/delta_norms"], result["loss/similarities"] = experts.delta_norm_LE, experts.similarity_LEE
    kept = weight_entries(model)
    weights = _whole(kept, {name: parameters[name].detach() for name in kept}, parallel)
    result |= {f"weight/{key}": tensor for key, tensor in weights.items()}
    states = method_entries(stepper.methods, parallel.groups)
    remembered = _whole(states, {name: entry.data.double() for name, entry in states.items()}, parallel)
    result |= {f"weight/{key}": tensor for key, tensor in remembered.items()}
    return result if parallel.is_main else None


def _routing_figures(routing: RoutingSummary) -> dict[str, torch.Tensor]:
    """What the board shows of a step's routing: counts by source and modality, and means over tokens."""
    names = ("counts_LGE", "balance_L", "z_L", "entropy_L", "margin_L")
    figures = {name: getattr(routing, name).contiguous() for name in names}
    return figures | {"balance": torch.tensor(routing.balance_loss, dtype=torch.float64)}


def _fill_adapters(entries: dict[str, Any], scale: float) -> None:
    """Adapters with random weights: B = 0 would hide most gradients.

    What a pair adds is half as large as what its base puts out, whatever the scale alpha / rank. Larger, the attention
    scores of random weights saturate, and a network that magnifies rounding a hundredfold can prove nothing.
    """
    with torch.no_grad():
        for entry in entries.values():
            if entry.key.startswith("vision_projection"):
                continue  # comes with the base
            whole = torch.randn(entry.global_shape, generator=_generator(entry.key)) / math.sqrt(entry.global_shape[-1])
            if entry.key.endswith("_B"):
                whole *= 0.5 / scale
            entry.data.copy_(whole[_window(entry)])


def compare(case: Case, reference: dict[str, torch.Tensor], measured: dict[str, torch.Tensor]) -> Comparison:
    """Worst relative differences of a record from its reference. Raises ValueError if they hold different tensors."""
    if reference.keys() != measured.keys():
        raise ValueError(
            f"{case.name}: other tensors than one process, first {min(reference.keys() ^ measured.keys())}"
        )
    worst = {"loss": (0.0, ""), "gradient": (0.0, ""), "weight": (0.0, "")}
    for key, expected in reference.items():
        kind, _, name = key.partition("/")
        scale = norm_to_measure_by(key, reference)
        difference = float((measured[key].double() - expected.double()).norm())
        ratio = difference / scale if scale else (math.inf if difference else 0.0)
        ratio = math.inf if math.isnan(ratio) else ratio
        if ratio > worst[kind][0]:
            worst[kind] = (ratio, name)
    return Comparison(
        case, worst["loss"][0], *worst["gradient"], *worst["weight"],
        num_tensors=sum(key.startswith("gradient/") for key in reference),
    )  # fmt: skip


def norm_to_measure_by(key: str, reference: dict[str, torch.Tensor]) -> float:
    """A tensor's own norm; of a gradient whose terms cancel about the root of the sum of their squares, if more.

    Rounding errors are as large as the terms of a sum, so the norm of one that cancels says nothing of them. Two do:

    A router's bias sums g_t over tokens. A softmax sends each token's pull both ways, and balanced experts leave little
    over. Its weight sums the same g_t, each times the token's normalised input, whose norm is sqrt(H) and whose
    directions keep terms from cancelling: norm / sqrt(H) is about the root of sum |g_t|^2. Projector biases are
    measured by their own norm like all else: their inputs are not normalised.

    A weight by which a task mixes common B_n (adapters/mixed_factors.py) gets (u_n - p_n sum_m u_m) / T, p the softmax
    and u_n = p_n <C, B_n> a sum over B's entries, C the gradient of the mixture. At a temperature T of 0.1 a share p_n
    is soon all but 1, and the two are all but equal. Summed over tasks, the terms of u_n are the entries of
    dL/dB_n * B_n. 1 / T is left out, which measures by less; B is taken after the steps, which moved it little.
    """
    own = float(reference[key].double().norm())
    if key.startswith("gradient/") and ".router." in key and key.endswith("bias"):
        weight = reference[f"{key.removesuffix('bias')}weight"].double()
        return max(own, float(weight.norm()) / math.sqrt(weight.shape[-1]))
    if key.startswith("gradient/") and key.endswith("_mix"):
        name = f"{key.removeprefix('gradient/').removesuffix('mix')}B"
        return max(own, float((reference[f"gradient/{name}"].double() * reference[f"weight/{name}"].double()).norm()))
    return own


def verify(cases: Sequence[Case], size: LlavaSize, *, debug: bool = True) -> list[Comparison]:
    """Record every case and its reference, one launch a world size, and compare. Raises RecordingError if a launch
    fails, of which without `debug` one line tells."""
    references = {_reference(case).name: _reference(case) for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "size.json").write_text(size.to_json())
        by_world: dict[int, list[Case]] = {1: list(references.values())}
        for case in cases:
            by_world.setdefault(case.world_size, []).append(case)
        for world_size, group in sorted(by_world.items()):
            listing = folder / f"cases_{world_size}.json"
            tree = [{"name": c.name, "run": run_config.to_dict(_with_base(c.run, folder / "base"))} for c in group]
            listing.write_text(json.dumps(tree))
            code = launch_worker("mole_mega.training.parity", [str(listing), *["--debug"] * debug], world_size)
            if code:
                raise RecordingError(world_size, code)
        return [
            compare(case, load_file(folder / f"{_reference(case).name}.st"), load_file(folder / f"{case.name}.st"))
            for case in cases
        ]


def table(comparisons: Iterable[Comparison]) -> str:
    """The comparisons for people, and what they are held to."""
    rows = [("case", "processes", "loss", "worst gradient", "worst weight", "tensors", "")]
    rows += [
        (c.case.name, str(c.case.world_size), f"{c.loss:.1e}", f"{c.gradient:.1e}", f"{c.weight:.1e}",
         str(c.num_tensors), "equal" if c.equal else f"DIFFERS: {c.gradient_tensor or c.weight_tensor}")
        for c in comparisons
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(
        f"equal: at most {GRADIENT_TOLERANCE:.0e} from one process in loss and gradients, {WEIGHT_TOLERANCE:.0e} in "
        f"weights after {STEPS} steps, of each tensor's norm (gradients that cancel: or of the root of their "
        "terms' squares)"
    )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """The worker: record the cases of a listing, all of this world size. Returns the exit code."""
    listing, *flags = arguments
    with report_errors(debug="--debug" in flags) as outcome:
        _record_all(Path(listing))
    return outcome.code


def _record_all(listing: Path) -> None:
    size = LlavaSize.from_json(listing.parent / "size.json")
    for tree in json.loads(listing.read_text()):
        run = run_config.from_dict(tree["run"])
        parallel = platform.initialize(run.parallel, run.train.seed)
        base = Path(run.model.base)
        if not base.exists():
            make_base(replace(run, fp8=Fp8Config()), size, parallel, base)
        measured = record(run, size, parallel)
        if measured is not None:
            save_file(measured, listing.parent / f"{tree['name']}.st")
        platform.leave_groups()
    platform.shutdown()


def _reference(case: Case) -> Case:
    run = replace(
        case.run,
        model=replace(case.run.model, backend="local"),
        parallel=ParallelConfig(),
        train=replace(case.run.train, distributed_optimizer=False, recompute="none"),
    )
    digest = hashlib.sha256(run_config.dump(run).encode()).hexdigest()[:12]
    return Case(f"reference_{digest}", run, 1)


def _with_base(run: RunConfig, base: Path) -> RunConfig:
    return replace(run, model=replace(run.model, base=str(base), base_hash=""))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))


def _window(entry: Any) -> tuple[slice, ...]:
    """Where a rank's part lies in the whole tensor."""
    return tuple(
        slice(offset, offset + length) for offset, length in zip(entry.global_offset, entry.local_shape, strict=True)
    )


def _whole(entries: dict[str, Any], tensors: dict[str, torch.Tensor], parallel: Parallel) -> dict[str, torch.Tensor]:
    """Put the ranks' parts together on every rank; NaN where ranks that hold the same part disagree, which no
    comparison calls equal. Raises ValueError for a part that nobody holds."""
    mine = [
        (e.key, tuple(e.global_shape), _window(e), tensors[name].detach().cpu().clone()) for name, e in entries.items()
    ]
    everyone: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for key, shape, window, part in (item for rank in everyone for item in rank):
        target = whole.setdefault(key, torch.zeros(shape, dtype=part.dtype))
        filled = seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        if filled[window].all() and filled[window].numel() and not torch.equal(target[window], part):
            part = torch.full_like(part, math.nan)
        target[window], filled[window] = part, True
    for key, filled in seen.items():
        if not filled.all():
            raise ValueError(f"no rank holds a part of {key}")
    return whole
