"""Megatron-Core's Adam over what is trainable, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from mole_mega.config import TrainConfig
from mole_mega.models.llava import LLaVA

LR_GROUPS = ("adapters", "projector", "router")


def lr_scale(step: int, train: TrainConfig) -> float:
    """The schedule at optimizer step `step` (the first is 1), as a share of the peak learning rate.

    Linear warm-up that ends at 1 on step `warmup_steps`, then cosine or linear down to `min_lr_ratio`, which is reached
    after step `schedule_steps`, so that the last step still moves; or constant. A pure function: a resumed run needs no
    schedule state.
    """
    if step <= train.warmup_steps:
        return step / train.warmup_steps
    total = train.schedule_steps or train.steps
    progress = min(1.0, (step - 1 - train.warmup_steps) / max(1, total - train.warmup_steps))
    if train.schedule == "constant":
        return 1.0
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * decay


def peak_lrs(train: TrainConfig) -> dict[str, float]:
    """Peak learning rate of each group of parameters."""
    return {
        "adapters": train.lr,
        "projector": train.lr if train.projector_lr is None else train.projector_lr,
        "router": train.lr if train.router_lr is None else train.router_lr,
    }


def build_optimizer(model: DistributedDataParallel, train: TrainConfig) -> MegatronOptimizer:
    """Adam (decoupled weight decay) over the trainable parameters, bf16 ones through fp32 master weights."""
    llava: LLaVA = model.module
    for parameter in llava.parameters():
        parameter.lr_group = "adapters"
    _assign(llava.router_parameters(), "router")
    if llava.pre_process:
        _assign(llava.vision_projection.parameters(), "projector")
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=0.0,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.precision == "bf16",
        params_dtype=llava.config.params_dtype,
        use_distributed_optimizer=train.distributed_optimizer,
    )
    # One Megatron-Core group a learning rate: its `max_lr` is what `set_lr` scales. The values differ even where the
    # user's rates are equal, so that the fp32 routers never share a group with bf16 factors.
    overrides = {
        ParamKey(predicate=ParamPredicate(name=name, fn=_in_group(name))): {"max_lr": lr, "min_lr": -float(index)}
        for index, (name, lr) in enumerate(peak_lrs(train).items())
    }
    return get_megatron_optimizer(config, [model], config_overrides=overrides)


def set_lr(optimizer: MegatronOptimizer, step: int, train: TrainConfig) -> dict[str, float]:
    """Set every group's learning rate for optimizer step `step`; returns them by group name."""
    scale = lr_scale(step, train)
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] * scale
        group["weight_decay"] = train.weight_decay
    return {name: lr * scale for name, lr in peak_lrs(train).items()}


def _assign(parameters: Iterable[torch.nn.Parameter], group: str) -> None:
    for parameter in parameters:
        parameter.lr_group = group  # type: ignore[attr-defined]


def _in_group(name: str) -> Callable[[torch.nn.Parameter], bool]:
    return lambda parameter: getattr(parameter, "lr_group", None) == name
