"""The mixture block, its router's choices and statistics, and what expert parallelism moves.

Shape suffixes: T tokens, H hidden, E experts.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_models import SIZE, SMALL, assert_close, build, gradients_of, logits_of, make_inputs, make_run
from test_routers import HIDDEN, make_router, randomise, run_routers
from trained_llava import save_step

from mole_mega.adapters import forms
from mole_mega.adapters.mixture import MixtureExperts, MixtureLayer
from mole_mega.adapters.routers import gate_weights, plan_routers, router_loss_gradients, summarize
from mole_mega.adapters.traffic import Traffic, choose_expert_parallel
from mole_mega.checkpoint import files
from mole_mega.checkpoint.base import save_base
from mole_mega.checkpoint.store import check_trained_with, load_weights
from mole_mega.config import AdapterConfig, ParallelConfig

MIX = replace(SMALL, expert_parallel="weights")
MIXTURES = {
    "top 1": MIX,
    "top 2": replace(MIX, top_k=2),
    "top 2, renormalized": replace(MIX, top_k=2, renormalize=True),
    "top 2, weight 1": replace(MIX, top_k=2, gate="none"),
    "top 2, straight through, renormalized": replace(MIX, top_k=2, gate="straight_through", renormalize=True),
    "top 2 of 13": replace(MIX, num_experts=13, top_k=2),
    "all by top k": replace(MIX, top_k=3),
    "dense": replace(MIX, gate="dense"),
    "shared A": replace(MIX, share_A=True, top_k=2),
    "shared A of 13": replace(MIX, share_A=True, num_experts=13, top_k=2),
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def weights_of(adapter: AdapterConfig, probs_E: torch.Tensor) -> torch.Tensor:
    """One token's gate, from the words of the config."""
    if adapter.gate == "dense":
        return probs_E
    chosen = probs_E.topk(adapter.top_k).indices
    if adapter.gate in ("none", "straight_through"):
        return torch.zeros_like(probs_E).scatter(0, chosen, 1.0)
    used = torch.zeros_like(probs_E).scatter(0, chosen, probs_E[chosen])
    return used / used.sum() if adapter.renormalize else used


