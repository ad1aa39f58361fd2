"""The conflict meter through its command: sources that are one, sources that contradict each other, and the same
figures in every layout."""

import json
import math
import random
from functools import partial
from pathlib import Path

import commands
import pytest

from mole_mega.adapters.methods import check_methods
from mole_mega.config import AdapterConfig, ConfigError, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.conflict.measure import Plan, set_aside, shared_adapter

# fp32, after 6 steps of Adam, which magnifies rounding: each figure against one process
TOLERANCE = 2e-4
# words that the tiny base knows
QUESTIONS = ["What colour is the mat?", "Where is it?", "Describe the picture."]
ANSWERS = {"red": "red", "red_too": "red", "green": "green"}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A file of text rows for each of ANSWERS, with the same questions; one labelled word and the end of the answer."""
    folder = tmp_path_factory.mktemp("answers")
    rng = random.Random(3)
    prompts = [f"{rng.choice(QUESTIONS)} {index}" for index in range(240)]
    for name, answer in ANSWERS.items():
        turns = [
            {"id": index, "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
            for index, prompt in enumerate(prompts)
        ]
        (folder / f"{name}.json").write_text(json.dumps(turns))
    return folder


@pytest.fixture(scope="module")
def ask(make_run, answers, tmp_path_factory):
    """ask(sources, *flags, nproc, layout) -> (what was printed, the figures as JSON, the folder of the page)."""

    def run(names, *flags, nproc=1, mixture=None, settings=(), **layout):
        folder = tmp_path_factory.mktemp("conflict")
        sources = [{"name": name, "path": str(answers / f"{name}.json")} for name in names]
        for source, own in zip(sources, settings, strict=False):
            source |= own
        train = {"global_batch_size": 8, "micro_batch_size": 4, "lr": 0.005, "warmup_steps": 0}
        path = make_run(
            folder, data={"sources": sources} | (mixture or {}), train=train, adapter={"dropout": 0}, parallel=layout
        )
        arguments = [path, "--repeats", 1, "--json", folder / "figures.json", "--out", folder / "page", *flags]
        code, text = commands.run(arguments, folder / "log", nproc=nproc, module="mole_mega.conflict.command")
        assert code == 0, text
        assert not (folder / "run").exists()  # the run itself has not begun
        return text, json.loads((folder / "figures.json").read_text()), folder / "page"

    return run


@pytest.fixture(scope="module")
def contradiction(ask):
    return ask(("red", "green"), "--steps", 16, "--batches", 4, "--chunks", 2)


def whole(figures, group="mlp"):
    (row,) = [row for row in figures["cosines"] if row["group"] == group and row["layer"] is None]
    return row


def test_sources_that_are_one_have_no_conflict(ask):
    text, figures, _ = ask(("red", "red_too"), "--steps", 8, "--warm", 3, "--batches", 4, "--chunks", 2)
    assert whole(figures)["cosine"] > 0.9 and whole(figures)["state"] == "aligned"
    assert figures["verdict"] == "none" and "No conflict found" in text
    # twice the steps on what is one source: the mix can only gain
    assert {row["state"] for row in figures["losses"]} <= {"even", "gains"}


def test_sources_that_contradict_each_other_have_one(contradiction):
    text, figures, page = contradiction
    assert whole(figures)["cosine"] < -0.5 and whole(figures)["state"] == "opposed"
    assert figures["verdict"] == "conflict" and "A mixture of experts is likely to help" in text
    for row in figures["losses"]:
        # alone all is learned; on the mix no model can do better than even odds on one of two labelled places
        assert row["state"] == "loses" and row["own_steps"] == 16 and row["mix_samples"] == 128
        assert row["same_samples_alone"] < 0.1 and math.log(2) / 2 - 0.05 < row["same_samples_mix"] < 0.6
    assert {"conflict.html", "conflict.md", "conflict_mlp.svg"} <= {path.name for path in page.iterdir()}


def test_every_layer_and_the_projector_have_a_figure_and_a_control(contradiction):
    _, figures, _ = contradiction
    places = {(row["group"], row["layer"]) for row in figures["cosines"]}
    layers = [0, 1, 2, 3, None]
    assert places >= {(group, layer) for group in ("mlp", "attention") for layer in layers}
    controls = [row["cosine"] for row in figures["same_source"] if row["group"] == "mlp"]
    assert len(controls) == 2 * len(layers) and all(control > 0.5 for control in controls)


@pytest.fixture(scope="module")
def short(ask):
    """ask for as little as a layout can be judged by."""
    return partial(ask, ("red", "green"), "--steps", 3, "--warm", 2, "--batches", 3, "--chunks", 2)


@pytest.fixture(scope="module")
def one_process(short):
    return short()[1]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}])
def test_a_layout_measures_what_one_process_measures(short, one_process, layout):
    _, figures, _ = short(nproc=2, **layout)
    expected = one_process
    assert figures["verdict"] == expected["verdict"]
    compared = 0
    for kind in ("cosines", "same_source", "losses"):
        for row, reference in zip(figures[kind], expected[kind], strict=True):
            for key, value in reference.items():
                if isinstance(value, float):
                    assert math.isclose(row[key], value, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (layout, kind, key, row)
                    compared += 1
                else:
                    assert row[key] == value, (layout, kind, key)
    assert compared > 40


def test_a_mixture_with_passes_schedules_tokens_and_a_temperature_is_measured(short, one_process):
    """As one of plain weights is that comes to the same shares: each source's rows, and their places, are as many."""
    text, figures, _ = short(
        mixture={"weights_in": "tokens", "temperature": 2.0},
        # the mean over the run's 6 steps is 2.5
        settings=({"epochs": 1, "weight": [[0, 0], [5, 5]]}, {"weight": 2.5}),
    )
    assert "epochs of red: ignored" in text
    assert "schedules of weights: taken as their means over train.steps 6: red 2.5" in text
    assert figures["losses"] == one_process["losses"] and figures["cosines"] == one_process["cosines"]


