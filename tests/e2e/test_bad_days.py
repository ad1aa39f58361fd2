"""What goes wrong outside of the program: full disks, damaged and hostile files, numbers that are not finite, typing
errors. Each is found, said in one line with a way on, and ends with the exit code promised for it (DESIGN 5)."""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import commands
import pytest
import safetensors.torch
import torch
from commands import limit_file_size, read_checkpoint, read_rows
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mole_mega.checkpoint import files
from mole_mega.checkpoint.store import complete_checkpoints
from mole_mega.platform.launch import launch

INPUT_ERROR, CHECK_FAILED, STOPPED_ITSELF, STOPPED_ON_SIGNAL, INTERRUPTED = 2, 3, 4, 75, 130


def error_line(code, text):
    """The one line that says what is wrong, when that is why a command ended."""
    assert code == INPUT_ERROR, text
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    return errors[0]


@pytest.fixture(scope="module")
def trained(make_run, tmp_path_factory):
    """The folder of a run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("trained")
    run = make_run(folder, train={"steps": 2}, checkpoint={"every": 1})
    code, text = commands.run([run], folder / "log")
    assert code == 0, text
    return folder / "run"


@pytest.fixture
def start_again(trained, write_run, tmp_path):
    """start_again(damage, *overrides): copy the trained run, damage(its newest checkpoint), go on: (code, text)."""

    def start(damage=None, *overrides, nproc=1, prepare=None):
        run_dir = tmp_path / "run"
        shutil.copytree(trained, run_dir)
        if damage is not None:
            damage(run_dir / "checkpoints" / "step_2")
        before = read_rows(run_dir)
        run = write_run(train={"steps": 4}, checkpoint={"every": 2})
        code, text = commands.run([run, *overrides], tmp_path / "log", nproc, prepare)
        if code == INPUT_ERROR:
            assert read_rows(run_dir)[:2] == before
        return code, text

    return start


# --- the disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint_and_names_it(start_again, tmp_path):
    line = error_line(*start_again(prepare=partial(limit_file_size, 300_000, 0)))
    checkpoints = tmp_path / "run/checkpoints"
    assert f"saving {checkpoints}/step_4 failed" in line
    assert "File too large (" in line
    assert "MiB free on its disk" in line
    assert f"Last good checkpoint: {checkpoints}/step_2" in line
    for path in complete_checkpoints(checkpoints):
        files.verify(path)
    assert (checkpoints / "latest").read_text() == "step_2\n"
    # with room again, the same command goes on, and takes the remains away
    run = tmp_path / "run.yaml"
    code, text = commands.run([run], tmp_path / "log")
    assert code == 0, text
    assert "going on after step 2" in text
    assert {path.name for path in checkpoints.iterdir()} == {"step_2", "step_4", "latest"}


def small_disk(folder, size, rank):
    """For `prepare`: a real disk of so many bytes at `folder`, which this process alone sees."""
    os.unshare(os.CLONE_NEWNS)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)


def can_mount():
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


# one checkpoint takes 2.1 MB: the second, in the middle of its tensors and at their end
@pytest.mark.parametrize("size", [2_500_000, 3_400_000, 4_000_000])
@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_disk_that_is_really_full_is_told_as_that(write_run, trained, tmp_path, size):
    checkpoints = tmp_path / "run/checkpoints"
    run = write_run(train={"steps": 4}, checkpoint={"every": 2})
    line = error_line(*commands.run([run], tmp_path / "log", prepare=partial(small_disk, checkpoints, size)))
    found = re.fullmatch(
        rf"error: saving {checkpoints}/step_4 failed: the disk is full: (.*) MiB free where about (.*) MiB are needed. "
        rf"Last good checkpoint: {checkpoints}/step_2",
        line,
    )
    assert found, line
    free, needed = map(float, found.groups())
    step = sum(path.stat().st_size for path in (trained / "checkpoints/step_2").iterdir())
    assert free < needed == pytest.approx(step / 2**20, rel=0.05)
    assert free == pytest.approx((size - step) / 2**20, abs=0.1)


def fail_after_the_tensors(on_rank, rank):
    """For `prepare`: what one rank writes by itself, after all have written their tensors, finds the disk full."""

    def fail(*_):
        raise OSError(27, "File too large")

    if rank == on_rank == 0:
        files.publish = fail
    elif rank == on_rank:
        safetensors.torch.save = fail


@pytest.mark.parametrize(
    "prepare",
    [partial(limit_file_size, 200_000, 1), partial(fail_after_the_tensors, 1), partial(fail_after_the_tensors, 0)],
    ids=["tensors", "generator state", "manifest"],
)
def test_a_disk_that_fails_on_one_rank_ends_all_ranks(write_run, tmp_path, prepare):
    run = write_run(parallel={"expert": 2}, train={"steps": 1})
    command = commands.start([run], tmp_path / "log", 2, prepare)
    for process in command.processes:
        process.join(60)
    assert [process.exitcode for process in command.processes] == [INPUT_ERROR] * 2, command.text
    assert "step_1 failed" in command.text
    assert "File too large" in command.text
    assert "Last good checkpoint: none" in command.text
    assert not complete_checkpoints(tmp_path / "run/checkpoints")


def without_compiler(cache, rank):
    os.environ.update({"PATH": "", "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(cache)})


def test_a_machine_without_a_compiler_trains(write_run, tmp_path):
    prepare = partial(without_compiler, tmp_path / "cache")
    code, text = commands.run([write_run(train={"steps": 1})], tmp_path / "log", prepare=prepare)
    assert code == 0, text


# --- damaged and hostile files --------------------------------------------------------------------------------------


def shard(folder):
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def cut_short(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def alter(folder):
    path = shard(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_shard(folder):
    shard(folder).unlink()


def remove_manifest(folder):
    (folder / files.MANIFEST).unlink()


def spoil_manifest(folder):
    (folder / files.MANIFEST).write_text("{")


def add_file(folder):
    (folder / "extra.bin").write_bytes(b"x")


DAMAGES = {
    cut_short: "bytes, its manifest says",
    alter: "was altered",
    remove_shard: "cannot be read",
    remove_manifest: "is not a complete checkpoint",
    spoil_manifest: "cannot be read as a manifest",
    add_file: "is not in the manifest",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_found_before_training(start_again, damage):
    code, text = start_again(damage)
    line = error_line(code, text)
    assert DAMAGES[damage] in line
    assert "step_2" in line
    assert "step 3/" not in text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_base_is_found_before_training(base, write_run, tmp_path, damage):
    shutil.copytree(base, tmp_path / "base")
    damage(tmp_path / "base")
    code, text = commands.run([write_run(model={"base": str(tmp_path / "base")})], tmp_path / "log")
    line = error_line(code, text)
    assert DAMAGES[damage] in line
    assert str(tmp_path / "base") in line
    assert "step 1/" not in text


def seal(folder):
    """Make the manifest agree with what the folder holds, as somebody who means ill would."""
    (folder / files.MANIFEST).unlink()
    final = folder.with_name("sealed")
    files.publish(folder, final)
    final.rename(folder)


def test_another_base_than_asked_for_is_refused(base, start_again, write_run, tmp_path):
    line = error_line(*commands.run([write_run(model={"base": str(base), "base_hash": "ab12"})], tmp_path / "log"))
    assert "ab12" in line
    assert files.folder_hash(base) in line
    # and so is going on from a checkpoint on another base
    other = tmp_path / "other"
    shutil.copytree(base, other)
    shutil.copyfile(base / "tokenizer.json", other / "added_tokens_copy.json")
    seal(other)
    assert files.folder_hash(other) != files.folder_hash(base)
    line = error_line(*start_again(None, f"model.base={other}"))
    assert files.folder_hash(other) in line
    assert files.folder_hash(base) in line


class Malice:
    """Unpickling it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoints_metadata_is_refused_and_does_not_run(start_again, tmp_path):
    marker = tmp_path / "ran"

    def damage(folder):
        (folder / ".metadata").write_bytes(pickle.dumps(Malice(marker)))
        seal(folder)

    line = error_line(*start_again(damage))
    assert ".metadata does not hold checkpoint metadata" in line
    assert "not allowed" in line
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malice(marker)))
    assert marker.exists()  # it would have run


