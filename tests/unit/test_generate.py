"""A run and every export of it give one answer, token for token, and what cannot be asked is told in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from trained_llava import save_step, train
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from mole_mega import generate
from mole_mega.checkpoint.trained import find_trained
from mole_mega.config import AdapterConfig
from mole_mega.convert.hf_export import export_merged
from mole_mega.convert.hf_import import import_hf
from mole_mega.convert.mole_folder import MODELING_FILE, export_mole
from mole_mega.convert.peft import export_peft
from mole_mega.data import conversation

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "base_hf"
ADAPTERS = {
    "experts": AdapterConfig(num_experts=3, rank=4, alpha=8.0),
    "gate none": AdapterConfig(num_experts=3, rank=4, alpha=8.0, gate="none"),
    "gate straight_through": AdapterConfig(num_experts=3, rank=4, alpha=8.0, gate="straight_through"),
    "one expert": AdapterConfig(num_experts=1, rank=4, alpha=8.0),
}
EXPORTS = {"mole": export_mole, "merged": export_merged, "peft": export_peft}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory, monkeypatch):
    """transformers copies a folder's code into a cache of its own before it runs it."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder))


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """The example's model in fp32: rounding would tell the sides of a comparison apart."""
    folder = tmp_path_factory.mktemp("hf") / "hf"
    LlavaForConditionalGeneration.from_pretrained(EXAMPLE, dtype=torch.float32).save_pretrained(folder)
    for path in EXAMPLE.iterdir():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def models(hf, alone, tmp_path_factory) -> dict[str, Path]:
    """{what: folder}: a base, a run of each adapter, and its exports."""
    folder = tmp_path_factory.mktemp("models")
    import_hf(hf, folder / "base")
    made = {"base": folder / "base", "hf": hf}
    for name, adapter in ADAPTERS.items():
        made[f"{name}: run"] = folder / name / "run"
        trained, model = train(folder / "base", folder / name / "start", alone, adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.requires_grad else 1)  # far from the example's few and short answers
        save_step(model, trained.run, folder / "base", folder / name / "run" / "checkpoints" / "step_1")
        trained = find_trained(folder / name / "run")
        for format, export in EXPORTS.items():
            if name == "one expert" or format == "mole":
                made[f"{name}: {format}"] = folder / name / format
                export(trained, folder / name / format)
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / "red.png", folder / "wide.jpg"]
    Image.new("RGB", (40, 60), (220, 30, 20)).save(paths[0])
    Image.linear_gradient("L").resize((90, 50)).convert("RGB").save(paths[1])
    return paths


@pytest.fixture
def ask(hf, models, capsys):
    """ask(model, *arguments) -> (exit code, what was printed, what went to standard error)."""

    def ask(model: str | Path, *arguments: object) -> tuple[int, str, str]:
        folder = models.get(model, model)
        base = ["--base", hf] if str(model).endswith("peft") else []
        code = generate.main([str(a) for a in ("--model", folder, *base, *arguments)])
        return code, *capsys.readouterr()

    return ask


@pytest.fixture
def tokens_of(ask):
    def tokens_of(model: str | Path, *arguments: object) -> list[int]:
        code, out, err = ask(model, "--json", "--max-new-tokens", 12, *arguments)
        assert code == 0, err
        return json.loads(out)["tokens"]

    return tokens_of


def refused(answer: tuple[int, str, str], says: str) -> None:
    code, out, err = answer
    assert (code, out) == (2, "")
    assert says in err and err.startswith("error: ") and err.count("\n") == 1


# ---- one answer


