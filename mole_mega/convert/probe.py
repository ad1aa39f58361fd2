"""One fixed batch of text and images, and what a model makes of it: logits, and the expert of every token.

Both sides of a comparison compute in fp32 whatever their weights are stored in: each module's own weights are widened
while it runs, so that a comparison needs no more memory than the model and one layer of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from mole_mega.adapters.routers import MoLERouter
from mole_mega.models.llava import LLaVA
from mole_mega.models.sizes import LlavaSize

_SEED = 20240129
_TEXT = 13  # places of text on either side of an image


@dataclass(frozen=True)
class Probe:
    """tokens [B, S] padded on the right; mask [B, S], True where a token is; pixels [N, 3, h, w]."""

    tokens: Tensor
    mask: Tensor
    pixels: Tensor
    image_token_id: int


@dataclass(frozen=True)
class Answer:
    """logits [B, S, V] fp32, zero at padding; choices {layer: [B, S]} of the adapted layers, -1 at padding. Where a
    layer has a router a linear [B, S, 3]; where a token uses several experts a last axis more, in the order of their
    numbers; where it uses all, the likeliest."""

    logits: Tensor
    choices: dict[int, Tensor]


def make_probe(size: LlavaSize, pad_to_multiple: int = 1) -> Probe:
    """Three rows: text alone, one image, and two images where the context is long enough for them."""
    generator = torch.Generator().manual_seed(_SEED)
    places, vocab = size.vision.num_places, size.language.vocab_size
    rows = []
    for images in (0, 1, 2):
        if images * places + (images + 1) * _TEXT > size.language.max_length:
            continue
        parts = [torch.randint(vocab, (_TEXT,), generator=generator)]
        for _ in range(images):
            # the image's id may lie in the vocabulary; in text it would stand for an image
            parts += [torch.full((places,), size.image_token_id), torch.randint(vocab, (_TEXT,), generator=generator)]
        row = torch.cat(parts)
        is_text = torch.cat([torch.full_like(part, index % 2 == 0) for index, part in enumerate(parts)]).bool()
        row[is_text & (row == size.image_token_id)] = (size.image_token_id + 1) % vocab
        rows.append(row)
    length = max(map(len, rows))
    length += -length % pad_to_multiple
    tokens = torch.full((len(rows), length), size.pad_token_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], mask[index, : len(row)] = row, True
    side, num_images = size.vision.image_size, sum(range(len(rows)))
    # eighths: the same number in every precision
    pixels = torch.randint(-16, 17, (num_images, 3, side, side), generator=generator) / 8
    return Probe(tokens, mask, pixels, size.image_token_id)


@torch.no_grad()
def ask_transformers(model: Any, probe: Probe) -> Tensor:
    """Logits [B, S, V] fp32 of a Hugging Face LLaVA, zero at padding."""
    device = next(model.parameters()).device
    with fp32_compute(model):
        logits = model(
            input_ids=probe.tokens.to(device),
            attention_mask=probe.mask.to(device).long(),
            pixel_values=probe.pixels.to(device) if len(probe.pixels) else None,
            use_cache=False,
        ).logits
    return (logits.float() * probe.mask[..., None].to(device)).cpu()


@torch.no_grad()
def ask_megatron(model: LLaVA, probe: Probe, expert: int | None = None) -> Answer:
    """What our model answers under its layout; every rank gets all of it. All ranks call it with the same probe.

    With `expert`, every token goes to that one, with weight 1.
    """
    kept: list[Tensor] = []
    chosen: dict[tuple[int, int], Tensor] = {}
    keep = partial(_keep_choice, chosen, expert, len(probe.tokens))
    hooks = [router.register_forward_hook(keep) for router in model.routers()]
    with fp32_compute(model):
        model.read_instructions([(probe.tokens, probe.mask & (probe.tokens != probe.image_token_id))])
        get_forward_backward_func()(
            forward_step_func=partial(_forward_step, probe, kept),
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=probe.tokens.shape[1],
            micro_batch_size=probe.tokens.shape[0],
            forward_only=True,
        )
    for hook in hooks:
        hook.remove()
    return Answer(_whole_logits(model, probe, kept), _whole_choices(model, probe, chosen))


@contextlib.contextmanager
def fp32_compute(model: nn.Module) -> Iterator[None]:
    """Run every module of `model` in fp32: its own parameters, and what it is given, are widened while it runs."""
    narrow: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point() and p.dtype != torch.float32]
        narrow[module] = [(parameter, parameter.data) for parameter in own]
        for parameter in own:
            parameter.data = parameter.data.float()
        return tuple(map(_widened, args)), {name: _widened(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, *_: Any) -> None:
        for parameter, data in narrow.pop(module, []):
            parameter.data = data

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(widen, with_kwargs=True))
        hooks.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widened(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32
    return value.float() if is_narrow else value


def _forward_step(probe: Probe, kept: list[Tensor], _: Any, model: Any) -> tuple[Tensor, Any]:
    device = model.parallel.device
    tokens = probe.tokens.to(device)
    output = model(
        tokens=tokens,
        position_ids=torch.arange(tokens.shape[1], device=device).expand_as(tokens),
        padding_mask=probe.mask.to(device),
        image_mask=(tokens == probe.image_token_id) & probe.mask.to(device),
        pixels=probe.pixels.to(device),
        # whose expert is asked is chosen by the caller (`_keep_choice`)
        domains=tokens.new_zeros(len(tokens)),
    )

    def keep(logits: Tensor) -> tuple[Tensor, Tensor, Any]:
        kept.append(logits)
        return logits.new_zeros(()), torch.ones((), dtype=torch.int, device=device), None

    return output, keep


def _keep_choice(
    chosen: dict[tuple[int, int], Tensor],
    expert: int | None,
    batch: int,
    router: MoLERouter,
    args: tuple,
    output: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Into `chosen`, by layer and site, [places, batch] or [places, batch, K]."""
    weight_TE, chosen_TE = output
    num_choices, experts_E = router.adapter.num_choices, torch.arange(chosen_TE.shape[1], device=chosen_TE.device)
    if expert is not None:
        # as many are chosen as always, the others with weight 0
        weight_TE = (experts_E == expert).to(weight_TE.dtype).expand_as(weight_TE)
        chosen_TE = ((experts_E - expert) % len(experts_E) < int(chosen_TE[0].sum())).expand_as(chosen_TE)
    if router.adapter.gate == "dense":
        choice = weight_TE.argmax(-1).view(-1, batch)
    elif num_choices == 1:
        choice = chosen_TE.int().argmax(dim=-1).view(-1, batch)
    else:
        choice = chosen_TE.nonzero()[:, 1].view(-1, batch, num_choices)
    chosen[router.layer, router.site] = choice
    return weight_TE, chosen_TE


