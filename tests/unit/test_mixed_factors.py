"""MTL-LoRA (arXiv 2410.09437): one A, a few B that each task mixes by weights of its own, and a transform between.

Shape suffixes: T tokens, H hidden, E experts (tasks), N common B, R rank.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from test_mixture import MIX
from test_models import SIZE, assert_close, build, logits_of, make_inputs, make_run

from mole_mega.adapters.mixed_factors import mix_factors
from mole_mega.adapters.routing import num_groups
from mole_mega.models.llava import LLaVA

TASKS = replace(MIX, router_scope="task", gate="none", balance_weight=0.0, num_experts=2, share_A=True)
MTL = replace(TASKS, shared_B=3)
HIDDEN = SIZE.language.hidden_size


def backward(model, inputs, tasks_B):
    for router in model.routers():
        router.sums.count_groups(num_groups(MTL.num_experts))
    losses = model(**inputs.arguments(), labels=inputs.labels, domains=tasks_B)
    (losses * (inputs.labels >= 0)).sum().backward()


def with_tasks(model, inputs, tasks_B):
    with torch.no_grad():
        return model(**inputs.arguments(), domains=tasks_B)


def test_a_block_computes_the_released_equation_token_by_token(alone):
    """METHODS: h = W x + s (sum_j softmax(w_t / T)_j B_j) Lambda_t A x."""
    block = build(alone, MTL).language_model.decoder.layers[1].mlp
    experts, scale = block.experts, MTL.alpha / MTL.rank
    x = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
    task_SB = torch.tensor([0, 1]).expand(6, 2)
    with torch.no_grad():
        output, _ = block(x, padding_mask=(2 * task_SB).T)
        gate_base, up_base = experts.linear_fc1.weight.chunk(2)

        def linear(name, base, z, task):
            A, B, mix, transform = (getattr(experts, f"lora_{name}_{f}") for f in ("A", "B", "mix", "transform"))
            own = sum(w * b for w, b in zip((mix[task] / MTL.mix_temperature).softmax(0), B, strict=True))
            return base @ z + scale * own @ (transform[task] @ (A @ z))

        for place, (x_H, task) in enumerate(zip(x.reshape(-1, HIDDEN), task_SB.flatten().tolist(), strict=True)):
            h = F.silu(linear("gate", gate_base, x_H, task)) * linear("up", up_base, x_H, task)
            expected = linear("down", experts.linear_fc2.weight, h, task)
            assert_close(output.reshape(-1, HIDDEN)[place], expected)
    assert experts.lora_gate_A.shape == (MTL.rank, HIDDEN) and len(experts.lora_gate_B) == 3


def test_with_identities_and_one_b_it_is_plain_lora(alone):
    """METHODS [NUM], whatever the task and its weights."""
    inputs, model = make_inputs(), build(alone, replace(MTL, shared_B=1))
    lora = build(alone, replace(MIX, num_experts=1, gate="none"))
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if ".router." not in name:
                parameter.copy_(own[name])
        for name, parameter in own.items():
            if name.endswith("_transform"):
                parameter.copy_(torch.eye(MTL.rank).expand_as(parameter))
    tasks_B = torch.arange(len(inputs.tokens)) % 2
    assert_close(with_tasks(model, inputs, tasks_B), logits_of(lora, inputs))


def test_transforms_begin_as_identities_and_b_as_zero(alone):
    model = LLaVA(make_run(MTL), SIZE, alone)
    named = {name: p for name, p in model.named_parameters() if ".experts.lora" in name}
    for name, parameter in named.items():
        if name.endswith("_transform"):
            assert torch.equal(parameter, torch.eye(MTL.rank).expand(2, -1, -1))
        assert parameter.any() != name.endswith("_B")


def test_b_zero_is_the_frozen_model_bit_for_bit(alone):
    inputs = make_inputs()
    frozen = logits_of(build(alone, None), inputs)
    model = build(alone, replace(MTL, attention=False), zero_B=True)
    assert torch.equal(with_tasks(model, inputs, torch.tensor([0, 1, 0])), frozen)


def test_gradients_are_those_of_the_composed_factors():
    generator = torch.Generator().manual_seed(0)
    B, mix, transform = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((3, 5, 4), (2, 3), (2, 4, 4))
    )
    assert torch.autograd.gradcheck(lambda *factors: mix_factors(*factors, 0.5), (B, mix, transform))


def test_every_part_learns_from_every_task_that_came(alone):
    model, inputs = build(alone, MTL), make_inputs()
    backward(model, inputs, torch.tensor([0, 1, 0]))
    for name, parameter in model.named_parameters():
        if ".experts.lora" in name:
            assert parameter.grad.flatten(1).any(1).all(), name


def test_a_task_that_did_not_come_stands_still(alone):
    model, inputs = build(alone, MTL), make_inputs()
    backward(model, inputs, torch.ones(3, dtype=torch.int64))
    for name, parameter in model.named_parameters():
        if name.endswith(("_mix", "_transform")):
            assert not parameter.grad[0].any() and parameter.grad[1].any(), name
