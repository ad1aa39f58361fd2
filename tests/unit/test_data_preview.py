"""The preview shows what training gets: the same tokens, the same mask, the same pixels, every row counted."""

import base64
import dataclasses
import io
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_data_loader import IMAGE, SPEC, TOKENIZER, Colours, make_encoder
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mole_mega import inspect_data
from mole_mega.config import ConfigError
from mole_mega.data import preview
from mole_mega.data.conversation import IGNORE_INDEX, Encoder
from mole_mega.data.image import ImageSpec, preprocess
from mole_mega.data.mixture import Mixture
from mole_mega.data.page import page
from mole_mega.data.sources import BadSample, Sample
from mole_mega.models.sizes import SIZES

EXAMPLE_BASE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf"


def tiny_encoder():
    """Of a tokenizer whose pieces begin with their space, which decoding them alone would drop."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE_BASE)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return Encoder(tokenizer, image_token_id=image, places_per_image=36, max_length=500)


def chat(*texts, images=()):
    roles = ("user", "assistant") * len(texts)
    return Sample(tuple(zip(roles, texts, strict=False)), tuple(images), "a", "7")


@pytest.mark.parametrize("make", [make_encoder, tiny_encoder], ids=["bytes", "words"])
def test_pieces_are_the_tokens_in_order_with_the_mask_that_training_has(make):
    encoder = make()
    sample = chat("<image> and <image>\nwhat is it?", "a red mat", "and this?", "grass, green", images=(None, None))
    example = encoder.encode(sample)
    found = list(preview.pieces(example, encoder))
    assert [piece.kind for piece in found if piece.kind != "given"] == ["image", "image", "learned", "learned"]
    image = f"<image x {encoder.places_per_image}>"
    assert [piece.text for piece in found if piece.kind == "image"] == [image, image]
    stop = encoder._tokenizer.eos_token
    answers = [piece.text.strip() for piece in found if piece.kind == "learned"]
    assert answers == [f"a red mat{stop}", f"grass, green{stop}"]
    text = "".join(piece.text for piece in found)
    assert f"{image} and {image}\nwhat is it? ASSISTANT: a red mat{stop}" in text
    learned = example.tokens[1:][example.labels[:-1] != IGNORE_INDEX]
    assert "".join(p.text for p in found if p.kind == "learned").replace(" ", "") == (
        encoder.decode(learned.tolist()).replace(" ", "")
    )


def shown(text, answer="ok"):
    encoder = make_encoder()
    example = encoder.encode(chat(text, answer))
    return preview.Shown("7", 1, 1, tuple(preview.pieces(example, encoder)), torch.zeros(0, 3, 8, 8))


def test_what_is_learned_is_marked_with_and_without_colour():
    sample = shown("why?")
    stop = TOKENIZER.eos_token
    assert re.search(rf"why\? ASSISTANT: ?\[\[ ?ok{re.escape(stop)}\]\]$", preview.as_text(sample, colour=False))
    coloured = preview.as_text(sample, colour=True)
    assert re.search(rf"\x1b\[1;32m ?ok{re.escape(stop)}\x1b\[0m$", coloured) and "[[" not in coloured


def test_a_text_cannot_drive_the_terminal_nor_the_page():
    sample = shown("\x1b[2Jgone \u202eback\ttab <script>alert(1)</script> &amp;")
    text = preview.as_text(sample, colour=False)
    assert "\x1b" not in text and "\u202e" not in text
    assert r"\x1b[2Jgone \u202eback" in text and "\ttab" in text
    view = preview.SourceView("<b>", 1, messages=["<i>broken</i>"], shown=[sample])
    html = page("<title>", [view], [1.0], ["<plan>"], "<facts>", SPEC)
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;amp;" in html
    assert not {"<b>", "<i>", "<plan>", "<facts>"} & set(re.findall(r"<\w+>", html))
    assert html.count("<title>") == 1


def test_counts_are_those_of_reading_every_row(tmp_path):
    source = Colours("ocr", 30, tmp_path, bad=[3, 8], broken=[4, 29])
    encoder = make_encoder(max_length=len(make_encoder().encode(source[20]).tokens))
    expected, bad = [], {}
    for row in range(30):
        try:
            example = encoder.encode(source[row])
            for image in example.images:
                image.open()
            expected.append(example)
        except BadSample as problem:
            bad[problem.kind] = bad.get(problem.kind, 0) + 1
    assert bad["roles"] == 2 and bad["image broken"] == 1 and bad["too long"] > 3
    view = preview.look_at(source, range(30), encoder, SPEC, samples=2)
    assert (view.looked_at, dict(view.bad)) == (30, bad)
    assert view.places == [len(example.tokens) for example in expected]
    assert sum(view.learned) == sum(int((example.labels != IGNORE_INDEX).sum()) for example in expected)
    assert view.images == sum(len(example.images) for example in expected)
    assert [sample.sample_id for sample in view.shown] == [example.sample_id for example in expected[:2]]
    assert any(message.startswith("ocr, sample 3: turn 1 is wrong") for message in view.messages)
    heading, cells = preview.columns([view])
    row = dict(zip(heading, cells, strict=True))
    lengths = sorted(view.places)
    assert [int(row[key]) for key in ("places: min", "median", "max")] == [
        lengths[0], statistics.median_low(lengths), lengths[-1],
    ]  # fmt: skip
    assert (row["rows"], row["usable"], row["roles"], row["no label"]) == ("30", str(len(expected)), "2", "0")


def test_a_source_without_a_usable_row_is_said_and_not_an_error(tmp_path):
    view = preview.look_at(Colours("ocr", 3, tmp_path, bad=range(3)), range(3), make_encoder(), SPEC, samples=2)
    assert preview.columns([view])[1][3:7] == ("0", "-", "-", "-")
    assert "No usable sample" in page("t", [view], [1.0], ["p"], "f", SPEC)


def test_the_page_shows_the_pixels_that_the_tower_gets():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (20, 33, 3), dtype=np.uint8))
    spec = ImageSpec(24, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    pixels = preprocess(picture, spec)
    sample = preview.Shown("7", 1, 1, (), pixels[None])
    html = page("t", [preview.SourceView("a", 1, shown=[sample])], [1.0], ["p"], "f", spec)
    [data] = re.findall(r"data:image/png;base64,([^\"]+)\"", html)
    seen = Image.open(io.BytesIO(base64.b64decode(data)))
    assert torch.allclose(preprocess(seen, spec), pixels, atol=1e-5)
    assert "http" not in html and "<script" not in html


@pytest.fixture
def run_file(tmp_path):
    """A run over two sources and a base that holds just what reading data takes."""
    base = tmp_path / "base"
    TOKENIZER.save_pretrained(base)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(base)
    (base / "model.json").write_text(dataclasses.replace(SIZES["tiny"], image_token_id=IMAGE).to_json())
    Image.new("RGB", (9, 4), (200, 30, 30)).save(tmp_path / "a.png")
    rows = [
        {"id": i, "image": "a.png", "conversations": [
            {"from": "human", "value": f"<image>\nQ{i}"}, {"from": "gpt", "value": f"answer {i}"},
        ]}
        for i in range(12)
    ]  # fmt: skip
    rows[5]["image"] = "missing.png"
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"base": str(base)},
        "train": {"steps": 3, "global_batch_size": 4},
        "data": {"max_length": 300, "sources": [{"name": n, "path": str(tmp_path / f"{n}.json")} for n in "ab"]},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def preview_of(*arguments):
    inspect_data._preview(inspect_data.arguments(["preview", *map(str, arguments)]))


def test_the_command_prints_plan_counts_and_samples_and_writes_the_page(run_file, tmp_path, capsys):
    preview_of(run_file, "--all", "--html", tmp_path / "page.html", "data.sources.b.weight=3")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "source a: 12 rows, asked 25.0% of the samples, planned 3 of 12 samples = 0.25 epochs"
    heading, a, b = (re.split(r"\s{2,}", line.strip()) for line in lines[3:6])
    for cells in (a, b):
        row = dict(zip(heading, cells, strict=True))
        assert (row["looked at"], row["usable"], row["image missing"]) == ("12", "11", "1")
    assert "no image file" in out
    assert out.count("<image x 4>") == out.count("[[") == 4
    html = (tmp_path / "page.html").read_text()
    assert html.count("data:image/png") == 4 and html.count('class="learned"') == 1 + 4


def test_the_command_shows_first_what_training_draws_first(run_file, capsys):
    preview_of(run_file, "--source", "b", "--samples", 3, "--rows", 4, "data.sources.a.weight=0")
    shown_ids = re.findall(r"^b, sample (\d+):", capsys.readouterr().out, re.MULTILINE)
    mixture = Mixture([12, 12], [0, 1], seed=0)
    drawn = [str(mixture.locate(position)[1]) for position in range(4)]
    assert shown_ids == [row for row in drawn if row != "5"][:3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "c"], "--source: data.sources has no 'c'; there are a, b"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--html", "/nowhere/page.html"], "--html: /nowhere is not a folder"),
        (["--html", "/tmp", "model.base=nowhere"], "--html: /tmp is a folder, not a file that can be written"),
        (["data.sources.b.wheight=1"], "nearest valid key is data.sources[1].weight"),
        (["data.sources.c.weight=1"], "'c' is not an index below 2, nor a name of a, b"),
        (["model.base=nowhere"], "is not a base checkpoint: cannot read model.json"),
        (["data.sources.a.path=/nowhere.json"], "source 'a': /nowhere.json does not exist"),
        (["data.sources.a.epochs=1", "data.sources.b.epochs=1", "train.steps=7"], "6 of 7 steps of 4 are possible"),
    ],
)
def test_bad_input_is_told_in_one_line(run_file, arguments, says, capsys):
    with pytest.raises(ConfigError) as caught:
        preview_of(run_file, *arguments)
    assert says in str(caught.value) and "\n" not in str(caught.value)