QUESTIONS = {
    "no image": ("What is 2 plus 3?", 0),
    "an image in front": ("What is it?", 1),
    "an image where the prompt says": ("Here <image> it is: what colour?", 1),
    "two images": ("Which is wider?", 2),
    "two images apart": ("<image> or <image>", 2),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("name", ["", *ADAPTERS])
def test_a_run_and_its_exports_give_one_answer(name, question, models, pictures, tokens_of):
    prompt, count = QUESTIONS[question]
    arguments = ["--prompt", prompt, *(word for path in pictures[:count] for word in ("--image", path))]
    sides = [side for side in models if side.startswith(name + ":")] or ["base", "hf"]
    assert len(sides) == {"one expert": 4}.get(name, 2)
    answers = {side: tokens_of(side, *arguments) for side in sides}
    first = answers[sides[0]]
    assert len(set(first)) > 1 or name.startswith("gate"), first
    assert all(answer == first for answer in answers.values()), answers


def test_the_answer_depends_on_model_prompt_and_image(models, pictures, tokens_of):
    def answer(side, prompt="What is it?", picture=pictures[0]):
        return tuple(tokens_of(side, "--prompt", prompt, "--image", picture))

    sides = ("base", *(f"{name}: run" for name in ADAPTERS))
    answers = {*map(answer, sides), answer(sides[1], picture=pictures[1]), answer(sides[1], "Read <image> to me.")}
    assert len(answers) == len(sides) + 2 - 1  # gates none and straight_through compute the same


def test_an_image_in_front_is_one_that_the_prompt_marks_there(pictures, tokens_of):
    answers = [
        tokens_of("experts: mole", "--image", pictures[0], "--prompt", prompt)
        for prompt in ("What?", "<image>\nWhat?", "What?<image>")
    ]
    assert answers[0] == answers[1] != answers[2]


def test_without_json_the_text_is_printed(ask, models, tokens_of):
    question = ["--prompt", "What is 2 plus 3?", "--max-new-tokens", 12]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    expected = tokenizer.decode(tokens_of("experts: run", *question), skip_special_tokens=True).strip()
    assert ask("experts: run", *question)[:2] == (0, expected + "\n")


@pytest.mark.parametrize("side", ["one expert: run", "one expert: mole", "one expert: peft"])
def test_the_answer_ends_before_a_stop_token(side, tokens_of, monkeypatch):
    whole = tokens_of(side, "--prompt", "What is it?")
    stop = whole[5]
    monkeypatch.setattr(conversation, "stop_ids", lambda *_: frozenset({stop}))
    assert tokens_of(side, "--prompt", "What is it?") == whole[: whole.index(stop)]


@pytest.mark.parametrize(("named", "more"), [(7, {7}), ([7, 8], {7, 8}), (None, set())], ids=str)
def test_the_tokenizer_and_the_generation_config_say_what_stops(named, more, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert conversation.stop_ids(tokenizer, tmp_path) == {2, *more}


def test_a_precision_that_is_asked_for_is_that_of_both(models, tokens_of, monkeypatch):
    seen = []
    for kind in (generate.MegatronModel, generate.ExportedModel):

        def answer(self, *args, answer=kind.answer):
            seen.append({p.dtype for name, p in self.model.named_parameters() if ".router." not in name})
            return answer(self, *args)

        monkeypatch.setattr(kind, "answer", answer)
    for side in ("experts: run", "experts: mole", "one expert: merged"):
        tokens_of(side, "--precision", "bf16", "--prompt", "What?")
        tokens_of(side, "--prompt", "What?")
    assert seen == [{torch.bfloat16}, {torch.float32}] * 3


# ---- refused


def test_a_prompt_and_images_that_do_not_fit_are_refused(ask, pictures):
    for arguments, says in (
        (["--prompt", "<image>?"], "the prompt marks 1 images with <image>, given 0"),
        (["--prompt", "<image>?", "--image", pictures[0], "--image", pictures[1]], "marks 1 images"),
        (["--prompt", "?", "--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["--prompt", "so " * 300, "--max-new-tokens", "300"], "places exceed the context of 512"),
    ):
        refused(ask("experts: mole", *arguments), says)


def test_the_context_counts_the_places_of_images_and_of_the_answer(ask, pictures, models):
    code, _, err = ask("experts: run", "--prompt", "?", "--image", pictures[0], "--max-new-tokens", 512)
    assert code == 2
    prompt_length = int(err.split("prompt ")[1].split()[0])
    assert 36 < prompt_length < 80
    fits = ["--prompt", "?", "--image", pictures[0], "--max-new-tokens"]
    refused(ask("experts: run", *fits, 512 - prompt_length + 1), "exceed the context")


@pytest.mark.parametrize("kind", ["missing", "text"])
def test_an_image_that_cannot_be_read_is_named(kind, ask, tmp_path):
    path = tmp_path / "picture.png"
    if kind == "text":
        path.write_text("no picture")
    refused(ask("experts: run", "--prompt", "?", "--image", path), "picture.png")


def test_a_folder_that_is_no_model_is_refused(ask, tmp_path):
    refused(ask(tmp_path / "gone", "--prompt", "?"), "is not a folder")
    refused(ask(tmp_path, "--prompt", "?"), "is neither a run, a step or a base nor an exported folder")
    (tmp_path / "checkpoints").mkdir()
    refused(ask(tmp_path, "--prompt", "?"), "no run with a complete checkpoint")


def test_a_folder_without_a_tokenizer_is_refused(ask, models, tmp_path):
    shutil.copytree(models["hf"], tmp_path / "hf")
    for path in tmp_path.glob("hf/tokenizer*"):
        path.unlink()
    refused(ask(tmp_path / "hf", "--prompt", "?"), "holds no usable tokenizer")


def test_an_adapter_whose_base_is_not_there_is_refused(models, ask, tmp_path):
    shutil.copytree(models["one expert: peft"], tmp_path / "adapter")
    refused(ask(tmp_path / "adapter", "--prompt", "?"), "is an adapter that names no base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/llava"}))
    refused(ask(tmp_path / "adapter", "--prompt", "?"), "is an adapter on 'someone/llava'")
    refused(ask(tmp_path / "adapter", "--base", tmp_path, "--prompt", "?"), "say where it is with --base")


def test_an_adapter_answers_on_its_own_base_alone(models, ask, tmp_path):
    adapter = models["one expert: peft"]
    question = ["--prompt", "?", "--max-new-tokens", 1]
    assert ask(adapter, "--base", models["base"], *question)[0] == 0
    other = shutil.copytree(models["base"], tmp_path / "other")
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    refused(ask(adapter, "--base", other, *question), "is an adapter on a base with hash ")


def test_a_run_whose_base_is_not_there_is_refused(alone, hf, ask, tmp_path):
    import_hf(hf, tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run" / "checkpoints" / "step_1", alone, ADAPTERS["experts"])
    (tmp_path / "base").rename(tmp_path / "moved")
    refused(ask(tmp_path / "run", "--prompt", "?"), "say where it is with --base")
    assert ask(tmp_path / "run", "--base", tmp_path / "moved", "--prompt", "?", "--max-new-tokens", 1)[0] == 0


# ---- code that came with a folder


@pytest.fixture
def foreign(models, tmp_path) -> Path:
    """An export whose code, when it runs, leaves a file `ran` beside it."""
    folder = shutil.copytree(models["experts: mole"], tmp_path / "foreign")
    with open(folder / MODELING_FILE, "a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return folder


@pytest.mark.parametrize("also", ["model", "adapter's base", "tokenizer"])
def test_foreign_code_is_not_run(also, foreign, models, ask, tmp_path):
    model, arguments = foreign, []
    if also == "adapter's base":
        model, arguments = models["one expert: peft"], ["--base", foreign]
    if also == "tokenizer":
        config = json.loads((models["hf"] / "config.json").read_text())
        (foreign / "config.json").write_text(json.dumps(config))
        shutil.copyfile(models["hf"] / "model.safetensors", foreign / "model.safetensors")
        settings = json.loads((foreign / "tokenizer_config.json").read_text())
        code = Path(MODELING_FILE).stem
        settings |= {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": [f"{code}.Odd", None]}}
        (foreign / "tokenizer_config.json").write_text(json.dumps(settings))
    code, _, err = ask(model, *arguments, "--prompt", "?", "--max-new-tokens", 1)
    assert not (tmp_path / "ran").exists()
    assert also == "tokenizer" or (code == 2 and "--trust-remote-code" in err)


def test_foreign_code_runs_when_it_is_trusted(foreign, ask, tmp_path):
    code, _, err = ask(foreign, "--trust-remote-code", "--prompt", "?", "--max-new-tokens", 1)
    assert code == 0, err
    assert (tmp_path / "ran").exists()


def test_our_code_beside_more_code_is_foreign(models, ask, tmp_path):
    folder = shutil.copytree(models["experts: mole"], tmp_path / "more")
    assert ask(folder, "--prompt", "?", "--max-new-tokens", 1)[0] == 0
    (folder / "more.py").write_text("")
    assert ask(folder, "--prompt", "?", "--max-new-tokens", 1)[0] == 2


@pytest.mark.parametrize("model", ["hf", "experts: mole", "one expert: peft"])
@pytest.mark.parametrize("fault", ["missing", "shape", "truncated"])
def test_a_broken_folder_does_not_answer(model, fault, models, ask, tmp_path):
    """transformers fills what is missing with random numbers, and PEFT with nothing."""
    folder = shutil.copytree(models[model], tmp_path / f"{fault} peft" if "peft" in model else tmp_path / fault)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.0" in name and "gate_proj" in name)
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    refused(ask(folder, "--prompt", "?", "--max-new-tokens", 1), str(folder))


def test_penalties_of_a_folder_do_not_change_the_greedy_answer(models, tokens_of, tmp_path):
    folder = shutil.copytree(models["experts: mole"], tmp_path / "mole")
    path = folder / "generation_config.json"
    penalties = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 9.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | penalties))
    assert tokens_of(folder, "--prompt", "What?") == tokens_of("experts: run", "--prompt", "What?")
