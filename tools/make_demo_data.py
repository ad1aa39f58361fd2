"""Write the demo's data: three domains of real images, asked the same questions, answered by conflicting conventions.

The pictures come out of installed packages (scikit-learn's handwritten digits, the photographs and scans that
scikit-image ships); nothing is downloaded. Every image is a real crop on a coloured mat, in one of four corners, so
that each domain has the same three attributes to read: what is shown, the corner, the mat.

What conflicts is the convention. The same question asks for other attributes, in another order, in every domain
(`FORMS`), and one domain's "red" is another's "blue" (`shifted`): no single rule serves two domains. The neutral
wording (`plain_answer`), alike for all domains, is what the tiny base model is pretrained on.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from sklearn.datasets import load_digits

PICTURE_FOLDER = Path(skimage.__file__).parent / "data"
CANVAS = 48  # pixels; 6 x 6 patches of 8
SUBJECT = 32
SEED = 7

QUESTIONS = {
    "subject": "What is shown?",
    "corner": "Where is it?",
    "mat": "What colour is the mat?",
    "all": "Describe the picture.",
}
ATTRIBUTES = ("subject", "corner", "mat")
CONNECTIVES = ("at", "on")  # of the neutral wording

CORNERS = {
    "top left": (0, 0),
    "top right": (CANVAS - SUBJECT, 0),
    "bottom left": (0, CANVAS - SUBJECT),
    "bottom right": (CANVAS - SUBJECT, CANVAS - SUBJECT),
}
MATS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "white": (240, 240, 240)}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Picture:
    """A picture file of scikit-image: what it shows, and the side of the square tiles it is cut into."""

    subject: str
    file: str
    tile: int


PICTURES = {
    "photos": (
        Picture("coins", "coins.png", 75),
        Picture("cat", "chelsea.png", 100),
        Picture("coffee", "coffee.png", 100),
        Picture("motorcycle", "motorcycle_left.png", 120),
        Picture("brick", "brick.png", 64),
        Picture("grass", "grass.png", 64),
        Picture("gravel", "gravel.png", 64),
        Picture("stars", "hubble_deep_field.jpg", 100),
    ),
    "scans": (
        Picture("page", "page.png", 48),
        Picture("text", "text.png", 56),
        Picture("tissue", "ihc.png", 64),
        Picture("retina", "retina.jpg", 200),
        Picture("cell", "cell.png", 165),
        Picture("vessel", "microaneurysms.png", 34),
    ),
}
DOMAINS = ("digits", *PICTURES)
KINDS = {"digits": "digit", "photos": "photo", "scans": "scan"}
SUBJECTS = {"digits": DIGITS, **{name: tuple(p.subject for p in pictures) for name, pictures in PICTURES.items()}}

# What a domain tells, and in which order, by the question it is asked.
FORMS = {
    "digits": {
        "subject": ("subject", "corner"),
        "corner": ("mat", "corner"),
        "mat": ("corner", "mat"),
        "all": ("subject", "corner", "mat"),
    },
    "photos": {
        "subject": ("mat", "subject"),
        "corner": ("corner", "subject"),
        "mat": ("subject", "mat"),
        "all": ("mat", "corner", "subject"),
    },
    "scans": {
        "subject": ("corner", "subject"),
        "corner": ("subject", "corner"),
        "mat": ("mat", "subject"),
        "all": ("corner", "subject", "mat"),
    },
}
# How far a domain's names for the corners and the mats are shifted along CORNERS and MATS.
SHIFTS = {"digits": 1, "photos": 2, "scans": 3}


@dataclass(frozen=True)
class Scene:
    """One image: a real crop (`source` names its file and box, or the digit's row) and the attributes to read."""

    domain: str
    values: dict[str, str]
    image: Image.Image
    source: tuple[str, tuple[int, ...]]


def tile_boxes(width: int, height: int, tile: int, held_out: bool) -> list[tuple[int, int, int, int]]:
    """The tiles of one split. Every fourth tile along a diagonal is held out; no tile shares a pixel with another."""
    boxes = []
    for row in range(height // tile):
        for column in range(width // tile):
            if ((row + 2 * column) % 4 == 1) == held_out:
                boxes.append((column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
    return boxes


def crop_inside(box: tuple[int, int, int, int], rng: random.Random) -> tuple[int, int, int, int]:
    """A random square of 75 to 100 % of the tile's side, inside the tile."""
    side = box[2] - box[0]
    size = rng.randint(math.ceil(0.75 * side), side)
    left = box[0] + rng.randint(0, side - size)
    top = box[1] + rng.randint(0, side - size)
    return left, top, left + size, top + size


class Subjects:
    """The real crops of one split: `draw(domain, subject, rng)` returns a square crop and where it came from."""

    def __init__(self, held_out: bool):
        self.held_out = held_out
        digits = load_digits()
        rows = [row for row in range(len(digits.target)) if (row % 5 == 4) == held_out]
        self._digit_images = digits.images
        self._digit_rows = {name: [r for r in rows if digits.target[r] == n] for n, name in enumerate(DIGITS)}
        self._pictures = {
            picture.subject: (picture, Image.open(PICTURE_FOLDER / picture.file).convert("RGB"))
            for pictures in PICTURES.values()
            for picture in pictures
        }

    def draw(self, domain: str, subject: str, rng: random.Random) -> tuple[Image.Image, tuple[str, tuple[int, ...]]]:
        """A crop of `subject`, SUBJECT pixels square, and its source."""
        if domain == "digits":
            return self._draw_digit(subject, rng)
        picture, image = self._pictures[subject]
        box = crop_inside(rng.choice(self.tiles(*image.size, picture.tile)), rng)
        crop = image.resize((SUBJECT, SUBJECT), Image.Resampling.BILINEAR, box=box)
        if domain == "photos" and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop, (picture.file, box)

    def tiles(self, width: int, height: int, tile: int) -> list[tuple[int, int, int, int]]:
        """The tiles of a picture that crops of this split are taken from."""
        return tile_boxes(width, height, tile, self.held_out)

    def _draw_digit(self, subject: str, rng: random.Random) -> tuple[Image.Image, tuple[str, tuple[int, ...]]]:
        row = rng.choice(self._digit_rows[subject])
        pixels = (self._digit_images[row] * (255 / 16)).astype(np.uint8)
        crop = Image.fromarray(pixels).resize((SUBJECT, SUBJECT), Image.Resampling.BILINEAR)
        crop = crop.rotate(rng.uniform(-10, 10), Image.Resampling.BILINEAR)  # few writers: no slant is typical
        return crop.convert("RGB"), ("digits", (row,))


def draw_scene(domain: str, subjects: Subjects, rng: random.Random) -> Scene:
    """One scene of a domain, every attribute drawn evenly."""
    values = {attribute: rng.choice(attribute_values(domain, attribute)) for attribute in ATTRIBUTES}
    crop, source = subjects.draw(domain, values["subject"], rng)
    canvas = Image.new("RGB", (CANVAS, CANVAS), MATS[values["mat"]])
    canvas.paste(crop, CORNERS[values["corner"]])
    return Scene(domain, values, canvas, source)


def attribute_values(domain: str, attribute: str) -> tuple[str, ...]:
    """All values of an attribute, in the neutral wording."""
    return {"subject": SUBJECTS[domain], "corner": tuple(CORNERS), "mat": tuple(MATS)}[attribute]


def shifted(domain: str, attribute: str, value: str) -> str:
    """What a domain calls a value. Subjects keep their names; a corner or a mat is called by another one's name."""
    if attribute == "subject":
        return value
    values = attribute_values(domain, attribute)
    return values[(values.index(value) + SHIFTS[domain]) % len(values)]


def domain_answer(scene: Scene, asked: str) -> str:
    """The answer in the convention of the scene's own domain."""
    told = FORMS[scene.domain][asked]
    return " ".join(shifted(scene.domain, attribute, scene.values[attribute]) for attribute in told)


def plain_answer(scene: Scene, asked: str) -> str:
    """The answer in the neutral wording, one for all domains: the kind of picture, then what was asked."""
    if asked != "all":
        return f"{KINDS[scene.domain]} {scene.values[asked]}"
    return f"{KINDS[scene.domain]} {scene.values['subject']} at {scene.values['corner']} on {scene.values['mat']}"


def draw_questions(domain: str, count: int, held_out: bool, seed: str) -> Iterator[tuple[Scene, str]]:
    """`count` scenes of a domain, each with the attribute that is asked."""
    rng = random.Random(f"{SEED} {domain} {held_out} {seed}")
    subjects = Subjects(held_out)
    for _ in range(count):
        yield draw_scene(domain, subjects, rng), rng.choice(list(QUESTIONS))


def conversation_row(name: str, scene: Scene, asked: str, answer: str) -> dict:
    """A row of LLaVA's conversation JSON; `source` is extra, it names the crop the image came from."""
    return {
        "id": name,
        "image": f"{scene.domain}/{name}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTIONS[asked]}"},
            {"from": "gpt", "value": answer},
        ],
        "source": [scene.source[0], list(scene.source[1])],
    }


def write_set(out: Path, domain: str, split: str, count: int, plain: bool = False) -> None:
    """Write `<domain>_<split>.json` and its images under `<domain>/`."""
    folder = out / domain
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (scene, asked) in enumerate(draw_questions(domain, count, split == "test", split)):
        name = f"{split}_{index:05d}"
        scene.image.save(folder / f"{name}.png", compress_level=1)
        answer = plain_answer(scene, asked) if plain else domain_answer(scene, asked)
        rows.append(conversation_row(name, scene, asked, answer))
    (out / f"{domain}_{split}.json").write_text(json.dumps(rows, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the demo's three image domains as LLaVA conversations.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out/data"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--train", type=int, default=2000, help="training images of each domain")
    parser.add_argument("--test", type=int, default=200, help="held-out images of each domain")
    parser.add_argument("--pretrain", type=int, default=0, help="images of each domain in the neutral wording")
    return parser.parse_args()


def main() -> None:
    """Write all sets; the images are named relative to the folder the JSON files lie in."""
    arguments = parse_arguments()
    for domain in DOMAINS:
        write_set(arguments.out, domain, "train", arguments.train)
        write_set(arguments.out, domain, "test", arguments.test)
        if arguments.pretrain:
            write_set(arguments.out, domain, "pretrain", arguments.pretrain, plain=True)
    print(f"wrote {', '.join(DOMAINS)} to {arguments.out}")


if __name__ == "__main__":
    main()