def test_code_in_a_checkpoints_objects_is_refused_and_does_not_run(start_again, tmp_path):
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Malice(marker), buffer)

    def damage(folder):
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        (index,) = (i for i in metadata.storage_data if is_object(metadata, i))
        info = metadata.storage_data[index]
        target = folder / info.relative_path
        info.offset, info.length = target.stat().st_size, buffer.getbuffer().nbytes
        with open(target, "ab") as file:
            file.write(buffer.getvalue())
        path.write_bytes(pickle.dumps(metadata))
        seal(folder)

    def is_object(metadata, index):
        return isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)

    assert "holds an object that is not plain data" in error_line(*start_again(damage))
    assert not marker.exists()


# --- numbers that are not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [({}, 1, False), ({"expert": 2}, 2, True), ({"pipeline": 2}, 2, False)])
def test_a_run_whose_loss_is_no_number_stops_itself_and_names_the_last_good_checkpoint(write_run, tmp_path, layout):
    parallel, nproc, distributed = layout
    train = {"steps": 20, "max_bad_steps": 3, "warmup_steps": 0, "distributed_optimizer": distributed}
    train |= {"global_batch_size": 4, "micro_batch_size": 2}
    good = write_run(parallel=parallel, train=train | {"steps": 2}, checkpoint={"every": 2})
    assert commands.run([good], tmp_path / "log", nproc)[0] == 0
    bad = write_run(parallel=parallel, train=train | {"lr": 1e30}, checkpoint={"every": 2})
    code, text = commands.run([bad], tmp_path / "log", nproc)
    assert code == STOPPED_ITSELF, text
    rows = read_rows(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert "NOT FINITE, step skipped" in text
    assert "stopped: 3 steps in a row" in text
    assert f"Last good checkpoint: {tmp_path}/run/checkpoints/step_2" in text
    (newest,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(newest).values())


@pytest.mark.parametrize("layout", [({}, 1, False), ({"expert": 2}, 2, True)])
@pytest.mark.parametrize("steps", [2, 9])
def test_weights_that_are_no_numbers_are_not_saved_and_stop_the_run(write_run, tmp_path, layout, steps):
    """The step's own loss and gradient are fine. Also at the last step, which is then not done."""
    parallel, nproc, distributed = layout
    train = {"steps": steps, "warmup_steps": 0, "distributed_optimizer": distributed}
    run = write_run(parallel=parallel, train=train, checkpoint={"every": 1})
    code, text = commands.run([run], tmp_path / "log", nproc, partial(spoil_a_weight_after, 2, nproc - 1))
    assert code == STOPPED_ITSELF, text
    assert [row["skipped"] for row in read_rows(tmp_path / "run")] == [0, 0]
    weight = r"language_model\.decoder\.layers\.\S*lora\S*"
    last = re.escape(f"{tmp_path}/run/checkpoints/step_1")
    told = rf"stopped after step 2, not saved: numbers that are not finite in {weight}\. Last good checkpoint: "
    assert re.search(rf"{told}{last}\n", text), text
    assert "done" not in text
    (newest,) = complete_checkpoints(tmp_path / "run/checkpoints")
    assert (newest.name, (newest.parent / "latest").read_text()) == ("step_1", "step_1\n")
    # without what spoilt it, the same command goes on from there
    code, text = commands.run([run, "train.steps=3"], tmp_path / "log", nproc)
    assert code == 0, text
    assert "going on after step 1" in text


def spoil_a_weight_after(step, on_rank, rank):
    """For `prepare`: one number of an expert becomes infinite on one rank, behind the optimizer's back."""
    from mole_mega.training.step import Stepper

    train_step = Stepper.train_step

    def train_and_spoil(self, *args, **kwargs):
        result = train_step(self, *args, **kwargs)
        if rank == on_rank and self.applied_steps == step:
            named = self.model.module.named_parameters()
            weight = next(p for name, p in named if p.requires_grad and "lora" in name and "experts" in name)
            weight.detach().view(-1)[-1] = float("inf")
        return result

    Stepper.train_step = train_and_spoil


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(write_run, tmp_path):
    run = write_run(train={"steps": 2}, checkpoint={"every": 1})
    code, text = commands.run([run], tmp_path / "log", prepare=save_spoilt)
    assert code == 0, text
    line = error_line(*commands.run([run, "train.steps=3"], tmp_path / "log"))
    assert f"{tmp_path}/run/checkpoints/step_2 holds numbers that are not finite, in language_model" in line


def save_spoilt(rank):
    """For `prepare`: a weight that is no number, and a version that saves it."""
    from mole_mega.checkpoint import store

    store.not_finite = lambda model: []
    spoil_a_weight_after(2, 0, rank)


def test_the_last_good_checkpoint_is_doubted_where_no_step_after_it_was_good(write_run, tmp_path):
    run = write_run(train={"steps": 9, "max_bad_steps": 2}, checkpoint={"every": 1})
    code, text = commands.run([run], tmp_path / "log", prepare=partial(spoil_steps, (3, 4)))
    assert code == STOPPED_ITSELF, text
    checkpoints = tmp_path / "run/checkpoints"
    assert f"Last good checkpoint: {checkpoints}/step_2\n" in text
    doubt = (
        f"no step after step_2 was good: if none is when the same command goes on from it, remove it and {checkpoints}"
    )
    assert f"{doubt}/latest to go on from step_1\n" in text
    shutil.rmtree(checkpoints / "step_2")
    (checkpoints / "latest").unlink()
    code, text = commands.run([run, "train.steps=3"], tmp_path / "log")
    assert code == 0 and "going on after step 1" in text


def test_a_bad_step_is_skipped_counted_and_forgotten_after_a_good_one(write_run, tmp_path):
    run = write_run(train={"steps": 5, "max_bad_steps": 2}, checkpoint={"every": 1, "keep": 9})
    code, text = commands.run([run], tmp_path / "log", prepare=partial(spoil_steps, (2, 4)))
    assert code == 0, text
    assert [row["skipped"] for row in read_rows(tmp_path / "run")] == [0, 1, 0, 1, 0]
    saved = complete_checkpoints(tmp_path / "run/checkpoints")
    # not after a bad step: a step that may be the first of many is no good place to go on from
    assert [path.name for path in saved] == ["step_1", "step_3", "step_5"]
    states = [json.loads((path / "state.json").read_text()) for path in saved]
    assert [state["applied_steps"] for state in states] == [1, 2, 3]


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_whose_last_steps_were_skipped_is_not_done_and_names_the_last_good_checkpoint(write_run, tmp_path, every):
    run = write_run(train={"steps": 3, "max_bad_steps": 9}, checkpoint={"every": every})
    code, text = commands.run([run], tmp_path / "log", prepare=partial(spoil_steps, (2, 3)))
    assert code == STOPPED_ITSELF, text
    assert "done" not in text
    assert "stopped after step 3, not saved: the last 2 steps had a loss or gradient that is not finite" in text
    last = f"{tmp_path}/run/checkpoints/step_1" if every else "none"
    assert f"Last good checkpoint: {last}\n" in text
    # without what spoilt them, the same command goes on
    code, text = commands.run([run], tmp_path / "log")
    assert code == 0, text
    assert "done: 3 steps, last checkpoint at step 3" in text


def test_a_signal_at_a_skipped_step_promises_no_checkpoint_of_it(write_run, tmp_path):
    run = write_run(train={"steps": 3, "max_bad_steps": 9})
    code, text = commands.run([run], tmp_path / "log", prepare=spoil_and_stop_at_the_first_step)
    assert code == STOPPED_ON_SIGNAL, text
    assert "stopped on a signal after step 1, skipped; last good checkpoint: none: run the same" in text


def spoil_and_stop_at_the_first_step(rank):
    spoil_steps((1,), rank)
    commands.terminate_before_step(1, 0, rank)


def spoil_steps(steps, rank):
    from mole_mega.data.loader import Loader

    read = Loader.micro_batches

    def read_spoilt(self, position, *args, **kwargs):
        batches = read(self, position, *args, **kwargs)
        if position + 1 in steps:
            next(batch.pixels for batch in batches if len(batch.pixels)).fill_(float("nan"))
        return batches

    Loader.micro_batches = read_spoilt


# --- what the user typed --------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": (["adapter.colour=3"], 1, "unknown config key adapter.colour; the nearest valid key is adapter."),
    "misspelt key": (["train.micro_batchsize=1"], 1, "train.micro_batchsize; the nearest valid key is train.micro_bat"),
    "misspelt section": (["paralel.tensor=2"], 1, "unknown config key paralel; the nearest valid key is parallel"),
    "no number": (["train.steps=many"], 1, "train.steps must be int, got 'many'"),
    "no such gate": (["adapter.gate=soft"], 1, "must be one of none, prob, straight_through, dense; got 'soft'"),
    "world": (["parallel.tensor=2"], 3, "3 processes do not divide into tensor 2"),
    "layers a stage": (["parallel.pipeline=3"], 3, "parallel.pipeline 3 does not divide the decoder's 4 layers"),
    "heads": (["parallel.tensor=3"], 3, "parallel.tensor 3 does not divide the decoder's heads, 8"),
    "experts": (["parallel.expert=3"], 3, "adapter.num_experts 4 does not divide over parallel.expert 3"),
    "expert ranks": (["parallel.expert=4"], 2, "parallel.expert 4 does not divide the 2 data-parallel ranks"),
    "batch": ([], 3, "train.global_batch_size 4 is not a multiple of train.micro_batch_size 2 x 3"),
    "length": (["data.max_length=9999"], 1, "data.max_length 9999 exceeds the base's context of 512"),
    "layer": (["adapter.layers=[1, 7]"], 1, "adapter.layers names layer 7; the decoder has layers 0 to 3"),
    "no base": (["model.base=nowhere"], 1, "nowhere is not a complete checkpoint"),
    "no such source": (["data.sources.vqa.weight=1"], 1, "'vqa' is not an index below 2, nor a name of mixed, text"),
    "weight": (
        ["data.sources.text.weight=.nan"],
        1,
        "sources[1].weight must be a finite number or a list, got nan",
    ),
    "schedule": (
        ["data.sources.text.weight=[[5, 1], [5, 2]]"],
        1,
        "'text': the steps of a schedule must be whole, from",
    ),
    "passes": (
        ["train.steps=8", "data.sources.mixed.epochs=1", "data.sources.text.epochs=1"],
        1,
        "run out after 29 samples (mixed 1 x 20 rows, text 1 x 9 rows): 7 of 8 steps of 4 are possible",
    ),
    "no data": (["data.sources.0.path=nowhere.json"], 1, "nowhere.json does not exist"),
    # before the base is looked at
    "no place": (["run_dir=/dev/null/run", "model.base=nowhere"], 1, "run_dir: /dev/null is a file, not a folder that"),
}


