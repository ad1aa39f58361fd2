"""The learning rate is a pure function of the step, and each group of parameters has its own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer

from mole_mega.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES
from mole_mega.training.optimizer import LR_GROUPS, build_optimizer, lr_scale, peak_lrs, set_lr

SHAPES = ("cosine", "linear", "constant")


def make(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 100} | fields)


def scales(train: TrainConfig, steps: int | None = None) -> list[float]:
    return [lr_scale(step, train) for step in range(1, (steps or train.steps) + 1)]


# the shapes


@pytest.mark.parametrize("schedule", SHAPES)
def test_warm_up_is_linear_from_one_part_to_the_peak(schedule):
    train = make(warmup_steps=5, schedule=schedule)
    assert scales(train, 5) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert lr_scale(6, train) == 1.0  # the decay begins after the peak


@pytest.mark.parametrize("schedule", SHAPES)
def test_without_warm_up_the_first_step_is_the_peak(schedule):
    assert lr_scale(1, make(schedule=schedule)) == 1.0


def test_cosine_is_half_way_down_half_way_through():
    train = make(steps=21, warmup_steps=1, min_lr_ratio=0.2)
    assert lr_scale(12, train) == pytest.approx(0.6)
    assert lr_scale(7, train) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + 0.5**0.5))


def test_linear_goes_down_in_equal_parts():
    assert scales(make(steps=4, schedule="linear")) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert scales(make(steps=4, schedule="linear", min_lr_ratio=0.5)) == pytest.approx([1, 0.875, 0.75, 0.625])


def test_constant_stays_at_the_peak_for_ever():
    assert set(scales(make(schedule="constant", min_lr_ratio=0.3), 300)) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_minimum_is_reached_right_after_the_last_step_and_kept(schedule, ratio):
    train = make(schedule=schedule, min_lr_ratio=ratio, warmup_steps=7)
    assert [lr_scale(step, train) for step in (101, 102, 5000)] == pytest.approx([ratio] * 3)
    assert lr_scale(100, train) == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_the_last_step_still_moves_even_when_the_minimum_is_zero(steps, warmup, schedule):
    assert lr_scale(steps, make(steps=steps, warmup_steps=warmup, schedule=schedule)) > 0


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 10, 99, 100, 150])
def test_the_rate_rises_to_the_peak_and_never_rises_again(schedule, ratio, warmup):
    values = scales(make(schedule=schedule, min_lr_ratio=ratio, warmup_steps=warmup), 200)
    assert values[:warmup] == sorted(values[:warmup]) and values[warmup:] == sorted(values[warmup:], reverse=True)
    assert all(0 <= value <= 1 for value in values)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_longer_than_the_run_is_cut_not_squeezed(schedule):
    long = make(steps=100, schedule=schedule)
    assert scales(replace(long, steps=30, schedule_steps=100)) == scales(long)[:30]


def test_a_schedule_shorter_than_the_run_ends_at_the_minimum():
    values = scales(make(steps=20, schedule_steps=10, min_lr_ratio=0.1))
    assert values[:10] == scales(make(steps=10, min_lr_ratio=0.1)) and values[10:] == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 3, 9, 10, 11, 40])
@pytest.mark.parametrize("end", [None, 1, 10, 20, 30])
def test_the_last_step_that_moves_is_where_the_rate_is_last_above_zero(schedule, ratio, warmup, end):
    train = make(steps=20, schedule_steps=end, schedule=schedule, min_lr_ratio=ratio, warmup_steps=warmup)
    assert train.last_moving_step == max(step for step in range(1, 21) if lr_scale(step, train) > 0)


# the groups


def test_rates_that_are_not_given_follow_the_main_one_and_zero_is_a_rate():
    assert peak_lrs(make(lr=0.5)) == dict.fromkeys(LR_GROUPS, 0.5)
    assert peak_lrs(make(lr=0.5, projector_lr=0.0, router_lr=2.0)) == {"adapters": 0.5, "projector": 0.0, "router": 2.0}


def build(alone, train: TrainConfig, **adapter: Any) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    run = RunConfig(
        run_dir="", model=ModelConfig(base=""), train=train, adapter=AdapterConfig(rank=2, **adapter),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=64),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = LLaVA(run, SIZES["tiny"], alone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=train.distributed_optimizer)
    wrapped = DistributedDataParallel(model.config, ddp, model)
    return wrapped, build_optimizer(wrapped, train)


def trained(model: DistributedDataParallel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.module.named_parameters() if p.requires_grad}


def expected_group(name: str) -> str:
    return "router" if ".router." in name else "projector" if name.startswith("vision_projection") else "adapters"


RATES = {
    "three rates": {"lr": 0.25, "projector_lr": 0.5, "router_lr": 0.125},
    "equal rates": {"lr": 0.25, "projector_lr": 0.25, "router_lr": 0.25},
    "the projector stands still": {"lr": 0.25, "projector_lr": 0.0},
}


@pytest.mark.parametrize("distributed", [False, True], ids=["", "distributed optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rates", RATES)
def test_each_tensor_moves_by_its_own_groups_rate(alone, rates, precision, distributed):
    """Adam's first step is the rate itself, whatever the gradient's size."""
    train = make(steps=10, schedule="linear", precision=precision, clip_grad=0.0, distributed_optimizer=distributed,
                 **RATES[rates])  # fmt: skip
    model, optimizer = build(alone, train)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    told = set_lr(optimizer, 4, train)
    assert told == pytest.approx({name: lr * 0.7 for name, lr in peak_lrs(train).items()})
    for parameter in trained(model).values():
        parameter.main_grad.fill_(1.0)
    optimizer.step()
    moved = {name: (p.detach().float() - before[name].float()).abs() for name, p in model.module.named_parameters()}
    for name, parameter in trained(model).items():
        # bf16 weights move to the nearest number that they have
        tolerance = 5e-3 if parameter.dtype == torch.bfloat16 else 1e-6
        rate = pytest.approx(told[expected_group(name)], rel=1e-3, abs=tolerance)
        assert float(moved[name].min()) == rate and float(moved[name].max()) == rate, name
    assert not [name for name in before.keys() - trained(model).keys() if moved[name].max() > 0]


def test_every_group_follows_the_schedule_from_its_own_peak(alone):
    train = make(steps=10, warmup_steps=4, lr=1.0, projector_lr=0.5, router_lr=0.0625)
    _, optimizer = build(alone, train)
    for step in range(1, 11):
        told = set_lr(optimizer, step, train)
        assert told == {name: peak * lr_scale(step, train) for name, peak in peak_lrs(train).items()}
        assert sorted({group["lr"] for group in optimizer.param_groups}) == sorted(told.values())


def test_weight_decay_is_what_the_config_says_in_every_group(alone):
    train = make(steps=10, weight_decay=0.25)
    _, optimizer = build(alone, train)
    set_lr(optimizer, 1, train)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}


@pytest.mark.parametrize("method", ["mole", "lora"])
@pytest.mark.parametrize("projector", [True, False])
def test_the_optimizer_holds_exactly_what_is_trained(alone, method, projector):
    model, optimizer = build(alone, make(precision="fp32", projector=projector), method=method)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trained(model).values())


@pytest.mark.parametrize("rates", RATES)
def test_no_group_of_the_optimizer_mixes_routers_projector_and_factors(alone, rates):
    """Even at equal rates: in a bf16 model routers are fp32, and states are saved in the order of their group."""
    model, optimizer = build(alone, make(precision="fp32", **RATES[rates]))
    names = {id(parameter): expected_group(name) for name, parameter in trained(model).items()}
    mixtures = [{names[id(parameter)] for parameter in group["params"]} for group in optimizer.param_groups]
    assert {len(mixture) for mixture in mixtures} == {1} and set.union(*mixtures) == set(LR_GROUPS)
