"""A checkpoint folder is whole or not seen, unaltered or refused, and never runs code when it is read."""

import copy
import errno
import io
import json
import os
import pickle
import resource
import shutil
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from mole_mega import config
from mole_mega.checkpoint import base, files
from mole_mega.checkpoint.files import MANIFEST, CheckpointError, folder_hash, incomplete_name, publish, verify
from mole_mega.checkpoint.store import CheckpointStore, complete_checkpoints, latest_checkpoint
from mole_mega.config import AdapterConfig, DataConfig, Fp8Config, ModelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.errors import ConfigError
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import SIZES

CONTENTS = {"a.bin": b"0123456789", ".metadata": b"hidden", "empty": b""}


def write(folder: Path, contents: dict[str, bytes] = CONTENTS) -> Path:
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def published(tmp_path) -> Path:
    final = tmp_path / "step_1"
    publish(write(incomplete_name(final)), final)
    return final


# --- published folders ---


def test_a_published_folder_holds_its_files_and_a_manifest_and_nothing_else_is_left(published, tmp_path):
    assert {path.name: path.read_bytes() for path in published.iterdir() if path.name != MANIFEST} == CONTENTS
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    sizes = {name: entry["size"] for name, entry in files.read_manifest(published).items()}
    assert sizes == {name: len(data) for name, data in CONTENTS.items()}
    verify(published)


def test_publishing_over_an_old_folder_replaces_it_whole(published):
    publish(write(incomplete_name(published), {"b.bin": b"new"}), published)
    verify(published)
    assert {path.name for path in published.iterdir()} == {"b.bin", MANIFEST}
    assert [path.name for path in published.parent.iterdir()] == ["step_1"]


def test_publishing_copes_with_what_a_killed_replacement_left(published):
    write(published.parent / ".step_1.replaced")
    publish(write(incomplete_name(published), {"b.bin": b"new"}), published)
    assert [path.name for path in published.parent.iterdir()] == ["step_1"]


ALTERATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (lambda f: (f / "a.bin").write_bytes(b"0123456780"), r"a\.bin was altered"),
    "cut short": (lambda f: (f / "a.bin").write_bytes(b"012345678"), r"a\.bin has 9 bytes, its manifest says 10"),
    "emptied": (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata has 0 bytes, its manifest says 6"),
    "longer": (lambda f: (f / "empty").write_bytes(b"x"), "empty has 1 bytes, its manifest says 0"),
    "missing": (lambda f: (f / "a.bin").unlink(), r"a\.bin cannot be read: No such file"),
    "extra": (lambda f: (f / "b.bin").write_bytes(b"x"), r"b\.bin is not in the manifest"),
    "extra folder": (lambda f: (f / "more").mkdir(), "more is not in the manifest"),
    "file turned folder": (lambda f: ((f / "empty").unlink(), (f / "empty").mkdir()), "empty "),
    "renamed": (lambda f: (f / "a.bin").rename(f / "c.bin"), r"c\.bin is not in the manifest"),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_a_folder_that_is_not_as_published_is_refused_with_the_file_named(published, kind):
    alter, says = ALTERATIONS[kind]
    alter(published)
    with pytest.raises(CheckpointError, match=says):
        verify(published)


MANIFESTS = {
    "cut short": '{"a.bin": {"si',
    "not json": "\x00\x01",
    "a list": "[]",
    "not entries": '{"a.bin": 3}',
    "no hash": '{"a.bin": {"size": 10}}',
    "size as text": '{"a.bin": {"size": "10", "sha256": "x"}}',
    "null": "null",
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_manifest_that_cannot_be_read_is_refused_by_name(published, kind):
    (published / MANIFEST).write_text(MANIFESTS[kind])
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read as a manifest"):
        verify(published)


@pytest.mark.parametrize("ask", [verify, folder_hash, files.read_manifest, base.read_size])
def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path, ask):
    for folder in (write(tmp_path / "step_1"), tmp_path / "gone"):
        with pytest.raises(CheckpointError, match="is not a complete checkpoint: it has no manifest"):
            ask(folder)


def test_a_checkpoint_error_is_the_users_input():
    assert issubclass(CheckpointError, ConfigError)


# --- the hash ---


def test_equal_folders_have_equal_hashes_whenever_and_in_whatever_order_they_were_written(tmp_path):
    hashes = []
    for name, contents in (("x", CONTENTS), ("y", dict(reversed(CONTENTS.items())))):
        folder = write(tmp_path / "new" / name, contents)
        os.utime(folder / "a.bin", (0, time.time() + len(hashes)))
        hashes.append(publish(folder, tmp_path / name))
    assert hashes[0] == hashes[1] == folder_hash(tmp_path / "x") == folder_hash(tmp_path / "y")


@pytest.mark.parametrize("change", [{"a.bin": b"0123456780"}, {"more": b""}, {"empty": b"\x00"}], ids=str)
def test_another_byte_name_or_file_gives_another_hash(tmp_path, published, change):
    assert publish(write(tmp_path / "new", CONTENTS | change), tmp_path / "other") != folder_hash(published)


def test_the_hash_survives_a_copy(published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    verify(tmp_path / "copy")
    assert folder_hash(tmp_path / "copy") == folder_hash(published)


# --- incomplete folders are never seen ---


def publish_step(folder: Path, name: str) -> None:
    publish(write(incomplete_name(folder / name)), folder / name)


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        publish_step(tmp_path, f"step_{step}")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_9", "step_10", "step_100"]


def test_what_is_not_a_whole_checkpoint_is_not_seen(tmp_path):
    publish_step(tmp_path, "step_1")
    write(tmp_path / ".step_2.incomplete")  # killed while writing
    write(tmp_path / ".step_1.replaced")
    write(tmp_path / "step_3")  # no manifest
    (tmp_path / "step_4").write_text("a file")
    (tmp_path / "latest").write_text("step_9\n")
    publish_step(tmp_path, "step_5_copy")
    publish_step(tmp_path, "step_")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_1"]


def test_a_pointer_of_other_bytes_is_named(tmp_path):
    publish_step(tmp_path, "step_1")
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"latest names it; restore it, or remove .*latest to go on from step_1"):
        latest_checkpoint(tmp_path)


def test_no_folder_means_no_checkpoints(tmp_path):
    assert complete_checkpoints(tmp_path / "checkpoints") == []


class KilledError(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("step", ["_describe", "_fsync_folder"])
def test_a_kill_while_publishing_shows_no_part_of_a_checkpoint(tmp_path, monkeypatch, step):
    def kill(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr(files, step, kill)
    with pytest.raises(KilledError):
        publish_step(tmp_path, "step_1")
    assert complete_checkpoints(tmp_path) == []


def test_a_kill_between_the_renames_leaves_the_old_or_nothing_but_never_a_mixture(published, monkeypatch):
    rename, calls = Path.rename, []

    def kill_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise KilledError
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", kill_second)
        with pytest.raises(KilledError):
            publish(write(incomplete_name(published), {"b.bin": b"new"}), published)
    assert complete_checkpoints(published.parent) == []
    verify(published.parent / ".step_1.replaced")  # nothing is lost, either


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(27, "File too large"), "File too large"),
        (CheckpointingException("two\nlines"), "two lines"),
        # not even an Exception, and its own text is every rank's traceback
        (CheckpointException("", {3: (ValueError("later"), None), 1: (ValueError("first"), None)}), "first"),  # type: ignore[dict-item]
    ],
    ids=["the disk's", "Megatron-Core's", "torch's"],
)
def test_each_error_of_writing_becomes_one_line(error, says, tmp_path):
    assert files.reason(error) == says
    with (
        pytest.raises(CheckpointError, match=rf"^saving .*/x failed: {says} \([0-9.]+ MiB free on its disk\)$"),
        files.shared_disk_errors("saving", tmp_path / "x"),
    ):
        raise error


ENOSPC, EDQUOT = (OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT))
LOGGED = CheckpointingException("Local worker 0 encountered an error: [Errno 28] No space left on device")
# torch's words for a file that came out short, whatever shortened it
SHORT = CheckpointingException("Local worker 0: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 5")


