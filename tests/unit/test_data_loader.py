"""Batches: padding, data-parallel layouts, replacement of bad samples, validation, and the builder."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from test_data_conversation import byte_tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mole_mega.config import ConfigError, DataConfig, SourceConfig
from mole_mega.data.collate import Batch, collate
from mole_mega.data.conversation import IGNORE_INDEX, Encoder
from mole_mega.data.image import ImageSpec
from mole_mega.data.loader import Loader, build_loader
from mole_mega.data.mixture import Mixture
from mole_mega.data.sources import BadSample, ImageRef, Sample

SPEC = ImageSpec(8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
TOKENIZER = byte_tokenizer()
PAD, IMAGE = TOKENIZER.pad_token_id, TOKENIZER.convert_tokens_to_ids("<image>")


class Colours:
    """Rows with row % 3 images of brightness `row` each; rows in `bad` fail on reading, in `broken` on decoding."""

    def __init__(self, name, size, folder, bad=(), broken=()):
        self.name, self._size, self._bad, self._broken = name, size, set(bad), set(broken)
        self._folder = folder
        for row in range(size):
            Image.new("RGB", (4, 4), (row, row, row)).save(folder / f"{row}.png")

    def __len__(self):
        return self._size

    def __getitem__(self, row):
        if row in self._bad:
            raise BadSample(self.name, str(row), "roles", "turn 1 is wrong")
        origin = b"broken" if row in self._broken else self._folder / f"{row}.png"
        count = max(row % 3, row in self._broken)
        images = tuple(ImageRef(origin, 10_000, self.name, str(row)) for _ in range(count))
        messages = (("user", "<image> " * count + "what" * row), ("assistant", f"{self.name} {row}"))
        return Sample(messages, images, self.name, f"{self.name}-{row}")


def make_encoder(max_length=2000):
    return Encoder(TOKENIZER, image_token_id=IMAGE, places_per_image=2, max_length=max_length)


def make_loader(folder, bad=(), broken=(), **more):
    sources = [Colours("ocr", 11, folder, bad, broken), Colours("vqa", 7, folder)]
    mixture = Mixture([11, 7], [1, 2], seed=4)
    settings = {"pad_token_id": PAD, "pad_to_multiple": 8, "prefetch": False} | more
    return Loader(sources, mixture, make_encoder(), SPEC, **settings)


def same(one: Batch, other: Batch):
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def ids_by_position(loader, step, size, micro, dp_size):
    """Sample ids of a global batch, in stream order, put together from all ranks."""
    chunks = {}
    for rank in range(dp_size):
        for m, batch in enumerate(loader.micro_batches(step, size, micro, rank, dp_size)):
            chunks[m * dp_size + rank] = batch.sample_ids
    return [name for chunk in sorted(chunks) for name in chunks[chunk]]


def test_a_batch_pads_right_and_keeps_images_in_order(tmp_path):
    source = Colours("ocr", 9, tmp_path)
    examples = [make_encoder().encode(source[row]) for row in (5, 3, 7)]
    batch = collate(examples, SPEC, IMAGE, PAD, {"x": 0, "ocr": 1}, 8)
    longest = max(len(example.tokens) for example in examples)
    assert batch.tokens.shape == batch.labels.shape == (3, -(-longest // 8) * 8)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        assert torch.equal(batch.tokens[row, :length], example.tokens)
        assert torch.equal(batch.labels[row, :length], example.labels)
        assert (batch.tokens[row, length:] == PAD).all()
        assert (batch.labels[row, length:] == IGNORE_INDEX).all()
        assert batch.padding_mask[row].tolist() == [True] * length + [False] * (batch.tokens.shape[1] - length)
    assert batch.pixels.shape == (3, 3, 8, 8)
    assert (batch.pixels[:, 0, 0, 0] * 255).round().tolist() == [5, 5, 7]
    assert batch.image_mask.sum(1).tolist() == [4, 0, 2]
    assert torch.equal(batch.image_mask, batch.tokens == IMAGE)
    assert torch.equal(batch.position_ids, torch.arange(batch.tokens.shape[1]).expand(3, -1))
    assert batch.domains.tolist() == [1, 1, 1]
    assert batch.sample_ids == ("ocr-5", "ocr-3", "ocr-7")


def test_a_batch_of_text_only_has_no_images_and_moves(tmp_path):
    batch = collate([make_encoder().encode(Colours("ocr", 1, tmp_path)[0])], SPEC, IMAGE, PAD, {"ocr": 0}, 1)
    assert batch.pixels.shape == (0, 3, 8, 8)
    assert batch.pixels.dtype == torch.float32
    assert batch.padding_mask.all()
    moved = batch.to("meta")
    assert moved.tokens.is_meta
    assert moved.pixels.is_meta
    assert moved.sample_ids == batch.sample_ids


def test_a_broken_image_is_a_bad_sample_of_the_batch(tmp_path):
    example = make_encoder().encode(Colours("ocr", 2, tmp_path, broken=[1])[1])
    with pytest.raises(BadSample, match=r"^ocr, sample 1: cannot decode"):
        collate([example], SPEC, IMAGE, PAD, {"ocr": 0}, 1)


@pytest.mark.parametrize("bad", [(), (1, 2, 3, 5, 8)], ids=["clean", "bad samples"])
def test_every_layout_sees_the_same_samples_in_the_same_order(tmp_path, bad):
    loader = make_loader(tmp_path, bad=bad, broken=[4])
    expected = ids_by_position(loader, 3, 12, 1, 1)
    assert len(expected) == 12
    for micro, dp_size in [(1, 2), (2, 3), (3, 4), (12, 1)]:
        assert ids_by_position(make_loader(tmp_path, bad=bad, broken=[4]), 3, 12, micro, dp_size) == expected


def test_chunks_go_round_the_ranks(tmp_path):
    loader = make_loader(tmp_path)
    stream = [loader.domains[source] + f"-{row}" for source, row in (loader._mixture.locate(p) for p in range(24, 36))]
    assert [b.sample_ids for b in loader.micro_batches(2, 12, 2, 1, 3)] == [tuple(stream[2:4]), tuple(stream[8:10])]


def test_a_step_depends_on_nothing_before_it(tmp_path):
    bad = range(1, 7)
    straight, resumed = make_loader(tmp_path, bad=bad), make_loader(tmp_path, bad=bad)
    for step in range(3):
        last = straight.micro_batches(step, 24, 12, 0, 2)
    again = resumed.micro_batches(2, 24, 12, 0, 2)
    assert len(last) == len(again) == 1
    assert resumed.skipped["ocr"]["roles"] > 1  # so this step did replace samples, and straight had before
    assert same(last[0], again[0])
    assert last[0].domains.tolist() == [("ocr", "vqa").index(name.split("-")[0]) for name in last[0].sample_ids]


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"global_batch_size 10 .* micro_batch_size 2 x data-parallel size 3 = 6"):
        make_loader(tmp_path).micro_batches(0, 10, 2, 0, 3)


def test_bad_samples_are_replaced_from_their_source_and_counted(tmp_path):
    clean = ids_by_position(make_loader(tmp_path), 0, 33, 1, 1)
    loader = make_loader(tmp_path, bad=[3, 4], broken=[5])
    names = ids_by_position(loader, 0, 33, 1, 1)
    for before, after in zip(clean, names, strict=True):
        if before in ("ocr-3", "ocr-4", "ocr-5"):
            assert after.startswith("ocr")
            assert after not in ("ocr-3", "ocr-4", "ocr-5")
        else:
            assert after == before
    assert set(loader.skipped) == {"ocr"}
    assert loader.skipped["ocr"]["roles"] >= 2
    assert loader.skipped["ocr"]["image broken"] >= 1
    assert "ocr, sample 3: turn 1 is wrong" in loader.skipped_messages


def test_stop_raises_and_a_stream_without_usable_samples_ends(tmp_path):
    with pytest.raises(BadSample, match="turn 1 is wrong"):
        make_loader(tmp_path, bad=range(11), on_bad_sample="stop").micro_batches(0, 9, 9, 0, 1)
    sources = [Colours("ocr", 4, tmp_path, bad=range(4))]
    loader = Loader(sources, Mixture([4], [1], 0), make_encoder(), SPEC, pad_token_id=PAD)
    with pytest.raises(ConfigError, match=r"no usable sample for position 0 .* in 24 attempts; last: ocr, sample"):
        loader.micro_batches(0, 1, 1, 0, 1)


def test_reading_ahead_changes_neither_batches_nor_counts_and_passes_errors_on(tmp_path):
    plain, ahead = make_loader(tmp_path, bad=[1, 2]), make_loader(tmp_path, bad=[1, 2], prefetch=True)
    for step in (0, 1, 2, 7, 8, 8, 3):
        for one, other in zip(
            plain.micro_batches(step, 4, 2, 0, 1), ahead.micro_batches(step, 4, 2, 0, 1), strict=True
        ):
            assert same(one, other)
        assert plain.skipped == ahead.skipped
    clean = [make_loader(tmp_path)._mixture.locate(p)[0] for p in range(4)]
    stopping = make_loader(tmp_path, bad=range(11), on_bad_sample="stop", prefetch=True)
    step = clean.index(0)  # the first position that is drawn from the bad source
    for good in range(step):
        stopping.micro_batches(good, 1, 1, 0, 1)
    with pytest.raises(BadSample):
        stopping.micro_batches(step, 1, 1, 0, 1)


def test_kept_samples_are_read_once_and_change_no_batch(tmp_path):
    def loader(kept):
        made = make_loader(tmp_path, bad=[1, 2], validation_sources=[Colours("vqa", 9, tmp_path, bad=[3])])
        made.kept = kept
        return made

    def batches(loader):
        train = [batch for step in range(3) for batch in loader.micro_batches(step, 4, 2, 0, 1)]
        return [*train, *loader.validation_batches(9, 3, 0, 1)], loader.skipped

    kept = {}
    wanted, skipped = batches(loader(None))
    first, first_skipped = batches(loader(kept))
    again = loader(kept)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    second, second_skipped = batches(again)
    assert skipped == first_skipped == second_skipped
    for one, kept_now, kept_before in zip(wanted, first, second, strict=True):
        assert same(one, kept_now) and same(one, kept_before)
    assert {name for _, name, _ in kept} == {"ocr", "vqa"}


@pytest.mark.parametrize("dp_size", [1, 2, 5])
def test_validation_counts_each_row_once_with_equal_batches_on_every_rank(tmp_path, dp_size):
    held_out = [Colours("vqa", 5, tmp_path, bad=[2]), Colours("new", 9, tmp_path)]
    loader = make_loader(tmp_path, validation_sources=held_out)
    assert loader.domains == ("ocr", "vqa", "new")
    ranks = [list(loader.validation_batches(7, 2, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = []
    for batches in ranks:
        for batch in batches:
            assert batch.tokens.shape[0] == 2
            assert batch.tokens.shape[1] % 8 == 0
            assert len(set(batch.domains.tolist())) == 1
            for row, name in enumerate(batch.sample_ids):
                assert bool(name) == bool(batch.padding_mask[row].any())
                assert bool(name) == bool((batch.labels[row] != IGNORE_INDEX).any())
                if name:
                    assert loader.domains[batch.domains[row]] == name.split("-")[0]
                    seen.append(name)
    assert sorted(seen) == sorted([f"vqa-{row}" for row in (0, 1, 3, 4)] + [f"new-{row}" for row in range(7)])
    assert loader.skipped == {"vqa": {"roles": 1}}


@pytest.fixture
def run_files(tmp_path):
    base = tmp_path / "base"
    TOKENIZER.save_pretrained(base)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(base)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    chat = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "a.json").write_text(
        json.dumps([{"id": str(i), "image": "a.png", "conversations": chat} for i in (1, 2)])
    )
    source = SourceConfig(name="a", path=str(tmp_path / "a.json"))
    held_out = dataclasses.replace(source, name="b")
    return base, DataConfig(sources=(source,), validation=(held_out,), max_length=300)


def build(base, config):
    return build_loader(
        config, base, seed=1, places_per_image=4, image_token_id=IMAGE, pad_token_id=PAD, pad_to_multiple=4
    )


def test_the_builder_reads_a_run_from_its_files(run_files):
    loader = build(*run_files)
    assert loader.domains == ("a", "b")
    [batch] = loader.micro_batches(0, 2, 2, 0, 1)
    assert sorted(batch.sample_ids) == ["1", "2"]
    assert batch.pixels.shape == (2, 3, 8, 8)
    assert batch.image_mask.sum() == 8
    [batch] = loader.validation_batches(64, 2, 0, 1)
    assert batch.domains.tolist() == [1, 1]


def test_the_builder_names_what_is_missing(run_files, tmp_path):
    base, config = run_files
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no usable tokenizer"):
        build(tmp_path / "empty", config)
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="has no image processor"):
        build(base, config)
