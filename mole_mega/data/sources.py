"""Rows on disk become `Sample`s: the only file that knows data set formats. No tokens, no tensors, no order here.

What is wrong with the whole source (missing, empty, unreadable) is a ConfigError when it is opened; what is wrong with
one row is a `BadSample` when that row, or its image, is read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
from PIL import Image, ImageOps

from mole_mega.config import ConfigError, SourceConfig
from mole_mega.data.image import to_rgb

IMAGE_MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class BadSample(ValueError):  # noqa: N818 (it names the sample, and is caught more often than seen)
    """One sample cannot be used. `kind` is a short class of reasons to count by; `reason` carries the numbers."""

    def __init__(self, source: str, sample_id: str, kind: str, reason: str):
        super().__init__(f"{source}, sample {sample_id}: {reason}")
        self.source, self.sample_id, self.kind, self.reason = source, sample_id, kind, reason


@dataclass(frozen=True)
class ImageRef:
    """An image that has not been read yet: a file, or the bytes of one. `source` and `sample_id` name its owner."""

    origin: Path | bytes
    max_pixels: int
    source: str
    sample_id: str

    def open(self) -> Image.Image:
        """Decode it: RGB, upright (EXIF). Raises BadSample if it is missing, broken, or too large to be safe."""
        if isinstance(self.origin, Path) and not self.origin.is_file():
            raise self._bad("image missing", f"no image file {self.origin}")
        try:
            with Image.open(io.BytesIO(self.origin) if isinstance(self.origin, bytes) else self.origin) as image:
                # The header gives the size before a pixel is decoded. The square counts, as padding will make one:
                # a strip of 1 x 100000 is small on disk and 10^10 pixels later.
                side = max(image.size)
                if side * side > self.max_pixels:
                    raise self._bad(
                        "image too large",
                        f"image of {image.width} x {image.height} pads to {side * side} pixels > {self.max_pixels}",
                    )
                return to_rgb(ImageOps.exif_transpose(image))
        except BadSample:
            raise
        except Image.DecompressionBombError as error:  # Pillow's own limit, twice the default of max_image_pixels
            raise self._bad("image too large", str(error)) from error
        # A damaged file makes Pillow's decoders raise nearly anything (OSError, SyntaxError, struct.error, KeyError).
        # Whatever it was, this image cannot be used.
        except Exception as error:
            raise self._bad("image broken", f"cannot decode the image: {' '.join(str(error).split())}") from error

    def _bad(self, kind: str, reason: str) -> BadSample:
        return BadSample(self.source, self.sample_id, kind, reason)


@dataclass(frozen=True)
class Sample:
    """One conversation. `messages`: (role, text), role "user" or "assistant", taking turns, the user first. Each
    `<image>` in the user's texts stands for one of `images`, in order. `domain` is the name of the source."""

    messages: tuple[tuple[str, str], ...]
    images: tuple[ImageRef, ...]
    domain: str
    sample_id: str


class Source(Protocol):
    """A named, indexable collection of samples; reading one may raise BadSample."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class _Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class ConversationSource:
    """Rows of `conversations` (from, value) or `messages` (role, content), with `image` or `images`."""

    name: str
    rows: _Rows
    image_folder: Path
    max_image_pixels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Row `index` as a Sample. Images are located, not read. Raises BadSample."""
        row = self.rows[index]
        if not isinstance(row, dict):
            raise BadSample(self.name, str(index), "conversation", f"the row is {type(row).__name__}, not an object")
        sample_id = str(index if row.get("id") is None else row["id"])
        images = tuple(self._image(entry, sample_id) for entry in _image_entries(row))
        try:
            messages = _messages(row)
            check_turns(messages, len(images))
        except _UnusableError as problem:
            raise BadSample(self.name, sample_id, *problem.args) from None
        return Sample(messages, images, self.name, sample_id)

    def _image(self, entry: Any, sample_id: str) -> ImageRef:
        def ref(origin: Path | bytes) -> ImageRef:
            return ImageRef(origin, self.max_image_pixels, self.name, sample_id)

        if isinstance(entry, dict):
            if entry.get("bytes"):
                return ref(entry["bytes"])
            entry = entry.get("path")
        if not isinstance(entry, str) or not entry:
            raise BadSample(self.name, sample_id, "image path", f"not an image: {entry!r}")
        folder = self.image_folder.resolve()
        try:
            # resolve() follows symbolic links, so a link out of the folder is caught like a `..` or an absolute path
            path = (folder / entry).resolve()
            found = path.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null character
            raise BadSample(self.name, sample_id, "image path", f"not a path: {entry[:80]!r}") from error
        if not path.is_relative_to(folder):
            raise BadSample(self.name, sample_id, "image path", f"image {entry!r} lies outside image_folder {folder}")
        if not found:
            raise BadSample(self.name, sample_id, "image missing", f"no image file {path}")
        return ref(path)


class _UnusableError(Exception):
    """(kind, reason), on its way to a BadSample that knows the source."""


