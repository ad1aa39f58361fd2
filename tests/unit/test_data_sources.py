"""Files on disk to samples: formats, and every way in which a row or a source can be bad."""

import io
import json
import zlib

import datasets
import pytest
from PIL import Image

from mole_mega.config import ConfigError, SourceConfig
from mole_mega.data.sources import BadSample, open_source

LIMIT = 10_000


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def row(image="red.png", question="<image>\nWhat colour?", **more):
    return {"id": "r", "image": image, "conversations": turns(question, "Red."), **more}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (6, 4), colour).save(tmp_path / "images" / f"{name}.png")
    Image.new("RGB", (6, 4)).save(tmp_path / "outside.png")
    return tmp_path


def open_rows(folder, rows, name="data.json"):
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text)
    return open_source(SourceConfig(name="vqa", path=str(folder / name), image_folder=str(folder / "images")), LIMIT)


def colours(sample):
    return [image.open().getpixel((0, 0)) for image in sample.images]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_conversation_files_may_mix_one_many_and_no_images(folder, name):
    rows = [
        row(),
        row(["blue.png", "red.png"], "<image> and <image>?", id=7),
        {"conversations": turns("Hi\u2028there", "Hello", "And?", "Bye")},
        row(None, "No picture?"),
        row("blue.png", images=[]),
    ]
    source = open_rows(folder, rows, name)
    assert (source.name, len(source)) == ("vqa", 5)
    one, two, text, none, other = (source[i] for i in range(5))
    assert one.messages == (("user", "<image>\nWhat colour?"), ("assistant", "Red."))
    assert (one.domain, one.sample_id, two.sample_id, text.sample_id) == ("vqa", "r", "7", "2")
    assert colours(one) == [(255, 0, 0)]
    assert colours(two) == [(0, 0, 255), (255, 0, 0)]
    assert colours(other) == [(0, 0, 255)]
    assert [role for role, _ in text.messages] == ["user", "assistant"] * 2
    assert text.messages[0][1] == "Hi\u2028there"
    assert text.images == none.images == ()


def test_image_paths_start_beside_the_data_when_no_folder_is_named(folder):
    (folder / "data.json").write_text(json.dumps([row("images/red.png")]))
    source = open_source(SourceConfig(name="vqa", path=str(folder / "data.json")), LIMIT)
    assert colours(source[0]) == [(255, 0, 0)]


@pytest.mark.parametrize("form", ["save_to_disk", "parquet file", "parquet folder"])
@pytest.mark.parametrize("columns", ["image", "images"])
def test_hugging_face_data_on_disk(folder, form, columns, monkeypatch):
    # copies, which have no file name: to_parquet would store that name and not the bytes
    red, blue = (Image.open(folder / "images" / f"{name}.png").copy() for name in ("red", "blue"))
    feature = datasets.Image() if columns == "image" else datasets.List(datasets.Image())
    texts = ["<image> one", "none"] if columns == "image" else ["<image> two <image>", "none"]
    table = datasets.Dataset.from_dict(
        {
            "id": ["a", "b"],
            columns: [red, None] if columns == "image" else [[blue, red], []],
            "messages": [[{"role": "user", "content": t}, {"role": "assistant", "content": "ok"}] for t in texts],
        }
    ).cast_column(columns, feature)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    path = folder / "table"
    if form == "save_to_disk":
        table.save_to_disk(path)
    else:
        path.mkdir()
        table.to_parquet(path / "part-0.parquet")
        path = path / "part-0.parquet" if form == "parquet file" else path
    source = open_source(SourceConfig(name="hf", path=str(path)), LIMIT)
    assert len(source) == 2
    assert source[0].messages == (("user", texts[0]), ("assistant", "ok"))
    assert colours(source[0]) == ([(255, 0, 0)] if columns == "image" else [(0, 0, 255), (255, 0, 0)])
    assert (source[1].sample_id, source[1].images) == ("b", ())