def test_a_run_does_not_start_from_an_older_step_than_the_latest(trained, write_run, tmp_path):
    source = shutil.copytree(trained, tmp_path / "source")
    run = write_run(train={"steps": 1}, checkpoint={"init_from": str(source)})
    (source / "checkpoints/step_2/manifest.json").unlink()
    line = error_line(*commands.run([run], tmp_path / "log"))
    assert "step_2 is not a complete checkpoint, yet" in line and "latest names it" in line
    (source / "checkpoints/latest").unlink()
    code, text = commands.run([run], tmp_path / "log")
    assert code == 0 and f"starting from the adapters of {source}/checkpoints/step_1" in text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_started(write_run, tmp_path, mistake):
    overrides, nproc, message = MISTAKES[mistake]
    code, text = commands.run([write_run(), *overrides], tmp_path / "log", nproc)
    line = error_line(code, text)
    assert message in line
    assert [text_line for text_line in text.splitlines() if text_line != line] == []
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def evaluate(trained, base, make_run, data, tmp_path_factory):
    """evaluate(*arguments) scores the trained run's newest checkpoint: (code, text)."""
    folder = tmp_path_factory.mktemp("evaluate")
    validation = [{"name": "text", "path": str(data / "text.json")}]
    sources = {"sources": validation, "validation": validation}
    run = make_run(folder, data=sources, validation={"samples": 2})

    def run_it(*arguments):
        return commands.run([run, f"run_dir={trained}", *arguments], folder / "log", module="mole_mega.evaluate")

    return run_it


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("adapter.method", "lora", "mole"),
        ("adapter.num_experts", 2, 4),
        ("adapter.rank", 2, 4),
        ("adapter.alpha", 16.0, 8.0),
        ("adapter.gate", "none", "prob"),
        ("adapter.router_bias", False, True),
        ("adapter.attention", False, True),
        ("adapter.layers", (0, 2), "all"),
        ("train.projector", False, True),
    ],
)
def test_a_checkpoint_is_not_scored_as_what_it_is_not(evaluate, key, value, old):
    typed = {"(0, 2)": "[0, 2]"}.get(str(value), str(value))
    line = error_line(*evaluate(f"{key}={typed}"))
    assert f"step_2 was written with {key} = {old}, this run has {value}" in line


