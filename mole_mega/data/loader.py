"""Which batches a rank gets at a step. A pure function of (seed, step, layout), so resuming needs the step and nothing
else. The only state here is a count of what was read, and next step's batches read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer

from mole_mega.config import ConfigError, DataConfig
from mole_mega.data.collate import Batch, load_pixels, stack
from mole_mega.data.conversation import Encoder, Example
from mole_mega.data.image import ImageSpec
from mole_mega.data.mixture import Mixture
from mole_mega.data.plan import MixturePlan, plan_mixture
from mole_mega.data.sources import BadSample, Source, open_source
from mole_mega.data.tally import Tally, add, tally

_MAX_ATTEMPTS = 24
_KEPT_MESSAGES = 10

_Loaded = tuple[Example, torch.Tensor]
_Request = tuple[int, int, int, int, int]


class Loader:
    """Batches of a mixture of sources.

    `domains` orders the names that `Batch.domains` indexes: the training sources, then names that only validation has.
    `read` counts what this process got to train on, by source; `plan`, of a run's loader, is what its config asks for.
    `skipped[domain][kind]` counts the samples that this process left out, `skipped_messages` keeps the first few.
    With `prefetch`, a thread reads the next step's batches during this one; results do not depend on it.
    `kept`, where it is given a dict, keeps every sample that was read, by (is for validation, source, row), for those
    who make many runs over the same small files in one process.
    """

    kept: dict[tuple[bool, str, int], _Loaded] | None = None

    def __init__(
        self,
        sources: Sequence[Source],
        mixture: Mixture,
        encoder: Encoder,
        image_spec: ImageSpec,
        *,
        pad_token_id: int,
        pad_to_multiple: int = 1,
        on_bad_sample: Literal["skip", "stop"] = "skip",
        validation_sources: Sequence[Source] = (),
        prefetch: bool = True,
        plan: MixturePlan | None = None,
    ):
        self.domains = tuple(dict.fromkeys(source.name for source in (*sources, *validation_sources)))
        self.encoder, self.image_spec, self.plan = encoder, image_spec, plan
        self.read: Tally = {}
        self.skipped: dict[str, dict[str, int]] = {}
        self.skipped_messages: list[str] = []
        self._sources, self._validation_sources, self._mixture = sources, validation_sources, mixture
        self._domain_index = {name: index for index, name in enumerate(self.domains)}
        self._pad_token_id, self._pad_to_multiple = pad_token_id, pad_to_multiple
        self._stop_on_bad = on_bad_sample == "stop"
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") if prefetch else None
        self._ahead: tuple[_Request, Future[tuple[list[Batch], list[BadSample], Tally]]] | None = None

    def micro_batches(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> list[Batch]:
        """The micro-batches of one rank at one step, in order.

        Step s holds positions [s G, (s + 1) G) of the stream, cut into chunks of `micro_batch_size`; chunk c is
        micro-batch c // dp_size of rank c % dp_size. Raises ConfigError if the sizes do not divide, BadSample under
        on_bad_sample "stop".
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
                f"x data-parallel size {dp_size} = {micro_batch_size * dp_size}"
            )
        request = (step, global_batch_size, micro_batch_size, dp_rank, dp_size)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == request:
            batches, left_out, read = ahead[1].result()
        else:
            batches, left_out, read = self._read_step(*request)
        if self._reader is not None:
            following = (step + 1, *request[1:])
            self._ahead = following, self._reader.submit(self._read_step, *following)
        self._count(left_out)
        self.read = add([self.read, read])
        return batches

    def validation_batches(self, samples: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[Batch]:
        """One rank's batches of the first `samples` rows of each validation source, a batch of one domain each.

        Every rank gets the same number of batches, of `micro_batch_size` rows each. Where rows run out, or are bad
        (nothing replaces them here, that would count others twice), a row is padding: no label, padding_mask False.
        """
        for source in self._validation_sources:
            rows = min(samples, len(source))
            for start in range(0, rows, micro_batch_size * dp_size):
                first = start + dp_rank * micro_batch_size
                chunk = range(first, min(first + micro_batch_size, rows))
                loaded, left_out = self._read_rows(source, chunk)
                self._count(left_out)
                filler = (_nothing(source.name), torch.zeros(0, 3, self.image_spec.size, self.image_spec.size))
                yield self._stack(loaded + [filler] * (micro_batch_size - len(loaded)))

    def _read_step(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> tuple[list[Batch], list[BadSample], Tally]:
        batches, left_out, examples = [], [], []
        stride = micro_batch_size * dp_size
        for start in range(step * global_batch_size, (step + 1) * global_batch_size, stride):
            first = start + dp_rank * micro_batch_size
            loaded = []
            for position in range(first, first + micro_batch_size):
                example_and_pixels, bad = self._read_position(position)
                loaded.append(example_and_pixels)
                left_out += bad
            batches.append(self._stack(loaded))
            examples += [example for example, _ in loaded]
        return batches, left_out, tally(examples, left_out)

    def _read_position(self, position: int) -> tuple[_Loaded, list[BadSample]]:
        """The example at a position of the stream, and the samples that had to be left out on the way to it. Pure, so
        that every layout replaces a bad sample by the same one."""
        left_out: list[BadSample] = []
        for attempt in range(_MAX_ATTEMPTS):
            source, row = self._mixture.locate(position, attempt)
            try:
                return self._read(self._sources[source], row), left_out
            except BadSample as bad:
                if self._stop_on_bad:
                    raise
                left_out.append(bad)
        raise ConfigError(
            f"no usable sample for position {position} of the stream in {_MAX_ATTEMPTS} attempts; last: {left_out[-1]}"
        )

    def _read_rows(self, source: Source, rows: range) -> tuple[list[_Loaded], list[BadSample]]:
        loaded, left_out = [], []
        for row in rows:
            try:
                loaded.append(self._read(source, row))
            except BadSample as bad:
                if self._stop_on_bad:
                    raise
                left_out.append(bad)
        return loaded, left_out

    def _read(self, source: Source, row: int) -> _Loaded:
        if self.kept is None:
            return self._decode(source, row)
        key = (any(source is other for other in self._validation_sources), source.name, row)
        if key not in self.kept:
            self.kept[key] = self._decode(source, row)
        return self.kept[key]

    def _decode(self, source: Source, row: int) -> _Loaded:
        example = self.encoder.encode(source[row])
        return example, load_pixels(example, self.image_spec)

    def _stack(self, loaded: Sequence[_Loaded]) -> Batch:
        examples, pixels = zip(*loaded, strict=True)
        return stack(
            examples, pixels, self.encoder.image_token_id, self._pad_token_id, self._domain_index, self._pad_to_multiple
        )

    def _count(self, left_out: Sequence[BadSample]) -> None:
        for bad in left_out:
            kinds = self.skipped.setdefault(bad.source, {})
            kinds[bad.kind] = kinds.get(bad.kind, 0) + 1
            if len(self.skipped_messages) < _KEPT_MESSAGES:
                self.skipped_messages.append(str(bad))


@dataclass(frozen=True)
class RunData:
    """What a run's data section names, opened."""

    sources: tuple[Source, ...]
    validation: tuple[Source, ...]
    encoder: Encoder
    image_spec: ImageSpec
    plan: MixturePlan


def open_run_data(
    data_config: DataConfig,
    base_dir: str | Path,
    seed: int,
    places_per_image: int,
    image_token_id: int,
    global_batch_size: int | None = None,
) -> RunData:
    """Open everything a run's data section names; tokenizer and image settings come from `base_dir`, never the network.
    `global_batch_size` is needed where weights change over the steps.

    Raises ConfigError if a file is missing or cannot be honoured.
    """
    sources = tuple(open_source(source, data_config.max_image_pixels) for source in data_config.sources)
    validation = tuple(open_source(source, data_config.max_image_pixels) for source in data_config.validation)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base_dir} holds no usable tokenizer: {' '.join(str(error).split())}") from error
    encoder = Encoder(
        tokenizer,
        image_token_id=image_token_id,
        places_per_image=places_per_image,
        max_length=data_config.max_length,
    )
    image_spec = ImageSpec.from_processor_files(base_dir)
    plan = plan_mixture(data_config, sources, encoder, seed, global_batch_size)
    return RunData(sources, validation, encoder, image_spec, plan)


def build_loader(
    data_config: DataConfig,
    base_dir: str | Path,
    seed: int,
    places_per_image: int,
    image_token_id: int,
    pad_token_id: int,
    pad_to_multiple: int,
    global_batch_size: int | None = None,
) -> Loader:
    """The loader of a run over `open_run_data`."""
    data = open_run_data(data_config, base_dir, seed, places_per_image, image_token_id, global_batch_size)
    return Loader(
        data.sources,
        data.plan.mixture,
        data.encoder,
        data.image_spec,
        pad_token_id=pad_token_id,
        pad_to_multiple=pad_to_multiple,
        on_bad_sample=data_config.on_bad_sample,
        validation_sources=data.validation,
        plan=data.plan,
    )


def _nothing(domain: str) -> Example:
    empty = torch.zeros(0, dtype=torch.int64)
    return Example(empty, empty, (), domain, "")
