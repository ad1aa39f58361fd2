"""The data-conflict experiment: its rules on made figures, its plan, its pictures, and that no finished run repeats."""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "data_conflict"
DOMAINS = ("digits", "photos", "scans")


@pytest.fixture(scope="module", autouse=True)
def import_paths():
    """Examples and tools are scripts that find one another by path, as when they are run."""
    sys.path[:0] = [str(EXAMPLE), str(ROOT / "tools")]
    yield
    del sys.path[:2]


@pytest.fixture(scope="module")
def evidence():
    return importlib.import_module("evidence")


@pytest.fixture(scope="module")
def runs():
    return importlib.import_module("runs")


@pytest.fixture(scope="module")
def run():
    """The command; the module's name is not its own in a process that runs other examples."""
    return importlib.import_module("run")


@pytest.fixture(scope="module")
def scenes():
    return importlib.import_module("make_conflict_data")


def made(accuracy, loss=0.5, seeds=3, noise=0.0):
    """A row's figures: one accuracy for every domain, or one a domain; seeds differ by +-noise around it."""
    by_domain = (
        dict(zip(DOMAINS, accuracy, strict=True)) if isinstance(accuracy, tuple) else dict.fromkeys(DOMAINS, accuracy)
    )
    offsets = [noise * (seed - (seeds - 1) / 2) for seed in range(seeds)]
    return {f"accuracy/{d}": {s: v + offsets[s] for s in range(seeds)} for d, v in by_domain.items()} | {
        f"loss/{d}": {s: loss - offsets[s] for s in range(seeds)} for d in DOMAINS
    }


def answers(evidence, figures, seconds=None):
    """{the beginning of a claim's text: whether it holds}."""
    seconds = seconds or {"mix": [1.0, 1.0], "mole-prob-3": [1.0, 1.0]}
    return {str(c.text): c.holds for c in evidence.claims(figures, seconds, DOMAINS, 3, ("prob",))}


def every_row(**changed):
    rows = {
        "alone_samples": 0.9,
        "alone_steps": 0.95,
        "mix": 0.6,
        "mix_twice": 0.7,
        "mix_wide": 0.85,
        "mole-prob-3": 0.8,
    }
    return {name: made(value, noise=0.01) for name, value in rows.items()} | changed


# the claims in their order: hurts (samples), hurts (steps), beats the mix, beats twice, beats wide, cost
@pytest.mark.parametrize(
    ("changed", "seconds", "expected"),
    [
        ({}, None, [True, True, True, True, False, True]),
        ({"mix_wide": 0.7}, None, [True, True, True, True, True, True]),
        ({"alone_samples": 0.5}, None, [False, True, True, True, False, True]),
        ({"alone_steps": 0.6}, None, [True, False, True, True, False, True]),
        ({"mix_twice": 0.9}, None, [True, True, True, False, False, True]),
        # ahead in the mean and in two domains, but not in every one
        ({"mole-prob-3": (0.9, 0.9, 0.59)}, None, [True, True, False, True, False, True]),
        ({}, {"mix": [1.0, 1.1], "mole-prob-3": [1.06, 1.17]}, [True, True, True, True, False, False]),
        # 1.04 on average, but a spread that reaches over the limit
        ({}, {"mix": [1.0, 1.0], "mole-prob-3": [1.00, 1.08]}, [True, True, True, True, False, False]),
    ],
)
def test_every_claim_can_come_out_yes_and_no(evidence, changed, seconds, expected):
    figures = every_row(**{name: made(value, noise=0.01) for name, value in changed.items()})
    assert list(answers(evidence, figures, seconds).values()) == expected


def test_a_claim_whose_rows_are_not_finished_is_left_open(evidence):
    figures = every_row()
    del figures["mix_twice"]
    asked = [claim.text for claim in evidence.claims(figures, {}, DOMAINS, 3, ("prob",))]
    assert len(asked) == 4 and not any("twice" in text or "costs" in text for text in asked)


def test_a_difference_counts_only_beyond_the_spread_of_the_seeds(evidence):
    # the same mean difference of 0.1; t(2) is 2.92, so the margin is 2.92 / sqrt(3) = 1.686 standard deviations
    narrow = evidence.Comparison("x", (0.08, 0.1, 0.12))
    wide = evidence.Comparison("x", (0.0, 0.1, 0.2))
    assert narrow.margin == pytest.approx(1.6859 * 0.02, rel=1e-4)
    assert narrow.shown
    assert not wide.shown and not wide.opposite_shown
    assert evidence.Comparison("x", (-0.08, -0.1, -0.12)).opposite_shown


def test_one_seed_shows_nothing(evidence):
    assert not evidence.Comparison("x", (0.5,)).shown
    assert not evidence.Comparison("x", (-0.5,)).opposite_shown


def test_seeds_are_compared_with_themselves(evidence):
    # both rows spread widely over seeds, their difference does not
    figures = {"a": made(0.6, noise=0.2), "b": made(0.5, noise=0.2)}
    assert all(c.shown for c in evidence.better(figures, "a", "b", "accuracy", DOMAINS))
    with pytest.raises(ValueError, match="seeds"):
        evidence.better({"a": made(0.6, seeds=3), "b": made(0.5, seeds=2)}, "a", "b", "accuracy", DOMAINS)