def test_a_checkpoint_is_scored_on_its_own_base_alone(evaluate, base, trained, tmp_path):
    code, text = evaluate()
    assert code == 0, text
    other = tmp_path / "other"
    shutil.copytree(base, other)
    shutil.copyfile(base / "tokenizer.json", other / "added_tokens_copy.json")
    seal(other)
    line = error_line(*evaluate(f"model.base={other}"))
    assert f"trained on a base with hash {files.folder_hash(base)}; {other} has {files.folder_hash(other)}" in line
    assert f"{base} is no step of a run: it has no state.json" in error_line(*evaluate("--checkpoint", base))
    assert "is not a complete checkpoint" in error_line(*evaluate("--checkpoint", trained))
    # what a step's own parts say is not believed if they were altered
    shutil.copytree(trained / "checkpoints/step_2", tmp_path / "step_2")
    (tmp_path / "step_2/state.json").write_text("{")
    assert "step_2/state.json does not say" in error_line(*evaluate("--checkpoint", tmp_path / "step_2"))


def test_the_command_line_itself_says_one_line_and_exits_2(write_run):
    """The real command, which sees the mistake before it starts processes."""
    command = [Path(sys.executable).with_name("mole-mega"), "train", write_run(), "--nproc", "2", "train.step=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == INPUT_ERROR
    assert result.stderr == "error: unknown config key train.step; the nearest valid key is train.steps\n"
    assert result.stdout == ""


def test_under_torchrun_an_error_that_all_ranks_meet_is_said_once(base, write_run, tmp_path):
    """The real command line, torchrun included."""
    shutil.copytree(base, tmp_path / "base")
    alter(tmp_path / "base")
    run = write_run(model={"base": str(tmp_path / "base")})
    command = [Path(sys.executable).with_name("mole-mega"), "train", run, "--nproc", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == INPUT_ERROR, result.stderr
    errors = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1, result.stderr
    assert "was altered" in errors[0]
    assert "Traceback" not in result.stderr


def test_under_torchrun_a_run_directory_that_one_rank_cannot_write_is_said_once(write_run):
    """The real command line again: once training has begun, SIGTERM means to save, not to end."""
    command = [Path(sys.executable).with_name("mole-mega"), "train", write_run(), "--nproc", "2", "run_dir=/proc/x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == INPUT_ERROR, result.stderr
    (line,) = result.stderr.splitlines()
    assert line == "error: run_dir: /proc/x cannot be written to: No such file or directory"


@contextlib.contextmanager
def launcher(run, log):
    """The real command of examples/cluster on two processes, which is what `--nproc 2` does; (it, what it said)."""
    command = [sys.executable, "-m", "mole_mega.platform.launch", "--standalone", "--nproc-per-node", "2"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "-m", "mole_mega.train", run], stdout=file, stderr=file, preexec_fn=commands.heed_interrupts
        )
    try:
        yield process, log.read_text
    finally:
        process.kill()


def wait_for_text(text, said):
    for _ in range(600):
        if text in said():
            return
        time.sleep(0.2)
    raise AssertionError(said())


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, STOPPED_ON_SIGNAL), (signal.SIGUSR1, STOPPED_ON_SIGNAL), (signal.SIGINT, INTERRUPTED)],
)
def test_the_launcher_passes_a_signal_on_and_ends_with_the_code_that_says_so(write_run, tmp_path, number, code):
    """torchrun's own command would end with 1."""
    with launcher(write_run(train={"steps": 10_000}), tmp_path / "log") as (process, said):
        wait_for_text("step 2/", said)
        process.send_signal(number)
        assert process.wait(timeout=120) == code, said()
    step = max(int(found.name.removeprefix("step_")) for found in complete_checkpoints(tmp_path / "run/checkpoints"))
    saved = f"{tmp_path / 'run/checkpoints'}/step_{step}"
    why = "by Ctrl-C" if number == signal.SIGINT else "on a signal"
    assert step >= 2 and f"stopped {why} after step {step}, saved in {saved}: run the same" in said()
    assert "Traceback" not in said()


