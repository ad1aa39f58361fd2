"""What a server makes of a picture and a question is what training made of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mole_mega.convert.hf_config import size_from_config
from mole_mega.convert.serving import write_serving_files
from mole_mega.data.conversation import VICUNA_CHAT_TEMPLATE, Encoder
from mole_mega.data.image import ImageSpec, preprocess

BASE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf"
QUESTION = "Describe the picture."


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    return folder


@pytest.fixture
def export(base, tmp_path):
    """Writes the files of an export of `base`; returns the folder."""

    def write():
        folder = tmp_path / "export"
        folder.mkdir()
        write_serving_files(base, size_from_config(base / "config.json", vocab_size=512), folder)
        shutil.copyfile(base / "config.json", folder / "config.json")  # an export writes its own
        return folder

    return write


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(91, 37), (37, 91), (48, 48), (200, 120)])
def test_the_processor_of_an_export_gives_the_pixels_of_training(base, export, shape):
    image, spec = picture(*shape), ImageSpec.from_processor_files(base)
    served = AutoProcessor.from_pretrained(export()).image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(served, preprocess(image, spec))
    carried = AutoProcessor.from_pretrained(base).image_processor(image, return_tensors="pt")["pixel_values"][0]
    # why it is not carried as it came
    assert torch.equal(carried, served) == (shape[0] == shape[1])


def without_template(base):
    (base / "chat_template.jinja").unlink()


def with_template_for_parts(base):
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}")


def with_template_in_the_tokenizer(base):
    without_template(base)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages[0]['content'] }}"}))


def with_template_of_its_own(base):
    own = VICUNA_CHAT_TEMPLATE.replace("USER: ", "Q: ")
    (base / "chat_template.jinja").write_text(own)


@pytest.mark.parametrize(
    "change",
    [
        lambda base: None,
        without_template,
        with_template_for_parts,
        with_template_in_the_tokenizer,
        with_template_of_its_own,
    ],
)
def test_the_prompt_of_an_export_is_that_of_training(base, export, change):
    change(base)
    size = size_from_config(base / "config.json", vocab_size=512)
    encoder = Encoder(
        AutoTokenizer.from_pretrained(base),
        image_token_id=size.image_token_id,
        places_per_image=size.vision.num_places,
        max_length=512,
    )
    expected = encoder.prompt([("user", f"<image>\n{QUESTION}")]).tolist()
    processor = AutoProcessor.from_pretrained(export())
    as_text = [{"role": "user", "content": f"<image>\n{QUESTION}"}]
    as_parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    for chat in (as_text, as_parts):
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        served = processor(images=picture(60, 40), text=prompt, return_tensors="pt")
        assert served["input_ids"][0].tolist() == expected
    assert ("Q: " in prompt) == (change is with_template_of_its_own)


def test_a_base_without_processor_or_tokenizer_exports_without_them(base, export):
    for path in [*base.glob("tokenizer*"), *base.glob("*processor*"), base / "chat_template.jinja"]:
        path.unlink()
    assert {path.name for path in export().iterdir()} == {"config.json", "generation_config.json"}
