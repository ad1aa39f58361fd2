"""The whole model on one process: mixtures equal what they reduce to, and only what was asked for is trained."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from mole_mega.adapters.mole import MoLEExperts
from mole_mega.config import (
    AdapterConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from mole_mega.models.llava import LLaVA
from mole_mega.models.mcore_config import check_layout
from mole_mega.models.sizes import SIZES, LanguageSize, LlavaSize, VisionSize

VOCABULARY, IMAGE_TOKEN, IGNORE = 40, 4, -100
SIZE = LlavaSize(
    vision=VisionSize(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_heads=2, image_size=8, patch_size=4),
    language=LanguageSize(
        num_layers=3, hidden_size=32, ffn_hidden_size=48, num_heads=4, num_kv_heads=2, vocab_size=VOCABULARY,
        max_length=64,
    ),
    image_token_id=IMAGE_TOKEN,
)  # fmt: skip
GATES = ("none", "prob", "straight_through")
SMALL = AdapterConfig(num_experts=3, rank=4, alpha=6)


def make_run(adapter: AdapterConfig = SMALL, parallel: ParallelConfig | None = None, **train: Any) -> RunConfig:
    return RunConfig(
        run_dir="", model=ModelConfig(base=""), adapter=adapter, parallel=parallel or ParallelConfig(),
        train=TrainConfig(**{"steps": 1, "precision": "fp32"} | train),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=SIZE.language.max_length),
    )  # fmt: skip


def noise(name: str, shape: torch.Size) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(alone, adapter: AdapterConfig | None = SMALL, *, zero_B: bool = False, size: LlavaSize = SIZE,
          **train: Any) -> LLaVA:  # fmt: skip
    """A model with random weights, the base's the same in each; B is 0 on demand. `adapter` None: the base alone."""
    model = LLaVA(make_run(adapter or AdapterConfig(), **train), size, alone, adapters=adapter is not None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = noise(name.replace(".experts.", "."), parameter.shape)
            if "norm" in name or "ln_pre" in name:
                parameter.copy_(1 + 0.1 * values if name.endswith("weight") else 0.1 * values)
            elif name.endswith("_B") and zero_B:
                parameter.zero_()
            else:
                parameter.copy_(values * parameter.shape[-1] ** -0.5)
    return model


@dataclass
class Inputs:
    """tokens, labels, image_mask, valid [B, S]; pixels [N, 3, h, w]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    image_mask: torch.Tensor
    valid: torch.Tensor
    pixels: torch.Tensor

    def arguments(self) -> dict[str, torch.Tensor]:
        positions = torch.arange(self.tokens.shape[1]).expand_as(self.tokens)
        return {"tokens": self.tokens, "position_ids": positions, "padding_mask": self.valid,
                "image_mask": self.image_mask, "pixels": self.pixels}  # fmt: skip


def make_inputs(images: tuple[int, ...] = (1, 0, 2), *, length: int = 20, pad_to: int | None = None) -> Inputs:
    """A sample of `length` - row places for each number of images, padded on the right to `pad_to`."""
    generator = torch.Generator().manual_seed(5)
    shape, places = (len(images), length), SIZE.vision.num_places
    tokens = torch.randint(5, VOCABULARY, shape, generator=generator)
    labels = torch.randint(5, VOCABULARY, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.4] = IGNORE
    image_mask = torch.zeros(shape, dtype=torch.bool)
    valid = torch.arange(length) < length - torch.arange(len(images))[:, None]
    for row, count in enumerate(images):
        for image in range(count):
            start = 1 + image * (places + 1)
            image_mask[row, start : start + places] = True
    more = (0, (pad_to or length) - length)
    return Inputs(
        tokens=F.pad(tokens.masked_fill(image_mask, IMAGE_TOKEN).masked_fill(~valid, 0), more),
        labels=F.pad(labels.masked_fill(~valid, IGNORE), more, value=IGNORE),
        image_mask=F.pad(image_mask, more),
        valid=F.pad(valid, more),
        pixels=torch.randn(sum(images), 3, SIZE.vision.image_size, SIZE.vision.image_size, generator=generator),
    )


def logits_of(model: LLaVA, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs.arguments())


def loss_of(model: LLaVA, inputs: Inputs) -> torch.Tensor:
    """The summed loss of the labelled places."""
    losses = model(**inputs.arguments(), labels=inputs.labels)
    return (losses * (inputs.labels != IGNORE)).sum()


def gradients_of(model: LLaVA, inputs: Inputs) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the tensor's norm."""
    assert expected.norm() > 0 and (actual - expected).norm() <= tolerance * expected.norm()


# --- what a mixture reduces to ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "adapter",
    [
        *(pytest.param(replace(SMALL, gate=gate), id=f"mole {gate}") for gate in GATES),
        pytest.param(replace(SMALL, num_experts=1), id="mole of one"),
        pytest.param(replace(SMALL, method="lora"), id="lora"),
        pytest.param(replace(SMALL, layers=(1,), attention=False), id="one layer"),
    ],
)
def test_with_B_zero_the_model_is_the_frozen_base_bit_for_bit(alone, adapter, precision):  # noqa: N802
    inputs = make_inputs()
    base = logits_of(build(alone, None, precision=precision), inputs)
    assert torch.equal(logits_of(build(alone, adapter, precision=precision, zero_B=True), inputs), base)
    adapted = logits_of(build(alone, adapter, precision=precision), inputs)
    assert (adapted - base).abs().max() > 0.01 * base.abs().max()  # so that equality above means something