@pytest.mark.parametrize("name", MIXTURES)
def test_a_block_computes_the_formula_token_by_token(alone, name):
    adapter = MIXTURES[name]
    block = build(alone, adapter).language_model.decoder.layers[1].mlp
    assert type(block) is MixtureLayer and type(block.experts) is MixtureExperts
    experts, router, hidden = block.experts, block.router, SIZE.language.hidden_size
    x = torch.randn(7, 2, hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, _ = block(x)
        probs_TE = torch.softmax(x.reshape(-1, hidden) @ router.weight.T + router.bias, -1)
        gate_base, up_base = experts.linear_fc1.weight.chunk(2)
        expected = []
        for x_H, p_E in zip(x.reshape(-1, hidden), probs_TE, strict=True):
            w_E = weights_of(adapter, p_E)

            def delta(name: str, z: torch.Tensor, w_E: torch.Tensor = w_E) -> torch.Tensor:
                A, B = (getattr(experts, f"lora_{name}_{factor}") for factor in "AB")
                A = A.expand(len(B), *A.shape[-2:])
                return adapter.alpha / adapter.rank * sum(w * (b @ (a @ z)) for w, a, b in zip(w_E, A, B, strict=True))

            h = F.silu(gate_base @ x_H + delta("gate", x_H)) * (up_base @ x_H + delta("up", x_H))
            expected.append(experts.linear_fc2.weight @ h + delta("down", h))
    assert len(set(probs_TE.argmax(-1).tolist())) > 1
    assert_close(output.reshape(-1, hidden), torch.stack(expected))


@pytest.mark.parametrize("gate", ["none", "prob", "straight_through"])
@pytest.mark.parametrize("num_experts", [1, 3, 7])
def test_top_1_of_weights_that_travel_is_top_1_of_tokens_that_travel(alone, gate, num_experts):
    tokens = replace(SMALL, gate=gate, num_experts=num_experts)
    inputs, found = make_inputs(), []
    for adapter in (tokens, replace(tokens, expert_parallel="weights")):
        model = build(alone, adapter)
        found.append((logits_of(model, inputs), gradients_of(model, inputs)))
    (expected, expected_gradients), (logits, gradients) = found
    assert_close(logits, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if gradient is not None and gradient.any():
            assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
        else:
            assert gradients[name] is None or not gradients[name].any()


@pytest.mark.parametrize("name", MIXTURES)
def test_b_zero_is_the_frozen_model_bit_for_bit(alone, name):
    inputs = make_inputs()
    frozen = logits_of(build(alone, None), inputs)
    mixture = build(alone, replace(MIXTURES[name], attention=False), zero_B=True)
    assert torch.equal(logits_of(mixture, inputs), frozen)


def test_both_forms_of_the_maths_give_one_model(alone, monkeypatch):
    inputs, adapter, found = make_inputs(), MIXTURES["top 2 of 13"], []
    for up_to in (0, 100):
        monkeypatch.setattr(forms, "_MASKED_UP_TO", {4: up_to})
        model = build(alone, adapter)
        found.append((logits_of(model, inputs), gradients_of(model, inputs)))
    assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 2e-5 * gradient.norm(), name


def test_the_experts_numbers_mean_nothing(alone):
    """Permuted with their routers' rows, they are the same model."""
    inputs, model = make_inputs(), build(alone, MIXTURES["top 2, renormalized"])
    before = logits_of(model, inputs)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for block in model.mole_layers():
            for parameter in (*block.router.parameters(), *block.experts.parameters(recurse=False)):
                parameter.copy_(parameter[order])
    assert_close(logits_of(model, inputs), before)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_language_loss_trains_the_router_unless_weights_are_1(alone, name):
    gradients = gradients_of(build(alone, MIXTURES[name]), make_inputs())
    for key, gradient in gradients.items():
        if ".router." in key:
            is_still = gradient is None or not gradient.any()
            assert is_still == (MIXTURES[name].gate == "none"), key


# --- a router for each linear ---

LINEAR = replace(MIX, router_scope="linear", gate="dense")


@pytest.mark.parametrize("name", ["dense", "top 2, renormalized", "shared A"])
def test_each_linear_has_a_router_of_its_own_input(alone, name):
    """METHODS, LoRAMoE: y = W x + s sum_i softmax(R x)_i B_i A_i x."""
    adapter = replace(MIXTURES[name], router_scope="linear")
    block = build(alone, adapter).language_model.decoder.layers[1].mlp
    experts, hidden = block.experts, SIZE.language.hidden_size
    x = torch.randn(7, 2, hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, _ = block(x)

        def linear(name: str, base: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            router = getattr(block.router, name)
            w_E = weights_of(adapter, (router.weight @ z + router.bias).softmax(-1))
            A, B = (getattr(experts, f"lora_{name}_{factor}") for factor in "AB")
            A = A.expand(len(B), *A.shape[-2:])
            return base @ z + adapter.alpha / adapter.rank * sum(
                w * (b @ (a @ z)) for w, a, b in zip(w_E, A, B, strict=True)
            )

        gate_base, up_base = experts.linear_fc1.weight.chunk(2)
        expected = []
        for x_H in x.reshape(-1, hidden):
            h = F.silu(linear("gate", gate_base, x_H)) * linear("up", up_base, x_H)
            expected.append(linear("down", experts.linear_fc2.weight, h))
    assert_close(output.reshape(-1, hidden), torch.stack(expected))


def test_the_statistics_of_a_layers_routers_are_told_together(alone):
    model, inputs = build(alone, replace(LINEAR, balance_weight=0.1)).train(), make_inputs()
    routers = model.routers()
    assert [(r.layer, r.site) for r in routers] == [(layer, site) for layer in range(3) for site in range(3)]
    for parameter in (p for router in routers for p in router.parameters()):
        parameter.main_grad = torch.zeros_like(parameter)
    plan = plan_routers(routers, 1)
    assert (plan.layers, plan.num_sites) == ((0, 1, 2), 3)
    model(**inputs.arguments(), domains=torch.zeros(len(inputs.tokens), dtype=torch.int64))
    counts = torch.stack([router.sums.counts_E.clone() for router in routers]).unflatten(0, (3, 3))
    balance = torch.stack([(r.sums.counts_E / r.sums.tokens * r.sums.probs_E / r.sums.tokens).sum() for r in routers])
    adapter = routers[0].adapter
    summary = summarize(router_loss_gradients(routers, plan, adapter, torch.tensor(1.0)), plan, adapter)
    assert summary.tokens == inputs.valid.sum()
    assert torch.equal(summary.counts_LE.float(), counts.sum(1))
    torch.testing.assert_close(summary.balance_L.float(), balance.view(3, 3).mean(1))
    assert summary.balance_loss == pytest.approx(balance.mean().item(), rel=1e-5)
    assert all(router.weight.main_grad.any() and router.bias.main_grad.any() for router in routers)


# --- one gate a sample ---

SAMPLE = replace(MIX, router_scope="sample", balance_weight=0.0, top_k=2, renormalize=True)


def instruction_of(inputs):
    """Text before the first label, for each row."""
    labelled = inputs.labels >= 0
    first_B = torch.where(labelled.any(1), labelled.int().argmax(1), labelled.shape[1])
    places = torch.arange(labelled.shape[1])
    return (places <= first_B[:, None]) & inputs.valid & ~inputs.image_mask


@pytest.mark.parametrize("expert_parallel", ["weights", "tokens"])
def test_a_samples_gate_is_that_of_its_instruction_in_every_layer(alone, expert_parallel):
    adapter = replace(SAMPLE, expert_parallel=expert_parallel)
    adapter = replace(adapter, top_k=1, renormalize=False) if expert_parallel == "tokens" else adapter
    model, inputs = build(alone, adapter), make_inputs()
    names = [name for name, _ in model.named_parameters() if ".router." in name]
    assert names == ["language_model.router.weight", "language_model.router.bias"]
    mask = instruction_of(inputs)
    table = model.language_model.embedding.word_embeddings.weight
    router = model.language_model.router
    expected_BE = []
    for tokens, own in zip(inputs.tokens, mask, strict=True):
        probs_E = (router.weight @ table[tokens[own]].mean(0) + router.bias).softmax(-1)
        expected_BE.append(weights_of(adapter, probs_E))
    expected_BE = torch.stack(expected_BE)
    assert len({tuple((row > 0).tolist()) for row in expected_BE}) > 1

    heard = {}
    for layer, one in enumerate(model.routers()):
        one.register_forward_hook(lambda _, args, output, layer=layer: heard.update({layer: output[0]}))
    model.read_instructions([(inputs.tokens, mask)])
    found = logits_of(model, inputs)
    assert heard.keys() == {0, 1, 2}
    for weight_TE in heard.values():
        weight_SBE = weight_TE.view(inputs.tokens.shape[1], -1, adapter.num_experts)
        for row, valid in enumerate(inputs.valid):
            torch.testing.assert_close(weight_SBE[valid, row], expected_BE[row].expand(int(valid.sum()), -1))

    # in micro-batches, and once more, as a stage of a pipeline or a decoder passes through them
    model.read_instructions([(inputs.tokens[:2], mask[:2]), (inputs.tokens[2:], mask[2:])])
    images = int(inputs.image_mask[:2].sum()) // SIZE.vision.num_places
    for _ in range(2):
        for rows, pixels in ((slice(2), inputs.pixels[:images]), (slice(2, None), inputs.pixels[images:])):
            part = {key: value[rows] for key, value in inputs.arguments().items() if key != "pixels"}
            with torch.no_grad():
                valid = inputs.valid[rows]
                assert_close(model(**part, pixels=pixels)[valid], found[rows][valid])


def test_a_model_that_routes_by_instruction_must_be_told_it(alone):
    with pytest.raises(ValueError, match="router_scope is sample"):
        logits_of(build(alone, SAMPLE), make_inputs())


def test_the_language_loss_trains_the_one_router_of_all_layers(alone):
    model, inputs = build(alone, SAMPLE), make_inputs()
    model.read_instructions([(inputs.tokens, instruction_of(inputs))])
    gradients = gradients_of(model, inputs)
    assert gradients["language_model.router.weight"].any() and gradients["language_model.router.bias"].any()


# --- experts that serve a task each ---

TASK = replace(SMALL, router_scope="task", gate="none", balance_weight=0.0, num_experts=2)


@pytest.mark.parametrize("expert_parallel", ["tokens", "weights"])
def test_the_tokens_of_a_sample_use_the_expert_of_its_task(alone, expert_parallel):
    model = build(alone, replace(TASK, expert_parallel=expert_parallel))
    assert not [name for name, _ in model.named_parameters() if ".router." in name]
    inputs = make_inputs()
    rows = len(inputs.tokens)
    lone = []
    for task in (0, 1):
        one = build(alone, replace(SMALL, num_experts=1, gate="none"))
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if ".router." not in name:
                    parameter.copy_(own[name][task : task + 1] if ".experts.lora" in name else own[name])
        lone.append(one(**inputs.arguments()).detach())
    tasks = torch.arange(rows) % 2
    with torch.no_grad():
        found = model(**inputs.arguments(), domains=tasks)
    for row, task in enumerate(tasks.tolist()):
        valid = inputs.valid[row]
        assert_close(found[row][valid], lone[task][row][valid])
        assert (found[row][valid] - lone[1 - task][row][valid]).norm() > 1e-3 * found[row][valid].norm()


def test_a_model_that_routes_by_task_must_be_told_it(alone):
    with pytest.raises(ValueError, match="router_scope is task"):
        logits_of(build(alone, TASK), make_inputs())


def test_statistics_of_tasks_count_their_tokens(alone):
    model, inputs = build(alone, TASK).train(), make_inputs()
    tasks = torch.arange(len(inputs.tokens)) % 2
    for router in model.routers():
        router.sums.count_groups(4)
    model(**inputs.arguments(), domains=tasks)
    for router in model.routers():
        expected = torch.stack([inputs.valid[tasks == task].sum() for task in (0, 1)]).float()
        assert torch.equal(router.sums.counts_E, expected)
        assert torch.equal(router.sums.counts_GE.sum(1).unflatten(0, (2, 2)).sum(1), expected)
        assert router.sums.entropy_sum == 0 and router.sums.margin_sum == inputs.valid.sum()


# --- the router ---


def test_renormalized_weights_sum_to_1_with_the_gradient_of_the_quotient(rng):
    logits_TE = torch.randn(5, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    chosen_TE = torch.zeros(5, 4, dtype=torch.bool).scatter(1, probs_TE.topk(2).indices, True)
    weight_TE = gate_weights(probs_TE, chosen_TE, "prob", renormalize=True)
    torch.testing.assert_close(weight_TE.sum(-1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(weight_TE > 0, chosen_TE)
    # the softmax of the chosen logits alone
    alone_TE = logits_TE.masked_fill(~chosen_TE, float("-inf")).softmax(-1)
    torch.testing.assert_close(weight_TE, alone_TE)
    probe_TE = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    straight_TE = gate_weights(probs_TE, chosen_TE, "straight_through", renormalize=True)
    assert torch.equal(straight_TE.detach(), chosen_TE.double())
    expected, *found = (
        torch.autograd.grad((w * probe_TE).sum(), logits_TE, retain_graph=True)[0]
        for w in (alone_TE, weight_TE, straight_TE)
    )
    for gradient in found:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("top_k", "gate"), [(2, "prob"), (3, "none"), (4, "prob"), (1, "dense")])
def test_the_balance_loss_counts_each_choice_of_a_token_by_its_share(alone, rng, top_k, gate):
    """C_j: share of choices; P_j: mean probability. Against autograd on the whole batch, C held fixed."""
    adapter = AdapterConfig(
        num_experts=4, top_k=top_k, gate=gate, expert_parallel="weights", balance_weight=0.3, z_loss_weight=0.7
    )
    router = make_router(alone, **vars(adapter))
    randomise(router, rng)
    x_TH, valid_T = torch.randn(40, HIDDEN, generator=rng), torch.rand(40, generator=rng) > 0.3
    summary = run_routers([router], x_TH[None], valid_T, [7, 1, 20, 12], adapter, grad_scale=17)

    weight, bias = (p.detach().double().requires_grad_() for p in (router.weight, router.bias))
    logits_TE = x_TH[valid_T].double() @ weight.T + bias
    probs_TE = logits_TE.softmax(-1)
    counted = 1 if gate == "dense" else top_k
    share_E = F.one_hot(probs_TE.topk(counted).indices, 4).sum((0, 1)) / (counted * len(probs_TE))
    balance, z = (share_E * probs_TE.mean(0)).sum(), logits_TE.logsumexp(-1).square().mean()
    (17 * (0.3 * balance + 0.7 * z)).backward()
    assert summary.tokens == valid_T.sum()
    assert summary.counts_LGE.sum() == counted * valid_T.sum()
    assert summary.balance_loss == pytest.approx(balance.item(), rel=1e-5)
    assert summary.z_loss == pytest.approx(z.item(), rel=1e-5)
    torch.testing.assert_close(router.weight.main_grad.double(), weight.grad, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(router.bias.main_grad.double(), bias.grad, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(summary.load_LE[0], share_E.double())


def test_statistics_of_a_dense_gate_are_those_of_top_1(alone, rng):
    x_LTH, valid_T = torch.randn(1, 20, HIDDEN, generator=rng), torch.ones(20, dtype=torch.bool)
    found = []
    for gate in ("prob", "dense"):
        adapter = AdapterConfig(num_experts=3, gate=gate)
        router = make_router(alone, **vars(adapter))
        found.append(run_routers([router], x_LTH, valid_T, [20], adapter))
    assert torch.equal(found[0].counts_LGE, found[1].counts_LGE)
    assert found[0].margin_L == found[1].margin_L and found[0].balance_loss == found[1].balance_loss


# --- what travels ---

SIZE_7B = {"hidden_size": 4096, "ffn_hidden_size": 11008}


def choose(num_tokens=4096, expert=2, tensor=1, sizes=SIZE_7B, **adapter):
    adapter = AdapterConfig(**{"expert_parallel": "auto", **adapter})
    return choose_expert_parallel(adapter, ParallelConfig(expert=expert, tensor=tensor), num_tokens=num_tokens, **sizes)


def test_at_7b_weights_are_7_times_cheaper_for_3_experts_and_more_bytes_from_about_23():
    """DESIGN section 2; twice the bytes, where tokens win, from about 46."""
    traffic = [
        Traffic.of(AdapterConfig(num_experts=n), ParallelConfig(expert=3), num_tokens=4096, **SIZE_7B) for n in (3, 24)
    ]
    assert traffic[0].tokens / traffic[0].weights == pytest.approx(7.7, abs=0.1)
    assert traffic[0].tokens == 2 * 4096 * 4096 * 2 // 3
    assert traffic[0].weights == 3 * 3 * 32 * (4096 + 11008) * 2 // 3
    more = [Traffic.of(AdapterConfig(num_experts=n), ParallelConfig(expert=2), num_tokens=4096, **SIZE_7B)
            for n in (22, 24)]  # fmt: skip
    assert [t.weights > t.tokens for t in more] == [False, True]
    assert [choose(num_experts=n).form for n in (2, 24, 46, 48, 64)] == ["weights"] * 3 + ["tokens"] * 2


def test_tensor_parallel_ranks_share_the_tokens_and_cut_what_is_as_wide_as_the_mlp():
    of = [Traffic.of(AdapterConfig(), ParallelConfig(expert=2, tensor=t), num_tokens=64, **SIZE_7B) for t in (1, 2)]
    assert of[1].tokens * 2 == of[0].tokens
    assert of[0].weights / of[1].weights == pytest.approx((4096 + 11008) / (4096 + 5504), rel=1e-6)


def test_an_a_that_experts_share_does_not_travel():
    own, shared = (
        Traffic.of(AdapterConfig(share_A=s), ParallelConfig(expert=2, tensor=2), num_tokens=64, **SIZE_7B)
        for s in (False, True)
    )
    assert own.weights == 3 * 32 * 3 * (4096 + 5504) // 2 and shared.weights == 3 * 32 * (4096 + 2 * 5504) // 2


def test_auto_says_why():
    assert choose(top_k=2, num_experts=64).form == "weights" and "top_k is 2" in choose(top_k=2).reason
    assert choose(gate="dense", num_experts=64).form == "weights"
    assert choose(expert=1).form == "tokens" and "nothing travels" in choose(expert=1).reason
    assert choose(num_experts=2).reason == (
        "a rank sends 1,449,984 numbers of weights a layer and pass, or 16,777,216 of 4,096 tokens, "
        "and weights win up to 2 times that and 200,000"
    )
    # of 512 and 1,376 columns, as the bench has them: what waits for tokens does not fall with their number
    small = {"expert": 2, "sizes": {"hidden_size": 512, "ffn_hidden_size": 1376}, "rank": 16}
    forms = {t: [choose(num_tokens=t, num_experts=n, **small).form for n in (8, 16, 32)] for t in (256, 1024)}
    assert forms == {256: ["weights", "tokens", "tokens"], 1024: ["weights", "weights", "tokens"]}
    for form in ("tokens", "weights"):
        assert choose(expert_parallel=form) == choose(expert_parallel=form, num_experts=64)
        assert choose(expert_parallel=form).form == form


# --- checkpoints ---


def test_a_step_of_travelling_tokens_is_one_of_travelling_weights(alone, tmp_path):
    """Through a file, both ways: the same names and shapes, and so the same model."""
    inputs = make_inputs()
    for first, then in (("tokens", "weights"), ("weights", "tokens")):
        run = replace(make_run(replace(SMALL, expert_parallel=first)), run_dir="unused")
        model = build(alone, run.adapter)
        base, step = tmp_path / f"base_{first}", tmp_path / first
        save_base(model, base)
        save_step(model, run, base, step)
        other = build(alone, replace(SMALL, expert_parallel=then), zero_B=True)
        before = logits_of(other, inputs)
        load_weights(other, step)
        check_trained_with(step, replace(run, adapter=replace(SMALL, expert_parallel=then)), files.folder_hash(base))
        assert_close(logits_of(other, inputs), logits_of(model, inputs))
        assert (logits_of(other, inputs) - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("change", [{"top_k": 2}, {"share_A": True}, {"gate": "dense"}], ids=str)
def test_a_step_of_another_mixture_is_refused(alone, tmp_path, change):
    run, base = replace(make_run(MIX), run_dir="unused"), tmp_path / "base"
    model = build(alone, MIX)
    save_base(model, base)
    save_step(model, run, base, tmp_path / "step")
    with pytest.raises(files.CheckpointError, match=next(iter(change))):
        check_trained_with(tmp_path / "step", replace(run, adapter=replace(MIX, **change)), files.folder_hash(base))
