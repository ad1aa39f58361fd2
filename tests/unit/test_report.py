"""A run's report says what the run's files say: every figure, what is missing, and nothing that a name smuggles in."""

import html
import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from mole_mega.report import command, sections, svg
from mole_mega.report.document import Document, Section, Table, to_html, to_markdown
from mole_mega.report.run_folder import read_run

SOURCES, LAYERS, EXPERTS = ("digits", "scans"), 2, 3
# by source and layer, the share of tokens of each expert
SHARES = {
    ("digits", 0): (0.9, 0.1, 0.0),
    ("scans", 0): (0.0, 0.1, 0.9),
    ("digits", 1): (0.2, 0.5, 0.3),
    ("scans", 1): (0.2, 0.5, 0.3),
}


def row(step):
    """What a trainer logs at a step, validation included."""
    values = {
        "step": step,
        "loss": 8 / step,
        "skipped": 0,
        "tokens_per_second": 1000 + 2 * step,
        "seconds_per_step": 0.5,
    }
    values["balance_loss"] = 0.4
    for index, source in enumerate(SOURCES):
        values |= {f"loss/{source}": (4 + index) / step, f"validation_loss/{source}": (6 + index) / step}
        values[f"validation_accuracy/{source}"] = 0.25 * (index + 1)
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                key = f"layer_{layer}/expert_{expert}"
                values[f"load_source/{source}/{key}"] = SHARES[source, layer][expert]
                values[f"load/{key}"] = (SHARES["digits", layer][expert] + SHARES["scans", layer][expert]) / 2
                values[f"load_image/{key}"] = values[f"load_text/{key}"] = 1 / EXPERTS
                values[f"expert/delta_norm/{key}"] = 0.01 * (1 + expert)
                values[f"expert/tokens/{key}"] = 100 * step
                for other in range(expert + 1, EXPERTS):
                    values[f"expert/similarity/layer_{layer}/expert_{expert}_{other}"] = -0.25
            for name in ("max_over_mean", "cv", "dead_experts", "load_entropy", "choice_entropy", "gate_margin"):
                values[f"router/{name}/layer_{layer}"] = 0.125
            values |= {f"balance_loss/layer_{layer}": 0.4, f"z_loss/layer_{layer}": 0.75}
    return values


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))


