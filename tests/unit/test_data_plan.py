"""What a data section asks for and what a run gets: units, temperature, schedules, passes, counts and the manifest."""

import dataclasses
import json
import math

import pytest
from test_data_loader import PAD, SPEC, Colours, make_encoder

from mole_mega.config import ConfigError, DataConfig, SourceConfig
from mole_mega.data import plan as plan_module
from mole_mega.data import tally
from mole_mega.data.conversation import IGNORE_INDEX
from mole_mega.data.loader import Loader
from mole_mega.data.plan import measure_places, plan_mixture
from mole_mega.data.sources import BadSample, Sample

STEPS, BATCH = 60, 10


class Texts:
    """Rows of text whose lengths are drawn from `lengths` in turn; rows in `bad` cannot be used."""

    def __init__(self, name, size, lengths, bad=()):
        self.name, self._size, self._lengths, self._bad = name, size, lengths, set(bad)

    def __len__(self):
        return self._size

    def __getitem__(self, row):
        if row in self._bad:
            raise BadSample(self.name, str(row), "roles", "turn 1 is wrong")
        words = "x" * self._lengths[row % len(self._lengths)]
        return Sample((("user", words), ("assistant", "yes")), (), self.name, f"{self.name}-{row}")


SHORT, LONG = Texts("short", 64, [1, 40, 9, 80]), Texts("long", 45, [900, 400, 1500])


def plan_of(sources, batch=BATCH, seed=3, settings=(), **section):
    """settings: (weight, epochs) by source."""
    settings = [*settings, *[(1.0, None)] * (len(sources) - len(settings))]
    configs = [
        SourceConfig(name=source.name, path="", weight=weight, epochs=epochs)
        for source, (weight, epochs) in zip(sources, settings, strict=True)
    ]
    return plan_mixture(DataConfig(sources=tuple(configs), **section), sources, make_encoder(), seed, batch)


def read(sources, plan, steps, dp_size=1, first=0, **more):
    """The tally of some steps, put together from all ranks."""
    loaders = []
    for rank in range(dp_size):
        loaders.append(
            Loader(sources, plan.mixture, make_encoder(), SPEC, pad_token_id=PAD, prefetch=False, plan=plan, **more)
        )
        for step in range(first, steps):
            loaders[-1].micro_batches(step, plan.batch, 1, rank, dp_size)
    return tally.add(loader.read for loader in loaders)


def places(source):
    encoder = make_encoder()
    return [len(encoder.encode(source[row]).tokens) for row in range(len(source))]


@pytest.mark.parametrize("settings", [[(1.0, None), (1.0, None)], [(1.0, None), (3.0, None)]], ids=["1:1", "1:3"])
def test_shares_of_tokens_are_reached_where_rows_differ_in_length(settings):
    """Within 1 percent of the whole, in 3000 samples. By rows the long source would take five sixths of the tokens."""
    sources = [SHORT, LONG]
    plan = plan_of(sources, settings=settings, weights_in="tokens")
    asked = settings[0][0] / (settings[0][0] + settings[1][0])
    assert plan.asked_shares(STEPS) == pytest.approx([asked, 1 - asked])
    lengths = [places(source) for source in sources]

    def shares(mixture):
        tokens = [0, 0]
        for position in range(3000):
            source, row = mixture.locate(position)
            tokens[source] += lengths[source][row]
        return [n / sum(tokens) for n in tokens]

    assert shares(plan.mixture) == pytest.approx([asked, 1 - asked], abs=0.01)
    assert shares(plan_of(sources).mixture)[1] > 0.83


def test_mean_places_are_those_of_the_rows_that_can_be_used(monkeypatch):
    encoder = make_encoder()
    few = Texts("few", 40, [1, 5, 300], bad=range(0, 40, 3))  # all the short ones are bad
    usable = [len(encoder.encode(few[row]).tokens) for row in range(40) if row % 3]
    measured = measure_places(few, encoder, seed=0, index=0)
    assert (measured.mean, measured.error, measured.rows) == (math.fsum(usable) / len(usable), 0.0, len(usable))
    monkeypatch.setattr(plan_module, "_ROWS_MEASURED", 60)
    many = Texts("many", 90, [90, 40, 150])
    every = places(many)
    measured = measure_places(many, encoder, seed=0, index=1)
    assert measured.rows == 60
    assert 1 < measured.error < 10 and abs(measured.mean - math.fsum(every) / len(every)) < 3 * measured.error
    assert measure_places(many, encoder, seed=0, index=1) == measured != measure_places(many, encoder, seed=9, index=1)


