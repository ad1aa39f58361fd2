"""The conflict meter through its command: sources that are one, sources that contradict each other, and the same
figures in every layout."""

import json
import math
import random

import commands
import pytest

# fp32, after steps of Adam, which magnifies rounding: each figure against one process
TOLERANCE = 2e-3
WORDS = ["red", "blue", "green", "small", "large", "round", "flat", "old", "new", "warm", "cold"]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Three files of text rows: the same questions in all; `yes` and `also_yes` answer alike, `no` contradicts them."""
    folder = tmp_path_factory.mktemp("questions")
    rng = random.Random(3)
    prompts = [f"Is the {' '.join(rng.choices(WORDS, k=4))} one number {index}?" for index in range(240)]
    for name, answer in (("yes", "yes it is so"), ("also_yes", "yes it is so"), ("no", "no never at all")):
        turns = [
            {"id": index, "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
            for index, prompt in enumerate(prompts)
        ]
        (folder / f"{name}.json").write_text(json.dumps(turns))
    return folder


@pytest.fixture(scope="module")
def ask(make_run, questions, tmp_path_factory):
    """ask(first, second, processes, layout) -> (what was printed, the figures as JSON, the folder of the page)."""

    def run(first, second, nproc=1, *flags, **layout):
        folder = tmp_path_factory.mktemp("conflict")
        sources = [{"name": name, "path": str(questions / f"{name}.json")} for name in (first, second)]
        train = {"global_batch_size": 8, "micro_batch_size": 2, "lr": 0.003, "warmup_steps": 0}
        path = make_run(folder, data={"sources": sources}, train=train, adapter={"dropout": 0}, parallel=layout)
        arguments = [
            path,
            "--steps",
            10,
            "--repeats",
            1,
            "--batches",
            4,
            "--chunks",
            3,
            "--warm",
            2,
            "--json",
            folder / "figures.json",
        ]
        arguments += ["--out", folder / "page", *flags]
        code, text = commands.run(arguments, folder / "log", nproc=nproc, module="mole_mega.conflict.command")
        assert code == 0, text
        assert not (folder / "run").exists()  # the run itself has not begun
        return text, json.loads((folder / "figures.json").read_text()), folder / "page"

    return run


@pytest.fixture(scope="module")
def contradiction(ask):
    return ask("yes", "no")


def whole(figures, group="mlp"):
    (row,) = [row for row in figures["cosines"] if row["group"] == group and row["layer"] is None]
    return row


def test_sources_that_are_one_have_no_conflict(ask):
    text, figures, _ = ask("yes", "also_yes")
    assert whole(figures)["cosine"] > 0.9 and whole(figures)["state"] == "aligned"
    assert figures["verdict"] == "none" and "No conflict found" in text
    for row in figures["losses"]:
        # twice the steps on what is one source: the mix can only gain
        assert row["state"] in ("even", "gains") and abs(row["same_steps_difference"]) < 0.1


def test_sources_that_contradict_each_other_have_one(contradiction):
    text, figures, page = contradiction
    assert whole(figures)["cosine"] < -0.3 and whole(figures)["state"] == "opposed"
    assert figures["verdict"] == "conflict" and "A mixture of experts is likely to help" in text
    # the mix cannot do better than even odds on the first word, alone there is nothing left to learn
    for row in figures["losses"]:
        assert row["state"] == "loses" and row["same_samples_difference"] > 0.1
        assert row["own_steps"] == 10 and row["mix_samples"] == 80
    assert {"conflict.html", "conflict.md", "conflict_mlp.svg"} <= {path.name for path in page.iterdir()}


def test_every_layer_and_the_projector_have_a_figure_and_a_control(contradiction):
    _, figures, _ = contradiction
    places = {(row["group"], row["layer"]) for row in figures["cosines"]}
    layers = [0, 1, 2, 3, None]
    assert places >= {(group, layer) for group in ("mlp", "attention") for layer in layers}
    controls = [row["cosine"] for row in figures["same_source"] if row["group"] == "mlp"]
    assert len(controls) == 2 * len(layers) and all(control > 0.5 for control in controls)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}, {}])
def test_a_layout_measures_what_one_process_measures(ask, contradiction, layout):
    _, expected, _ = contradiction
    _, figures, _ = ask("yes", "no", 2, **layout)
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


def test_a_mixture_of_one_source_is_refused(make_run, questions, tmp_path):
    path = make_run(tmp_path, data={"sources": [{"name": "yes", "path": str(questions / "yes.json")}]})
    code, text = commands.run([path], tmp_path / "log", module="mole_mega.conflict.command")
    assert code == 2 and "a conflict takes two" in text and text.count("\n") == 1