@pytest.fixture
def run_dir(tmp_path):
    """A run of 20 steps, all of whose files are there and whole."""
    folder = tmp_path / "night_run"
    write_lines(folder / "metrics.jsonl", [row(step) for step in range(1, 21)])
    (folder / "config.yaml").write_text(
        "run_dir: night_run\nmodel: {base: b, base_hash: ''}\nadapter: {method: mole, num_experts: 3, rank: 4, "
        "gate: prob}\ntrain: {steps: 20}\nvalidation: {every: 1}\nparallel: {tensor: 2, expert: 1}\n"
    )
    alarm = {"step": 7, "kind": "collapse", "layer": 1, "expert": 2, "value": 2.75, "limit": 2.5, "reaction": "none"}
    write_lines(folder / "events.jsonl", [alarm])
    counts = {"size": 90, "rows": 75, "share_asked": 0.75, "share_realised": 0.7421, "left_out": {"broken": 2}}
    shares = {"digits": counts, "scans": {"rows": 25, "left_out": {}}}
    (folder / "mixture.json").write_text(json.dumps({"step": 20, "shares_of": "samples", "sources": shares}))
    answer = {"id": "1", "source": "digits", "prompt": "which?", "true": "seven", "answer": "one", "exact": 0}
    write_lines(folder / "eval" / "step_20.jsonl", [answer, answer | {"answer": "seven", "exact": True}])
    for step in (10, 20):
        checkpoint = folder / "checkpoints" / f"step_{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "base_hash": "abcdef"}))
        (checkpoint / "weights").write_bytes(b"12345")
        size = (checkpoint / "state.json").stat().st_size
        manifest = {"weights": {"size": 5, "sha256": ""}, "state.json": {"size": size, "sha256": ""}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    (folder / "checkpoints" / "latest").write_text("step_20\n")
    return folder


def test_methods_are_shown_with_their_options_and_figures(run_dir):
    assert "None was asked for." in blocks_of(run_dir, sections.methods)[1]
    config = run_dir / "config.yaml"
    methods = "[{name: bora, tau: 0.5}, {name: riemannian, delta: 1.0e-6}, {name: lorasculpt}]"
    asked = f"gate: prob, methods: {methods}, shared_B: 3, expert_form: mlp"
    config.write_text(config.read_text().replace("gate: prob", asked))
    figures = [{"method/bora/prior": 0.5 * step} for step in range(1, 21)]
    write_lines(run_dir / "metrics.jsonl", [row(step + 1) | figure for step, figure in enumerate(figures)])
    kinds, text = blocks_of(run_dir, sections.methods)
    assert kinds == ["Table", "Figures"]
    assert "| bora | tau 0.5 |" in text and "| riemannian | delta 1.00e-06 |" in text
    assert "| lorasculpt | all as by default |" in text
    assert "bora/prior, at each logged step." in text and "| bora/prior | 0.5 |" in text
    assert "gate prob, 3 B mixed, whole MLPs" in blocks_of(run_dir, sections.at_a_glance)[1]
    config.unlink()
    assert blocks_of(run_dir, sections.methods)[0] == ["Figures"]


def report(folder, capsys=None):
    """(the page, the Markdown twin) of a run for which the command ends well."""
    assert command.main([str(folder)]) == 0
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def table_rows(markdown, title):
    """The cells of all table rows of a section."""
    text = markdown.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def blocks_of(folder, section):
    """(kinds of blocks, their text) of one section."""
    blocks = section(read_run(folder))
    return [type(block).__name__ for block in blocks], to_markdown(Document("", "", [Section("", blocks)]))


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


# what the files say stands in the report


def test_losses_by_source_are_the_rows_of_the_file(run_dir):
    _, markdown = report(run_dir)
    rows = table_rows(markdown, "Losses by source")
    assert ["digits", "4 @ 1", "0.2 @ 20", "0.3 @ 20", "0.3 @ 20", "0.25 @ 20"] in rows
    assert ["scans", "5 @ 1", "0.25 @ 20", "0.35 @ 20", "0.35 @ 20", "0.5 @ 20"] in rows


def test_the_map_of_a_source_shows_its_own_loads(run_dir):
    _, markdown = report(run_dir)
    text = markdown.split("Source digits, ", 1)[1].split("Source scans, ", 1)[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:3] in ("| 0", "| 1")]
    assert cells == [["0", "0.9", "0.1", "0"], ["1", "0.2", "0.5", "0.3"]]


def test_a_cell_that_was_not_logged_is_empty_and_not_zero(run_dir):
    gone = "load_source/digits/layer_0/expert_2"
    rows = [{key: value for key, value in row(step).items() if key != gone} for step in range(1, 21)]
    write_lines(run_dir / "metrics.jsonl", rows)
    page, markdown = report(run_dir)
    assert ["0", "0.9", "0.1", "-"] in table_rows(markdown, "Which expert serves what")
    assert "<title>0, 2: -</title>" in page


def test_the_table_names_the_expert_of_each_group_and_how_far_the_groups_are_apart(run_dir):
    _, markdown = report(run_dir)
    rows = table_rows(markdown, "Which expert serves what")
    # two sources that share a tenth of their tokens: H(mean) - mean H, over log 2
    mean, own = (0.45, 0.1, 0.45), (0.9, 0.1)
    apart = -sum(p * math.log(p) for p in mean) + sum(p * math.log(p) for p in own)
    assert ["0", "0 (0.90)", "2 (0.90)", "0 (0.33)", "0 (0.33)", f"{apart / math.log(2):.2f}", "0.00"] in rows
    assert ["1", "1 (0.50)", "1 (0.50)", "0 (0.33)", "0 (0.33)", "0.00", "0.00"] in rows