@pytest.mark.parametrize("gate", GATES)
def test_one_expert_is_plain_lora_with_the_same_factors(alone, gate):
    """Its probability is 1, so that gates that weigh by it change nothing either."""
    inputs = make_inputs()
    mole = build(alone, replace(SMALL, num_experts=1, gate=gate))
    lora = build(alone, replace(SMALL, method="lora"))
    factors = dict(mole.named_parameters())
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if hasattr(parameter, "placement") and ".mlp." in name:
                parameter.copy_(factors[of_one_expert(name)][0])
    assert_close(logits_of(mole, inputs), logits_of(lora, inputs), 1e-6)
    of_mole, of_lora = gradients_of(mole, inputs), gradients_of(lora, inputs)
    for name, expected in of_lora.items():
        is_factor = ".mlp." in name
        assert_close(of_mole[of_one_expert(name)][0] if is_factor else of_mole[name], expected)
    routers = of_mole.keys() - {of_one_expert(name) for name in of_lora}
    assert all(of_mole[name] is None or of_mole[name].abs().max() == 0 for name in routers) and len(routers) == 6


def of_one_expert(name: str) -> str:
    """...mlp.linear_fc1.lora_gate_A of plain LoRA is ...mlp.experts.lora_gate_A of a mixture."""
    for linear in (".mlp.linear_fc1.", ".mlp.linear_fc2."):
        name = name.replace(f"{linear}lora", ".mlp.experts.lora")
    return name