def test_a_lower_loss_is_the_better_one(evidence):
    figures = {"a": made(0.5, loss=0.2, noise=0.01), "b": made(0.5, loss=0.4, noise=0.011)}
    (comparison,) = evidence.better_on_average(figures, "a", "b", "loss", DOMAINS)
    assert comparison.shown
    assert comparison.mean == pytest.approx(0.2)


def test_the_table_holds_mean_and_deviation_over_seeds(evidence):
    figures = {"row": made((0.1, 0.2, 0.6), loss=0.25, noise=0.02)}
    header, _, line = evidence.table(figures, {"row": "A row"}, DOMAINS).splitlines()
    cells = dict(zip([c.strip() for c in header.split("|")], [c.strip() for c in line.split("|")], strict=True))
    assert line.startswith("| A row |")
    assert cells["accuracy photos"] == "0.200 ± 0.020"
    assert cells["accuracy mean"] == "0.300 ± 0.020"
    assert cells["loss mean"] == "0.250 ± 0.020"


def test_the_cost_table_compares_block_by_block(evidence):
    seconds = {"mix": [0.1, 0.2, 0.3], "mole": [0.11, 0.22, 0.33]}
    assert "| mole | 220.0 | 1.10 ± 0.00 |" in evidence.cost_table(seconds, "mix")


@pytest.fixture(scope="module")
def settings():
    return yaml.safe_load((EXAMPLE / "settings.yaml").read_text())


@pytest.fixture
def jobs(runs, settings, tmp_path):
    """All runs of one seed, at made rates."""
    rows = runs.table_rows(settings["adapter"]["rank"], 3)
    tuned = {row.tuned: {"lr": 0.001} for row in rows}
    return list(runs.make_jobs(rows, [0], settings, tuned, tmp_path, DOMAINS, "test"))


def test_rows_that_are_compared_differ_in_what_they_say(runs, settings, jobs):
    by_row = {job.row: job.run for job in jobs}
    steps, rank = settings["train"]["steps"], settings["adapter"]["rank"]
    assert by_row["mix"].train.steps == by_row["alone_steps"].train.steps == by_row["mole-prob-3"].train.steps == steps
    assert by_row["alone_samples"].train.steps * 3 == steps
    assert by_row["mix_twice"].train.steps == 2 * steps
    assert by_row["mix_wide"].adapter.rank == 3 * rank
    # alpha / rank, and with it the size of a step, is alike
    assert {job.run.adapter.alpha / job.run.adapter.rank for job in jobs} == {2}
    moles = {(r.adapter.gate, r.adapter.num_experts) for r in by_row.values() if r.adapter.method == "mole"}
    assert moles == {("prob", 1), *itertools.product(("none", "prob", "straight_through"), (2, 3, 4, 8))}
    assert all(job.run.adapter.rank == rank for job in jobs if job.run.adapter.method == "mole")
    assert {tuple(s.name for s in job.run.data.sources) for job in jobs if job.row == "mix"} == {DOMAINS}
    assert sorted(job.domains for job in jobs if job.row == "alone_samples") == [(d,) for d in DOMAINS]
    assert len({job.folder for job in jobs}) == len(jobs)


def test_reported_runs_are_scored_on_pictures_that_tuning_did_not_see(jobs):
    for job in jobs:
        assert all(re.search(r"_test\.json$", source.path) for source in job.run.data.validation)
        assert all(re.search(r"_train\.json$", source.path) for source in job.run.data.sources)


def work(job):
    """Stands for training: says which job it was, and leaves a mark each time."""
    with open(job.folder.parent / "log", "a") as log:
        log.write(f"{job.folder.name}\n")
    return {"scores": {f"accuracy/{domain}": 0.5 for domain in job.domains}}


def test_finished_runs_are_not_repeated_and_changed_ones_are(runs, jobs, capsys):
    some = jobs[:3]
    results = runs.run_all(some, 1, work)
    assert [Path(r["settings"]["run_dir"]) for r in results] == [job.folder for job in some]
    (some[1].folder / "result.json").unlink()  # as if killed before the end
    (some[1].folder / "checkpoints").mkdir()  # and a rest of it
    stored = json.loads((some[2].folder / "result.json").read_text())
    stored["settings"]["train"]["lr"] = 0.5
    (some[2].folder / "result.json").write_text(json.dumps(stored))
    runs.run_all(some, 1, work)
    names = [job.folder.name for job in some]
    assert (some[0].folder.parent / "log").read_text().split() == [*names, names[1], names[2]]
    assert not (some[1].folder / "checkpoints").exists()
    assert "1 of 3 runs are at hand" in capsys.readouterr().out
    assert runs.run_all(some, 1, work)[2]["settings"]["train"]["lr"] == some[2].run.train.lr