def test_loads_are_means_of_the_last_rows_alone(run_dir):
    rows = [row(step) for step in range(1, 21)]
    for values in rows[: -sections.LAST_ROWS]:
        values["load/layer_0/expert_0"] = 77.0
    write_lines(run_dir / "metrics.jsonl", rows)
    _, markdown = report(run_dir)
    assert ["0", "0.45", "0.1", "0.45"] in table_rows(markdown, "Which expert serves what")


def test_alarms_mixture_answers_experts_routers_and_throughput_are_told(run_dir):
    _, markdown = report(run_dir)
    assert ["7", "collapse", "1", "2", "2.75", "2.5", "none"] in table_rows(markdown, "Alarms")
    mixture = table_rows(markdown, "The mixture, asked and realised")
    assert mixture[0] == ["source", "share asked", "share realised", "rows", "size", "left out broken"]
    assert mixture[2:] == [["digits", "0.75", "0.7421", "75", "90", "2"], ["scans", "-", "-", "25", "-", "-"]]
    assert ["step\\_20", "digits", "0.500 of 2", "not recorded", "not recorded"] in table_rows(markdown, "Answers")
    assert ["digits", "which?", "seven", "one"] in table_rows(markdown, "Answers")
    assert ["1", "0.01", "0.02", "0.03"] in table_rows(markdown, "What the experts became")
    assert ["1", "2,000", "2,000", "2,000"] in table_rows(markdown, "What the experts became")
    assert ["0", "-0.25", "-0.25", "0 and 1"] in table_rows(markdown, "What the experts became")
    assert ["1", *["0.125"] * 6, "0.4", "0.75"] in table_rows(markdown, "Routers")
    assert ["tokens/s", "1,021", "1,002", "1,040"] in table_rows(markdown, "Throughput")
    assert "not recorded" not in markdown.split("## Losses")[1].split("## Answers")[0]


def test_a_step_that_was_logged_twice_counts_as_it_was_last(run_dir):
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 20, "loss/digits": 0.125}) + "\n")
    _, markdown = report(run_dir)
    assert table_rows(markdown, "Losses by source")[-2][2] == "0.125 @ 20"


# checks


def outcome_of(folder, check):
    _, markdown = report(folder)
    (found,) = [cells for cells in table_rows(markdown, "Checks") if check in cells[0]]
    return found[1]


def test_a_whole_run_passes_its_checks(run_dir):
    _, markdown = report(run_dir)
    outcomes = {cells[0]: cells[1] for cells in table_rows(markdown, "Checks")[2:]}
    assert [outcome for name, outcome in outcomes.items() if "layouts" not in name] == ["passed"] * 6
    assert outcomes["layouts compute the same"] == "not recorded"


@pytest.mark.parametrize(
    ("check", "spoil"),
    [
        ("step 10 is complete", lambda folder: (folder / "checkpoints/step_10/weights").write_bytes(b"1234")),
        ("step 10 is complete", lambda folder: (folder / "checkpoints/step_10/weights").unlink()),
        ("step 10 is complete", lambda folder: (folder / "checkpoints/step_10/manifest.json").unlink()),
        ("step 10 is complete", lambda folder: (folder / "checkpoints/step_10/manifest.json").write_text("{")),
        ("latest names", lambda folder: (folder / "checkpoints/latest").write_text("step_30")),
        ("latest names", lambda folder: (folder / "checkpoints/latest").unlink()),
        ("one base", lambda folder: (folder / "checkpoints/step_10/state.json").write_text('{"base_hash": "other"}')),
        ("one base", lambda folder: (folder / "config.yaml").write_text("model: {base_hash: other}")),
        ("finite", lambda folder: write_lines(folder / "metrics.jsonl", [row(1), row(2) | {"skipped": 1}])),
        ("finite", lambda folder: write_lines(folder / "metrics.jsonl", [row(1), row(2) | {"grad_norm": "nan"}])),
        ("finite", lambda folder: write_lines(folder / "metrics.jsonl", [row(1), row(2) | {"loss/scans": "inf"}])),
        ("finite", lambda folder: write_lines(folder / "metrics.jsonl", [{"step": 3, "loss": "nan"}])),
        ("finite", lambda folder: write_lines(folder / "metrics.jsonl", [row(1) | {"validation_loss/a": "nan"}])),
        ("layouts", lambda folder: (folder / "verify_parallel.json").write_text('[{"case": "TP 2", "equal": false}]')),
        ("layouts", lambda folder: (folder / "verify_parallel.json").write_text("[]")),
    ],
)
def test_a_check_fails_when_what_it_is_about_is_spoilt(run_dir, check, spoil):
    spoil(run_dir)
    assert outcome_of(run_dir, check) == "FAILED"


