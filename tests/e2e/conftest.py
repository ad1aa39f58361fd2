"""A small real base, small real data, and run files over them."""

import json
import random
from functools import partial

import commands
import pytest
import yaml
from PIL import Image


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The tiny example's model as a base checkpoint."""
    folder = tmp_path_factory.mktemp("model")
    arguments = ["hf-to-megatron", "--hf", commands.EXAMPLE_BASE, "--out", folder / "base"]
    code, text = commands.run(arguments, folder / "log", module="mole_mega.convert.command")
    assert code == 0, text
    return folder / "base"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with two LLaVA files, `mixed.json` and `text.json`, and their images."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(5)
    (folder / "images").mkdir()

    def image(name):
        size = rng.randint(20, 70), rng.randint(20, 70)
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(folder / "images" / name)
        return name

    def turns(number, num_images, num_turns):
        for turn in range(num_turns):
            marks = "<image>\n" * num_images if turn == 0 else ""
            yield {"from": "human", "value": f"{marks}question {number} {'so ' * rng.randint(0, 9)}{turn}?"}
            yield {"from": "gpt", "value": f"answer {rng.randint(0, 99)} {'and ' * rng.randint(0, 6)}done"}

    def row(number, num_images, num_turns):
        names = [image(f"{number}_{i}.png") for i in range(num_images)]
        key = {} if not names else {"image": names[0] if num_images == 1 else names}
        return {"id": number, "conversations": list(turns(number, num_images, num_turns))} | key

    mixed = [row(number, num_images=(1, 2, 0, 1)[number % 4], num_turns=1 + number % 2) for number in range(20)]
    (folder / "mixed.json").write_text(json.dumps(mixed))
    (folder / "text.json").write_text(json.dumps([row(100 + number, 0, 1) for number in range(9)]))
    return folder


@pytest.fixture(scope="session")
def make_run(base, data):
    """make_run(folder, name="run", **sections) writes a run file whose run directory is `folder / name`; its path."""

    def make(folder, name="run", **sections):
        tree = {
            "run_dir": str(folder / name),
            "model": {"base": str(base)},
            "adapter": {"num_experts": 4, "rank": 4, "alpha": 8, "dropout": 0.1, "z_loss_weight": 0.001},
            "train": {
                "steps": 6,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "lr": 0.003,
                "warmup_steps": 2,
                "precision": "fp32",
            },
            "data": {
                "max_length": 256,
                "sources": [
                    {
                        "name": "mixed",
                        "path": str(data / "mixed.json"),
                        "image_folder": str(data / "images"),
                        "weight": 3,
                    },
                    {"name": "text", "path": str(data / "text.json")},
                ],
            },
            "checkpoint": {"every": 3},
            "monitor": {"tensorboard": False},
        }
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return make


@pytest.fixture
def write_run(make_run, tmp_path):
    """`make_run` in the test's own folder."""
    return partial(make_run, tmp_path)
