"""Pixels of `image.py` against transformers' CLIP processor and against hand-made expectations."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mole_mega.config import ConfigError
from mole_mega.data.image import ImageSpec, preprocess

PLAIN = ImageSpec(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def clip_processor(size=28):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def noise(width, height, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


@pytest.mark.parametrize("side", [28, 63, 9])
def test_a_square_image_gives_what_the_clip_processor_gives(tmp_path, side):
    processor = clip_processor()
    processor.save_pretrained(tmp_path)
    spec = ImageSpec.from_processor_files(tmp_path)
    pixels = preprocess(noise(side, side), spec)
    expected = processor(noise(side, side), return_tensors="pt")["pixel_values"][0]
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 28, 28)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width_height", [(4, 2), (2, 4)])
def test_a_long_image_is_centred_on_the_mean_colour(width_height):
    mean, std = (0.5, 0.25, 0.75), (0.5, 0.25, 0.125)
    pixels = preprocess(Image.new("RGB", width_height, (255, 0, 51)), ImageSpec(4, mean, std))
    if width_height == (2, 4):
        pixels = pixels.transpose(1, 2)
    inside = torch.tensor([(1 - 0.5) / 0.5, (0 - 0.25) / 0.25, (0.2 - 0.75) / 0.125])
    border = torch.tensor([(127 / 255 - 0.5) / 0.5, (63 / 255 - 0.25) / 0.25, (191 / 255 - 0.75) / 0.125])
    torch.testing.assert_close(pixels[:, 1:3], inside[:, None, None].expand(3, 2, 4))
    torch.testing.assert_close(pixels[:, [0, 3]], border[:, None, None].expand(3, 2, 4))


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 51, (51, 51, 51)),
        ("1", 1, (255, 255, 255)),
        ("LA", (51, 0), (51, 51, 51)),
        ("RGBA", (1, 2, 3, 0), (1, 2, 3)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("I;16", 257 * 200, (200, 200, 200)),
        ("I", 257 * 7, (7, 7, 7)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour, expected):
    pixels = preprocess(Image.new(mode, (4, 4), colour), PLAIN)
    torch.testing.assert_close(pixels[:, 2, 2] * 255, torch.tensor(expected, dtype=torch.float32))


def test_palettes_with_and_without_transparency_become_rgb():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    for transparency in (None, b"\x00\x80"):
        if transparency:
            image.info["transparency"] = transparency
        pixels = preprocess(image, PLAIN)
        torch.testing.assert_close(pixels[:, 0, 0] * 255, torch.tensor([10.0, 20.0, 30.0]))


def test_floating_point_pictures_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        preprocess(Image.new("F", (4, 4), 0.5), PLAIN)


def test_the_spec_is_read_from_either_file(tmp_path):
    settings = clip_processor(42).to_dict()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0, 0, 0]}))
    old = ImageSpec.from_processor_files(tmp_path)
    assert (old.size, old.mean) == (42, (0, 0, 0))
    (tmp_path / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert ImageSpec.from_processor_files(tmp_path) == old
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert ImageSpec.from_processor_files(tmp_path).mean == tuple(settings["image_mean"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": {"height": 28, "width": 30}}, r"\[28, 30\]"),
        ({"size": {"shortest_edge": 32}}, r"\[28, 32\]"),
        ({"do_resize": False}, "do_resize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"rescale_factor": 0.5}, "rescale_factor is 0.5"),
        ({"image_mean": [0.5]}, "image_mean must be 3 numbers"),
        ({"image_std": [1, 0, 1]}, "image_std must be above 0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(tmp_path, change, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(clip_processor().to_dict() | change))
    with pytest.raises(ConfigError, match=message):
        ImageSpec.from_processor_files(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_base_without_readable_settings_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError):
        ImageSpec.from_processor_files(tmp_path)