def test_losses_without_a_word_on_skipped_steps_are_checked_and_no_losses_are_not(run_dir):
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    assert outcome_of(run_dir, "finite") == "passed"
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, "expert/delta_norm/layer_0/expert_0": "nan"}])
    assert outcome_of(run_dir, "finite") == "not recorded"


def test_layouts_that_were_proved_equal_are_a_check_passed(run_dir):
    (run_dir / "verify_parallel.json").write_text('[{"case": "TP 2", "equal": true}]')
    assert outcome_of(run_dir, "layouts") == "passed"


# what is not there is said


@pytest.mark.parametrize(
    ("section", "gone"),
    [
        (sections.losses, "validation_loss/"),
        (sections.serving, "load_source/"),
        (sections.serving, "load_image/"),
        (sections.load_over_time, "load/"),
        (sections.routers, "router/cv"),
        (sections.experts, "expert/delta_norm"),
        (sections.throughput, "tokens_per_second"),
    ],
)
def test_what_a_run_did_not_log_is_said_and_not_shown_as_zero(run_dir, section, gone):
    complete, _ = blocks_of(run_dir, section)
    assert "Missing" not in complete
    full = [row(step) for step in range(1, 21)]
    keep = [{key: value for key, value in values.items() if not key.startswith(gone)} for values in full]
    if gone == "load_image/":
        keep = [{key: value for key, value in values.items() if "load_text" not in key} for values in keep]
    write_lines(run_dir / "metrics.jsonl", keep)
    blocks, text = blocks_of(run_dir, section)
    assert "Missing" in blocks and "not recorded" in text


@pytest.mark.parametrize(
    ("section", "name"),
    [(sections.alarms, "events.jsonl"), (sections.mixture, "mixture.json"), (sections.answers, "eval/step_20.jsonl")],
)
def test_a_file_that_is_not_there_is_said(run_dir, section, name):
    assert "Missing" not in blocks_of(run_dir, section)[0]
    (run_dir / name).unlink()
    assert blocks_of(run_dir, section)[0] == ["Missing"]


def test_answers_of_which_there_is_none_are_not_recorded(run_dir):
    (run_dir / "eval" / "step_20.jsonl").write_text("")
    blocks, text = blocks_of(run_dir, sections.answers)
    assert blocks == ["Missing"] and "not recorded: no file in eval/ holds an answer" in text


def test_a_run_of_plain_lora_has_no_experts_to_show(run_dir):
    (run_dir / "config.yaml").write_text("adapter: {method: lora, rank: 4}")
    write_lines(run_dir / "metrics.jsonl", [{"step": 1, "loss": 2.0, "loss/a": 2.0}])
    assert "plain LoRA" in blocks_of(run_dir, sections.serving)[1]


def test_no_alarm_and_no_watch_are_told_apart(run_dir):
    (run_dir / "events.jsonl").write_text("")
    assert "None was raised" in blocks_of(run_dir, sections.alarms)[1]
    (run_dir / "events.jsonl").unlink()
    assert "not recorded" in blocks_of(run_dir, sections.alarms)[1]


