"""A process that cannot import mole_mega: loads an exported folder and saves what its model answers.

python -I ask_mole_folder.py FOLDER INPUTS OUT
"""

import importlib.abc
import sys

BLOCKED = ("mole_mega", "megatron")


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} must not be needed")


def main(folder: str, inputs_path: str, out: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        logits = model(**torch.load(inputs_path)).logits
    assert not [name for name in sys.modules if name.partition(".")[0] in BLOCKED]
    answer = {
        "logits": logits,
        "choices": model.expert_choices(),
        "wrong_keys": [name for names in info.values() for name in names],
        "processor": type(processor).__name__,
        "tokens": processor(text="<image>", images=torch.zeros(3, 48, 48), return_tensors="pt").input_ids,
    }
    torch.save(answer, out)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    try:
        import mole_mega  # noqa: F401
    except ImportError:
        main(*sys.argv[1:])
    else:
        sys.exit("mole_mega could be imported")
