"""Megatron-Core's optimizer over what is trainable, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from mole_mega.adapters.methods.base import Held
from mole_mega.config import TrainConfig
from mole_mega.models.llava import LLaVA

LR_GROUPS = ("adapters", "projector", "router")
# what Adam keeps of each weight, by the names that torch gives them; SGD keeps nothing
MOMENTS = ("exp_avg", "exp_avg_sq")


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
    """Peak learning rate of each group of parameters. `adapters_B` are the B factors where LoRA+ sets them apart (Hayou
    et al., arXiv 2402.12354): lr_B = ratio * lr_A."""
    lrs = {
        "adapters": train.lr,
        "projector": train.lr if train.projector_lr is None else train.projector_lr,
        "router": train.lr if train.router_lr is None else train.router_lr,
    }
    return lrs if train.lora_plus_ratio == 1 else lrs | {"adapters_B": train.lr * train.lora_plus_ratio}


def build_optimizer(model: DistributedDataParallel, train: TrainConfig) -> MegatronOptimizer:
    """Adam (decoupled weight decay) or SGD over the trainable parameters, bf16 ones through fp32 master weights."""
    llava: LLaVA = model.module
    for parameter in llava.parameters():
        parameter.lr_group = "adapters"
    if train.lora_plus_ratio != 1:
        _assign((pair.B.parameter for pair in llava.lora_pairs()), "adapters_B")
    _assign(llava.router_parameters(), "router")
    if llava.pre_process:
        _assign(llava.vision_projection.parameters(), "projector")
    config = OptimizerConfig(
        optimizer=train.optimizer,
        sgd_momentum=0.0,
        lr=train.lr,
        min_lr=0.0,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.dtype == "bf16",
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


def current_lr(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the group "adapters", which `set_lr` has set; 0 on a stage that has none."""
    # the first group's mark (`build_optimizer`)
    return next((float(group["lr"]) for group in optimizer.param_groups if group["min_lr"] == 0), 0.0)


def held_parts(parameter: torch.nn.Parameter, optimizer: MegatronOptimizer) -> Iterator[Held]:
    """What this rank's optimizer holds of a trainable parameter: all of it, or under the distributed optimizer a range,
    or nothing. Moments are there after the first step."""
    parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
    if not optimizer.config.use_distributed_optimizer:
        master = getattr(parameter, "main_param", parameter)
        states = [part.optimizer.state[master] for part in parts if master in part.optimizer.state]
        yield Held(master, _moments(states[0]) if states else (), 0)
        return
    for part in parts:
        if parameter in part.model_param_gbuf_map:
            buffer, dtype, bucket = part.model_param_gbuf_map[parameter]
            held = part.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            group, order = part.model_param_group_index_map[parameter]
            master = part.optimizer.param_groups[group]["params"][order]
            yield Held(master, _moments(part.optimizer.state[master]), held.start)


def _moments(state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(state[name] for name in MOMENTS if name in state)


def _assign(parameters: Iterable[torch.nn.Parameter], group: str) -> None:
    for parameter in parameters:
        parameter.lr_group = group  # type: ignore[attr-defined]


def _in_group(name: str) -> Callable[[torch.nn.Parameter], bool]:
    return lambda parameter: getattr(parameter, "lr_group", None) == name