# bad input


def refused(capsys, *arguments):
    """The one line that a refused report leaves."""
    assert command.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no metrics.jsonl"),
        (b"", "it is empty"),
        (b"\x00\xff\xfe not json\n", "is not JSON"),
        (b'{"loss": 1}\n[1, 2]\n', "1 row without a step"),
        (b'{"step": -1, "loss": 1}\n{"step": true}\n{"step": "x"}\n', "3 rows without a step"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_run_without_a_usable_row_is_refused_with_the_reason(run_dir, capsys, content, said):
    (run_dir / "metrics.jsonl").unlink()
    if content is not None:
        (run_dir / "metrics.jsonl").write_bytes(content)
    assert said in refused(capsys, run_dir)
    assert not (run_dir / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "is no run" in refused(capsys, tmp_path)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in refused(capsys, tmp_path / "file")
    (tmp_path / "metrics.jsonl").mkdir()
    assert "could not be read" in refused(capsys, tmp_path)


def test_an_unwritable_place_is_one_line(run_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file"
    said = f"error: --out: {folder} is a file, not a folder that can be written to\n"
    assert [refused(capsys, run_dir, "--out", out) for out in (folder, folder / "x")] == [said] * 2
    (run_dir / "report.md").mkdir()
    assert f"--out: {run_dir / 'report.md'} is a folder, not a file" in refused(capsys, run_dir)
    assert not (run_dir / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "metrics.jsonl",
            b'\xff\xfe\n{"step": 3, "loss": 1.0}\nnull\n',
            "line 1, which was left out: it is not JSON (2",
        ),
        (
            "metrics.jsonl",
            b'{"step": 3, "loss": 1.0}\nnull\n',
            "line 2, which was left out: it is JSON, but not an object",
        ),
        ("metrics.jsonl", b'{"step": 3, "loss": 1.0}\n{"step": 4, "lo', "line 2, which was left out: it is cut short"),
        ("metrics.jsonl", b'{"step": 3, "loss": 1.0}\n{"step": 4, "lo\n', "line 2, which was left out: it is not JSON"),
        ("metrics.jsonl", b'{"step": 3, "loss": [1], "loss/a": true}\n', "2 values left out that are no number"),
        ("events.jsonl", b"\x89PNG\x00\x01", "it is cut short"),
        ("mixture.json", b"[]", "not a JSON object"),
        ("mixture.json", b"\xff", "not UTF-8"),
        ("config.yaml", b"a: [", "not YAML"),
        ("config.yaml", b"\xff\xfe", "not UTF-8"),
        ("eval/step_20.jsonl", b"{", "cut short"),
        ("verify_parallel.json", b"{}", "not a JSON list"),
    ],
)
def test_a_corrupt_file_is_told_at_the_top_and_the_rest_is_reported(run_dir, capsys, name, content, said):
    (run_dir / name).write_bytes(content)
    page, markdown = report(run_dir)
    assert said in capsys.readouterr().out
    assert "## Could not be read" in markdown and said in markdown
    assert said in Page(page).text


ALARM = {"step": 7, "kind": "collapse", "layer": 1, "expert": None, "value": 2.75, "limit": 2.5}
ANSWER = {"source": "digits", "answer": "one", "exact": True}
ONE_SOURCE = {"sources": {"digits": {"rows": 3, "share_asked": 1.0}}}


def changed(tree, **change):
    """JSON of a row, with some values changed (None: the key gone)."""
    return json.dumps({key: value for key, value in (tree | change).items() if value is not None}).encode()


def one_source(**change):
    return changed({}, sources={"digits": ONE_SOURCE["sources"]["digits"] | change})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("events.jsonl", changed(ALARM, step=None), "it has no step"),
        ("events.jsonl", changed(ALARM, step="7"), "step is '7'"),
        ("events.jsonl", changed(ALARM, step=-1), "step is -1"),
        ("events.jsonl", changed(ALARM, kind=[1]), "kind is a list"),
        ("events.jsonl", changed(ALARM, value=10**400), "value is 1000"),
        ("events.jsonl", changed(ALARM, layer=True), "layer is True"),
        ("events.jsonl", b"{}", "it has no step"),
        ("mixture.json", b"{}", "sources is no object that names one or more"),
        ("mixture.json", b'{"sources": {}}', "sources is no object that names one or more"),
        ("mixture.json", b'{"sources": [{"name": "digits", "rows": 3}]}', "sources is no object"),
        ("mixture.json", b'{"sources": {"digits": 3}}', "source 'digits' is no object"),
        ("mixture.json", b'{"sources": {"digits": {}}}', "source 'digits': it has no rows"),
        ("mixture.json", one_source(rows="many"), "source 'digits': rows is 'many'"),
        ("mixture.json", one_source(share_asked=7.5), "source 'digits': share_asked is 7.5"),
        ("mixture.json", one_source(tokens=-3), "source 'digits': tokens is -3"),
        ("mixture.json", changed(ONE_SOURCE, phases={}), "phases is no list"),
        ("mixture.json", changed(ONE_SOURCE, phases=[3]), "phases[0]: sources is no object"),
        ("mixture.json", changed(ONE_SOURCE, phases=[ONE_SOURCE]), "phases[0]: it has no from_step"),
        ("eval/step_20.jsonl", changed(ANSWER, source=None), "it has no source"),
        ("eval/step_20.jsonl", changed(ANSWER, exact="yes"), "exact is 'yes'"),
        ("eval/step_20.jsonl", changed(ANSWER, anls=3), "anls is 3"),
        ("eval/step_20.jsonl", changed(ANSWER, answer=None, exact=None), "neither an answer nor one of exact"),
        ("config.yaml", b"- 1", "it holds no mapping of keys but list"),
        ("config.yaml", b"", "it holds no mapping of keys but NoneType"),
        ("config.yaml", b"adapter: [1]", "adapter is no section of keys"),
        ("config.yaml", b"train: {steps: many}", "train.steps is 'many', no whole number"),
        ("config.yaml", b"adapter: {method: {a: 1}}", "adapter.method is an object, no text"),
        ("verify_parallel.json", b"[1]", "entry 1 is no object"),
        ("verify_parallel.json", b'[{"case": "TP 2", "equal": true}, {"case": "PP 2"}]', "entry 2: it has no equal"),
        ("verify_parallel.json", b'[{"case": "TP 2", "equal": "yes"}]', "entry 1: equal is 'yes'"),
    ],
)
def test_what_is_well_formed_but_of_another_shape_is_told_with_the_reason_and_not_used(
    run_dir, capsys, name, content, said
):
    (run_dir / "verify_parallel.json").write_text('[{"case": "TP 2", "equal": true}]')
    assert read_run(run_dir).problems == ()
    (run_dir / name).write_bytes(content)
    _, markdown = report(run_dir)
    told = capsys.readouterr().out
    assert f"not read: {name.split('/')[-1]}" in told and said in told
    assert "## Could not be read" in markdown
    run = read_run(run_dir)
    left = {"events.jsonl": run.events, "eval/step_20.jsonl": run.answers[0].rows, "mixture.json": run.mixture,
            "verify_parallel.json": run.layouts, "config.yaml": run.setting("train", "steps")}  # fmt: skip
    assert not left[name]
    if name == "verify_parallel.json":
        assert outcome_of(run_dir, "layouts") == "not recorded"


