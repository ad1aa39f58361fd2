"""The config tree of a run: load, override, validate, dump.

One YAML file a run, the same shape as the dataclasses below. This module knows names and ranges; it does not know
torch, Megatron-Core or the machine. What needs the model's size (heads that do not divide, layers a stage) is checked
where the size is known, in `models/mcore_config.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from mole_mega.errors import ConfigError as ConfigError


@dataclass(frozen=True)
class Range:
    """Where a number of the config may lie; the bounds belong to it unless they are open."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:  # NaN lies nowhere
        return (value > self.low if self.low_open else value >= self.low) and (
            value < self.high if self.high_open else value <= self.high
        )

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.low_open else 'at least'} {self.low}"
        if self.high > 1 and not self.low_open and not self.high_open:
            return f"from {self.low} to {self.high:,}"
        return f"in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"


# of a source, so that sums of weights times sizes stay finite
_LARGEST_WEIGHT = 1e100
# of steps, samples, pixels, processes: two of them multiplied fit in 64 bits
LARGEST_COUNT = 10**9
# of ranks and experts: a bank of them, as wide as any model, has a number of numbers that fits in 64 bits
_LARGEST_SIZE = 2**16
# what processes and steps add to it fits in 64 bits too
_LARGEST_SEED = 10**18

Count = Annotated[int, Range(0, LARGEST_COUNT)]
PositiveInt = Annotated[int, Range(1, LARGEST_COUNT)]
Size = Annotated[int, Range(1, _LARGEST_SIZE)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, low_open=True)]
Share = Annotated[float, Range(0, 1)]
ProperShare = Annotated[float, Range(0, 1, high_open=True)]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which frozen LLaVA the adapters sit on. `base` is a folder written by `mole-mega convert hf-to-megatron`.
    `backend` is whose attention, norms and linears compute it: torch's through Megatron-Core, on any hardware, or
    Transformer Engine's, on CUDA."""

    base: str
    # Fails the run when the base is not the one the user meant; empty accepts any and records what was found.
    base_hash: str = ""
    backend: Literal["local", "transformer_engine"] = "local"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the process grid. Data parallelism is what is left of the world. TP > 1 always means sequence
    parallelism: Megatron-Core's MoE layer does not train without it."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    context: PositiveInt = 1

    def data(self, world_size: int) -> int:
        """How many ranks of so many processes read other samples."""
        return world_size // (self.tensor * self.pipeline * self.context)