@pytest.mark.parametrize("weights_in", ["samples", "tokens"])
def test_a_source_of_which_no_row_can_be_used_is_refused(weights_in):
    nothing = Texts("few", 40, [1], bad=range(40))
    refused = r"source 'few': none of the 40 rows that were looked at can be used; sample \d+, for example: \w"
    with pytest.raises(ConfigError, match=refused):
        plan_of([SHORT, nothing], weights_in=weights_in)
    plan_of([SHORT, Texts("few", 40, [1], bad=range(39))], weights_in=weights_in)


def test_a_source_that_is_switched_off_is_not_measured():
    nothing = Texts("off", 5, [1], bad=range(5))
    plan = plan_of([SHORT, nothing], settings=[(1.0, None), (0.0, None)], weights_in="tokens")
    assert plan.places[1] is None and plan.asked_shares(5) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("temperature", "expected"), [(None, [1, 1]), (1, [64, 45]), (2, [64**0.5, 45**0.5]), (1e9, [1, 1])]
)
def test_temperature_is_the_usual_one(temperature, expected):
    plan = plan_of([SHORT, LONG], temperature=temperature)
    wanted = [value / sum(expected) for value in expected]
    assert plan.asked_shares(STEPS) == pytest.approx(wanted)
    assert plan.mixture.counts(2000) == pytest.approx([2000 * share for share in wanted], abs=2)
    twice = plan_of([SHORT, LONG], temperature=temperature, settings=[(2.0, None)])
    assert twice.asked_shares(1)[0] / twice.asked_shares(1)[1] == pytest.approx(2 * wanted[0] / wanted[1])


def test_a_temperature_whose_powers_no_number_holds_is_refused_with_the_least_that_will_do():
    with pytest.raises(
        ConfigError, match=r"data.temperature 0.001 .* 64 samples to the power of 1000.* at least 0.01 "
    ):
        plan_of([SHORT, LONG], temperature=0.001)
    plan_of([SHORT, LONG], temperature=0.011)


def test_temperature_counts_sizes_in_the_unit_of_the_weights():
    plan = plan_of([SHORT, LONG], temperature=1, weights_in="tokens")
    tokens = [64 * plan.places[0].mean, 45 * plan.places[1].mean]
    assert plan.asked_shares(STEPS) == pytest.approx([n / sum(tokens) for n in tokens])
    # shares of the tokens that follow the tokens are shares of the samples that follow the rows
    assert plan.mixture.counts(109) == pytest.approx([64, 45], abs=2)


def test_a_schedule_moves_the_shares_over_the_steps():
    plan = plan_of([SHORT, LONG], settings=[(((10, 0.0), (110, 4.0)), None)])
    stream = [plan.mixture.locate(position)[0] for position in range(2500)]
    for first, last in ((0, 10), (10, 30), (60, 80), (110, 250)):
        part = stream[first * BATCH : last * BATCH]
        weights = [min(4.0, max(0.0, 4 * (step - 10) / 100)) for step in range(first, last)]
        expected = math.fsum(weight / (weight + 1) for weight in weights) / len(weights)
        assert part.count(0) / len(part) == pytest.approx(expected, abs=0.02)
    assert plan.asked_shares(250)[0] == pytest.approx(stream.count(0) / 2500, abs=0.002)


def test_a_long_slope_is_cut_into_few_stairs_of_the_same_mean():
    plan = plan_of([SHORT, LONG], settings=[(((0, 1.0), (100_000, 3.0)), None)])
    assert len(plan.mixture._phases) <= 257
    expected = 1 - math.log(2) / 2  # the mean of w / (w + 1) for w from 1 to 3
    assert plan.asked_shares(100_000)[0] == pytest.approx(expected, rel=1e-5)