def check_turns(messages: Sequence[tuple[str, str]], num_images: int) -> None:
    """Raise unless user and assistant take turns, someone answers, and `<image>` stands `num_images` times, always
    in the user's text. A missing `<image>` is not guessed: where it would go changes what is trained."""
    for place, (role, text) in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            raise _UnusableError(
                "roles", f"turn {place + 1} of {len(messages)} is the {role}'s, expected the {expected}'s"
            )
        if not text.strip():
            raise _UnusableError("empty turn", f"turn {place + 1} of {len(messages)} ({role}) has no text")
    if len(messages) < 2:
        raise _UnusableError("no assistant turn", f"{len(messages)} turns and none of the assistant's")
    if any(IMAGE_MARK in text for _, text in messages[1::2]):
        raise _UnusableError("image count", f"the assistant's text holds {IMAGE_MARK}")
    marks = sum(text.count(IMAGE_MARK) for _, text in messages)
    if marks != num_images:
        raise _UnusableError("image count", f"{marks} {IMAGE_MARK} in the text but {num_images} images")


def open_source(config: SourceConfig, max_image_pixels: int) -> Source:
    """Open a LLaVA conversation file (.json, .jsonl), a .parquet file, a folder of them, or a `save_to_disk` folder.

    Image paths are taken from `image_folder`, or where that is empty from the folder the data lies in; none may leave
    it. Raises ConfigError if nothing readable is there.
    """
    path = Path(config.path)
    if not path.exists():
        raise ConfigError(f"source {config.name!r}: {path} does not exist")
    if config.image_folder and not Path(config.image_folder).is_dir():
        raise ConfigError(f"source {config.name!r}: image_folder {config.image_folder} is not a folder")
    rows: _Rows
    if path.is_dir() or path.suffix == ".parquet":
        rows = _arrow_rows(path, config.name)
    elif path.suffix in (".json", ".jsonl"):
        rows = _json_rows(path, config.name)
    else:
        raise ConfigError(f"source {config.name!r}: {path} must be .json, .jsonl, .parquet or a folder")
    if not len(rows):
        raise ConfigError(f"source {config.name!r}: {path} has 0 rows")
    beside = path if path.is_dir() else path.parent
    return ConversationSource(config.name, rows, Path(config.image_folder or beside), max_image_pixels)


def bytes_on_disk(config: SourceConfig) -> int:
    """What a source's file, or all files in its folder, come to: other rows seldom leave that as it was. Of images only
    those that lie in these files."""
    path = Path(config.path)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())


def _json_rows(path: Path, name: str) -> list[Any]:
    # Not through `datasets`: Arrow wants one type a column, and LLaVA files mix rows whose `image` is a string, a list
    # or absent, and whose `id` is a number or a string. Plain lists take them as they are, at the price of memory; a
    # source that is too large for that is better kept as a data set on disk, which is memory-mapped.
    where = f"source {name!r}: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    if path.suffix == ".json":
        rows = _parse(text, where)
        if not isinstance(rows, list):
            raise ConfigError(f"{where} must hold a list of samples, found {type(rows).__name__}")
        return rows
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and friends as they are
    lines = enumerate(text.split("\n"), start=1)
    return [_parse(line, f"{where} line {number}") for number, line in lines if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error


@dataclass(frozen=True)
class _ArrowRows:
    """Rows of a data set as plain values; images stay undecoded ({"bytes", "path"}), so that reading a row is cheap."""

    table: datasets.Dataset

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int, /) -> Any:
        return self.table[index].to_pylist()[0]


def _arrow_rows(path: Path, name: str) -> _ArrowRows:
    where = f"source {name!r}: {path}"
    saved = any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not saved and not files:
        raise ConfigError(f"{where} is neither a folder of save_to_disk nor one with .parquet files")
    try:
        table = datasets.load_from_disk(path) if saved else datasets.Dataset.from_parquet([str(file) for file in files])
    # `datasets` and Arrow each have their own families of errors for files they cannot read
    except Exception as error:
        raise ConfigError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(table, datasets.DatasetDict):
        raise ConfigError(f"{where} holds several splits; name one of the folders {', '.join(table)} in it")
    if not {"conversations", "messages"} & set(table.column_names):
        raise ConfigError(f"{where} has no column conversations or messages, only {', '.join(table.column_names)}")
    return _ArrowRows(table.with_format("arrow"))


def _image_entries(row: dict[str, Any]) -> tuple[Any, ...]:
    value = row.get("images") or row.get("image")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _messages(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    if row.get("conversations") is not None:
        turns, role_key, text_key = row["conversations"], "from", "value"
    else:
        turns, role_key, text_key = row.get("messages"), "role", "content"
    if isinstance(turns, dict):  # how older versions of `datasets` stored a list of structs: a struct of lists
        columns = [turns.get(role_key), turns.get(text_key)]
        if not all(isinstance(column, list) for column in columns):
            raise _UnusableError("conversation", f"the conversation lacks {role_key!r} or {text_key!r}")
        turns = [{role_key: role, text_key: text} for role, text in zip(*columns, strict=True)]
    if not isinstance(turns, list):
        raise _UnusableError("conversation", "the row has no list of conversations or messages")
    return tuple(_message(turn, role_key, text_key) for turn in turns)


def _message(turn: Any, role_key: str, text_key: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
        raise _UnusableError("conversation", f"a turn is not an object with text in {text_key!r}")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        raise _UnusableError("roles", f"unknown role {role!r}; known are {', '.join(ROLES)}")
    text = turn[text_key]
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair; a tokenizer cannot
        raise _UnusableError("conversation", "the text is not valid Unicode") from None
    return ROLES[role], text
