"""mole-mega generate --model DIR --image F --prompt T: ask a trained or an exported model about images, greedily."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mole_mega.errors import ConfigError, quiet_libraries, report_errors

if TYPE_CHECKING:
    import torch

    from mole_mega.checkpoint.trained import Trained
    from mole_mega.models.llava import LLaVA


class Model(Protocol):
    """What `main` asks: a model, its tokenizer, the folder of its processor, and what else encodes a prompt for it."""

    folder: Path
    tokenizer: Any
    image_token_id: int
    places_per_image: int
    max_length: int

    def answer(self, prompt: torch.Tensor, pixels: torch.Tensor, max_new_tokens: int) -> list[int]:
        """Greedy continuation of prompt int64 [S] with pixels [N, 3, h, w], up to a stop token, which is left out."""


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mole-mega generate",
        description="Ask a model about images. The answer is greedy: the same from a run and from its export.",
    )
    parser.add_argument("--model", type=Path, required=True, help="a run, a step, a base, or an exported folder")
    parser.add_argument("--image", type=Path, action="append", default=[], help="an image file; may be given again")
    parser.add_argument(
        "--prompt", required=True, help="the question; images come first unless it says where, with <image>"
    )
    parser.add_argument(
        "--source", help="which of the run's sources the question is like, for experts that serve a task each"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--base", type=Path, help="where the base is, if not where the run or adapter says")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: the run's, or the export's")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a modeling file that is not our own")
    parser.add_argument("--json", action="store_true", help='print {"answer": text, "tokens": ids}')
    parser.add_argument("--debug", action="store_true", help="show warnings and tracebacks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parse, load, ask, print the answer. Returns the exit code."""
    args = _parse(argv)
    with report_errors(debug=args.debug) as outcome:
        if not args.debug:
            quiet_libraries()
        if args.max_new_tokens < 1:
            raise ConfigError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
        answer, tokens = ask(_open(args), args.image, args.prompt, args.max_new_tokens)
        print(json.dumps({"answer": answer, "tokens": tokens}) if args.json else answer)
    return outcome.code


def ask(model: Model, images: list[Path], prompt: str, max_new_tokens: int) -> tuple[str, list[int]]:
    """The answer as text and as tokens, prompted as in training. Raises ConfigError for images that do not fit."""
    import torch

    from mole_mega.config import DataConfig
    from mole_mega.data.conversation import Encoder
    from mole_mega.data.image import ImageSpec, preprocess
    from mole_mega.data.sources import IMAGE_MARK, BadSample, ImageRef

    if IMAGE_MARK not in prompt:
        prompt = f"{IMAGE_MARK}\n" * len(images) + prompt
    if prompt.count(IMAGE_MARK) != len(images):
        raise ConfigError(f"the prompt marks {prompt.count(IMAGE_MARK)} images with {IMAGE_MARK}, given {len(images)}")
    encoder = Encoder(
        model.tokenizer,
        image_token_id=model.image_token_id,
        places_per_image=model.places_per_image,
        max_length=model.max_length,
    )
    spec = ImageSpec.from_processor_files(model.folder)
    try:
        limit = DataConfig.max_image_pixels
        opened = [ImageRef(path, limit, "--image", path.name).open() for path in images]
    except BadSample as error:
        raise ConfigError(error.reason) from error
    pixels = [preprocess(image, spec) for image in opened]
    tokens = encoder.prompt([("user", prompt)])
    if len(tokens) + max_new_tokens > model.max_length:
        raise ConfigError(
            f"prompt {len(tokens)} + --max-new-tokens {max_new_tokens} places exceed the context of {model.max_length}"
        )
    new = model.answer(
        tokens, torch.stack(pixels) if pixels else torch.zeros(0, 3, spec.size, spec.size), max_new_tokens
    )
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip(), new


class MegatronModel:
    """A base, a run or a step, on one process."""

    def __init__(self, trained: Trained, precision: Any, source: str | None = None) -> None:
        from mole_mega.checkpoint.trained import build_trained
        from mole_mega.config import ParallelConfig
        from mole_mega.data import conversation
        from mole_mega.platform import parallel as platform

        self._domain = _domain(trained, source)
        parallel = platform.initialize(ParallelConfig(), seed=0)
        self.model: LLaVA = build_trained(trained, parallel, ParallelConfig(), precision)
        size = trained.size
        self.folder, self.image_token_id, self.places_per_image = (
            trained.base, size.image_token_id, size.vision.num_places,
        )  # fmt: skip
        self.max_length = size.language.max_length
        self.tokenizer = _tokenizer(trained.base)
        self._stop_ids = conversation.stop_ids(self.tokenizer, trained.base)

    def answer(self, prompt: torch.Tensor, pixels: torch.Tensor, max_new_tokens: int) -> list[int]:
        from mole_mega.models.decode import greedy, pad_prompts

        is_image = prompt == self.image_token_id
        prompts = pad_prompts([prompt], [is_image], pixels, self.model.parallel, [self._domain])
        ((tokens,),) = greedy(self.model, [prompts], max_new_tokens, self._stop_ids)
        return [token for token in tokens if token not in self._stop_ids]