def test_old_data_sets_that_store_conversations_as_a_struct_of_lists(folder):
    datasets.Dataset.from_list([{"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}]).save_to_disk(
        folder / "old"
    )
    source = open_source(SourceConfig(name="hf", path=str(folder / "old")), LIMIT)
    assert source[0].messages == (("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    ("bad", "kind", "reason"),
    [
        (row("gone.png"), "image missing", "gone.png"),
        (row("../outside.png"), "image path", "outside image_folder"),
        (row("/etc/hostname"), "image path", "outside image_folder"),
        (row("link.png"), "image path", "outside image_folder"),
        (row("loop.png"), "image", ""),
        (row("a\0b.png"), "image path", "not a path"),
        (row("x" * 5000), "image path", "not a path"),
        (row(""), "image path", "not an image"),
        (row(3), "image path", "not an image: 3"),
        (row([None]), "image path", "not an image: None"),
        (row(question="What?"), "image count", "0 <image> in the text but 1 images"),
        (row(question="<image><image>"), "image count", "2 <image> in the text but 1 images"),
        (row(None, conversations=turns("Q", "A <image>")), "image count", "assistant's text"),
        (row(None, conversations=turns("Q")), "no assistant turn", "1 turns"),
        (row(None, conversations=[]), "no assistant turn", "0 turns"),
        (row(None, conversations=turns("Q", "A")[::-1]), "roles", "turn 1 of 2 is the assistant's"),
        (row(None, conversations=turns("Q", "A") + turns("Q", "A")[1:]), "roles", "turn 3 of 3"),
        (row(None, conversations=[{"from": "system", "value": "S"}]), "roles", "'system'"),
        (row(None, conversations=[{"from": ["x"], "value": "S"}]), "roles", "unknown role"),
        (row(None, conversations=turns("Q", "  ")), "empty turn", "turn 2 of 2"),
        (row(None, conversations=[{"from": "human", "value": None}]), "conversation", "text in 'value'"),
        (row(None, conversations=turns("Q\ud83d", "A")), "conversation", "Unicode"),
        (row(None, conversations="Q"), "conversation", "no list"),
        ({"id": "r"}, "conversation", "no list"),
        (["r"], "conversation", "the row is list"),
    ],
)
def test_bad_rows_name_source_sample_and_reason(folder, bad, kind, reason):
    (folder / "images" / "link.png").symlink_to(folder / "outside.png")
    (folder / "images" / "loop.png").symlink_to(folder / "images" / "loop.png")
    source = open_rows(folder, [row(), bad])
    assert source[0].sample_id == "r"
    with pytest.raises(BadSample) as caught:
        source[1]
    assert caught.value.kind.startswith(kind)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"vqa, sample {'r' if isinstance(bad, dict) else 1}: ")


def test_data_sets_that_store_paths_read_them_from_the_image_folder(folder):
    paths = [str(folder / "images" / "red.png"), "blue.png", str(folder / "outside.png")]
    datasets.Dataset.from_list([row({"bytes": None, "path": path}) for path in paths]).save_to_disk(folder / "paths")
    config = SourceConfig(name="hf", path=str(folder / "paths"), image_folder=str(folder / "images"))
    source = open_source(config, LIMIT)
    assert [colours(source[i]) for i in range(2)] == [[(255, 0, 0)], [(0, 0, 255)]]
    with pytest.raises(BadSample, match="outside image_folder"):
        source[2]


def test_a_link_that_stays_inside_the_folder_is_fine(folder):
    (folder / "images" / "link.png").symlink_to(folder / "images" / "blue.png")
    assert colours(open_rows(folder, [row("link.png")])[0]) == [(0, 0, 255)]


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"not an image", "image broken", "cannot"),
        (b"", "image broken", "cannot"),
        ("truncated", "image broken", "truncated"),
        (png_header(101, 100), "image too large", "101 x 100 pads to 10201 pixels > 10000"),
        (png_header(1, 101), "image too large", "pads to 10201"),
        (png_header(30000, 30000), "image too large", ""),
    ],
    ids=["text", "empty", "truncated", "area", "strip", "beyond Pillow's limit"],
)
def test_images_that_cannot_be_read_are_bad_when_opened(folder, data, kind, reason):
    if data == "truncated":
        data = (folder / "images" / "red.png").read_bytes()[:-30]
    (folder / "images" / "bad.png").write_bytes(data)
    sample = open_rows(folder, [row("bad.png")])[0]
    with pytest.raises(BadSample, match=r"^vqa, sample r: ") as caught:
        sample.images[0].open()
    assert caught.value.kind == kind
    assert reason in caught.value.reason


def test_an_image_at_the_limit_opens_and_a_16_bit_one_keeps_its_grey(folder):
    Image.new("I;16", (100, 100), 257 * 128).save(folder / "images" / "deep.png")
    assert colours(open_rows(folder, [row("deep.png")])[0]) == [(128, 128, 128)]


def test_a_photograph_is_turned_upright(folder):
    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "images" / "turned.jpg", exif=exif)
    assert open_rows(folder, [row("turned.jpg")])[0].images[0].open().size == (4, 6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.json", None, "does not exist"),
        ("empty.json", "[]", "0 rows"),
        ("empty.jsonl", "\n\n", "0 rows"),
        ("broken.json", "[{", "is not JSON"),
        ("broken.jsonl", '{"id": 1}\n{"id":', "line 2 is not JSON"),
        ("deep.json", "[" * 100_000, "is not JSON"),
        ("object.json", "{}", "found dict"),
        ("latin.json", b"\xff\xfe\xfd", "cannot be read"),
        ("table.csv", "a,b", "must be .json"),
        ("broken.parquet", "PAR0", "cannot be read"),
    ],
)
def test_unreadable_sources_are_config_errors(folder, name, text, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    if text is not None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(SourceConfig(name="vqa", path=str(folder / name)), LIMIT)
    assert "\n" not in str(caught.value)
    assert "'vqa'" in str(caught.value)


def test_folders_without_usable_data_are_config_errors(folder):
    def opened(path, **more):
        return open_source(SourceConfig(name="hf", path=str(path), **more), LIMIT)

    with pytest.raises(ConfigError, match="neither a folder of save_to_disk"):
        opened(folder)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "text")
    with pytest.raises(ConfigError, match="no column conversations or messages, only text"):
        opened(folder / "text")
    split = datasets.Dataset.from_dict({"messages": [[]]})
    datasets.DatasetDict(train=split, test=split).save_to_disk(folder / "splits")
    with pytest.raises(ConfigError, match="several splits; name one of the folders train, test"):
        opened(folder / "splits")
    assert len(opened(folder / "splits" / "train")) == 1
    with pytest.raises(ConfigError, match="is not a folder"):
        opened(folder / "splits" / "train", image_folder=str(folder / "nowhere"))