def _whole_logits(model: LLaVA, probe: Probe, kept: list[Tensor]) -> Tensor:
    """The last stage's logits, put together over tensor parallelism, on every rank: [B, S, V]."""
    parallel = model.parallel
    logits: Tensor | None = None
    if parallel.is_last_stage:
        parts = [torch.empty_like(kept[0]) for _ in range(parallel.tp_size)]
        dist.all_gather(parts, kept[0].contiguous(), group=parallel.groups.tp)
        logits = torch.cat(parts, dim=-1)[..., : model.size.language.vocab_size].float()
    if parallel.pp_size > 1:
        if logits is None:
            logits = torch.empty(*probe.tokens.shape, model.size.language.vocab_size, device=parallel.device)
        logits = logits.contiguous()
        dist.broadcast(logits, dist.get_process_group_ranks(parallel.groups.pp)[-1], group=parallel.groups.pp)
    assert logits is not None
    return logits.masked_fill(~probe.mask[..., None].to(logits.device), 0).cpu()


def _whole_choices(model: LLaVA, probe: Probe, chosen: dict[tuple[int, int], Tensor]) -> dict[int, Tensor]:
    """{layer: [B, S]}: put together over sequence parallelism, a layer's routers, and the pipeline's stages."""
    parallel = model.parallel
    sites: dict[int, list[Tensor]] = {}
    for (layer, _), choice_SB in sorted(chosen.items(), key=lambda item: item[0]):
        parts = [choice_SB]
        if len(choice_SB) < probe.tokens.shape[1]:  # the router of a linear whose input is cut sees all places
            parts = [torch.empty_like(choice_SB) for _ in range(parallel.tp_size)]
            dist.all_gather(parts, choice_SB.contiguous(), group=parallel.groups.tp)
        choice_BS = torch.cat(parts).transpose(0, 1).cpu()
        choice_BS[~probe.mask] = -1
        sites.setdefault(layer, []).append(choice_BS)
    mine = {layer: torch.stack(own, dim=2) if len(own) > 1 else own[0] for layer, own in sites.items()}
    stages: list[dict[int, Tensor]] = [{} for _ in range(parallel.pp_size)]
    dist.all_gather_object(stages, mine, group=parallel.groups.pp)
    return {layer: choice for stage in stages for layer, choice in sorted(stage.items())}