@pytest.mark.parametrize("gate", GATES)
def test_permuting_experts_with_their_router_rows_changes_nothing_but_their_names(alone, gate):
    inputs, order = make_inputs(), torch.tensor([2, 0, 1])
    model = build(alone, replace(SMALL, gate=gate))
    loss, logits, gradients = loss_of(model, inputs), logits_of(model, inputs), gradients_of(model, inputs)
    loads = [router.sums.counts_E.clone() for router in model.routers()]
    of_experts = [n for n, p in model.named_parameters() if ".router." in n or ".experts.lora" in n]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in of_experts:
                parameter.copy_(parameter[order].clone())
    for router in model.routers():
        router.sums.clear()
    assert_close(logits_of(model, inputs), logits)
    permuted_loss, permuted = loss_of(model, inputs), gradients_of(model, inputs)
    assert float(permuted_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in gradients.items():
        if gradient is not None:
            # a router bias sums terms that cancel: its norm is no measure of their rounding (training/parity.py)
            tolerance = 1e-4 if name.endswith(".router.bias") else 1e-5
            assert_close(permuted[name], gradient[order] if name in of_experts else gradient, tolerance)
    for router, load in zip(model.routers(), loads, strict=True):
        assert torch.equal(router.sums.counts_E, load[order]) and (load > 0).sum() > 1


@pytest.mark.parametrize("gate", GATES)
def test_a_block_computes_the_published_formula_with_one_choice_for_all_three_projections(alone, gate):
    """METHODS A.1, token by token."""
    adapter = replace(SMALL, gate=gate)
    model = build(alone, adapter)
    block = model.language_model.decoder.layers[1].mlp
    experts, router, hidden = block.experts, block.router, SIZE.language.hidden_size
    x = torch.randn(7, 2, hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, _ = block(x)
        probs_TE = torch.softmax(x.reshape(-1, hidden) @ router.weight.T + router.bias, -1)
        gate_base, up_base = experts.linear_fc1.weight.chunk(2)
        expected = []
        for x_H, p_E in zip(x.reshape(-1, hidden), probs_TE, strict=True):
            k = int(p_E.argmax())
            w = p_E[k] if gate == "prob" else 1.0

            def delta(name: str, z: torch.Tensor, k: int = k) -> torch.Tensor:
                A, B = getattr(experts, f"lora_{name}_A")[k], getattr(experts, f"lora_{name}_B")[k]
                return adapter.alpha / adapter.rank * (B @ (A @ z))

            h = F.silu(gate_base @ x_H + w * delta("gate", x_H)) * (up_base @ x_H + w * delta("up", x_H))
            expected.append(experts.linear_fc2.weight @ h + w * delta("down", h))
    assert len(set(probs_TE.argmax(-1).tolist())) > 1
    assert_close(output.reshape(-1, hidden), torch.stack(expected))


def test_a_block_asks_its_router_once_and_its_experts_once(alone):
    model = build(alone)
    calls: list[str] = []
    for kind, modules in (
        ("router", model.routers()),
        ("experts", (m for m in model.modules() if isinstance(m, MoLEExperts))),
    ):
        for module in modules:
            module.register_forward_hook(lambda *_, kind=kind: calls.append(kind))
    logits_of(model, make_inputs())
    assert calls == ["router", "experts"] * SIZE.language.num_layers


@pytest.mark.parametrize("gate", GATES)
def test_a_sharper_router_leaves_the_model_as_it_is_unless_the_gate_is_the_probability(alone, gate):
    """METHODS A.6 item 2."""
    model, inputs = build(alone, replace(SMALL, gate=gate)), make_inputs()
    before = logits_of(model, inputs)
    with torch.no_grad():
        for router in model.routers():
            router.weight.mul_(3)
            router.bias.mul_(3)
    assert torch.equal(logits_of(model, inputs), before) == (gate != "prob")


def test_straight_through_computes_what_no_gate_computes(alone):
    inputs = make_inputs()
    straight, none = (logits_of(build(alone, replace(SMALL, gate=g)), inputs) for g in ("straight_through", "none"))
    assert_close(straight, none, 1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_the_language_loss_trains_the_router_in_every_gate_but_none(alone, gate):
    """METHODS A.6 item 3."""
    gradients = gradients_of(build(alone, replace(SMALL, gate=gate)), make_inputs())
    of_routers = [gradient for name, gradient in gradients.items() if ".router." in name]
    assert len(of_routers) == 6
    if gate == "none":
        assert all(gradient is None or gradient.abs().max() == 0 for gradient in of_routers)
    else:
        assert all(gradient.abs().max() > 0 for gradient in of_routers)


def test_an_expert_that_no_token_chose_gets_a_gradient_of_zeros(alone):
    """Not None: gradient buckets wait for every parameter."""
    model = build(alone)
    with torch.no_grad():
        for router in model.routers():
            router.bias.copy_(torch.tensor([50.0, 0.0, -50.0]))
    gradients = gradients_of(model, make_inputs())
    for name, gradient in gradients.items():
        if ".experts.lora" in name:
            assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0, name


# --- what is trained ---


@pytest.mark.parametrize("projector", [True, False], ids=["projector", "no projector"])
@pytest.mark.parametrize("attention", [True, False], ids=["attention", "no attention"])
@pytest.mark.parametrize("method", ["mole", "lora"])
def test_exactly_what_was_asked_for_is_trained(alone, method, attention, projector):
    adapter = replace(SMALL, method=method, attention=attention, layers=(0, 2), router_bias=False)
    model = build(alone, adapter, projector=projector)
    expected = {
        f"vision_projection.encoder.linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias") if projector
    }
    for layer in range(SIZE.language.num_layers):
        where = f"language_model.decoder.layers.{layer}"
        if attention:
            expected |= {f"{where}.self_attention.linear_qkv.lora_{p}_{f}" for p in "qkv" for f in "AB"}
            expected |= {f"{where}.self_attention.linear_proj.lora_o_{f}" for f in "AB"}
        if layer == 1:
            continue
        if method == "mole":
            expected |= {f"{where}.mlp.router.weight"}
            expected |= {f"{where}.mlp.experts.lora_{p}_{f}" for p in ("gate", "up", "down") for f in "AB"}
        else:
            expected |= {f"{where}.mlp.linear_fc1.lora_{p}_{f}" for p in ("gate", "up") for f in "AB"}
            expected |= {f"{where}.mlp.linear_fc2.lora_down_{f}" for f in "AB"}
    gradients = gradients_of(model, make_inputs())
    assert gradients.keys() == expected
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert not [n for n, p in model.named_parameters() if p.grad is not None and n not in expected]


def test_the_base_alone_trains_nothing(alone):
    assert not [name for name, p in build(alone, None).named_parameters() if p.requires_grad]


def test_text_alone_gives_the_projector_no_gradient_and_everything_else_one(alone):
    gradients = gradients_of(build(alone), make_inputs((0, 0)))
    without = {name for name, gradient in gradients.items() if gradient is None or gradient.abs().max() == 0}
    assert without == {name for name in gradients if name.startswith("vision_projection")}


def test_a_bf16_model_keeps_its_routers_and_their_sums_in_fp32(alone):
    model = build(alone, replace(SMALL, z_loss_weight=0.1), precision="bf16")
    routers = {p for router in model.routers() for p in router.parameters()}
    assert {p.dtype for p in routers} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in routers} == {torch.bfloat16}
    gradients = gradients_of(model, make_inputs())
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    for router in model.routers():
        assert router.weight.grad.dtype == torch.float32 and {t.dtype for t in router.sums.tensors()} == {torch.float32}


@pytest.mark.parametrize("images", [(1, 0, 2), (0, 0)], ids=["images", "text alone"])
@pytest.mark.parametrize("projector", [True, False], ids=["projector", "no projector"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(alone, recompute, dropout, projector, images):
    inputs, adapter = make_inputs(images), replace(SMALL, dropout=dropout)
    results, models = [], []
    for mode in ("none", recompute):
        model = build(alone, adapter, recompute=mode, projector=projector)
        model_parallel_cuda_manual_seed(3, force_reset_rng=True)  # the same dropout in both
        results.append(gradients_of(model, inputs))
        models.append(model)
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert (expected is None) == (results[1][name] is None), name
        if expected is not None:
            torch.testing.assert_close(results[1][name], expected, rtol=0, atol=0)
    for plain, recomputed in zip(*(model.routers() for model in models), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain.sums.tensors(), recomputed.sums.tensors(), strict=True))


def test_dropout_is_off_in_evaluation_and_on_in_training(alone):
    inputs, model = make_inputs(), build(alone, replace(SMALL, dropout=0.5))
    still = build(alone, SMALL)
    assert torch.equal(logits_of(model.eval(), inputs), logits_of(still, inputs))
    assert not torch.equal(logits_of(model.train(), inputs), logits_of(still, inputs))


# --- images and padding ---


def test_each_sample_sees_its_own_images_alone(alone):
    model, inputs = build(alone), make_inputs((1, 0, 2))
    before = logits_of(model, inputs)
    for image, row in enumerate((0, 2, 2)):
        changed = replace(inputs, pixels=inputs.pixels.clone())
        changed.pixels[image] += 1
        after = logits_of(model, changed)
        # not bit for bit: experts multiply their tokens together, whichever sample these are of
        moved_BS = (after - before).abs().amax(-1) > 1e-4 * before.abs().max()
        first = int(inputs.image_mask[row].nonzero()[4 if image == 2 else 0])
        assert moved_BS[row, first] and not moved_BS[row, :first].any()
        assert not moved_BS[torch.arange(3) != row].any()


def test_what_stands_at_an_image_place_does_not_matter(alone):
    """The image token need not be in the vocabulary."""
    model, inputs = build(alone), make_inputs((1, 2))
    odd = replace(inputs, tokens=inputs.tokens.masked_fill(inputs.image_mask, VOCABULARY + 7))
    assert torch.equal(logits_of(model, inputs), logits_of(model, odd))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: replace(i, pixels=i.pixels[:1]), "12 image places in the text, but 1 images of 4 features give 4"),
        (lambda i: replace(i, pixels=i.pixels[:0]), "12 image places in the text, but no images"),
        (lambda i: replace(i, image_mask=i.image_mask & False), "0 image places in the text, but 3 images"),
    ],
)
def test_images_that_do_not_fit_the_text_are_refused_with_the_numbers(alone, change: Callable, says):
    with pytest.raises(ValueError, match=says):
        logits_of(build(alone), change(make_inputs((1, 0, 2))))


