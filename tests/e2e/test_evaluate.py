"""`mole-mega eval` and validation inside training: figures, answers beside them, and what cannot be scored."""

import json
import math
import shutil
from dataclasses import fields

import commands
import pytest

from mole_mega.training.evaluation import Answer

INPUT_ERROR = 2
FACTS = ("checkpoint", "step")
KINDS = ("loss", "perplexity", "token_accuracy", "accuracy", "exact_match", "contains", "anls")


@pytest.fixture(scope="module")
def rows(data):
    """Two validation files: `mixed` with images and one or two answers a row, one row broken; `text` without."""
    mixed = json.loads((data / "mixed.json").read_text())[:7]
    mixed[2] = mixed[2] | {"image": "gone.png"}
    (data / "mixed_test.json").write_text(json.dumps(mixed))
    (data / "text_test.json").write_text(json.dumps(json.loads((data / "text.json").read_text())[:3]))
    (data / "asks.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": "and?"}]}] * 2))
    return {
        "mixed": {"name": "mixed", "path": str(data / "mixed_test.json"), "image_folder": str(data / "images")},
        "text": {"name": "text", "path": str(data / "text_test.json")},
        "asks": {"name": "asks", "path": str(data / "asks.json")},
    }


@pytest.fixture(scope="module")
def trained(make_run, data, rows, tmp_path_factory):
    """(run file, run directory) of a run that answers while it trains."""
    folder = tmp_path_factory.mktemp("answers")
    run = make_run(
        folder,
        train={"steps": 2},
        data={
            "sources": [{"name": "text", "path": str(data / "text.json")}],
            "validation": [rows["mixed"], rows["text"]],
        },
        validation={"every": 2, "samples": 7, "generate": True, "max_new_tokens": 6},
    )
    code, text = commands.run([run], folder / "log")
    assert code == 0, text
    return run, folder / "run"


@pytest.fixture
def evaluate(trained, tmp_path):
    """evaluate(*arguments, nproc=1) -> (exit code, what was printed, the figures, the answers)."""

    def run(*arguments, nproc=1):
        out, answers = tmp_path / "figures.json", tmp_path / "answers.jsonl"
        own = [
            "--json",
            out,
            *(() if "--no-generate" in arguments or "--answers" in arguments else ("--answers", answers)),
        ]
        code, text = commands.run([trained[0], *own, *arguments], tmp_path / "log", nproc, module="mole_mega.evaluate")
        figures = json.loads(out.read_text()) if code == 0 else {}
        figures = {key: value for key, value in figures.items() if key not in FACTS}
        lines = answers.read_text().splitlines() if code == 0 and answers.exists() else []
        return code, text, figures, [json.loads(line) for line in lines]

    return run


def error_of(found):
    code, text, *_ = found
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code == INPUT_ERROR and "Traceback" not in text
    return line


def test_training_logs_and_keeps_the_answers_that_eval_writes(trained, evaluate):
    code, text, figures, answers = evaluate()
    assert code == 0, text
    assert figures.keys() == {f"{kind}/{source}" for kind in KINDS for source in ("mixed", "text")}
    (row,) = [row for row in commands.read_rows(trained[1]) if "validation_exact_match/text" in row]
    logged = {key: value for key, value in row.items() if key.startswith("validation_")}
    assert logged == {f"validation_{key}": pytest.approx(value, rel=1e-6) for key, value in figures.items()}
    kept = [json.loads(line) for line in (trained[1] / "eval" / "step_2.jsonl").read_text().splitlines()]
    assert kept == answers
    assert [answer.keys() for answer in answers] == [{field.name for field in fields(Answer)}] * len(answers)
    # rows 0 to 6 without the broken one; those of odd numbers have two answers
    mixed = [(answer["id"], answer["turn"]) for answer in answers if answer["source"] == "mixed"]
    assert mixed == [("0", 0), ("1", 0), ("1", 1), ("3", 0), ("3", 1), ("4", 0), ("5", 0), ("5", 1), ("6", 0)]
    first = answers[1]
    assert first["prompt"].count("<image>") == 2 and "question 1 " in first["prompt"] and "?" in first["prompt"]
    assert first["true"].startswith("answer ") and first["true"] in answers[2]["prompt"]
    for kind, key in (("exact_match", "exact"), ("contains", "contains"), ("anls", "anls")):
        own = [answer[key] for answer in answers if answer["source"] == "mixed"]
        assert figures[f"{kind}/mixed"] == pytest.approx(sum(own) / len(own))
    for source in ("mixed", "text"):
        assert figures[f"perplexity/{source}"] == pytest.approx(math.exp(figures[f"loss/{source}"]))
    assert "left out 1 sample of mixed: image missing" in text