def test_a_schedule_needs_to_know_the_samples_of_a_step():
    with pytest.raises(ValueError, match="needs the samples a step"):
        plan_of([SHORT], batch=None, settings=[(((0, 1.0), (5, 2.0)), None)])
    assert plan_of([SHORT], batch=None, settings=[(((5, 2.0),), None)]).mixture.locate(0)[0] == 0


def test_sources_that_run_out_too_early_are_told_before_training():
    sources = [Texts("a", 30, [3]), Texts("b", 20, [3])]
    plan = plan_of(sources, settings=[(1.0, 1), (1.0, 2)])
    plan.check(7)
    with pytest.raises(ConfigError) as caught:
        plan.check(8)
    assert str(caught.value) == (
        "data.sources run out after 70 samples (a 1 x 30 rows, b 2 x 20 rows): 7 of 8 steps of 10 are possible; "
        "set train.steps to that, or raise epochs"
    )
    one_limited = plan_of(sources, settings=[(1.0, 1)])
    one_limited.check(10**6)
    lines = one_limited.describe(20)
    assert lines[0] == (
        "source a: 30 rows, asked 50.0% of the samples, planned 30 of 200 samples = 1.00 epochs; "
        "runs out in step 6 (epochs: 1)"
    )
    assert lines[1].endswith("planned 170 of 200 samples = 8.50 epochs")


def test_one_pass_reads_each_row_once():
    sources = [Texts("a", 30, [3]), Texts("b", 20, [3])]
    plan = plan_of(sources, settings=[(5.0, 1), (1.0, 1)])
    loader = Loader(sources, plan.mixture, make_encoder(), SPEC, pad_token_id=PAD)
    ids = [name for step in range(5) for batch in loader.micro_batches(step, 10, 10, 0, 1) for name in batch.sample_ids]
    assert sorted(ids) == sorted([f"a-{row}" for row in range(30)] + [f"b-{row}" for row in range(20)])
    with pytest.raises(ConfigError, match="the stream ends after 50 samples"):
        loader.micro_batches(5, 10, 10, 0, 1)


def naive(plan, sources, steps):
    """Counts by a plain walk over the stream, one sample at a time."""
    counts = {source.name: {} for source in sources}

    def count(name, key, by=1):
        counts[name][key] = counts[name].get(key, 0) + by

    for position in range(steps * plan.batch):
        for attempt in range(99):
            index, row = plan.mixture.locate(position, attempt)
            try:
                sample = sources[index][row]
                example = make_encoder().encode(sample)
                for image in example.images:
                    image.open()
                break
            except BadSample as bad:
                count(sources[index].name, f"left_out/{bad.kind}")
        count(sample.domain, "rows")
        count(sample.domain, "tokens", len(example.tokens))
        count(sample.domain, "labelled_tokens", sum(label != IGNORE_INDEX for label in example.labels.tolist()))
        count(sample.domain, "images", len(example.images))
    return counts


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_counts_are_those_of_a_plain_walk_in_any_layout_and_also_after_a_stop(tmp_path, dp_size):
    sources = [Colours("ocr", 11, tmp_path, bad=[3], broken=[4]), Colours("vqa", 7, tmp_path)]
    plan = plan_of(sources, batch=8, settings=[(((0, 1.0), (6, 3.0)), None), (2.0, 3)])
    expected = naive(plan, sources, 9)
    assert expected["ocr"]["left_out/roles"] > 0 < expected["ocr"]["left_out/image broken"]
    assert read(sources, plan, 9, dp_size) == expected
    kept = json.loads(json.dumps(read(sources, plan, 4)))
    assert tally.add([kept, read(sources, plan, 9, dp_size, first=4)]) == expected


def test_reading_ahead_counts_only_what_was_handed_out(tmp_path):
    sources = [Colours("ocr", 11, tmp_path, bad=[3])]
    plan = plan_of(sources, batch=4)
    ahead = Loader(sources, plan.mixture, make_encoder(), SPEC, pad_token_id=PAD, prefetch=True)
    for step in range(5):
        ahead.micro_batches(step, 4, 2, 0, 1)
    ahead._reader.submit(int).result()  # the next step has been read by now
    assert ahead.read == naive(plan, sources, 5)