def test_a_second_ctrl_c_reaches_the_processes_of_the_launcher(write_run, tmp_path):
    """In the middle of a step that takes minutes."""
    run = write_run(train={"steps": 2, "global_batch_size": 20_000})
    with launcher(run, tmp_path / "log") as (process, said):
        wait_for_text("prompts:", said)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        wait_for_text("Ctrl-C: saving and stopping after this step", said)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == INTERRUPTED, said()
    assert "step 1/" not in said() and "Traceback" not in said()
    assert not complete_checkpoints(tmp_path / "run/checkpoints")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, STOPPED_ON_SIGNAL),
        (signal.SIGUSR1, STOPPED_ON_SIGNAL),
        (signal.SIGINT, INTERRUPTED),
        (signal.SIGHUP, 128 + signal.SIGHUP),
    ],
)
def test_only_a_signal_that_saves_ends_the_launcher_with_the_code_that_promises_it(monkeypatch, number, code):
    def run(args):
        raise SignalException("told to stop", number)

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert launch("mole_mega.train", [], 2) == code


@pytest.mark.parametrize(
    ("number", "code", "why"),
    [
        (signal.SIGKILL, STOPPED_ITSELF, " (so the system ends what takes too much memory)"),
        (signal.SIGSEGV, STOPPED_ITSELF, ""),
        (signal.SIGTERM, STOPPED_ON_SIGNAL, ""),
    ],
)
def test_a_process_that_a_signal_ended_is_named(monkeypatch, capsys, number, code, why):
    def run(args):
        raise ChildFailedError("train", {3: ProcessFailure(local_rank=1, pid=4242, exitcode=-number, error_file="")})

    monkeypatch.setattr("torch.distributed.run.run", run)
    assert launch("mole_mega.train", [], 2) == code
    assert capsys.readouterr().err == f"error: rank 3, process 4242, was ended by {number.name}{why}\n"


def test_the_launcher_has_processes_meet_where_those_that_it_starts_again_can(monkeypatch):
    name, seen = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", []
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.run.run", lambda args: seen.append(os.environ.get(name)))
    assert launch("mole_mega.train", [], 2) == 0
    assert seen == ["1"] and name not in os.environ