class ExportedModel:
    """A folder that transformers loads: an export of ours, or any LLaVA; a PEFT adapter with its base."""

    def __init__(self, folder: Path, base: Path | None, precision: str | None, *, trust_remote_code: bool) -> None:
        import torch
        from transformers import GenerationConfig

        from mole_mega.convert.folders import is_our_code, load_exported
        from mole_mega.data import conversation

        dtype: Any = {"fp32": torch.float32, "bf16": torch.bfloat16, None: "auto"}[precision]
        trust = trust_remote_code or is_our_code(folder)
        if (folder / "adapter_config.json").is_file():
            self.model, self.folder = _load_peft(folder, base, dtype)
        else:
            self.model, self.folder = load_exported(folder, dtype, trust_remote_code=trust), folder
        # plainly greedy, as the run answers: no penalties that the folder may name
        self.model.generation_config = GenerationConfig()
        config = self.model.config
        if getattr(config, "image_token_id", None) is None:
            raise ConfigError(f"{folder} is no LLaVA: its config names no image token")
        self.image_token_id = config.image_token_id
        self.places_per_image = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        self.max_length = config.text_config.max_position_embeddings
        self.tokenizer = _tokenizer(self.folder, trust_remote_code=trust)
        self._stop_ids = conversation.stop_ids(self.tokenizer, self.folder)

    def answer(self, prompt: torch.Tensor, pixels: torch.Tensor, max_new_tokens: int) -> list[int]:
        import torch

        tokens = self.model.generate(
            input_ids=prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            # given as None it is taken for an image
            **({"pixel_values": pixels.to(self.model.dtype)} if len(pixels) else {}),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=min(self._stop_ids),
        )[0, len(prompt) :].tolist()
        return [token for token in tokens if token not in self._stop_ids]


def _open(args: argparse.Namespace) -> Model:
    folder: Path = args.model
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    is_ours = any((folder / name).exists() for name in ("model.json", "state.json", "checkpoints", "adapter.yaml"))
    if is_ours:
        from mole_mega.checkpoint.trained import find_trained

        return MegatronModel(find_trained(folder, args.base), args.precision, args.source)
    if args.source is not None:
        raise ConfigError(f"--source {args.source}: {folder} is an export, none of which routes by task")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"{folder} is neither a run, a step or a base nor an exported folder with a config.json")
    return ExportedModel(folder, args.base, args.precision, trust_remote_code=args.trust_remote_code)


def _domain(trained: Trained, source: str | None) -> int:
    """Which of a run's sources a question is like. Only experts that serve a task each need to know."""
    adapter = trained.adapter
    routes_by_task = adapter is not None and adapter.method == "mole" and adapter.router_scope == "task"
    names = [entry.name for entry in trained.run.data.sources] if routes_by_task else []
    if source is None and not routes_by_task:
        return 0
    if source not in names:
        given = "no --source was given" if source is None else f"--source {source} is none of them"
        knows = f"has an expert for each of {', '.join(names)}" if routes_by_task else "does not route by task"
        raise ConfigError(f"{trained.step or trained.base} {knows}; {given}")
    return names.index(source)


def _load_peft(folder: Path, base: Path | None, dtype: Any) -> tuple[Any, Path]:
    """(model, the base's folder): the base is a Hugging Face folder, or one of ours."""
    from mole_mega.checkpoint.files import folder_hash
    from mole_mega.convert.folders import load_adapter, load_base, load_exported
    from mole_mega.convert.provenance import base_hash

    named = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    base = base or Path(named or "")
    if not (base / "config.json").is_file():
        which = f"an adapter on {named!r}, which is no folder here" if named else "an adapter that names no base"
        raise ConfigError(f"{folder} is {which}; say where it is with --base")
    if (base / "model.json").is_file():
        named, found = base_hash(folder), folder_hash(base)
        if named is not None and named != found:
            raise ConfigError(f"{folder} is an adapter on a base with hash {named}; {base} has {found}")
        model = load_base(base)
        model = model if dtype == "auto" else model.to(dtype)
    else:
        model = load_exported(base, dtype)
    return load_adapter(model, folder), base


def _tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} holds no usable tokenizer: {' '.join(str(error).split())[:300]}") from error


if __name__ == "__main__":
    sys.exit(main())