def test_validation_is_not_counted_as_training(tmp_path):
    sources = [Colours("ocr", 5, tmp_path)]
    loader = Loader(
        sources, plan_of(sources).mixture, make_encoder(), SPEC, pad_token_id=PAD, validation_sources=sources
    )
    assert list(loader.validation_batches(5, 1, 0, 1)) and loader.read == {}


def test_the_manifest_says_asked_and_realised_and_its_table_prints(tmp_path):
    sources = [Colours("ocr", 11, tmp_path, bad=[3], broken=[4]), Colours("vqa", 7, tmp_path)]
    plan = plan_of(sources, batch=8, settings=[(3.0, None), (1.0, None)])
    counts = read(sources, plan, 5)
    tree = json.loads(json.dumps(tally.manifest([tally.phase(plan, 0, 5, counts)], counts)))
    assert tree["samples"] == tree["samples_counted"] == 40
    ocr, vqa = tree["sources"]["ocr"], tree["sources"]["vqa"]
    assert (ocr["share_asked"], vqa["share_asked"]) == (0.75, 0.25)
    assert (ocr["drawn"], vqa["drawn"]) == (ocr["rows"], vqa["rows"]) == (30, 10)
    assert (ocr["epochs_begun"], vqa["epochs_begun"]) == (3, 2)
    assert (ocr["share_realised"], vqa["share_realised"]) == (0.75, 0.25)
    assert ocr["left_out"].keys() == {"roles", "image broken"}
    assert vqa["left_out"] == {}
    for entry, name in ((ocr, "ocr"), (vqa, "vqa")):
        assert {k: entry[k] for k in ("rows", "tokens", "labelled_tokens", "images")}.items() <= counts[name].items()
    lines = tally.table(tree)
    assert lines[0] == "mixture after 5 steps, shares of samples:"
    assert lines[2].split()[:4] == ["ocr", "75.00%", "75.00%", "30"]
    assert lines[2].split()[-1] == str(sum(ocr["left_out"].values()))
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_run_that_kept_no_counts_or_had_other_sources_says_so():
    plan = plan_of([SHORT], batch=8)
    old = {"gone": {"rows": 8, "tokens": 80}}
    counts = tally.add([old, {"short": {"rows": 16, "tokens": 160}}])
    tree = tally.manifest([tally.phase(plan, 0, 5, counts)], counts)
    assert tree["sources"]["gone"]["share_realised"] == pytest.approx(1 / 3)
    assert tree["sources"]["gone"]["share_asked"] == 0
    assert tally.table(tree)[-1] == "  counted: 24 of 40 samples; no counts were kept of the rest"


def test_a_run_that_changes_its_mixture_is_held_against_each_for_its_own_steps():
    """5 steps of 8 at 3 to 1, then 15 steps of 4 at 1 to 4 with the first source gone: asked, drawn and realised."""
    other = Texts("other", 30, [7])
    sources = {source.name: source for source in (SHORT, LONG, other)}
    first = plan_of([SHORT, LONG], batch=8, settings=[(3.0, None), (1.0, None)])
    then = plan_of([LONG, other], batch=4, settings=[(1.0, None), (4.0, None)])
    before, after = read([SHORT, LONG], first, 5), read([LONG, other], then, 20, first=5)
    phases = [tally.phase(first, 0, 5, before)]
    counts = tally.add([before, after])
    assert tally.taken_since(phases, counts)["other"]["rows"] == after["other"]["rows"] == 48
    phases.append(tally.phase(then, 5, 20, tally.taken_since(phases, counts)))
    tree = tally.manifest(phases, counts)
    assert (tree["step"], tree["samples"], tree["samples_counted"]) == (20, 100, 100)
    found = {
        name: (entry["share_asked"], entry["drawn"], entry["rows"], entry["epochs_begun"])
        for name, entry in tree["sources"].items()
    }
    assert found == {
        "long": (pytest.approx(0.4 * 0.25 + 0.6 * 0.2), 22, 22, 1),
        "other": (pytest.approx(0.6 * 0.8), 48, 48, 2),
        "short": (pytest.approx(0.4 * 0.75), 30, 30, 1),
    }
    assert len(sources["other"]) == 30 and tree["sources"]["short"]["weight"] is None
    spans = [(part["from_step"], part["to_step"], part["sources"]["long"]["rows"]) for part in tree["phases"]]
    assert spans == [(1, 5, 10), (6, 20, 12)]
    lines = tally.table(tree)
    assert lines[-2:] == [
        "  steps 1 to 5, asked / realised of the samples: short 75.00% / 75.00%, long 25.00% / 25.00%",
        "  steps 6 to 20, asked / realised of the samples: long 20.00% / 20.00%, other 80.00% / 80.00%",
    ]