@pytest.mark.parametrize(
    ("error", "needed", "says"),
    [
        (ENOSPC, 3, "the disk is full: 1.5 MiB free where about 3.0 MiB are needed"),
        (ENOSPC, 0, "the disk is full: 1.5 MiB free"),
        (LOGGED, 2, "the disk is full: 1.5 MiB free where about 2.0 MiB are needed"),
        (EDQUOT, 1, "the disk quota is used up: 1.5 MiB free where about 1.0 MiB are needed"),
        (SHORT, 3, "the disk is full: 1.5 MiB free where about 3.0 MiB are needed"),
        (SHORT, 1, f"{SHORT} (0.5 MiB free on its disk)"),
        (OSError(errno.EIO, "Input/output error"), 3, "Input/output error (0.5 MiB free on its disk)"),
    ],
)
def test_a_full_disk_is_told_as_that_with_the_room_that_there_was(error, needed, says, tmp_path, monkeypatch):
    """0.5 MiB are free beside 1 MiB that was written (`needed` is in MiB); the disk's answers are made up here."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**19))
    write(incomplete_name(tmp_path / "x"), {"a": bytes(2**19), "b": bytes(2**19)})
    with pytest.raises(CheckpointError) as caught, files.shared_disk_errors("saving", tmp_path / "x", needed * 2**20):
        raise error
    assert str(caught.value) == f"saving {tmp_path}/x failed: {says}"


# --- a real checkpoint, honest and hostile ---


def make_model(alone, *, seed: int = 0) -> LLaVA:
    run = RunConfig(
        run_dir="", model=ModelConfig(base=""), train=TrainConfig(steps=1, precision="fp32"), adapter=AdapterConfig(),
        data=DataConfig(sources=(SourceConfig(name="a", path=""),), max_length=64),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    model = LLaVA(run, SIZES["tiny"], alone, adapters=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def honest(alone, tmp_path_factory) -> Path:
    """A base checkpoint as the project writes it."""
    folder = tmp_path_factory.mktemp("honest") / "base"
    base.save_base(make_model(alone), folder)
    return folder


@pytest.fixture
def checkpoint(honest, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(honest, tmp_path / "base")


def test_an_honest_checkpoint_passes_and_loads_what_was_saved(alone, honest):
    files.verify(honest)
    files.refuse_unsafe(honest)
    saved, loaded = make_model(alone), make_model(alone, seed=1)
    base.load_base(loaded, honest)
    for name, parameter in saved.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert base.read_size(honest) == SIZES["tiny"]


def test_equal_bases_have_equal_hashes_and_another_weight_another(alone, honest, tmp_path):
    assert base.save_base(make_model(alone), tmp_path / "elsewhere") == folder_hash(honest)
    assert base.save_base(make_model(alone, seed=1), tmp_path / "other") != folder_hash(honest)


def test_a_base_is_not_written_over_a_folder_that_exists(alone, honest):
    before = folder_hash(honest)
    with pytest.raises(CheckpointError, match="base exists; choose another folder or remove it"):
        base.save_base(make_model(alone, seed=1), honest)
    assert folder_hash(honest) == before


def test_a_disk_that_fills_up_is_an_error_of_one_line_and_leaves_nothing_that_looks_whole(alone, tmp_path):
    """No file may grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"^writing .*base failed: .*$"):
            base.save_base(make_model(alone), tmp_path / "base")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == [".base.incomplete"]
    base.save_base(make_model(alone), tmp_path / "base")  # and the next attempt starts afresh
    verify(tmp_path / "base")


def test_files_that_came_with_the_weights_are_kept_and_counted(alone, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    base.save_base(make_model(alone), tmp_path / "base", [tmp_path / "tokenizer.json"])
    verify(tmp_path / "base")
    assert (tmp_path / "base" / "tokenizer.json").read_text() == "{}"
    assert "tokenizer.json" in json.loads((tmp_path / "base" / MANIFEST).read_text())


class Harmful:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path) -> Path:
    """Where harmful pickles leave a trace when they are run."""
    return tmp_path / "was_run"


def refused(alone, folder: Path, says: str) -> None:
    """Refused when checked and when loaded, even by a manifest that agrees with it."""
    (folder / MANIFEST).unlink()
    publish(folder.rename(incomplete_name(folder)), folder)
    verify(folder)
    with pytest.raises(CheckpointError, match=says):
        files.refuse_unsafe(folder)
    with pytest.raises(CheckpointError, match=says):
        base.load_base(make_model(alone), folder)