def test_a_bad_row_among_good_ones_is_left_out_alone(run_dir):
    write_lines(run_dir / "events.jsonl", [ALARM, {"step": 8}, ALARM | {"step": 9}])
    run = read_run(run_dir)
    assert [event["step"] for event in run.events] == [7, 9]
    assert run.problems == ("events.jsonl: line 2, which was left out: it has no kind",)


def test_a_mixture_that_was_changed_on_the_way_is_shown_by_phase(run_dir):
    parts = [
        {"from_step": 1, "to_step": 1500, "shares_of": "rows", "sources": {"digits": {"rows": 3, "share_asked": 0.25}}},
        {
            "from_step": 1501,
            "to_step": 1600,
            "shares_of": "tokens",
            "sources": {"scans": {"rows": 4, "share_asked": 1}},
        },
    ]
    (run_dir / "mixture.json").write_text(json.dumps(ONE_SOURCE | {"phases": parts}))
    rows = table_rows(report(run_dir)[1], "The mixture, asked and realised")
    assert rows[-2:] == [["1 to 1,500", "digits", "rows", "0.25", "-"], ["1,501 to 1,600", "scans", "tokens", "1", "-"]]


def test_odd_values_in_any_file_make_no_traceback(run_dir):
    odd = [None, "x", 1e400, -1, True, [], {"a": {"b": [1]}}, 10**400, "<b>", math.nan]
    write_lines(run_dir / "events.jsonl", [{"step": value, "kind": value, "value": value} for value in odd] + [{}])
    (run_dir / "mixture.json").write_text(json.dumps({"sources": [{"name": value, "rows": value} for value in odd]}))
    write_lines(run_dir / "eval/step_20.jsonl", [{"source": value, "exact": value, "answer": value} for value in odd])
    write_lines(run_dir / "metrics.jsonl", [row(1) | {"loss": value, "load/layer_0/expert_0": value} for value in odd])
    (run_dir / "config.yaml").write_text("adapter: [1]\ntrain: 3\nparallel: {tensor: {}}\nmodel: {base_hash: 3}\n")
    report(run_dir)


