"""The experiment's pictures, and answers by conventions that contradict one another.

The crops are those of the demo (tools/make_demo_data.py: handwritten digits, photographs, scans). Here each lies in one
of four corners of a mat of two colours, so that four attributes can be read off every picture.

All domains are asked the same question and answer it in the same words and the same order, those that the base was
taught (`plain_answer`), but each by a permutation of the names of its own (`conventions`): what one domain calls red
another calls blue and the third white, and none calls anything what the base was taught.
"""

import functools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import make_demo_data as demo
from PIL import Image

CANVAS, SUBJECT = demo.CANVAS, demo.SUBJECT
DOMAINS, KINDS, SUBJECTS, CORNERS = demo.DOMAINS, demo.KINDS, demo.SUBJECTS, demo.CORNERS
COLOURS = {
    "red": (200, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 70, 200),
    "white": (240, 240, 240),
    "yellow": (230, 210, 50),
    "purple": (130, 50, 150),
}
ATTRIBUTES = ("subject", "corner", "upper", "lower")
CONNECTIVES = ("at", "over")  # of the neutral wording
QUESTIONS = {
    "all": "Describe the picture.",
    "subject": "What is shown?",
    "corner": "Where is it?",
    "mat": "What is behind it?",
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scene:
    """One picture and what can be read off it; `source` names the crop's file and box, or the digit's row."""

    domain: str
    values: dict[str, str]
    image: Image.Image
    source: tuple[str, tuple[int, ...]]


class Subjects(demo.Subjects):
    """The demo's crops in three splits that share no pixel: its held-out crops are the test split, and of the others
    some are validation."""

    def __init__(self, held_out: bool, validation: bool = False):
        super().__init__(held_out)
        self.validation = validation
        if not held_out:
            self._digit_rows = {
                name: [row for row in rows if (row % 5 == 3) == validation] for name, rows in self._digit_rows.items()
            }

    def tiles(self, width: int, height: int, tile: int) -> list[tuple[int, int, int, int]]:
        """The tiles of a picture that belong to this split."""
        boxes = demo.tile_boxes(width, height, tile, self.held_out)
        if self.held_out:
            return boxes
        return [
            (left, top, right, bottom)
            for left, top, right, bottom in boxes
            if ((top // tile + 2 * (left // tile)) % 4 == 3) == self.validation
        ]


def attribute_values(domain: str, attribute: str) -> tuple[str, ...]:
    """All values of an attribute, in the neutral wording."""
    return {"subject": SUBJECTS[domain], "corner": tuple(CORNERS)}.get(attribute, tuple(COLOURS))


def draw_scene(domain: str, subjects: Subjects, rng: random.Random) -> Scene:
    """One scene of a domain, every attribute drawn evenly."""
    values = {attribute: rng.choice(attribute_values(domain, attribute)) for attribute in ATTRIBUTES}
    crop, source = subjects.draw(domain, values["subject"], rng)
    canvas = Image.new("RGB", (CANVAS, CANVAS), COLOURS[values["upper"]])
    canvas.paste(COLOURS[values["lower"]], (0, CANVAS // 2, CANVAS, CANVAS))
    canvas.paste(crop, CORNERS[values["corner"]])
    return Scene(domain, values, canvas, source)


def plain_answer(scene: Scene, asked: str) -> str:
    """The answer in the neutral wording that the base is taught: the kind of picture, then what was asked."""
    subject, corner, upper, lower = (scene.values[attribute] for attribute in ATTRIBUTES)
    told = {
        "all": f"{subject} at {corner} {upper} over {lower}",
        "subject": subject,
        "corner": f"at {corner}",
        "mat": f"{upper} over {lower}",
    }
    return f"{KINDS[scene.domain]} {told[asked]}"


def domain_answer(scene: Scene) -> str:
    """The description in the convention of the scene's own domain."""
    names = {attribute: conventions()[scene.domain][attribute][value] for attribute, value in scene.values.items()}
    return plain_answer(replace(scene, values=names), "all")


@functools.cache
def conventions() -> dict[str, dict[str, dict[str, str]]]:
    """{domain: {attribute: {value: what the domain calls it}}}: permutations, always the same, of which no two agree
    anywhere, nor one with the neutral names. (Subjects are each domain's own.)"""
    rng = random.Random("names")
    names: dict[str, dict[str, dict[str, str]]] = {domain: {} for domain in DOMAINS}
    for attribute in ATTRIBUTES:
        for domain in DOMAINS:
            values = attribute_values(domain, attribute)
            others = [names[other].get(attribute, {}) for other in DOMAINS]
            called = list(values)
            while any(
                name in (value, *(other.get(value) for other in others))
                for value, name in zip(values, called, strict=True)
            ):
                rng.shuffle(called)
            names[domain][attribute] = dict(zip(values, called, strict=True))
    return names


def write_set(out: Path, domain: str, split: str, count: int) -> None:
    """Write `<domain>_<split>.json`, a LLaVA conversation file, and its pictures under `<domain>/`."""
    folder = out / domain
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{domain} {split}")
    subjects = Subjects(split == "test", split == "validation")
    rows = []
    for index in range(count):
        scene = draw_scene(domain, subjects, rng)
        name = f"{split}_{index:05d}"
        scene.image.save(folder / f"{name}.png", compress_level=1)
        rows.append(demo.conversation_row(name, scene, "all", domain_answer(scene)))
    (out / f"{domain}_{split}.json").write_text(json.dumps(rows) + "\n")


def write_data(out: Path, counts: Mapping[str, int]) -> None:
    """Every domain's sets, `counts` pictures of a split."""
    for domain in DOMAINS:
        for split, count in counts.items():
            write_set(out, domain, split, count)
