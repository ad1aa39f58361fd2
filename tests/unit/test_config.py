"""A config is what the user wrote or an error of one line that names the key and the numbers."""

import dataclasses
import json
import math
import re
import typing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mole_mega import config as run_config
from mole_mega.config import AdapterConfig, ConfigError, RunConfig

SMALLEST: dict[str, Any] = {
    "run_dir": "out",
    "model": {"base": "base"},
    "train": {"steps": 10},
    "data": {"sources": [{"name": "a", "path": "a.json"}, {"name": "b", "path": "b.json", "weight": 2}]},
}


def merged(base: Any, change: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return {key: merged(base.get(key), change.get(key, base.get(key))) for key in base | change}


def make(**change: Any) -> RunConfig:
    """The smallest config with some keys changed: make(train={"steps": 3})."""
    return run_config.from_dict(merged(SMALLEST, change))


def refused(**change: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(**change)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    """Writes a run file and returns its path."""

    def write_file(tree: Any = SMALLEST) -> Path:
        path = tmp_path / "runs" / "run.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write_file


def nested(*keys: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} of the keys a and b."""
    first, *others = keys
    return {first: nested(*others, value=value) if others else value}


def refused_override(path: Path, override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        run_config.load(path, [override])
    return str(caught.value)


# unknown keys


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"runn_dir": "x"}, "runn_dir", "run_dir"),
        ({"adaptor": {}}, "adaptor", "adapter"),
        ({"adapter": {"num_expert": 3}}, "adapter.num_expert", "adapter.num_experts"),
        ({"adapter": {"balance-weight": 3}}, "adapter.balance-weight", "adapter.balance_weight"),
        ({"data": {"maxlength": 3}}, "data.maxlength", "data.max_length"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_valid_one_at_every_depth(change, key, nearest):
    message = refused(**change)
    assert message.startswith(f"unknown config key {key};") and f"nearest valid key is {nearest}" in message


@pytest.mark.parametrize("kind", ["sources", "validation"])
def test_a_misspelt_key_inside_a_list_is_named_with_its_index(kind):
    message = refused(data={kind: [{"name": "a", "path": "a.json"}, {"name": "b", "path": "b.json", "wieght": 1}]})
    assert f"data.{kind}[1].wieght; the nearest valid key is data.{kind}[1].weight" in message


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("precision=fp32", "train.precision"),
        ("train.rank=4", "adapter.rank"),
        ("adapter.parallel.tensor=2", "parallel"),
        ("monitor.dead_steps=9", "monitor.alarms.dead_steps"),
        ("every=2", "validation.every or checkpoint.every or monitor.every"),
        ("weight=2", "data.sources.NAME.weight or data.validation.NAME.weight"),
        ("micro_batchsize=2", "train.micro_batch_size"),
    ],
)
def test_a_key_at_a_wrong_level_is_told_where_it_belongs(write, override, meant):
    key = override.partition("=")[0].removesuffix(".tensor")
    assert refused_override(write(), override) == f"unknown config key {key}; did you mean {meant}?"


def test_a_key_spelt_like_one_beside_it_is_not_sent_elsewhere():
    assert refused(train={"step": 3}).endswith("the nearest valid key is train.steps")
    assert refused(validation={"sample": 3}).endswith("the nearest valid key is validation.samples")


def test_keys_that_are_not_text_are_unknown_keys():
    assert "unknown config key train.7" in refused(train={7: 1})


@pytest.mark.parametrize("key", ["run_dir", "model", "train", "data"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"config key {key} is missing"):
        run_config.from_dict({k: v for k, v in SMALLEST.items() if k != key})


def test_a_missing_key_inside_a_list_is_named_with_its_index():
    assert refused(data={"sources": [{"path": "x"}]}) == "config key data.sources[0].name is missing"


# types


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", "10"),
        ("train", "steps", 10.0),
        ("train", "steps", True),
        ("train", "steps", None),
        ("train", "schedule_steps", "ten"),
        ("train", "lr", "fast"),
        ("train", "lr", True),
        ("train", "lr", [1]),
        ("train", "projector", 1),
        ("train", "projector", "yes"),
        ("train", "precision", "fp16"),
        ("adapter", "gate", True),
        ("adapter", "gate", "Prob"),
        ("adapter", "layers", "some"),
        ("adapter", "layers", 3),
        ("model", "base", 3),
        ("model", "base", None),
        ("data", "sources", "a.json"),
        ("data", "sources", {"name": "a"}),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(section, key, value):
    message = refused(**{section: {key: value}})
    assert message.startswith(f"{section}.{key} must be") and repr(value) in message


@pytest.mark.parametrize("item", ["x", True, 1.0, None])
def test_a_list_item_of_the_wrong_type_is_named_with_its_index(item):
    assert refused(adapter={"layers": [0, item]}) == f"adapter.layers[1] must be int, got {item!r}"


@pytest.mark.parametrize("section", [3, "text", None, [1]])
def test_a_section_must_be_a_mapping(section):
    assert refused(adapter=section).startswith("adapter must be a mapping of keys")


def test_one_of_several_words_is_refused_with_all_of_them():
    assert refused(train={"schedule": "cosin"}) == "train.schedule must be one of cosine, linear, constant; got 'cosin'"


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("2E-5", 2e-5), ("1.0e-4", 1e-4), ("1", 1.0), ("0", 0.0)])
def test_a_learning_rate_is_a_number_however_yaml_spells_it(write, text, value):
    tree = yaml.safe_dump(SMALLEST) + f"adapter:\n  alpha: 1\n  dropout: 0\n  balance_weight: {text}\n"
    loaded = run_config.load(write(tree), [f"train.lr={text}"])
    assert (loaded.train.lr, loaded.adapter.balance_weight) == (value, value)
    assert isinstance(loaded.train.lr, float) and isinstance(loaded.adapter.alpha, float)


NOT_FINITE = [math.nan, math.inf, -math.inf, "nan", "inf", ".nan", 10**400]


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda value: str(value)[:6])
@pytest.mark.parametrize(
    ("section", "key"),
    [("train", "lr"), ("train", "projector_lr"), ("train", "clip_grad"), ("adapter", "alpha"), ("adapter", "dropout")],
)
def test_numbers_that_are_not_finite_are_refused(section, key, value):
    assert refused(**{section: {key: value}}).startswith(f"{section}.{key} must be ")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("adapter", "alpha"), ("adapter", "dropout"), ("adapter", "balance_weight"), ("adapter", "z_loss_weight"),
        ("train", "lr"), ("train", "projector_lr"), ("train", "router_lr"), ("train", "min_lr_ratio"),
        ("train", "weight_decay"), ("train", "clip_grad"), ("train", "adam_eps"), ("train", "adam_beta1"),
    ],
)  # fmt: skip
def test_a_config_made_in_code_is_checked_for_nan_too(section, key):
    config = make()
    part = replace(getattr(config, section), **{key: math.nan})
    with pytest.raises(ConfigError, match=rf"{section}\.{key} must be .*got nan"):
        run_config.validate(replace(config, **{section: part}))


# ranges and fields that depend on one another: the message carries the numbers


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("parallel", "tensor", 0), ("parallel", "pipeline", -2), ("parallel", "expert", 0), ("parallel", "context", 0),
        ("adapter", "num_experts", 0), ("adapter", "rank", 0), ("adapter", "top_k", 0), ("adapter", "alpha", 0.0),
        ("adapter", "balance_weight", -0.5), ("adapter", "z_loss_weight", -0.5), ("adapter", "dropout", 1.0),
        ("adapter", "dropout", -0.25), ("train", "steps", 0), ("train", "schedule_steps", 0),
        ("train", "global_batch_size", 0), ("train", "micro_batch_size", 0), ("train", "lr", -0.25),
        ("train", "projector_lr", -0.25), ("train", "router_lr", -0.25), ("train", "warmup_steps", -3),
        ("train", "min_lr_ratio", 1.5), ("train", "min_lr_ratio", -0.5), ("train", "weight_decay", -0.5),
        ("train", "clip_grad", -1.0), ("train", "seed", -7), ("train", "max_bad_steps", 0), ("train", "adam_eps", 0.0),
        ("train", "adam_beta1", 1.0), ("train", "adam_beta2", -0.5), ("data", "max_length", 1),
        ("data", "max_image_pixels", 0), ("checkpoint", "every", -1), ("checkpoint", "keep", 0),
        ("validation", "every", -1), ("validation", "samples", 0), ("validation", "max_new_tokens", 0),
        ("monitor", "every", 0),
        ("monitor", "experts_every", -1), ("monitor", "pictures_every", -1), ("monitor.alarms", "dead_steps", -1),
        ("monitor.alarms", "repeat_every", 0),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named_with_its_key_and_number(section, key, value):
    message = refused(**nested(*section.split("."), key, value=value))
    assert message.startswith(f"{section}.{key} must be") and message.endswith(f"got {value}")


def whole_numbers(kind: type, *above: str) -> list[tuple[str, ...]]:
    """The keys of all whole numbers of a section and of those in it, but for what lies in lists."""
    hints, found = typing.get_type_hints(kind), []
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            found += whole_numbers(typing.cast(type, hint), *above, name)
        elif hint is int or int in typing.get_args(hint):
            found.append((*above, name))
    return found


@pytest.mark.parametrize("keys", whole_numbers(RunConfig), ids=".".join)
def test_a_whole_number_that_nothing_can_count_to_is_refused_with_its_key(keys):
    message = refused(**nested(*keys, value=10**24))
    assert message.startswith(f"{'.'.join(keys)} must be from ") and message.endswith(f"got {10**24}")


TASK = {"router_scope": "task", "gate": "none", "balance_weight": 0.0, "num_experts": 1}
MTL = {**TASK, "share_A": True, "shared_B": 2, "expert_parallel": "weights"}
MLPS = {"expert_form": "mlp", "top_k": 2, "renormalize": True, "expert_parallel": "auto"}
SIGMOID = {
    "router_score": "sigmoid", "top_k": 2, "renormalize": True, "router_bias": False, "balance_weight": 0.0,
    "expert_parallel": "auto",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            {"parallel": {"context": 2}},
            ["parallel.context is 2", "Transformer Engine's attention alone", "model.backend"],
        ),
        ({"train": {"precision": "fp8"}}, ["train.precision fp8", "model.backend", "fp8.store_base true"]),
        (
            {"model": {"backend": "transformer_engine"}, "fp8": {"store_base": True}},
            ["fp8.store_base", "train.precision bf16", "model.backend local"],
        ),
        (
            {
                "model": {"backend": "transformer_engine"},
                "train": {"precision": "fp8"},
                "fp8": {"recipe": "delayed", "first_last_layers_bf16": True},
            },
            ["fp8.first_last_layers_bf16", "fp8.recipe delayed", "tensorwise"],
        ),
        (
            {
                "model": {"backend": "transformer_engine"},
                "train": {"precision": "fp8"},
                "fp8": {"recipe": "delayed", "store_base": True},
            },
            ["fp8.store_base", "fp8.recipe delayed", "scale of 1", "tensorwise"],
        ),
        (
            {"model": {"backend": "transformer_engine"}, "validation": {"generate": True}},
            ["validation.generate", "model.backend local"],
        ),
        ({"adapter": {"top_k": 2}}, ["adapter.top_k is 2", "weights"]),
        ({"adapter": {"gate": "dense"}}, ["adapter.gate is dense", "weights"]),
        ({"adapter": {"router_scope": "sample"}}, ["adapter.balance_weight 0.01", "set it to 0"]),
        ({"adapter": {"router_scope": "linear"}}, ["adapter.router_scope is linear", "weights"]),
        (
            {
                "adapter": {"router_scope": "linear", "expert_parallel": "auto"},
                "monitor": {"alarms": {"reaction": "reseed"}},
            },
            ["reaction reseed", "router_scope is linear"],
        ),
        ({"adapter": {"rescale_gate": True}}, ["adapter.rescale_gate is true", "weights"]),
        (
            {"adapter": {"rescale_gate": True, "expert_parallel": "auto", "gate": "straight_through"}},
            ["adapter.rescale_gate", "straight_through is 1"],
        ),
        (
            {"adapter": {"rescale_gate": True, "expert_parallel": "auto", "gate": "dense", "num_experts": 1}},
            ["adapter.rescale_gate", "num_experts 1 is 1"],
        ),
        ({"adapter": {"share_A": True}}, ["adapter.share_A is true", "weights"]),
        ({"adapter": {"gate": "dense", "top_k": 2, "expert_parallel": "auto"}}, ["gate dense", "top_k 2"]),
        ({"adapter": {"top_k": 4, "expert_parallel": "auto"}}, ["adapter.top_k is 4", "adapter.num_experts is 3"]),
        (
            {"adapter": {"router_scope": "task"}},
            ["adapter.router_scope task", "adapter.gate must be none", "got prob"],
        ),
        ({"adapter": {**TASK, "balance_weight": 0.5}}, ["adapter.balance_weight must be 0", "got 0.5"]),
        ({"adapter": {**TASK, "num_experts": 5}}, ["adapter.num_experts is 5", "data.sources has 2"]),
        ({"adapter": {"renormalize": True}}, ["adapter.renormalize", "got 1 and prob"]),
        (
            {"adapter": MLPS | {"renormalize": False}},
            ["expert_form mlp", "adapter.renormalize must be true, got false"],
        ),
        ({"adapter": MLPS | {"gate": "straight_through"}}, ["adapter.gate must be prob, got straight_through"]),
        ({"adapter": MLPS | {"router_scope": "linear"}}, ["router_scope must be block or sample, got linear"]),
        ({"adapter": MLPS | {"rescale_gate": True}}, ["adapter.rescale_gate must be false, got true"]),
        ({"adapter": MLPS | {"expert_parallel": "tokens"}}, ["top_k is 2", "weights"]),
        ({"adapter": {"shared_B": 2}}, ["adapter.shared_B mixes a B for each task", "router_scope must be task"]),
        ({"adapter": {**TASK, "shared_B": 2}}, ["adapter.share_A must be true, got false"]),
        ({"adapter": {**MTL, "num_experts": 2}, "train": {"weight_decay": 0.1}}, ["weight_decay 0.1 would pull"]),
        ({"adapter": {**MTL, "methods": [{"name": "bora", "tau": 1}]}}, ["shared_B", "adapter.methods must be []"]),
        (
            {"adapter": {**SIGMOID, "balance_weight": 0.1}},
            ["router_score sigmoid", "balance_weight must be 0, got 0.1"],
        ),
        ({"adapter": {**SIGMOID, "router_bias": True}}, ["adapter.router_bias must be false"]),
        # a bias may make a weight negative, which has no root
        ({"adapter": {**SIGMOID, "rescale_gate": True}}, ["adapter.rescale_gate must be false, got true"]),
        (
            {"adapter": {"top_k": 2, "expert_parallel": "auto"}, "monitor": {"alarms": {"collapse": 1.6}}},
            ["monitor.alarms.collapse must be at most 3 / 2 = 1.5", "adapter.top_k 2", "got 1.6", "never sound"],
        ),
        (
            {"adapter": SIGMOID, "monitor": {"alarms": {"reaction": "reseed"}}},
            ["reaction reseed", "adapter.router_score is sigmoid"],
        ),
        (
            {"adapter": {"renormalize": True, "top_k": 2, "gate": "none", "expert_parallel": "auto"}},
            ["adapter.renormalize", "got 2 and none"],
        ),
        ({"adapter": {"method": "lora"}, "parallel": {"expert": 2}}, ["parallel.expert is 2", "lora"]),
        ({"adapter": {"num_experts": 6}, "parallel": {"expert": 4}}, ["num_experts 6", "parallel.expert 4"]),
        ({"train": {"global_batch_size": 10, "micro_batch_size": 4}}, ["size 10", "size 4"]),
        (
            {"train": {"optimizer": "sgd", "distributed_optimizer": True}},
            ["optimizer sgd", "shards Adam"],
        ),
        ({"adapter": {"layers": []}}, ["adapter.layers is empty", "mole"]),
        (
            {"adapter": {"method": "lora", "layers": [], "attention": False}, "train": {"projector": False}},
            ["nothing to train", "adapter.attention"],
        ),
        ({"adapter": {"gate": "none", "balance_weight": 0}}, ["adapter.gate none", "adapter.balance_weight"]),
        ({"run_dir": ""}, ["run_dir is empty"]),
    ],
)
def test_fields_that_do_not_go_together_are_refused_with_their_numbers(change, parts):
    message = refused(**change)
    assert all(part in message for part in parts), message


def test_plain_lora_may_leave_the_mlps_alone_and_any_number_of_experts_divides_for_it():
    assert make(adapter={"method": "lora", "layers": [], "num_experts": 3}).adapter.layers == ()


@pytest.mark.parametrize("kind", ["sources", "validation"])
def test_a_domain_named_twice_is_refused_with_its_name_and_count(kind):
    source = {"name": "docs", "path": "x"}
    assert f"data.{kind} has the name 'docs' 3 times" in refused(data={kind: [source, source, source]})


@pytest.mark.parametrize("kind", ["sources", "validation"])
@pytest.mark.parametrize(
    "name",
    [
        "a\nb",
        "a\r",
        "\x1b[31mred",
        "a\x00b",
        "a\u2028b",
        "a\u202eb",
        "",
        " a",
        "a/../b",
        "..",
        "./a",
        "a//b",
        "/a",
        "a/",
    ],
)
def test_a_name_that_could_break_a_line_or_leave_a_folder_is_refused_as_it_is_written(kind, name):
    message = refused(data={kind: [{"name": name, "path": "x"}]})
    assert message.startswith(f"data.{kind} has the name {name!r}: a name ") and message.isprintable()


@pytest.mark.parametrize("name", ["vqa/train", "a b", "a..b", "médecine 医", "1.5", "yes: no"])
def test_other_names_are_the_users_own(name):
    assert make(data={"sources": [{"name": name, "path": "x"}]}).data.sources[0].name == name


def test_the_same_domain_may_be_trained_and_validated_on():
    assert make(data={"validation": [{"name": "a", "path": "v.json"}]}).data.validation[0].name == "a"


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1, -0.5], ["'1': a weight must be at least 0, got -0.5"]),
        ([0, 0], ["all weights are 0"]),
        ([-1, 2], ["'0': a weight must be at least 0, got -1.0"]),
    ],
)
@pytest.mark.parametrize("kind", ["sources", "validation"])
def test_weights_are_not_negative_and_not_all_zero(kind, weights, parts):
    sources = [{"name": str(i), "path": "x", "weight": weight} for i, weight in enumerate(weights)]
    message = refused(data={kind: sources})
    assert f"data.{kind}" in message and all(part in message for part in parts)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"weight": [[0, 1], [50, -2]]}, "data.sources 'a': a weight must be at least 0, got -2.0"),
        ({"weight": [[0, 1], [9, 2], [9, 3]]}, "increasing, got [0.0, 9.0, 9.0]"),
        ({"weight": [[9, 1], [3, 2]]}, "increasing, got [9.0, 3.0]"),
        ({"weight": [[-1, 1]]}, "increasing, got [-1.0]"),
        ({"weight": [[0.5, 1]]}, "increasing, got [0.5]"),
        ({"weight": [[0, 1], [5]]}, "a list of [step, weight], got [[0.0, 1.0], [5.0]]"),
        ({"weight": []}, "a list of [step, weight], got []"),
        ({"weight": [[0, float("nan")]]}, "weight[0][1] must be a finite number, got nan"),
        ({"weight": float("nan")}, "weight must be a finite number or a list, got nan"),
        ({"weight": "much"}, "weight must be float or a list, got 'much'"),
        ({"weight": 1e308}, "data.sources 'a': a weight must be at most 1e+100, got 1e+308"),
        ({"weight": [[0, 1], [8, 0]]}, "all weights are 0 at step 8"),
        ({"weight": [[0, 0], [8, 1]]}, "data.sources: all weights are 0"),
        ({"epochs": 0}, "data.sources 'a': epochs must be from 1 to 1,000,000,000, got 0"),
        ({"epochs": 10**24}, f"epochs must be from 1 to 1,000,000,000, got {10**24}"),
        ({"epochs": 1.5}, "epochs must be"),
    ],
)
def test_a_schedule_or_a_limit_that_makes_no_sense_is_told_with_its_numbers(source, says):
    assert says in refused(data={"sources": [{"name": "a", "path": "x", **source}]})


def test_a_schedule_is_straight_between_its_points_and_level_outside_of_them():
    source = make(data={"sources": [{"name": "a", "path": "x", "weight": [[10, 1], [20, 3], [40, 0.5]]}]}).data.sources[
        0
    ]
    steps = [0, 10, 15, 20, 36, 40, 99]
    assert [source.weight_at(step) for step in steps] == [1, 1, 2, 3, 1, 0.5, 0.5]
    assert make().data.sources[1].weight_at(7) == 2.0


def test_validation_takes_no_schedule_and_no_limit():
    for more in ({"epochs": 1}, {"weight": [[0, 1], [5, 2]]}):
        assert "data.validation is read once" in refused(data={"validation": [{"name": "a", "path": "x"} | more]})


@pytest.mark.parametrize("temperature", [0, -1])
def test_a_temperature_is_above_zero(temperature):
    assert refused(data={"temperature": temperature}) == f"data.temperature must be above 0, got {float(temperature)}"


def test_a_weight_of_zero_switches_one_source_off():
    sources = [{"name": "a", "path": "x", "weight": 0}, {"name": "b", "path": "x"}]
    assert [source.weight for source in make(data={"sources": sources}).data.sources] == [0.0, 1.0]


def test_no_source_at_all_is_refused():
    assert "data.sources is empty" in refused(data={"sources": []})


# files and overrides


@pytest.mark.parametrize(
    "text", ["a: [1", "", "- 1\n- 2\n", "just text", "42", "a: !!python/object/apply:os.getcwd []", "\x00"]
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_in_one_line(write, text):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        run_config.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is not YAML"):
        run_config.load(tmp_path / "run.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*gone\.yaml: No such file"):
        run_config.load(tmp_path / "gone.yaml")


def test_relative_paths_are_taken_from_the_files_own_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    source = {"name": "a", "path": "../data/a.json", "image_folder": "images"}
    path = write(merged(SMALLEST, {"data": {"sources": [source], "validation": [source]},
                                   "checkpoint": {"init_from": "other"}}))  # fmt: skip
    loaded = run_config.load(path)
    folder = tmp_path / "runs"
    assert (loaded.run_dir, loaded.model.base) == (str(folder / "out"), str(folder / "base"))
    assert loaded.checkpoint.init_from == str(folder / "other")
    for kind in (loaded.data.sources, loaded.data.validation):
        assert (kind[0].path, kind[0].image_folder) == (str(tmp_path / "data" / "a.json"), str(folder / "images"))


def test_relative_paths_of_an_override_are_taken_from_the_current_folder(write, tmp_path, monkeypatch):
    path = write()
    monkeypatch.chdir(tmp_path)
    loaded = run_config.load(path, ["run_dir=here", "data.sources.1.path=b.json", "data.sources.0.image_folder=pics"])
    assert (loaded.run_dir, loaded.data.sources[1].path) == (str(tmp_path / "here"), str(tmp_path / "b.json"))
    assert loaded.data.sources[0].image_folder == str(tmp_path / "pics")
    assert loaded.data.sources[0].path == str(tmp_path / "runs" / "a.json")


def test_absolute_and_home_paths_stay_and_an_empty_path_stays_empty(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = run_config.load(write(merged(SMALLEST, {"model": {"base": "/models/base"}, "run_dir": "~/run"})))
    assert (loaded.model.base, loaded.run_dir) == ("/models/base", str(tmp_path / "run"))
    assert loaded.checkpoint.init_from == "" and loaded.data.sources[0].image_folder == ""


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.steps=7", lambda c: c.train.steps, 7),
        ("adapter.rank=4", lambda c: c.adapter.rank, 4),  # a section that the file does not have
        ("adapter.layers=[0, 3]", lambda c: c.adapter.layers, (0, 3)),
        ("adapter.layers=all", lambda c: c.adapter.layers, "all"),
        ("adapter.attention=false", lambda c: c.adapter.attention, False),
        ("train.schedule_steps=null", lambda c: c.train.schedule_steps, None),
        ("train.projector_lr=1e-5", lambda c: c.train.projector_lr, 1e-5),
        ("model.base_hash='a=b'", lambda c: c.model.base_hash, "a=b"),
        ("data.sources.1.weight=0.25", lambda c: [s.weight for s in c.data.sources], [1.0, 0.25]),
        ("data.sources.b.weight=0.25", lambda c: [s.weight for s in c.data.sources], [1.0, 0.25]),
        ("data.sources.0={name: z, path: /z}", lambda c: [s.name for s in c.data.sources], ["z", "b"]),
        ("data.sources=[{name: z, path: /z}]", lambda c: [s.name for s in c.data.sources], ["z"]),
        ("data.sources.0.image_folder=''", lambda c: c.data.sources[0].image_folder, ""),
    ],
)
def test_an_override_sets_the_one_key_it_names(write, override, read, value):
    tree = merged(SMALLEST, {"train": {"schedule_steps": 5}})
    assert read(run_config.load(write(tree), [override])) == value


def test_later_overrides_win(write):
    assert run_config.load(write(), ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("train.steps=[1", "the value is not YAML"),
        ("train.steps=", "train.steps must be int, got None"),
        ("train.stepss=3", "unknown config key train.stepss; the nearest valid key is train.steps"),
        ("train.steps.more=3", "'steps' holds a value, not a section"),
        ("data.sources.2.weight=1", "'2' is not an index below 2"),
        ("data.sources.-1.weight=1", "'-1' is not an index below 2"),
        ("data.sources.²={}", "'²' is not an index below 2"),
        ("data.sources.first.weight=1", "'first' is not an index below 2, nor a name of a, b"),
        ("data.sources.0.wait=1", "unknown config key data.sources[0].wait"),
        ("train=null", "train must be a mapping of keys"),
        ("..=1", "unknown config key"),
    ],
)
def test_an_override_that_cannot_be_applied_says_why(write, override, says):
    assert says in refused_override(write(), override)


def all_set() -> RunConfig:
    """A config in which no field stands at its default."""
    return make(
        model={"base_hash": "0123", "backend": "transformer_engine"},
        parallel={"tensor": 2, "pipeline": 2, "expert": 2},
        adapter={
            "num_experts": 4, "rank": 8, "alpha": 4.5, "dropout": 0.1, "gate": "straight_through", "top_k": 2,
            "renormalize": True, "share_A": True, "expert_parallel": "auto", "balance_weight": 1e-7,
            "balance_scope": "model", "z_loss_weight": 1e-22, "router_bias": False, "attention": False,
            "layers": [3, 1], "scaling": "rslora", "methods": [{"name": "any", "option": [0.5, {"x": None}]}],
            "mix_temperature": 0.2, "score_bias_rate": 1e-4,
        },
        train={
            "schedule_steps": 9, "global_batch_size": 6, "micro_batch_size": 3, "seed": 5, "lr": 1e-4,
            "projector_lr": 1e-5, "router_lr": 0, "projector": False, "schedule": "linear", "warmup_steps": 2,
            "min_lr_ratio": 0.1, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-9,
            "clip_grad": 0, "precision": "fp8", "distributed_optimizer": True, "recompute": "full",
            "max_bad_steps": 1, "hang_seconds": 60.0, "lora_plus_ratio": 16.0,
        },
        data={
            "sources": [
                {"name": "yes: no", "path": "/ünï/1e-4", "image_folder": "/i", "weight": 1 / 3},
                {"name": "2", "path": "/2", "weight": [[0, 1 / 3], [7, 1e-9]], "epochs": 3},
            ],
            "weights_in": "tokens", "temperature": 1.5,
            "validation": [{"name": "007", "path": "/v"}], "max_length": 99, "on_bad_sample": "stop",
            "max_image_pixels": 5,
        },
        validation={"every": 3, "samples": 2, "max_new_tokens": 7},
        checkpoint={"every": 4, "keep": 1, "init_from": "/other"},
        fp8={"store_base": True, "scale": "block", "recipe": "mxfp8", "first_last_layers_bf16": True},
        monitor={
            "every": 2, "experts_every": 5, "pictures_every": 6, "tensorboard": False,
            "alarms": {
                "collapse": 1.5, "dead_steps": 7, "entropy_floor": 0.5, "repeat_every": 8, "reaction": "reseed",
                "balance_factor": 1.5, "max_balance_weight": 2.0, "reseed_noise": 0.2,
            },
        },
    )  # fmt: skip


@pytest.mark.parametrize("config", [make(), all_set()], ids=["defaults", "all set"])
def test_a_dumped_config_loads_equal(config, tmp_path):
    config = replace(config, run_dir="/out", model=replace(config.model, base="/base"))
    sources = tuple(replace(source, path=f"/{source.name}") for source in config.data.sources)
    config = replace(config, data=replace(config.data, sources=sources))
    (tmp_path / "config.yaml").write_text(run_config.dump(config))
    loaded = run_config.load(tmp_path / "config.yaml")
    assert loaded == config
    assert run_config.dump(loaded) == run_config.dump(config)
    assert run_config.from_dict(run_config.to_dict(config)) == config


def test_the_all_set_config_leaves_no_field_at_its_default():
    """So that a field that dump or load forgets is seen by the test above."""
    # one value only, or inside a list
    # sgd does not go with a sharded Adam, nor answers with Transformer Engine, nor some forms of mixtures with others
    left_out = {"method", "router_scope", "rescale_gate", "context", "optimizer", "generate"} | {
        "shared_B", "expert_form", "router_score",
    }  # fmt: skip

    def defaults(node: Any, where: str) -> list[str]:
        found = []
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                found += defaults(value, f"{where}{field.name}.")
            elif value == field.default and field.name not in left_out:
                found.append(where + field.name)
        return found

    assert defaults(all_set(), "") == []


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().train.steps = 3  # type: ignore[misc]


def test_making_a_config_leaves_the_users_tree_as_it_was():
    tree = merged(SMALLEST, {})
    run_config.from_dict(tree)
    assert tree == SMALLEST


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST) + "adapter:\n  rank: 4\n  alpha: 8\n  rank: 16\n")
    with pytest.raises(ConfigError, match="the key 'rank' stands 2 times") as caught:
        run_config.load(path)
    assert "\n" not in str(caught.value)


def test_an_alias_is_a_section_of_its_own_and_a_merge_is_no_key_twice(tmp_path):
    tree = yaml.safe_load(yaml.safe_dump(SMALLEST))
    (source, *_), path = tree["data"]["sources"], tmp_path / "run.yaml"
    source |= {"name": "a", "path": "train.json"}
    del tree["data"]
    path.write_text(
        yaml.safe_dump(tree)
        + f"data:\n  sources: &all\n  - &a {json.dumps(source)}\n  - {{<<: *a, name: b, weight: 2}}\n"
        + "  validation: *all\n"
    )
    run = run_config.load(path, ["data.validation.a.path=/other.json", "data.validation.b.weight=5"])
    assert [(s.name, Path(s.path).name, s.weight) for s in run.data.sources] == [
        ("a", "train.json", 1.0), ("b", "train.json", 2.0),
    ]  # fmt: skip
    assert [(s.name, Path(s.path).name, s.weight) for s in run.data.validation] == [
        ("a", "other.json", 1.0), ("b", "train.json", 5.0),
    ]  # fmt: skip


def test_a_section_that_holds_itself_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("data: &all\n  sources: *all\n")
    with pytest.raises(ConfigError, match="a section holds itself"):
        run_config.load(tmp_path / "run.yaml")


@pytest.mark.parametrize("layers", ["0-1", 3])
def test_of_a_key_that_takes_two_kinds_of_value_both_are_named(layers):
    with pytest.raises(ConfigError, match=re.escape(f"adapter.layers must be one of all or a list, got {layers!r}")):
        make(adapter={"layers": layers})


def test_the_untrained_router_is_allowed_where_there_is_no_choice_or_another_loss_trains_it():
    for adapter in ({"num_experts": 1, "balance_weight": 0}, {"balance_weight": 0, "z_loss_weight": 0.1}):
        assert make(adapter={"gate": "none"} | adapter).adapter.gate == "none"


# alarms, a section inside a section


@pytest.mark.parametrize(
    ("name", "low", "value"),
    [
        ("collapse", 0, -0.5), ("entropy_floor", 0, -1.0), ("balance_factor", 1, 0.5), ("max_balance_weight", 0, -1.0),
        ("reseed_noise", 0, -0.1),
    ],
)  # fmt: skip
def test_an_alarm_out_of_range_is_refused_with_its_number(name, low, value):
    message = refused(monitor={"alarms": {name: value}})
    assert message == f"monitor.alarms.{name} must be at least {low}, got {value}"


@pytest.mark.parametrize("limit", [0.25, 1.0])
def test_a_collapse_that_no_load_can_stay_below_is_refused(limit):
    message = refused(monitor={"alarms": {"collapse": limit}})
    assert message.startswith(f"monitor.alarms.collapse must be above 1, or 0 for off, got {limit}")


def test_an_entropy_floor_above_every_load_is_refused_with_the_experts_that_it_depends_on():
    alarms = {"alarms": {"entropy_floor": 1.2}}
    message = refused(monitor=alarms, adapter={"num_experts": 3})
    assert message.startswith(
        "monitor.alarms.entropy_floor must be at most ln 3 = 1.099 with adapter.num_experts 3, got 1.2"
    )
    for adapter in ({"num_experts": 4}, {"num_experts": 1}, {"method": "lora", "num_experts": 3}):
        assert make(monitor=alarms, adapter=adapter).monitor.alarms.entropy_floor == 1.2


def test_an_unknown_alarm_or_reaction_is_named():
    assert "unknown config key monitor.alarms.colapse; the nearest valid key is monitor.alarms.collapse" in refused(
        monitor={"alarms": {"colapse": 2}}
    )
    assert "monitor.alarms.reaction must be one of none, raise_balance, reseed" in refused(
        monitor={"alarms": {"reaction": "panic"}}
    )


def test_a_balance_weight_of_zero_cannot_be_raised():
    message = refused(monitor={"alarms": {"reaction": "raise_balance"}}, adapter={"balance_weight": 0})
    assert message == "monitor.alarms.reaction raise_balance multiplies adapter.balance_weight, which is 0"
    alarms = {"reaction": "raise_balance", "max_balance_weight": 0.01}
    message = refused(monitor={"alarms": alarms}, adapter={"balance_weight": 0.03})
    assert "stops at max_balance_weight 0.01, and adapter.balance_weight is 0.03 already" in message
    make(monitor={"alarms": {"reaction": "raise_balance"}}, adapter={"balance_weight": 0, "method": "lora"})


def test_alarms_come_back_from_a_dumped_config_and_can_be_overridden(write):
    run = run_config.load(write(), ["monitor.alarms.reaction=reseed", "monitor.alarms.collapse=3"])
    assert (run.monitor.alarms.reaction, run.monitor.alarms.collapse) == ("reseed", 3.0)
    assert run_config.load(write(run_config.dump(run))) == run


# --- what has no effect ---

HEARD_BY_LORA = {"method", "rank", "alpha", "dropout", "attention", "layers", "scaling", "methods"}


def test_every_key_of_the_adapters_is_plain_loras_or_a_mixtures():
    assert {entry.name for entry in dataclasses.fields(AdapterConfig)} == HEARD_BY_LORA | run_config.MIXTURE_KEYS
    assert not HEARD_BY_LORA & run_config.MIXTURE_KEYS


def test_what_plain_lora_does_not_hear_is_told_with_its_value():
    asked = {"num_experts": 8, "rank": 4, "gate": "none", "renormalize": True, "balance_weight": 0.0}
    (line,) = run_config.describe_idle(make(adapter=asked | {"method": "lora"}, train={"router_lr": 1e-3}))
    assert line == (
        "adapter.method lora: these keys have no effect: adapter.num_experts 8, adapter.gate none, adapter.renormalize "
        "true, adapter.balance_weight 0.0, train.router_lr 0.001"
    )
    assert run_config.describe_idle(make(adapter={"method": "lora", "rank": 4})) == []


def test_a_mixture_hears_its_keys_but_those_of_what_it_has_not():
    assert run_config.describe_idle(make(adapter={"num_experts": 8, "gate": "none"}, train={"router_lr": 1e-3})) == []
    (line,) = run_config.describe_idle(make(adapter={"mix_temperature": 0.2, "score_bias_rate": 1e-3}))
    assert line == "these keys have no effect: adapter.mix_temperature 0.2, adapter.score_bias_rate 0.001"
    sigmoid = {"router_score": "sigmoid", "renormalize": True, "router_bias": False, "balance_weight": 0}
    sigmoid |= {"top_k": 2, "expert_parallel": "weights", "score_bias_rate": 1e-3}
    assert run_config.describe_idle(make(adapter=sigmoid)) == []


@pytest.mark.parametrize(
    ("fp8", "precision", "unheard"),
    [
        (
            {"first_last_layers_bf16": True, "scale": "block"},
            "bf16",
            "fp8.scale block, fp8.first_last_layers_bf16 true",
        ),
        ({"recipe": "mxfp8", "store_base": True, "scale": "block"}, "bf16", "fp8.recipe mxfp8"),
        ({"recipe": "mxfp8", "store_base": True, "scale": "block"}, "fp8", "fp8.scale block"),
        ({"recipe": "mxfp8", "first_last_layers_bf16": True}, "fp8", None),
        ({"store_base": True, "first_last_layers_bf16": True, "scale": "block"}, "fp32", None),
    ],
)
def test_keys_of_fp8_that_nothing_hears_are_told(fp8, precision, unheard):
    backend = "transformer_engine" if precision == "fp8" else "local"
    run = make(fp8=fp8, train={"precision": precision}, model={"backend": backend})
    stored = str(fp8.get("store_base", False)).lower()
    line = f"train.precision {precision}, fp8.store_base {stored}: these keys have no effect: {unheard}"
    assert run_config.describe_idle(run) == ([] if unheard is None else [line])


def test_steps_after_the_schedule_that_train_nothing_are_told():
    (line,) = run_config.describe_idle(make(train={"steps": 30, "schedule_steps": 20}))
    assert line == (
        "train.schedule_steps 20 ends before train.steps 30: from step 21 on the learning rate is 0 and nothing trains"
    )
    for heard in ({"min_lr_ratio": 0.1}, {"schedule": "constant"}, {"steps": 20}, {"schedule_steps": 40}):
        assert run_config.describe_idle(make(train={"steps": 30, "schedule_steps": 20} | heard)) == []


def test_reseeding_where_every_expert_has_all_tokens_is_refused():
    message = refused(adapter={"gate": "dense", "expert_parallel": "auto"}, monitor={"alarms": {"reaction": "reseed"}})
    assert "with adapter.gate dense every expert has all tokens" in message


def test_validation_without_a_source_is_told():
    (line,) = run_config.describe_idle(make(validation={"every": 2}))
    assert line == "validation.every is 2, but data.validation is empty: nothing is validated"
    source = [{"name": "a", "path": "a.json"}]
    assert run_config.describe_idle(make(validation={"every": 2}, data={"validation": source})) == []
