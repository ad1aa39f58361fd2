"""The sections about how it is trained, scored, saved and watched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mole_mega.config.values import (
    LARGEST_SEED,
    Count,
    NonNegative,
    Positive,
    PositiveInt,
    ProperShare,
    Range,
    Share,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation. Learning rates left at None follow `lr`; `schedule_steps` left at None follows `steps`."""

    steps: PositiveInt
    schedule_steps: PositiveInt | None = None
    global_batch_size: PositiveInt = 16
    micro_batch_size: PositiveInt = 1
    seed: Annotated[int, Range(0, LARGEST_SEED)] = 0
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

    @property
    def last_moving_step(self) -> int:
        """The last of `steps` whose learning rate the schedule leaves above 0."""
        if self.schedule_steps is None or self.schedule == "constant" or self.min_lr_ratio > 0:
            return self.steps
        return min(self.steps, max(self.schedule_steps, self.warmup_steps + 1))


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation loss by domain, every `every` steps (0: never) on at most `samples` of each source. With `generate`
    the model also writes its answers, greedily, of at most `max_new_tokens` each."""

    every: Count = 0
    samples: PositiveInt = 64
    generate: bool = False
    max_new_tokens: PositiveInt = 128


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