def test_processes_that_share_the_work_give_the_same(evaluate):
    _, _, figures, answers = evaluate()
    for layout in ([], ["parallel.tensor=2"]):
        code, text, shared, written = evaluate(*layout, nproc=2)
        assert code == 0, text
        assert written == answers
        assert shared == {key: pytest.approx(value, rel=1e-5) for key, value in figures.items()}


def test_the_base_answers_otherwise_and_an_answer_has_no_more_tokens_than_asked(evaluate):
    _, _, _, answers = evaluate()
    code, text, _, of_base = evaluate("--base")
    assert code == 0, text
    assert [a["answer"] for a in of_base] != [a["answer"] for a in answers]
    _, text, _, short = evaluate("--max-new-tokens", "1")
    cut = sum(answer["cut"] for answer in short if answer["source"] == "text")
    assert cut and f"{cut} of 3 answers of text were cut off at 1 tokens" in text
    assert all(len(s["answer"]) <= len(a["answer"]) for s, a in zip(short, answers, strict=True))
    assert [s["answer"] for s in short] != [a["answer"] for a in answers]


def test_numbers_other_than_those_of_training_are_told(evaluate):
    code, text, *_ = evaluate("--no-generate", "train.precision=bf16", "fp8.store_base=true")
    assert code == 0, text
    assert "computed otherwise than it was trained: train.precision fp32 -> bf16, fp8.store_base False -> True" in text
    assert "computed otherwise" not in evaluate("--no-generate", "train.global_batch_size=2")[1]


def test_scores_without_answers(evaluate):
    code, text, figures, answers = evaluate("--no-generate")
    assert code == 0 and not answers and "anls" not in text
    assert figures.keys() == {f"{kind}/{source}" for kind in KINDS[:4] for source in ("mixed", "text")}
    assert all(math.isfinite(value) for value in figures.values())


def test_what_cannot_be_scored_or_written_is_one_line(evaluate, rows, tmp_path):
    asks = f"data.validation=[{json.dumps(rows['text'])}, {json.dumps(rows['asks'])}]"
    line = error_of(evaluate(asks))
    assert "data.validation 'asks' has no sample that can be scored: 2 no assistant turn" in line
    (tmp_path / "empty.json").write_text("[]")
    empty = json.dumps({"name": "empty", "path": str(tmp_path / "empty.json")})
    assert "has 0 rows" in error_of(evaluate(f"data.validation=[{empty}]"))
    (tmp_path / "file").write_text("")
    assert "file" in error_of(evaluate("--answers", tmp_path / "file" / "answers.jsonl"))
    assert "exclude each other" in error_of(evaluate("--answers", tmp_path / "a", "--no-generate"))
    assert "validation.max_new_tokens must be from 1 to 1,000,000,000, got 0" in error_of(
        evaluate("--max-new-tokens", "0")
    )


def fail_scoring(rank):
    """For `prepare`: a model that is run at all."""
    from mole_mega.training.step import Evaluator

    def evaluate(self, micro_batches):
        raise RuntimeError("the model was run")

    Evaluator.evaluate = evaluate