def test_the_harmful_object_does_harm_where_nobody_looks(marker):
    pickle.loads(pickle.dumps(Harmful(marker)))
    assert marker.exists()


PICKLES: dict[str, Callable[[Path, Any], Any]] = {
    "a call": lambda marker, metadata: Harmful(marker),
    "a call inside": lambda marker, metadata: setattr(metadata, "planner_data", Harmful(marker)) or metadata,
    "a call as a key": lambda marker, metadata: {Harmful(marker): metadata},
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_metadata_file_that_would_run_code_is_refused_unrun(alone, checkpoint, marker, kind, protocol):
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps(PICKLES[kind](marker, pickle.loads(path.read_bytes())), protocol=protocol))
    refused(alone, checkpoint, r"\.metadata does not hold checkpoint metadata: .* is not allowed")
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        ("builtins", "eval"), ("builtins", "getattr"), ("os", "system"), ("torch", "load"), ("torch", "ops"),
        ("torch", "nn.Module"), ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.filesystem", "pickle"), ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.planner", "operator"), ("torch.serialization", "load"),
        ("torch.distributed.checkpoint.filesystem", "uuid"), ("pathlib", "Path.unlink"),
    ],
    ids=".".join,
)  # fmt: skip
def test_names_beyond_a_checkpoints_own_are_not_reached(name):
    with pytest.raises(pickle.UnpicklingError, match="is not allowed"):
        files._MetadataUnpickler(io.BytesIO()).find_class(*name)


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({}), pickle.dumps(None), pickle.dumps([1])], ids=str
)
def test_a_metadata_file_that_is_no_metadata_is_refused(alone, checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    refused(alone, checkpoint, r"\.metadata does not hold checkpoint metadata")


def test_a_checkpoint_without_metadata_is_refused(alone, checkpoint):
    (checkpoint / ".metadata").unlink()
    refused(alone, checkpoint, r"is not a distributed checkpoint: it has no \.metadata")


def point_object_at(folder: Path, relative_path: str, offset: int, length: int) -> None:
    """Make the checkpoint's byte object be read from elsewhere."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    ((index, info),) = [(i, s) for i, s in metadata.storage_data.items() if i.fqn.startswith("common_state")]
    changed = copy.copy(info)
    changed.relative_path, changed.offset, changed.length = relative_path, offset, length
    metadata.storage_data[index] = changed
    path.write_bytes(pickle.dumps(metadata))


def save_object(value: Any, path: Path, *, as_zip: bool) -> tuple[int, int]:
    """Append an object in one of the formats that torch.load takes; (offset, length)."""
    torch.save(value, path.with_suffix(".tmp"), _use_new_zipfile_serialization=as_zip)
    data = path.with_suffix(".tmp").read_bytes()
    path.with_suffix(".tmp").unlink()
    offset = path.stat().st_size if path.exists() else 0
    with open(path, "ab") as file:
        file.write(data)
    return offset, len(data)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_a_byte_object_that_would_run_code_is_refused_unrun(alone, checkpoint, marker, as_zip):
    (part, *_) = sorted(path.name for path in checkpoint.glob("*.distcp"))
    point_object_at(checkpoint, part, *save_object([Harmful(marker)], checkpoint / part, as_zip=as_zip))
    refused(alone, checkpoint, r"distcp holds an object that is not plain data \(common_state")
    assert not marker.exists()


def test_a_byte_object_outside_the_folder_is_refused_unread(alone, checkpoint, marker):
    """With a harmless file of the same name inside, that a look at the name alone would find."""
    offset, length = save_object([Harmful(marker)], checkpoint.parent / "x.distcp", as_zip=True)
    save_object([1], checkpoint / "x.distcp", as_zip=True)
    for outside in ("../x.distcp", str(checkpoint.parent / "x.distcp"), "sub/../../x.distcp"):
        point_object_at(checkpoint, outside, offset, length)
        refused(alone, checkpoint, "which is not a file of this checkpoint")
    assert not marker.exists()


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (10**9, 10), (-5, 10), (0, 0)])
def test_a_byte_object_that_is_not_where_it_should_be_is_refused(alone, checkpoint, offset, length):
    (part, *_) = sorted(path.name for path in checkpoint.glob("*.distcp"))
    point_object_at(checkpoint, part, offset, length)
    refused(alone, checkpoint, "holds an object that is not plain data")


def test_a_part_that_is_not_there_is_refused(alone, checkpoint):
    point_object_at(checkpoint, "gone.distcp", 0, 10)
    refused(alone, checkpoint, r"gone\.distcp holds an object that is not plain data")


def test_an_altered_base_is_refused_before_it_is_unpickled(alone, checkpoint, marker):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harmful(marker)))
    with pytest.raises(CheckpointError, match=r"\.metadata has \d+ bytes, its manifest says"):
        base.load_base(make_model(alone), checkpoint)
    assert not marker.exists()


def test_a_base_of_another_size_is_refused_with_the_tensor_named(alone, honest):
    model = make_model(alone)
    layer = model.language_model.decoder.layers[0].mlp.linear_fc2
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape[0], layer.weight.shape[1] + 8))
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*linear_fc2"):
        base.load_base(model, honest)


IN_FP8 = {"model": ModelConfig(base="base", backend="transformer_engine"), "precision": "fp8"}
STORED = Fp8Config(store_base=True)


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ({}, {"fp8": STORED}, ["fp8.store_base False -> True"]),
        ({"fp8": STORED}, {"fp8": replace(STORED, scale="block")}, ["fp8.scale channel -> block"]),
        ({}, {"fp8": Fp8Config(scale="block", recipe="mxfp8", first_last_layers_bf16=True)}, []),
        (IN_FP8, IN_FP8 | {"fp8": Fp8Config(recipe="delayed")}, ["fp8.recipe tensorwise -> delayed"]),
        ({}, {"model": IN_FP8["model"]}, ["model.backend local -> transformer_engine"]),
        ({}, {"model": ModelConfig(base="elsewhere")}, []),
    ],
)  # fmt: skip
def test_a_base_that_computes_otherwise_is_said(tmp_path, first, then, told):
    """Adapters that were trained beside one base go on beside another one; what a run does not hear is not told."""
    assert store_after(tmp_path, first, then).changes_since(tmp_path) == told


def store_after(folder: Path, first: dict[str, Any], then: dict[str, Any]) -> CheckpointStore:
    """The store of a run with the sections `then`, beside the config of one with the sections `first`."""

    def run_of(precision="bf16", router_lr=None, **sections):
        source = SourceConfig(name="a", path=str(folder / "a"))
        sections = {"model": ModelConfig(base="base")} | sections
        return RunConfig(
            run_dir=str(folder), train=TrainConfig(steps=4, precision=precision, router_lr=router_lr),
            data=DataConfig(sources=(source,)), **sections,
        )  # fmt: skip

    (folder / "config.yaml").write_text(config.dump(run_of(**first)))
    return CheckpointStore(run_of(**then), None)


LORA = AdapterConfig(method="lora")
UNHEARD = {"num_experts": 8, "gate": "none", "top_k": 2, "share_A": True, "router_bias": False, "balance_weight": 0.0}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"adapter": LORA}, {"adapter": replace(LORA, **UNHEARD), "router_lr": 1e-3}),
        ({"adapter": AdapterConfig()}, {"adapter": AdapterConfig(mix_temperature=0.5, score_bias_rate=1e-3)}),
    ],
)  # fmt: skip
def test_keys_without_effect_neither_stop_a_run_from_going_on_nor_are_told(tmp_path, first, then):
    for one, other in ((first, then), (then, first)):
        store = store_after(tmp_path, one, other)
        store._check_compatible(tmp_path)
        assert store.changes_since(tmp_path) == []


@pytest.mark.parametrize("change", [{"rank": 4}, {"layers": (1,)}, {"attention": False}, {"scaling": "rslora"}])
def test_keys_that_plain_lora_hears_still_stop_it(tmp_path, change):
    store = store_after(tmp_path, {"adapter": LORA}, {"adapter": replace(LORA, **change)})
    with pytest.raises(CheckpointError, match=f"written with adapter.{next(iter(change))} = "):
        store._check_compatible(tmp_path)