def test_values_that_are_not_finite_are_counted_and_not_drawn(run_dir):
    rows = [row(1), row(2) | {"loss": "nan", "skipped": 1}, row(3) | {"loss": math.inf, "skipped": 1}]
    write_lines(run_dir / "metrics.jsonl", rows)
    page, markdown = report(run_dir)
    assert "loss at 2 steps" in markdown and "was not finite: 2 logged steps." in markdown
    assert "nan" not in "".join(re.findall(r'points="([^"]*)"', page))


# names that come from the run

EVIL = "<script>alert(1)</script>\"'&|`*x*\x00\x1b[0m\n# top"


def test_names_of_a_run_can_neither_run_nor_break_the_page(run_dir):
    values = {key.replace("digits", EVIL): value for key, value in row(1).items()}
    write_lines(run_dir / "metrics.jsonl", [values, values | {"step": 2}])
    write_lines(run_dir / "events.jsonl", [ALARM | {"kind": EVIL, "reaction": EVIL}])
    write_lines(run_dir / "eval" / "x.jsonl", [{"source": EVIL, "answer": EVIL, "prompt": EVIL, "true": EVIL}])
    (run_dir / "mixture.json").write_text(json.dumps({"sources": {EVIL: {"rows": 1, EVIL: EVIL}}}))
    (run_dir / "config.yaml").write_text("# </pre><script>alert(2)</script> ```\n````\nadapter: {method: mole}\n")
    page, markdown = report(run_dir)
    seen = Page(page)
    assert "script" not in seen.tags and "<script>alert(1)</script>" in seen.text
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "\x00" not in page and "\x1b" not in page
    outside_code = re.sub(r"\n(`{5,})\n.*?\n\1\n", "", markdown, flags=re.DOTALL)
    assert "<script>" not in re.sub(r"\\<", "", outside_code) and "\n# top" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|") and "alert" in line:
            assert "\\|" in line


def test_the_page_needs_nothing_but_itself(run_dir):
    page, _ = report(run_dir)
    seen = Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(seen.tags)
    assert [value for name, value in seen.attributes if name in ("href", "src")] == [
        value for name, value in seen.attributes if name == "href" and value.startswith("#")
    ]
    assert "url(" not in page and "@import" not in page
    assert not [value for name, value in seen.attributes if value and "://" in value and name != "xmlns"]


