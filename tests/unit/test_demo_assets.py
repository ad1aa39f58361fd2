"""The demo's data and its stored base model are what the demo says of them."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "tiny_cpu" / "base_hf"
PER_DOMAIN = 40


@pytest.fixture(scope="module")
def demo():
    """The module tools/make_demo_data.py."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("make_demo_data")
    finally:
        sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def data(demo, tmp_path_factory):
    """A small data folder."""
    out = tmp_path_factory.mktemp("demo_data")
    write_all(demo, out)
    return out


def write_all(demo, out):
    for domain in demo.DOMAINS:
        for split in ("train", "test"):
            demo.write_set(out, domain, split, PER_DOMAIN)


def rows(folder, domain, split):
    return json.loads((folder / f"{domain}_{split}.json").read_text())


def test_the_data_is_the_same_at_every_run(demo, data, tmp_path):
    write_all(demo, tmp_path)
    first = {path.relative_to(data): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    second = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(first) == 6 + 6 * PER_DOMAIN
    assert first == second


def test_every_row_names_an_image_that_exists_and_begins_with_the_image_mark(demo, data):
    for domain, split in itertools.product(demo.DOMAINS, ("train", "test")):
        for row in rows(data, domain, split):
            with Image.open(data / row["image"]) as image:
                assert image.size == (demo.CANVAS, demo.CANVAS)
            assert row["conversations"][0]["value"].startswith("<image>\n")


def test_train_and_held_out_tiles_cover_no_common_pixel(demo):
    for picture in itertools.chain(*demo.PICTURES.values()):
        with Image.open(demo.PICTURE_FOLDER / picture.file) as image:
            train = demo.tile_boxes(*image.size, picture.tile, held_out=False)
            held_out = demo.tile_boxes(*image.size, picture.tile, held_out=True)
        assert train
        assert held_out
        assert not any(overlap(a, b) for a, b in itertools.product(train, held_out)), picture


def test_written_train_and_held_out_crops_do_not_overlap(demo, data):
    for domain in demo.DOMAINS:
        train, test = ({(s[0], tuple(s[1])) for s in sources(data, domain, split)} for split in ("train", "test"))
        for (file, box), (other_file, other_box) in itertools.product(train, test):
            assert file != other_file or not overlap(box, other_box)


def sources(folder, domain, split):
    return [row["source"] for row in rows(folder, domain, split)]


def overlap(a, b):
    """Whether two boxes (left, top, right, bottom), or two digits' rows, share anything."""
    if len(a) == 1:
        return a == b
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_the_domains_share_their_questions(demo, data):
    asked = [
        {row["conversations"][0]["value"] for row in rows(data, domain, "train") + rows(data, domain, "test")}
        for domain in demo.DOMAINS
    ]
    assert asked[0] == asked[1] == asked[2] == {f"<image>\n{question}" for question in demo.QUESTIONS.values()}


def test_no_two_domains_answer_the_same_question_alike(demo):
    """Another choice or order of attributes for every question, and another name for every corner and mat."""
    for one, other in itertools.combinations(demo.DOMAINS, 2):
        assert all(demo.FORMS[one][asked] != demo.FORMS[other][asked] for asked in demo.QUESTIONS)
        for attribute in ("corner", "mat"):
            for value in demo.attribute_values(one, attribute):
                assert demo.shifted(one, attribute, value) != demo.shifted(other, attribute, value)


def test_the_stored_base_reads_held_out_crops_in_the_neutral_wording(demo):
    processor = AutoProcessor.from_pretrained(BASE)
    model = AutoModelForImageTextToText.from_pretrained(BASE, dtype=torch.float32).eval()
    for domain in demo.DOMAINS:
        scenes = [scene for scene, _ in demo.draw_questions(domain, 24, held_out=True, seed="unit test")]
        answers = ask(model, processor, scenes, demo.QUESTIONS["subject"])
        right = sum(
            answer == demo.plain_answer(scene, "subject") for answer, scene in zip(answers, scenes, strict=True)
        )
        assert right >= 16, (domain, answers)  # chance is 24 / 6 at best


def ask(model, processor, scenes, question):
    """Greedy answers to one question about each scene, by the stored processor and chat template alone."""
    chat = [{"role": "user", "content": f"<image>\n{question}"}]
    prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt] * len(scenes), images=[scene.image for scene in scenes], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    told = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(told, skip_special_tokens=True)]