@pytest.mark.parametrize("method", ["mole", "lora"])
def test_more_padding_changes_neither_loss_nor_gradients_nor_statistics(alone, method):
    model = build(alone, replace(SMALL, method=method, z_loss_weight=0.1))
    results = []
    for pad_to in (20, 33):
        inputs = make_inputs(pad_to=pad_to)
        gradients = gradients_of(model, inputs)
        results.append(
            (
                loss_of(model.eval(), inputs),
                gradients,
                [[r.sums.tokens, *r.sums.tensors()] for r in model.train().routers()],
            )
        )
        results[-1] = (results[-1][0], gradients, [[t.clone() for t in tensors] for tensors in results[-1][2]])
        for router in model.routers():
            router.sums.clear()
    (loss, gradients, sums), (padded_loss, padded_gradients, padded_sums) = results
    assert float(padded_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, gradient in gradients.items():
        assert_close(padded_gradients[name], gradient)
    for tensors, padded in zip(sums, padded_sums, strict=True):
        assert tensors[0] == padded[0] == 20 + 19 + 18
        for a, b in zip(tensors, padded, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_number_of_features_is_the_sizes(alone):
    features = build(alone).encode_images(make_inputs((1, 1)).pixels)
    assert features.shape == (2, SIZE.vision.num_places, SIZE.language.hidden_size)


# --- a vocabulary padded by hand: the last rank of a tensor-parallel group holds rows that no token has ---


def test_rows_that_pad_the_vocabulary_are_never_chosen_and_change_no_loss(alone):
    size = replace(SIZE, language=replace(SIZE.language, vocab_size=VOCABULARY + 3))
    padded, inputs = build(alone, size=size), make_inputs()
    plain = build(alone)
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            if parameter.shape[0] == VOCABULARY + 3:
                parameter[:VOCABULARY] = plain.get_parameter(name)
                parameter[VOCABULARY:] = 100.0  # would win every softmax
    padded._num_real_logits = VOCABULARY
    logits = logits_of(padded, inputs)
    assert (logits[..., VOCABULARY:] == -torch.inf).all()
    assert_close(logits[..., :VOCABULARY], logits_of(plain, inputs), 1e-6)
    assert float(loss_of(padded, inputs)) == pytest.approx(float(loss_of(plain, inputs)), rel=1e-6)
    expected = gradients_of(plain, inputs)
    for name, gradient in gradients_of(padded, inputs).items():
        assert_close(gradient, expected[name])


def test_the_loss_is_the_cross_entropy_of_the_logits(alone):
    model, inputs = build(alone), make_inputs()
    with torch.no_grad():
        losses = model(**inputs.arguments(), labels=inputs.labels)
    expected = F.cross_entropy(logits_of(model, inputs).transpose(1, 2), inputs.labels, reduction="none",
                               ignore_index=IGNORE)  # fmt: skip
    labelled = inputs.labels != IGNORE
    torch.testing.assert_close(losses[labelled], expected[labelled])


# --- a layout against a size ---


@pytest.mark.parametrize(
    ("layout", "language", "vision", "says"),
    [
        ({"tensor": 3}, {}, {}, "parallel.tensor 3 does not divide the decoder's heads, 4"),
        ({"tensor": 4}, {}, {}, "parallel.tensor 4 does not divide the decoder's key-value heads, 2"),
        ({"tensor": 2}, {"ffn_hidden_size": 49}, {}, "does not divide the decoder's feed-forward width, 49"),
        ({"tensor": 2}, {"hidden_size": 33}, {}, "does not divide the decoder's hidden width, 33"),
        ({"tensor": 2}, {}, {"num_heads": 3}, "does not divide the tower's heads, 3"),
        ({"tensor": 2}, {}, {"ffn_hidden_size": 25}, "does not divide the tower's feed-forward width, 25"),
        ({"pipeline": 2}, {}, {}, "parallel.pipeline 2 does not divide the decoder's 3 layers"),
        ({}, {"max_length": 63}, {}, "data.max_length 64 exceeds the base's context of 63"),
    ],
)
def test_a_layout_that_does_not_divide_a_size_is_refused_with_the_numbers(layout, language, vision, says):
    size = replace(SIZE, language=replace(SIZE.language, **language), vision=replace(SIZE.vision, **vision))
    with pytest.raises(ConfigError) as caught:
        check_layout(make_run(parallel=ParallelConfig(**layout)), size)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((0, 3), "names layer 3; the decoder has layers 0 to 2"),
        ((-1,), "names layer -1"),
        ((1, 0, 1), r"twice: [1, 0, 1]"),
    ],
)
def test_adapter_layers_that_the_decoder_does_not_have_are_refused(layers, says):
    with pytest.raises(ConfigError) as caught:
        check_layout(make_run(replace(SMALL, layers=layers)), SIZE)
    assert says in str(caught.value)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 3}, {"tensor": 2, "pipeline": 3}])
def test_a_layout_that_divides_passes(layout):
    check_layout(make_run(parallel=ParallelConfig(**layout)), SIZE)


# --- sizes as data ---


@pytest.mark.parametrize("name", SIZES)
def test_a_size_survives_its_file(tmp_path, name):
    (tmp_path / "model.json").write_text(SIZES[name].to_json())
    assert LlavaSize.from_json(tmp_path / "model.json") == SIZES[name]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"vision": {}, "language": {}}', '{"vision": 3, "language": 4}', "null"]
)
def test_a_file_that_describes_no_llava_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json does not describe a LLaVA"):
        LlavaSize.from_json(tmp_path / "model.json")


def test_a_folder_without_a_size_is_no_base(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a base checkpoint: cannot read model\.json"):
        LlavaSize.from_json(tmp_path / "model.json")


def test_llava_15_is_as_published():
    vision, language = SIZES["llava15_7b"].vision, SIZES["llava15_7b"].language
    assert (vision.num_places, vision.num_built_layers, language.kv_channels) == (576, 23, 128)