def test_a_source_that_cannot_be_scored_is_named_before_the_others_are(trained, rows, tmp_path):
    asks = f"data.validation=[{json.dumps(rows['text'])}, {json.dumps(rows['asks'])}]"
    for arguments, message in (([asks], "data.validation 'asks' has no sample"), ([], "the model was run")):
        code, text = commands.run(
            [trained[0], *arguments, "--no-generate"], tmp_path / "log", 1, fail_scoring, module="mole_mega.evaluate"
        )
        assert code and message in text, text


@pytest.fixture
def plain_eval(trained, tmp_path):
    """plain_eval(*arguments) -> (exit code, what was printed), of an eval of one row without --json and --answers."""

    def run(*arguments):
        arguments = [trained[0], "validation.samples=1", *arguments]
        return commands.run(arguments, tmp_path / "log", module="mole_mega.evaluate")

    return run


def test_what_was_scored_is_said_and_training_keeps_its_own_answers(trained, plain_eval, tmp_path):
    folder = trained[1] / "eval"
    before, out = (folder / "step_2.jsonl").read_bytes(), tmp_path / "figures.json"
    code, text = plain_eval("--json", out)
    checkpoint = trained[1] / "checkpoints" / "step_2"
    assert code == 0 and f"evaluated {checkpoint}\n" in text, text
    figures = json.loads(out.read_text())
    assert {key: figures[key] for key in FACTS} == {"checkpoint": str(checkpoint), "step": 2}
    assert (folder / "step_2.jsonl").read_bytes() == before
    assert len((folder / "step_2_eval.jsonl").read_text().splitlines()) == 2 < len(before.splitlines())
    assert f"answers: {folder / 'step_2_eval.jsonl'}" in text
    code, text = plain_eval("--base", "--no-generate", "--json", out)
    assert code == 0 and "evaluated the base alone" in text
    assert {json.loads(out.read_text())[key] for key in FACTS} == {None}


def test_answers_of_another_run_do_not_lie_in_this_one(trained, plain_eval, tmp_path):
    other, mine = tmp_path / "other", tmp_path / "mine"
    shutil.copytree(trained[1], other, ignore=shutil.ignore_patterns("eval"))
    checkpoint = other / "checkpoints" / "step_2"
    arguments = [f"run_dir={mine}", "--checkpoint", checkpoint]
    code, text = plain_eval(*arguments)
    assert code == 0 and f"answers: not written, {checkpoint} is no checkpoint of {mine} (--answers FILE)" in text, text
    code, text = plain_eval(*arguments, "--json", tmp_path / "figures.json")
    beside = tmp_path / "figures_answers.jsonl"
    assert code == 0 and f"answers: {beside}" in text and len(beside.read_text().splitlines()) == 2, text
    assert not mine.exists() and not (other / "eval").exists()


def test_an_older_checkpoint_does_not_stand_in_for_the_latest(trained, plain_eval, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[1], copy)
    shutil.copytree(copy / "checkpoints" / "step_2", copy / "checkpoints" / "step_1")
    (copy / "checkpoints" / "step_2" / "manifest.json").unlink()
    line = error_of(plain_eval(f"run_dir={copy}"))
    assert "step_2 is not a complete checkpoint, yet" in line and "latest names it" in line


def test_a_validation_that_scores_nothing_leaves_nothing(make_run, data, rows, tmp_path):
    text_rows = [{"name": "text", "path": str(data / "text.json")}]
    run = make_run(
        tmp_path,
        train={"steps": 1},
        data={"sources": text_rows, "validation": [rows["asks"]]},
        validation={"every": 1, "generate": True, "max_new_tokens": 2},
    )
    code, text = commands.run([run], tmp_path / "log")
    assert code == 0 and "validation after step 1: not scored, for want of a sample that can be: asks" in text, text
    assert [len(row) > 1 for row in commands.read_rows(tmp_path / "run")] == [True]
    assert not (tmp_path / "run" / "eval").exists()