def shared(*sources, steps=10, methods=()):
    run = RunConfig(
        run_dir="run",
        model=ModelConfig(base="base"),
        adapter=AdapterConfig(methods=methods),
        train=TrainConfig(steps=steps),
        data=DataConfig(sources=tuple(SourceConfig(path="x", **source) for source in sources)),
    )
    one = shared_adapter(run, Plan(steps=5, warm_steps=5, repeats=1, batches=3, chunks=2))
    assert check_methods(one) == []
    return [(source.name, source.weight, source.epochs) for source in one.data.sources], set_aside(run)


def test_a_schedule_counts_by_its_mean_and_passes_do_not():
    kept, lines = shared(
        {"name": "a", "weight": ((0, 0.0), (4, 8.0))}, {"name": "b", "epochs": 2}, {"name": "c", "weight": 0.0},
        {"name": "late", "weight": ((20, 0.0), (30, 1.0))},
    )  # fmt: skip
    assert kept == [("a", pytest.approx((0 + 2 + 4 + 6 + 6 * 8) / 10), None), ("b", 1.0, None)]
    assert lines == [
        "epochs of b: ignored, these are short runs that may read rows again",
        "schedules of weights: taken as their means over train.steps 10: a 6, late 0",
    ]
    assert shared({"name": "a"}, {"name": "b"})[1] == []
    with pytest.raises(ConfigError, match="has 1 source with a weight above 0"):
        shared({"name": "a"}, {"name": "late", "weight": ((20, 0.0), (30, 1.0))})


def test_methods_of_experts_are_left_out_and_told():
    _, lines = shared({"name": "a"}, {"name": "b"}, methods=({"name": "bora", "tau": 1.0}, {"name": "riemannian"}))
    assert lines == ["adapter.methods bora, riemannian: left out, what is trained here is plain LoRA"]


def test_a_source_that_the_mix_would_hardly_read_is_named_before_anything_is_trained(make_run, answers, tmp_path):
    sources = [{"name": name, "path": str(answers / f"{name}.json")} for name in ("red", "green")]
    sources[1]["weight"] = 1e-6
    path = make_run(tmp_path, data={"sources": sources})
    code, text = commands.run([path, "--steps", 2], tmp_path / "log", module="mole_mega.conflict.command")
    assert (
        code == 2 and "data.sources 'green': 4 steps on the mix read 1 of its samples" in text and text.count("\n") == 1
    )


@pytest.fixture(scope="module")
def some_unusable(make_run, answers, tmp_path_factory):
    """some_unusable(asks, rows) -> (code, text) of a meter whose source green has `rows` held-out rows, of which the
    first `asks` have no answer, and one such row among those to train on."""
    folder = tmp_path_factory.mktemp("unusable")
    red, green = (json.loads((answers / f"{name}.json").read_text()) for name in ("red", "green"))

    def without_answers(rows, count):
        return [row | {"conversations": row["conversations"][:1]} for row in rows[:count]] + rows[count:]

    def run(asks, rows):
        files = {"red": red[:64], "green": without_answers(green[:64], 1)}
        held_out = {"red": red[64:80], "green": without_answers(green[64 : 64 + rows], asks)}
        data = {}
        for key, tables in (("sources", files), ("validation", held_out)):
            data[key] = [{"name": name, "path": str(folder / f"{key}_{name}.json")} for name in tables]
            for source in data[key]:
                Path(source["path"]).write_text(json.dumps(tables[source["name"]]))
        train = {"global_batch_size": 8, "micro_batch_size": 4, "lr": 0.005, "warmup_steps": 0}
        path = make_run(folder, data=data, train=train, adapter={"dropout": 0})
        # 8 steps on the mix read every row once
        arguments = [path, "--steps", 8, "--warm", 1, "--repeats", 1, "--batches", 3, "--chunks", 2]
        return commands.run(arguments, folder / "log", module="mole_mega.conflict.command")

    return run


@pytest.mark.parametrize(
    ("asks", "rows", "message"),
    [
        (16, 16, "data.validation 'green' has no sample that can be scored: 16 no assistant turn"),
        (8, 16, "data.validation 'green': 1 of 2 batches of 8 held-out rows can be scored, an uncertainty needs 2"),
        (0, 8, "data.validation 'green': 1 of 1 batches of 8 held-out rows can be scored, an uncertainty needs 2"),
    ],
)
def test_held_out_rows_that_cannot_be_scored_are_named_before_anything_is_trained(some_unusable, asks, rows, message):
    code, text = some_unusable(asks, rows)
    assert code == 2 and message in text and text.count("\n") == 1


def test_samples_that_are_left_out_are_told(some_unusable):
    code, text = some_unusable(asks=3, rows=16)
    assert code == 0 and "nan" not in text, text
    assert "WARNING: green: 3 samples left out of the held-out rows: no assistant turn" in text
    assert "WARNING: green: 1 sample left out of the 16 steps on the mix: no assistant turn" in text


def test_a_mixture_of_one_source_is_refused(make_run, answers, tmp_path):
    path = make_run(tmp_path, data={"sources": [{"name": "red", "path": str(answers / "red.json")}]})
    code, text = commands.run([path], tmp_path / "log", module="mole_mega.conflict.command")
    assert code == 2 and "a conflict takes two" in text and text.count("\n") == 1
