"""One picture becomes one tensor: what a LLaVA-1.5 vision tower expects. Opening files is in `sources.py`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mole_mega.config import ConfigError


@dataclass(frozen=True)
class ImageSpec:
    """`size`: the side in pixels of the square that the vision tower sees; `mean`, `std` of R, G, B in [0, 1]."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_processor_files(cls, base_dir: str | Path) -> ImageSpec:
        """Read it from processor_config.json or preprocessor_config.json as transformers writes them (CLIP style).

        Raises ConfigError if there is none, or if it asks for steps that `preprocess` does not do.
        """
        settings, path = _processor_settings(Path(base_dir))
        side = settings.get("crop_size") if settings.get("do_center_crop", True) else None
        sizes = {*_sides(side), *_sides(settings.get("size"))}
        # A resize to one size and a crop to another would cut the borders that padding to a square is there to keep.
        if len(sizes) != 1 or min(sizes) < 1:
            raise ConfigError(f"{path}: size and crop_size must be one square, got {sorted(sizes)}")
        for key, wanted in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
            if settings.get(key, wanted) != wanted:
                raise ConfigError(f"{path}: {key} is {settings[key]}, only {wanted} is supported")
        if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise ConfigError(f"{path}: rescale_factor is {settings['rescale_factor']}, only 1/255 is supported")
        mean, std = (_three_numbers(settings.get(key), f"{path}: {key}") for key in ("image_mean", "image_std"))
        if min(std) <= 0:
            raise ConfigError(f"{path}: image_std must be above 0, got {std}")
        return cls(sizes.pop(), mean, std)


def preprocess(image: Image.Image, spec: ImageSpec) -> torch.Tensor:
    """float32 [3, size, size]: RGB, padded to a square with the mean colour, resized (bicubic), (x / 255 - mean) / std.

    Raises ValueError for a picture whose range of values is unknown (floating-point TIFF).
    """
    square = _pad_to_square(to_rgb(image), spec.mean).resize((spec.size, spec.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((pixels - mean) / std).contiguous()


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. Transparency is dropped, as transformers and LLaVA do; 16-bit greys keep their brightness."""
    if image.mode == "F":
        raise ValueError("a picture of floating-point values has no known white")
    if image.mode.startswith("I"):
        # convert("RGB") would clip: every grey above 255 of 65535 turns white
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) / 257
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it has to do this step itself
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    red, green, blue = (int(value * 255) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _processor_settings(base_dir: Path) -> tuple[dict[str, Any], Path]:
    # transformers 5 nests the image processor's settings in the processor's file; older bases have a file of their own
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        path = base_dir / name
        if not path.is_file():
            continue
        try:
            settings = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"{path} must hold an object, found {type(settings).__name__}")
        if key is None:
            return settings, path
        if isinstance(settings.get(key), dict):
            return settings[key], path
    raise ConfigError(f"{base_dir} has no image processor: neither processor_config.json nor preprocessor_config.json")


def _sides(size: Any) -> set[int]:
    """The edge lengths that a CLIP `size` names: a number, {"shortest_edge"} or {"height", "width"}."""
    values = size.values() if isinstance(size, dict) else [size]
    return {value for value in values if isinstance(value, int)}


def _three_numbers(values: Any, where: str) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise ConfigError(f"{where} must be 3 numbers, got {values!r}")
    red, green, blue = values
    return float(red), float(green), float(blue)