# The keys of AdapterConfig that make a mixture; adapter.method lora hears none of them.
MIXTURE_KEYS = frozenset({
    "num_experts", "gate", "top_k", "router_scope", "renormalize", "rescale_gate", "share_A", "shared_B",
    "mix_temperature", "expert_form", "router_score", "score_bias_rate", "balance_weight", "balance_scope",
    "z_loss_weight", "expert_parallel", "router_bias",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained beside the frozen base (LLaVA-MoLE, arXiv 2401.16160)."""

    method: Literal["mole", "lora"] = "mole"
    num_experts: Size = 3
    rank: Size = 32
    alpha: Positive = 64.0
    dropout: ProperShare = 0.0
    # The weight of a chosen expert's output: 1; its probability; 1 with the probability's gradient. dense: all experts,
    # each by its probability.
    gate: Literal["none", "prob", "straight_through", "dense"] = "prob"
    top_k: PositiveInt = 1
    # What routes: a router a block (LLaVA-MoLE); one for each of gate, up and down (LoRAMoE, arXiv 2312.09979); one of
    # the model, which reads a sample's instruction (Octavius, arXiv 2311.02684); or the sample's task: source number e
    # of data.sources is served by expert e, and nothing is learned (as in BoRA, arXiv 2407.15857).
    router_scope: Literal["block", "linear", "sample", "task"] = "block"
    # divide the probabilities of the chosen experts by their sum
    renormalize: bool = False
    # backward an expert gets the square root of its weight where the weight stood (arXiv 2502.15828); the value stays
    rescale_gate: bool = False
    # one A a linear for all its experts (MoSLD, arXiv 2412.08946; HydraLoRA, arXiv 2404.19245)
    share_A: bool = False
    # So many B a linear, of which each expert's is a mixture of its own, with the softmax of its weights over
    # mix_temperature, behind a transform of the ranks (MTL-LoRA, arXiv 2410.09437). 0: a B each.
    shared_B: Annotated[int, Range(0, _LARGEST_SIZE)] = 0
    mix_temperature: Positive = 0.1
    # What the weights weigh: what LoRA adds to each linear, or whole MLPs, each with its own activation (MixLoRA, arXiv
    # 2404.15159).
    expert_form: Literal["linear", "mlp"] = "linear"
    # How a router scores experts: by a softmax; or each by a sigmoid and a bias that no gradient moves, but after each
    # step score_bias_rate towards the mean load (SMoRA, arXiv 2501.15103).
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    score_bias_rate: NonNegative = 1e-5
    balance_weight: NonNegative = 0.01
    balance_scope: Literal["layer", "model"] = "layer"
    z_loss_weight: NonNegative = 0.0
    # What travels between expert-parallel ranks: tokens to their expert (top_k 1 alone), or the weights of a layer's
    # experts to where the tokens are; auto: by the bytes of each (adapters/traffic.py).
    expert_parallel: Literal["tokens", "weights", "auto"] = "tokens"
    router_bias: bool = True
    attention: bool = True
    # "all", or the indices (from 0) of the decoder layers that carry adapters in their MLP.
    layers: Literal["all"] | tuple[int, ...] = "all"
    # The scale of what a pair adds: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
    scaling: Literal["lora", "rslora"] = "lora"
    # What works around the optimizer step, in order: a `name` of adapters/methods and that method's options each.
    methods: tuple[dict[str, Any], ...] = ()

    @property
    def scale(self) -> float:
        """s of y = W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @property
    def why_tokens_stay(self) -> str:
        """What of this config wants `expert_parallel` weights, in words; empty if nothing does."""
        reasons = {
            f"adapter.top_k is {self.top_k}": self.top_k > 1,
            "adapter.gate is dense": self.gate == "dense",
            "adapter.share_A is true": self.share_A,
            "adapter.rescale_gate is true": self.rescale_gate,
            "adapter.router_scope is linear": self.router_scope == "linear",
            "adapter.expert_form is mlp": self.expert_form == "mlp",
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    @property
    def without_effect(self) -> frozenset[str]:
        """The keys of this section that nothing hears beside its others: they may hold anything."""
        if self.method == "lora":
            return MIXTURE_KEYS
        idle = {"mix_temperature": self.shared_B == 0, "score_bias_rate": self.router_score != "sigmoid"}
        return frozenset(key for key, holds in idle.items() if holds)

    @property
    def num_choices(self) -> int:
        """How many experts a token is counted for: top_k; where it uses all, its likeliest."""
        return 1 if self.gate == "dense" else self.top_k


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation. Learning rates left at None follow `lr`; `schedule_steps` left at None follows `steps`."""

    steps: PositiveInt
    schedule_steps: PositiveInt | None = None
    global_batch_size: PositiveInt = 16
    micro_batch_size: PositiveInt = 1
    seed: Annotated[int, Range(0, _LARGEST_SEED)] = 0
    lr: NonNegative = 2e-4
    projector_lr: NonNegative | None = None
    router_lr: NonNegative | None = None
    # The learning rate of the B factors, as a multiple of `lr` (LoRA+, arXiv 2402.12354).
    lora_plus_ratio: Positive = 1.0
    projector: bool = True
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 0
    min_lr_ratio: Share = 0.0
    # sgd: plain gradient descent, without momentum
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: NonNegative = 0.0
    adam_beta1: ProperShare = 0.9
    adam_beta2: ProperShare = 0.999
    adam_eps: Positive = 1e-8
    clip_grad: NonNegative = 1.0
    # fp8: bf16, but for the products with the frozen base, which are Transformer Engine's in FP8 (section fp8)
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    distributed_optimizer: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    # A step with a non-finite loss or gradient is skipped; so many in a row stop the run (exit code 4).
    max_bad_steps: PositiveInt = 5
    # A process that stands in one place of a step for so long, waiting for others, stops the run, names whom it waits
    # for and ends with exit code 4; 0: never.
    hang_seconds: NonNegative = 480.0

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """That of parameters and activations."""
        return "fp32" if self.precision == "fp32" else "bf16"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One data source: a LLaVA conversation file (.json, .jsonl) or a Hugging Face dataset on disk. Its name is the
    domain that losses and expert loads are reported by."""

    name: str
    path: str
    image_folder: str = ""
    # A number, or a schedule [[step, weight], ...]: straight lines between the points, level before the first and
    # after the last. A point holds once so many steps are done.
    weight: float | tuple[tuple[float, ...], ...] = 1.0
    # At most so many passes over the rows; the other sources then share the rest. None: as many as come.
    epochs: int | None = None

    @property
    def points(self) -> tuple[tuple[float, float], ...]:
        """The weight as a schedule; a plain number is one of one point."""
        if isinstance(self.weight, float | int):
            return ((0, self.weight),)
        return tuple((step, weight) for step, weight in self.weight)

    def weight_at(self, step: float) -> float:
        """The weight once `step` steps are done."""
        points = self.points
        for (start, low), (end, high) in pairwise(points):
            if start <= step < end:
                return low + (high - low) * (step - start) / (end - start)
        return points[0][1] if step < points[0][0] else points[-1][1]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The mixture. `max_length` counts places, image places included.

    A source's share is weight x size ** (1 / temperature), of the samples or of the tokens (places). At temperature 1
    shares follow the sizes, above it small sources gain (Raffel et al., arXiv 1910.10683, section 3.5.2); at None, its
    limit, sizes do not count. A size is in the same unit: rows, or rows x mean places.
    """

    sources: tuple[SourceConfig, ...]
    weights_in: Literal["samples", "tokens"] = "samples"
    temperature: Positive | None = None
    validation: tuple[SourceConfig, ...] = ()
    max_length: Annotated[int, Range(2, LARGEST_COUNT)] = 2048
    # A sample that cannot be used (broken image, no assistant turn, too long): leave it out and count it, or stop.
    on_bad_sample: Literal["skip", "stop"] = "skip"
    max_image_pixels: PositiveInt = 89_478_485


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation loss by domain, every `every` steps (0: never) on at most `samples` of each source. With `generate`
    the model also writes its answers, greedily, of at most `max_new_tokens` each."""

    every: Count = 0
    samples: PositiveInt = 64
    generate: bool = False
    max_new_tokens: PositiveInt = 128


ScaleOf = Literal["channel", "block"]


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 in storage and in products.

    `store_base` keeps the frozen linears of tower and decoder as float8. Alone it is storage: e4m3 with a `scale` an
    output channel or a 128 x 128 block, products in the training precision, on any hardware. With train.precision fp8
    it is Transformer Engine's primary FP8 weights, scaled as the recipe says.

    `first_last_layers_bf16` leaves the decoder's first and last layer as they are, in either form. `recipe` is heard
    with train.precision fp8 alone: how tensors are scaled (Transformer Engine's DelayedScaling, Float8CurrentScaling,
    Float8BlockScaling, MXFP8BlockScaling). Products in FP8 are the decoder's: the tower, whose products are few, and
    the projector, which is trained, stay in bf16.
    """

    store_base: bool = False
    scale: ScaleOf = "channel"
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    first_last_layers_bf16: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Save every `every` steps (0: only at the end) and keep the newest `keep`. `init_from` starts a new run from
    another run's adapters: weights only, step 0."""

    every: Count = 0
    keep: PositiveInt = 2
    init_from: str = ""


@dataclass(frozen=True, kw_only=True)
class AlarmsConfig:
    """When a layer's routing is called sick, judged at every step on its global batch; 0 switches an alarm off. What
    goes on is told, and reacted to, again after `repeat_every` steps."""

    # the busiest expert has at least so many times the mean's tokens (E when one expert has all)
    collapse: NonNegative = 0.0
    # an expert had no token for so many steps in a row
    dead_steps: Count = 100
    # the entropy of the load, in nats, is below this (log E when balanced)
    entropy_floor: NonNegative = 0.0
    repeat_every: PositiveInt = 100
    # raise_balance: at any alarm, adapter.balance_weight times `balance_factor`, up to `max_balance_weight`.
    # reseed: dead experts become copies of the layer's busiest ones, one of each, each number times
    # 1 + `reseed_noise` N(0, 1).
    reaction: Literal["none", "raise_balance", "reseed"] = "none"
    balance_factor: Annotated[float, Range(1)] = 2.0
    max_balance_weight: NonNegative = 1.0
    reseed_noise: NonNegative = 0.05


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is logged, every `every` steps. Norms and similarities of the experts (`experts_every`) and TensorBoard's
    pictures (`pictures_every`) cost more; 0: never, else also at the last step."""

    every: PositiveInt = 1
    experts_every: Count = 100
    pictures_every: Count = 100
    tensorboard: bool = True
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: str
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.path=value` overrides (values are YAML), check it.

    Relative paths in the file are taken from the file's own folder, except those that an override gives, which are
    taken from the current one. Raises ConfigError with the key and the numbers.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, found {type(tree).__name__}")
    _resolve_paths(tree, path.parent.resolve())
    for override in overrides:
        _apply_override(tree, override)
    _resolve_paths(tree, Path.cwd())
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> RunConfig:
    """Build and check the config from nested dicts; the inverse of `to_dict`."""
    config = _build(RunConfig, tree, "")
    validate(config)
    return config


def build_section(kind: type, tree: dict[str, Any], where: str) -> Any:
    """Build a frozen dataclass from a mapping that stands at `where`, and check its ranges. Raises ConfigError."""
    section = _build(kind, tree, where)
    _validate_ranges(section, f"{where}.")
    return section


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars, every default filled in."""
    return _plain(dataclasses.asdict(config))


def flat(config: RunConfig) -> dict[str, str]:
    """{"train.lr": "0.0002", ...}: every value as text, lists whole."""

    def walk(node: Any, key: str) -> dict[str, str]:
        if not isinstance(node, dict):
            return {key: str(node)}
        return {name: text for part, value in node.items() for name, text in walk(value, f"{key}.{part}").items()}

    return {key.removeprefix("."): text for key, text in walk(to_dict(config), "").items()}


def dump(config: RunConfig) -> str:
    """The resolved config as YAML; `load` of it gives an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def validate(config: RunConfig) -> None:
    """Checks that need no model: ranges and the fields that depend on one another. Raises ConfigError."""
    if not config.run_dir:
        raise ConfigError("run_dir is empty: name the folder that the run writes to")
    _validate_ranges(config, "")
    _validate_parallel(config.parallel, config.adapter)
    _validate_backend(config)
    _validate_adapter(config.adapter, config.train)
    _validate_forms(config.adapter)
    _validate_samples(config.adapter)
    _validate_tasks(config.adapter, config.data)
    _validate_optimizer(config.train)
    _validate_batch(config.train)
    _validate_sources("sources", config.data.sources)
    _validate_sources("validation", config.data.validation)
    _validate_alarms(config.monitor.alarms, config.adapter)


def idle_keys(config: RunConfig) -> frozenset[str]:
    """The whole keys of sections adapter and train that nothing hears beside the others."""
    adapter = config.adapter
    has_routers = adapter.method == "mole" and adapter.router_scope != "task"
    unheard = {f"adapter.{key}" for key in adapter.without_effect}
    return frozenset(unheard if has_routers else unheard | {"train.router_lr"})


def describe_idle(config: RunConfig) -> list[str]:
    """For people, a line a reason: what is set, to something else than its default, and changes nothing."""
    idle, lines = idle_keys(config), []
    unheard = [
        f"{name}.{entry.name} {str(_plain(getattr(section, entry.name))).lower()}"
        for name, section in (("adapter", config.adapter), ("train", config.train))
        for entry in dataclasses.fields(section)
        if f"{name}.{entry.name}" in idle and getattr(section, entry.name) != entry.default
    ]
    if unheard:
        why = "adapter.method lora: " if config.adapter.method == "lora" else ""
        lines.append(f"{why}these keys have no effect: {', '.join(unheard)}")
    if config.validation.every and not config.data.validation:
        lines.append(
            f"validation.every is {config.validation.every}, but data.validation is empty: nothing is validated"
        )
    return lines


def check_batch(train: TrainConfig, data_parallel: int) -> None:
    """Raise ConfigError unless the global batch divides over so many data-parallel ranks."""
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks"
        )


def _validate_ranges(section: Any, where: str) -> None:
    """Every number of a section and of those in it, against the range that its type names."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    for entry in dataclasses.fields(section):
        value, bounds = getattr(section, entry.name), _range_of(hints[entry.name])
        if dataclasses.is_dataclass(value):
            _validate_ranges(value, f"{where}{entry.name}.")
        elif bounds is not None and value is not None and value not in bounds:
            raise ConfigError(f"{where}{entry.name} must be {bounds}, got {value}")


def _range_of(hint: Any) -> Range | None:
    """The range in a type hint, also in one of a number that may be None."""
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next((found for option in typing.get_args(hint) if (found := _range_of(option))), None)
    return None


def _validate_parallel(parallel: ParallelConfig, adapter: AdapterConfig) -> None:
    if adapter.method == "lora" and parallel.expert != 1:
        raise ConfigError(f"parallel.expert is {parallel.expert}, but adapter.method lora has no experts to spread")
    if adapter.method == "mole" and adapter.num_experts % parallel.expert:
        raise ConfigError(
            f"adapter.num_experts {adapter.num_experts} does not divide over parallel.expert {parallel.expert} ranks"
        )


def _validate_backend(config: RunConfig) -> None:
    """What only Transformer Engine does, and what it does not do."""
    has_te, in_fp8 = config.model.backend == "transformer_engine", config.train.precision == "fp8"
    if config.parallel.context != 1 and not has_te:
        raise ConfigError(
            f"parallel.context is {config.parallel.context}: a place attends to those of other ranks in Transformer "
            "Engine's attention alone; set it to 1, or model.backend to transformer_engine"
        )
    if in_fp8 and not has_te:
        raise ConfigError(
            "train.precision fp8 computes with Transformer Engine: set model.backend to transformer_engine. Where it "
            "or a GPU for it is missing, train.precision bf16 with fp8.store_base true keeps the base in FP8 and "
            "computes in bf16, on any hardware"
        )
    if has_te and config.fp8.store_base and not in_fp8:
        raise ConfigError(
            f"fp8.store_base with train.precision {config.train.precision} is storage alone, which model.backend local "
            "has; with transformer_engine set train.precision to fp8"
        )
    if in_fp8 and config.fp8.first_last_layers_bf16 and config.fp8.recipe == "delayed":
        raise ConfigError(
            "fp8.first_last_layers_bf16 does not go with fp8.recipe delayed, whose largest values are gathered over "
            "all layers together; use tensorwise"
        )
    if in_fp8 and config.fp8.store_base and config.fp8.recipe == "delayed":
        raise ConfigError(
            "fp8.store_base does not go with fp8.recipe delayed: a weight is rounded once, as it is loaded, when no "
            "pass has set its scale yet, and so by a scale of 1; use tensorwise, which measures what it rounds"
        )
    if has_te and config.validation.generate:
        raise ConfigError(
            "validation.generate writes answers with a cache of keys that only model.backend local has; set it to "
            "false, and ask the trained model with mole-mega generate"
        )


def _validate_adapter(adapter: AdapterConfig, train: TrainConfig) -> None:
    if adapter.method == "mole":
        _validate_mixture(adapter)
    if adapter.method == "mole" and not adapter.layers:
        raise ConfigError("adapter.layers is empty: adapter.method mole needs at least one layer to put its experts in")
    if adapter.method == "lora" and not adapter.layers and not adapter.attention and not train.projector:
        raise ConfigError("nothing to train: adapter.layers is empty, adapter.attention and train.projector are false")
    if (
        adapter.method == "mole"
        and adapter.num_experts > 1
        and adapter.router_scope != "task"
        and adapter.gate == "none"
        and adapter.balance_weight == adapter.z_loss_weight == 0
    ):
        raise ConfigError(
            "adapter.gate none gives the router no gradient, and adapter.balance_weight and adapter.z_loss_weight are "
            "both 0: the router would stay as it is initialised; set one of them, or another gate"
        )


def _validate_mixture(adapter: AdapterConfig) -> None:
    """How many experts a token uses, and what that asks for."""
    if adapter.top_k > adapter.num_experts:
        raise ConfigError(f"adapter.top_k is {adapter.top_k}, but adapter.num_experts is {adapter.num_experts}")
    if adapter.gate == "dense" and adapter.top_k > 1:
        raise ConfigError(f"adapter.gate dense uses every expert; adapter.top_k {adapter.top_k} chooses: leave it at 1")
    if adapter.expert_parallel == "tokens" and (reason := adapter.why_tokens_stay):
        raise ConfigError(
            f"{reason}: adapter.expert_parallel tokens sends each token to one expert that is whole; set it to weights "
            "or auto"
        )
    if adapter.rescale_gate and adapter.gate not in ("prob", "dense"):
        raise ConfigError(
            f"adapter.rescale_gate takes the root of an expert's weight, which with adapter.gate {adapter.gate} is 1: "
            "it would change nothing; set it to false, or the gate to prob or dense"
        )
    if adapter.renormalize and (adapter.top_k == 1 or adapter.gate not in ("prob", "straight_through")):
        raise ConfigError(
            "adapter.renormalize divides the probabilities of several chosen experts by their sum: it wants "
            f"adapter.top_k above 1 and adapter.gate prob or straight_through, got {adapter.top_k} and {adapter.gate}"
        )


def _validate_forms(adapter: AdapterConfig) -> None:
    """Mixtures of whole MLPs, of shared B, and by sigmoid scores."""
    if adapter.method != "mole":
        return
    _want(adapter, adapter.expert_form == "mlp", "adapter.expert_form mlp weighs whole MLPs, the frozen one included", {
        "gate": ("prob",), "renormalize": (True,), "router_scope": ("block", "sample"), "rescale_gate": (False,),
    })  # fmt: skip
    _want(adapter, adapter.shared_B > 0, "adapter.shared_B mixes a B for each task", {
        "router_scope": ("task",), "share_A": (True,), "expert_form": ("linear",), "methods": ((),),
    })  # fmt: skip
    _want(adapter, adapter.router_score == "sigmoid", "adapter.router_score sigmoid balances by its own bias", {
        "gate": ("prob",), "renormalize": (True,), "router_scope": ("block", "linear"), "router_bias": (False,),
        "rescale_gate": (False,), "balance_weight": (0,), "z_loss_weight": (0,),
    })  # fmt: skip


def _want(adapter: AdapterConfig, asked: bool, why: str, wanted: dict[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError where something is `asked` for that goes with these values alone."""
    for key, values in wanted.items() if asked else ():
        value = getattr(adapter, key)
        if value not in values:
            *choices, got = (str(_plain(v)).lower() for v in (*values, value))
            raise ConfigError(f"{why}: adapter.{key} must be {' or '.join(choices)}, got {got}")


def _validate_samples(adapter: AdapterConfig) -> None:
    """One gate a sample: it has no losses of its own."""
    if adapter.method == "mole" and adapter.router_scope == "sample":
        for key in ("balance_weight", "z_loss_weight"):
            if getattr(adapter, key) != 0:
                raise ConfigError(
                    f"adapter.router_scope sample routes samples and not tokens, which adapter.{key} "
                    f"{getattr(adapter, key)} weighs; set it to 0"
                )


def _validate_tasks(adapter: AdapterConfig, data: DataConfig) -> None:
    """Experts that serve a task each: nothing chooses, and there is one for each source."""
    if adapter.method != "mole" or adapter.router_scope != "task":
        return
    wanted = {"gate": "none", "top_k": 1, "balance_weight": 0, "z_loss_weight": 0}
    for key, value in wanted.items():
        if getattr(adapter, key) != value:
            raise ConfigError(
                f"adapter.router_scope task has no router, so that adapter.{key} must be {value}, got "
                f"{getattr(adapter, key)}"
            )
    names = [source.name for source in data.sources]
    if names and adapter.num_experts != len(names):
        raise ConfigError(
            f"adapter.router_scope task has an expert for each source: adapter.num_experts is {adapter.num_experts}, "
            f"data.sources has {len(names)}"
        )
    for source in data.validation:
        if source.name not in names:
            raise ConfigError(
                f"data.validation {source.name!r} is none of data.sources ({', '.join(names)}): with "
                "adapter.router_scope task no expert serves it"
            )


def _validate_optimizer(train: TrainConfig) -> None:
    if train.optimizer == "sgd" and train.distributed_optimizer:
        raise ConfigError(
            "train.optimizer sgd keeps nothing that train.distributed_optimizer could shard, and Megatron-Core shards "
            "Adam's moments only; set it to false"
        )


def _validate_batch(train: TrainConfig) -> None:
    if train.global_batch_size % train.micro_batch_size:
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}"
        )


def _validate_sources(kind: str, sources: Sequence[SourceConfig]) -> None:
    """`data.sources` or `data.validation`, whichever `kind` names."""
    if kind == "sources" and not sources:
        raise ConfigError("data.sources is empty: name at least one source")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.{kind} has the name {name!r} {names.count(name)} times; a name is a domain")
    for source in sources:
        _validate_name(source.name, f"data.{kind}")
        _validate_weight(source, f"data.{kind} {source.name!r}")
    if any(source.epochs is not None or len(source.points) > 1 for source in sources) and kind == "validation":
        raise ConfigError("data.validation is read once, in order: it has no epochs and no schedule")
    for step in sorted({step for source in sources for step, _ in source.points}):
        if not sum(source.weight_at(step) for source in sources) > 0:
            raise ConfigError(f"data.{kind}: all weights are 0" + (f" at step {step:g}" if step else ""))


def _validate_alarms(alarms: AlarmsConfig, adapter: AdapterConfig) -> None:
    if 0 < alarms.collapse <= 1:
        raise ConfigError(
            f"monitor.alarms.collapse must be above 1, or 0 for off, got {alarms.collapse}: the busiest expert "
            "always has at least the mean's tokens"
        )
    if adapter.method != "mole":
        return
    if adapter.num_experts > 1 and alarms.entropy_floor > math.log(adapter.num_experts):
        raise ConfigError(
            f"monitor.alarms.entropy_floor must be at most ln {adapter.num_experts} = "
            f"{math.log(adapter.num_experts):.4g} with adapter.num_experts {adapter.num_experts}, got "
            f"{alarms.entropy_floor}: no load has more entropy, so the alarm would never be silent"
        )
    most = adapter.num_experts / adapter.num_choices  # every token at the same experts
    if adapter.num_experts > 1 and alarms.collapse > most:
        raise ConfigError(
            f"monitor.alarms.collapse must be at most {adapter.num_experts} / {adapter.num_choices} = {most:.4g} with "
            f"adapter.num_experts {adapter.num_experts} and adapter.top_k {adapter.top_k}, got {alarms.collapse}: no "
            "load is more uneven, so the alarm would never sound"
        )
    if alarms.reaction == "reseed" and adapter.router_scope != "block":
        raise ConfigError(
            "monitor.alarms.reaction reseed copies an expert with its row of the block's router; adapter.router_scope "
            f"is {adapter.router_scope}"
        )
    if alarms.reaction == "reseed" and adapter.router_score != "softmax":
        raise ConfigError(
            "monitor.alarms.reaction reseed makes an expert the equal of another to a router; adapter.router_score is "
            f"{adapter.router_score}, whose bias knows the dead one's load"
        )
    if alarms.reaction == "raise_balance" and adapter.balance_weight == 0:
        raise ConfigError("monitor.alarms.reaction raise_balance multiplies adapter.balance_weight, which is 0")
    if alarms.reaction == "raise_balance" and alarms.max_balance_weight <= adapter.balance_weight:
        raise ConfigError(
            f"monitor.alarms.reaction raise_balance stops at max_balance_weight {alarms.max_balance_weight:g}, and "
            f"adapter.balance_weight is {adapter.balance_weight:g} already: it would never raise anything"
        )


def _validate_name(name: str, where: str) -> None:
    """A name is part of the names of metrics, and stands in progress lines and on pages."""
    if not name.isprintable():
        raise ConfigError(f"{where} has the name {name!r}: a name has no line breaks and no control characters")
    if name != name.strip() or any(part in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(
            f"{where} has the name {name!r}: a name is not empty, has no space at its ends, and is no path: none of "
            "its parts between slashes is empty, . or .."
        )


def _validate_weight(source: SourceConfig, where: str) -> None:
    if not isinstance(source.weight, float | int):
        if not source.weight or any(len(point) != 2 for point in source.weight):
            raise ConfigError(f"{where}: a schedule is a list of [step, weight], got {_plain(source.weight)}")
        steps = [step for step, _ in source.points]
        if any(step != int(step) or step < 0 for step in steps) or any(b <= a for a, b in pairwise(steps)):
            raise ConfigError(f"{where}: the steps of a schedule must be whole, from 0 on and increasing, got {steps}")
    weights = [weight for _, weight in source.points]
    if any(not weight >= 0 for weight in weights):  # `not >=` so that NaN fails too
        raise ConfigError(f"{where}: a weight must be at least 0, got {min(weights)}")
    if max(weights) > _LARGEST_WEIGHT:
        raise ConfigError(f"{where}: a weight must be at most {_LARGEST_WEIGHT:g}, got {max(weights):g}")
    if source.epochs is not None and source.epochs not in (bounds := Range(1, LARGEST_COUNT)):
        raise ConfigError(f"{where}: epochs must be {bounds}, got {source.epochs}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a run file that says a thing twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"the key {key!r} stands {keys.count(key)} times in one section")
        return super().construct_mapping(node, deep)


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    def resolve(node: Any, key: str) -> None:
        if isinstance(node, dict) and isinstance(node.get(key), str) and node[key]:
            node[key] = str((folder / Path(node[key]).expanduser()).resolve())

    resolve(tree, "run_dir")
    resolve(tree.get("model"), "base")
    resolve(tree.get("checkpoint"), "init_from")
    data = tree.get("data")
    for kind in ("sources", "validation"):
        sources = data.get(kind) if isinstance(data, dict) else None
        for source in sources if isinstance(sources, list) else []:
            resolve(source, "path")
            resolve(source, "image_folder")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error
    *parents, last = key.split(".")
    node: Any = tree
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    else:
        node[last] = value


def _index(items: list[Any], part: str, override: str) -> int:
    """Where the item is that a part of a key means: by its number, or by its name."""
    names = [str(item["name"]) for item in items if isinstance(item, dict) and "name" in item]
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    if len(names) == len(items) and part in names:
        return names.index(part)
    known = f", nor a name of {', '.join(names)}" if names else ""
    raise ConfigError(f"override {override!r}: {part!r} is not an index below {len(items)}{known}")


def _build(kind: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where or 'the config'} must be a mapping of keys, got {tree!r}")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in tree:
        if key not in hints:
            raise ConfigError(f"unknown config key {prefix}{key}; {_hint(str(key), hints, prefix)}")
    for entry in dataclasses.fields(kind):
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and entry.name not in tree:
            raise ConfigError(f"config key {prefix}{entry.name} is missing")
    return kind(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()})


def _hint(key: str, known: Iterable[str], prefix: str) -> str:
    """What may have been meant by a key that is not one of the `known` below `prefix`: the keys of its name elsewhere
    in the tree; else the one spelt like it, here or elsewhere; else the nearest here."""
    places = _places(RunConfig)
    alike = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    found = [key] if key in places else difflib.get_close_matches(key, places, n=1, cutoff=0.8) if not alike else []
    if found:
        return f"did you mean {' or '.join(places[found[0]])}?"
    (near,) = alike or difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"the nearest valid key is {prefix}{near}"


def _places(kind: type, prefix: str = "") -> dict[str, list[str]]:
    """{last name: the whole keys that end with it} of a section and of those in it, a list's by its items' names."""
    places: dict[str, list[str]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        places.setdefault(name, []).append(f"{prefix}{name}")
        items = typing.get_origin(hint) is tuple
        inner = typing.get_args(hint)[0] if items else hint
        if dataclasses.is_dataclass(inner):
            below = _places(typing.cast(type, inner), f"{prefix}{name}.{'NAME.' * items}")
            for last, keys in below.items():
                places.setdefault(last, []).extend(keys)
    return places


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check `value` against a type hint and bring it into the frozen form (lists become tuples)."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        problems = []
        for option in args:
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                problems.append(str(error))
        # the one that says more than "not this type"
        raise ConfigError(next((p for p in problems if not p.startswith(f"{where} must be ")), problems[0]))
    if origin is Literal:
        # type() too: YAML's `1` and `true` compare equal in Python
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}; got {value!r}")
    if origin is dict:
        # sections whose keys another room knows
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{where} must be a mapping of keys with a name, got {value!r}")
        return dict(value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is type(None):
        if value is None:
            return None
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        number = _number(value)
        if number is not None:
            if not math.isfinite(number):
                raise ConfigError(f"{where} must be a finite number, got {value}")
            return number
    elif hint is str and isinstance(value, str):
        return value
    raise ConfigError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _number(value: Any) -> float | None:
    """The value as a float, None when it is not one. Text too: YAML 1.1 reads 1e-4 (no point) as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # an int with more digits than a float has room for
        return math.inf


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    return node