def test_every_figure_is_well_formed_and_the_twin_has_its_table(run_dir):
    page, markdown = report(run_dir)
    figures = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    for figure in figures:
        ElementTree.fromstring(figure)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(figures) == len(captions) >= 14
    for caption in captions:
        assert f"{html.unescape(caption)}\n\n|" in markdown.replace("\\", "")


def test_the_report_is_fast_and_loads_neither_torch_nor_megatron(run_dir):
    code = (
        "import sys; sys.argv = ['mole-mega', 'report', sys.argv[1]]\nfrom mole_mega.cli import main\ncode = main()\n"
        "heavy = {'torch', 'megatron', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


# drawing


def test_a_line_stands_where_its_values_say():
    figure = svg.line_chart({"a": [(0, 0.0), (10, 1.0)]}, label="x", bounds=(0.0, 2.0), legend=False, width=500)
    (points,) = re.findall(r'points="([^"]*)"', figure)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    ticks = {
        text: float(y)
        for y, text in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end"[^>]*>([\d.]+)<', figure)
    }
    assert x1 < x2 and y1 > y2
    assert math.isclose(y1 + 4, ticks["0"], abs_tol=0.11) and math.isclose(y2 + 4, ticks["1"], abs_tol=0.11)


def test_a_cell_is_darker_the_larger_its_value_and_its_text_can_be_read():
    values = [index / 20 for index in range(21)]
    lightness = []
    for value in values:
        fill, ink = svg._cell_colours(value, (0.0, 1.0), "share")
        red, green, blue = (int(fill[start : start + 2], 16) for start in (1, 3, 5))
        lightness.append(0.299 * red + 0.587 * green + 0.114 * blue)
        assert abs(lightness[-1] - (255 if ink == "#ffffff" else 26)) > 90
    assert lightness == sorted(lightness, reverse=True)


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-1e-9, 1e9], [1e-12, 2e-12], [-5.0, -4.0]])
def test_any_finite_curve_can_be_drawn(values):
    ElementTree.fromstring(svg.line_chart({"a": list(enumerate(values))}, label="x"))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.07), (-3, 1234), (1e-9, 3e-9), (99, 101)])
def test_ticks_are_round_inside_and_few(low, high):
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low - 1e-12 <= tick <= high + 1e-9 * high for tick in found)
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_long_runs_are_thinned_to_means_of_neighbours():
    line = tuple((step, float(step)) for step in range(1, 4001))
    thinned = sections._thin(line)
    assert len(thinned) == sections.MAX_POINTS and thinned[0] == (5.5, 5.5)


def test_a_chart_or_map_of_nothing_is_refused():
    with pytest.raises(ValueError, match="without a point"):
        svg.line_chart({"a": []}, label="x")
    with pytest.raises(ValueError, match="1 x 2 names"):
        svg.heat_map([[1.0]], ["a"], ["b", "c"], label="x")


def test_tables_of_both_forms_hold_the_same_cells():
    table = Table(("name", "value"), [("a", "1"), ("b|c", "<2>")])
    document = Document("t", "l", [Section("s", [table])])
    assert "| b\\|c | \\<2\\> |" in to_markdown(document)
    assert '<td class="text">b|c</td><td>&lt;2&gt;</td>' in to_html(document)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("top_k: 1, router_scope: block, renormalize: false", "gate prob"),
        ("top_k: 2, renormalize: true, share_A: true", "gate prob, top 2, renormalized, one A for all"),
        ("router_scope: linear", "gate prob, routed by linear"),
    ],
)
def test_what_a_mixture_is_stands_at_its_beginning(run_dir, more, words):
    path = run_dir / "config.yaml"
    path.write_text(path.read_text().replace("num_experts: 3,", f"num_experts: 3, {more},"))
    (table,) = sections.at_a_glance(read_run(run_dir))
    assert dict(table.rows)["adapter"].endswith(f"in the MLPs, {words}")