def test_a_finished_run_stays_valid_when_the_config_gains_a_key_but_not_when_it_loses_one(runs, jobs):
    job, path = jobs[0], jobs[0].folder / "result.json"
    path.parent.mkdir(parents=True)
    older, another, later = job.settings, job.settings, job.settings
    del older["adapter"]["shared_B"]
    del another["monitor"]["tensorboard"]  # which is not at its default
    later["adapter"]["magic"] = 1
    for settings, is_valid in ((older, True), (another, False), (later, False)):
        path.write_text(json.dumps({"settings": settings}))
        assert (runs.finished(job) is not None) == is_valid


def test_what_the_claims_need_runs_first_over_all_seeds(runs, settings, tmp_path):
    rows = runs.table_rows(settings["adapter"]["rank"], 3)
    tuned = {row.tuned: {"lr": 0.001} for row in rows}
    jobs = list(runs.make_jobs(rows, [0, 1], settings, tuned, tmp_path, DOMAINS, "test"))
    ordered = runs.by_need(jobs)
    assert sorted(map(id, ordered)) == sorted(map(id, jobs))
    names = [(job.row, job.seed) for job in ordered]
    compared = ["mix", "mix_twice", "mix_wide", *(f"mole-{gate}-3" for gate in runs.GATES)]
    assert names[:12] == [(row, seed) for seed in (0, 1) for row in compared]
    assert {row for row, _ in names[12:24]} == {"alone_samples", "alone_steps"}


def test_the_table_so_far_holds_the_rows_that_are_complete(runs, jobs):
    by_row = [job for job in jobs if job.row in ("alone_steps", "mix", "mix_twice")]
    runs.run_all([job for job in by_row if job.row != "mix_twice" and job.domains != ("scans",)], 1, work)
    assert set(runs.complete_rows(by_row)) == {"mix"}  # of alone_steps a domain is missing
    runs.run_all([job for job in by_row if job.row == "alone_steps"], 1, work)
    assert set(runs.complete_rows(by_row)) == {"mix", "alone_steps"}


def test_every_method_gets_as_many_tries_and_the_best_of_them(run):
    grids = run.grid(rank=1)
    assert set(grids) == {"lora", "lora_wide", "mole_none", "mole_prob", "mole_straight_through"}
    assert len({len(points) for points in grids.values()}) == 1
    for points in grids.values():
        assert len({tuple(rates.items()) for _, rates in points}) == len({row.key for row, _ in points}) == len(points)
    points = grids["lora"][:3]
    keys = [row.key for row, _ in points]
    figures = {keys[0]: made(0.5, loss=0.3), keys[1]: made(0.6, loss=0.9), keys[2]: made(0.6, loss=0.8)}
    assert run.best_point(points, figures) == points[2]  # by accuracy, and where that is equal by loss


def test_figures_of_domains_trained_apart_come_together_in_one_row(runs):
    results = [
        {"row": "alone", "seed": seed, "scores": {f"accuracy/{d}": seed + i}}
        for seed in (0, 1)
        for i, d in enumerate(DOMAINS)
    ]
    assert runs.read_figures(results) == {
        "alone": {"accuracy/digits": {0: 0, 1: 1}, "accuracy/photos": {0: 1, 1: 2}, "accuracy/scans": {0: 2, 1: 3}}
    }


def test_no_two_domains_call_a_value_alike_and_none_as_the_base_was_taught(scenes):
    for domain, attribute in itertools.product(DOMAINS, scenes.ATTRIBUTES):
        names = scenes.conventions()[domain][attribute]
        values = scenes.attribute_values(domain, attribute)
        assert tuple(names) == values and sorted(names.values()) == sorted(values)  # a permutation
        assert all(name != value for value, name in names.items())
    for attribute in ("corner", "upper", "lower"):
        for value in scenes.attribute_values("digits", attribute):
            assert len({scenes.conventions()[domain][attribute][value] for domain in DOMAINS}) == 3, (attribute, value)


def test_domains_answer_in_the_neutral_words_but_for_the_names(scenes):
    values = {"subject": "cat", "corner": "top left", "upper": "red", "lower": "blue"}
    scene = scenes.Scene("photos", values, None, ("", ()))
    names = {attribute: scenes.conventions()["photos"][attribute][value] for attribute, value in values.items()}
    wanted = f"photo {names['subject']} at {names['corner']} {names['upper']} over {names['lower']}"
    assert scenes.domain_answer(scene) == wanted
    assert scene.values == values
    assert scenes.plain_answer(scene, "all") == "photo cat at top left red over blue"


def test_the_three_splits_share_no_pixel(scenes):
    splits = [scenes.Subjects(False), scenes.Subjects(False, validation=True), scenes.Subjects(True)]
    for one, other in itertools.combinations(splits, 2):
        for name in scenes.SUBJECTS["digits"]:
            assert not set(one._digit_rows[name]) & set(other._digit_rows[name])
    for picture, image in splits[0]._pictures.values():
        boxes = [split.tiles(*image.size, picture.tile) for split in splits]
        assert all(boxes), picture
        assert len({box for split in boxes for box in split}) == sum(map(len, boxes)), picture