def test_phases_in_tokens_weigh_by_their_tokens_and_units_are_not_mixed():
    in_tokens = [plan_of([SHORT, LONG], settings=[(weight, None)], weights_in="tokens") for weight in (1.0, 3.0)]
    before, after = {"short": {"rows": 9, "tokens": 100}}, {"short": {"rows": 1, "tokens": 300}}
    phases = [tally.phase(in_tokens[0], 0, 1, before), tally.phase(in_tokens[1], 1, 9, after)]
    counts = tally.add([before, after])
    shares = [entry["share_asked"] for entry in tally.manifest(phases, counts)["sources"].values()]
    assert shares == pytest.approx([(100 * 0.5 + 300 * 0.75) / 400, (100 * 0.5 + 300 * 0.25) / 400])
    phases[0] = tally.phase(plan_of([SHORT, LONG]), 0, 1, before)
    tree = tally.manifest(phases, counts)
    assert {entry["share_asked"] for entry in tree["sources"].values()} == {None}
    assert tally.table(tree)[2].split()[:2] == ["short", "-"]


@pytest.mark.parametrize(
    "change",
    [{"settings": [(2.0, None)]}, {"settings": [(1.0, 3)]}, {"settings": [(((0, 1.0), (9, 2.0)), None)]},
     {"weights_in": "tokens"}, {"temperature": 2.0}, {"seed": 4}, {"batch": 5}],
    ids=str,
)  # fmt: skip
def test_a_phase_knows_its_own_plan_from_another_one(change):
    plan = plan_of([SHORT, LONG])
    one = json.loads(json.dumps(tally.phase(plan, 0, 3, read([SHORT, LONG], plan, 3))))
    assert tally.ask_the_same(one, tally.phase(plan_of([SHORT, LONG]), 0, 8, {}))
    assert not tally.ask_the_same(one, tally.phase(plan_of([SHORT, LONG], **change), 0, 3, {}))
    assert not tally.ask_the_same(one, tally.phase(plan_of([LONG, SHORT]), 0, 3, {}))


def test_what_is_left_of_a_run_is_planned_from_the_step_where_its_mixture_began():
    lines = plan_of([SHORT, LONG], settings=[(3.0, None)]).describe(20, 12)
    assert lines[0].endswith("asked 75.0% of the samples, planned 60 of 80 samples = 0.94 epochs")


def test_the_plan_shows_the_error_of_a_mean_unless_all_rows_were_counted():
    few, many = (Texts("a", size, [3]) for size in (512, 513))
    assert plan_module.Places(80.81, 0.0, 400).describe(len(few)) == "80.8"
    shown = [plan_module.Places(80.8149, error, 512).describe(len(many)) for error in (3.26, 0.31, 0.0149, 0.0)]
    assert shown == ["80.8 +- 3.3", "80.8 +- 0.3", "80.81 +- 0.01", "80.8 (as 512 rows have, all alike)"]


def test_a_plan_depends_on_files_config_and_seed_alone():
    section = {"weights_in": "tokens", "temperature": 1.7, "settings": [(((0, 1.0), (90, 0.2)), 2), (1.0, None)]}
    one, other = (plan_of([SHORT, LONG], **section) for _ in range(2))
    assert dataclasses.replace(one, mixture=other.mixture) == other
    assert [one.mixture.locate(p) for p in range(500)] == [other.mixture.locate(p) for p in range(500)]
