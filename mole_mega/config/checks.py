"""Checks that need no model: ranges, and fields that depend on one another. They raise ConfigError with the numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from mole_mega.config.adapter import AdapterConfig
from mole_mega.config.data import DataConfig, SourceConfig
from mole_mega.config.model import ParallelConfig
from mole_mega.config.run import RunConfig
from mole_mega.config.training import AlarmsConfig, TrainConfig
from mole_mega.config.values import LARGEST_COUNT, Range, plain
from mole_mega.errors import ConfigError

# of a source, so that sums of weights times sizes stay finite
_LARGEST_WEIGHT = 1e100


def validate(config: RunConfig) -> None:
    """Checks that need no model: ranges and the fields that depend on one another. Raises ConfigError."""
    if not config.run_dir:
        raise ConfigError("run_dir is empty: name the folder that the run writes to")
    check_ranges(config, "")
    _validate_parallel(config.parallel, config.adapter)
    _validate_backend(config)
    _validate_adapter(config.adapter, config.train)
    _validate_forms(config.adapter)
    _validate_samples(config.adapter)
    _validate_tasks(config.adapter, config.data)
    _validate_decay(config.adapter, config.train)
    _validate_optimizer(config.train)
    _validate_batch(config.train)
    _validate_sources("sources", config.data.sources)
    _validate_sources("validation", config.data.validation)
    _validate_alarms(config.monitor.alarms, config.adapter)


def check_batch(train: TrainConfig, data_parallel: int) -> None:
    """Raise ConfigError unless the global batch divides over so many data-parallel ranks."""
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        raise ConfigError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {data_parallel} data-parallel ranks"
        )


def check_ranges(section: Any, where: str) -> None:
    """Every number of a section and of those in it, against the range that its type names."""
    for name, bounds in _ranges_of(section.__class__).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{where}{name}.")
        elif bounds is not None and value is not None and value not in bounds:
            raise ConfigError(f"{where}{name} must be {bounds}, got {value}")


@functools.cache  # a search of layouts checks thousands of configs
def _ranges_of(kind: type) -> dict[str, Range | None]:
    """{field: the range that its type names} of a section."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {entry.name: _range_of(hints[entry.name]) for entry in dataclasses.fields(kind)}


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
    if adapter.rescale_gate and adapter.num_experts == 1:
        raise ConfigError(
            "adapter.rescale_gate takes the root of an expert's weight, which with adapter.num_experts 1 is 1: it "
            "would change nothing; set it to false"
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
            *choices, got = (str(plain(v)).lower() for v in (*values, value))
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


def _validate_decay(adapter: AdapterConfig, train: TrainConfig) -> None:
    """Weight decay pulls to 0: what begins at 1 must not have it."""
    if adapter.method == "mole" and adapter.shared_B and train.weight_decay:
        raise ConfigError(
            f"train.weight_decay {train.weight_decay} would pull the transforms of adapter.shared_B, which begin as "
            "the identity, to 0; set it to 0"
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
    if alarms.reaction == "reseed" and adapter.gate == "dense":
        raise ConfigError(
            "monitor.alarms.reaction reseed gives an expert without tokens another one's weights; with adapter.gate "
            "dense every expert has all tokens, also one that is never the likeliest: set it to none"
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
            raise ConfigError(f"{where}: a schedule is a list of [step, weight], got {plain(source.weight)}")
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
