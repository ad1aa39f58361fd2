"""LLaVA composed of Megatron-Core's own parts, under the attribute names of its `LLaVAModel`, so that base checkpoints
stay interchangeable with it. (`LLaVAModel` itself refuses sequence parallelism without Transformer Engine.)

Shape suffixes: B batch, S sequence, N images, P places an image, H hidden, V vocabulary of one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

from mole_mega.adapters import mixture
from mole_mega.adapters.instructions import InstructionRouter, number_places
from mole_mega.adapters.mixture import MixtureLayer
from mole_mega.adapters.mole import MoLELayer
from mole_mega.adapters.pairs import HasPairs, Pair
from mole_mega.adapters.routers import MoLERouter
from mole_mega.adapters.routing import place_groups
from mole_mega.config import RunConfig
from mole_mega.models import specs
from mole_mega.models.backend import backend_called
from mole_mega.models.cache import KeyValueCache
from mole_mega.models.context import ContextPart
from mole_mega.models.expert_parallel import expert_parallel
from mole_mega.models.mcore_config import McoreConfigs, build_configs
from mole_mega.models.sizes import LlavaSize
from mole_mega.models.splice import splice
from mole_mega.platform import fp8
from mole_mega.platform.parallel import Parallel


class LLaVA(MegatronModule):
    """One pipeline stage of a LLaVA: tower and projector on the first, the output layer on the last.

    `adapters=False` builds the base alone (conversion). Weights of the base are not initialised: load them.
    """

    def __init__(self, run: RunConfig, size: LlavaSize, parallel: Parallel, *, adapters: bool = True) -> None:
        configs: McoreConfigs = build_configs(run, size)
        super().__init__(configs.language)
        self.model_type = ModelType.encoder_or_decoder
        self.size = size
        self.parallel = parallel
        self.pre_process, self.post_process = parallel.is_first_stage, parallel.is_last_stage
        self.share_embeddings_and_output_weights = size.language.tied_embeddings
        backend = backend_called(run.model.backend)
        if self.pre_process:
            self.vision_model = CLIPViTModel(
                configs.vision,
                specs.vision_layer(backend),
                ln_pre_impl=backend.norm,
                patch_dim=size.vision.patch_size,
                img_h=size.vision.image_size,
                img_w=size.vision.image_size,
                pg_collection=parallel.groups,
            )
            self.vision_model.conv1.to(configs.vision.params_dtype)
            self.vision_projection = MultimodalProjector(
                configs.projector,
                specs.projector_mlp(backend),
                "mlp",
                size.vision.hidden_size,
                tp_group=parallel.groups.tp,
            )
        tp, vocab_size = parallel.tp_size, size.language.vocab_size
        padded_vocab_size = -(-vocab_size // tp) * tp
        per_stage = size.language.num_layers // parallel.pp_size
        layers = range(parallel.pp_rank * per_stage, (parallel.pp_rank + 1) * per_stage)
        adapter = replace(run.adapter, expert_parallel=expert_parallel(run, size).form) if adapters else None
        self._instructions: tuple[InstructionRouter, ...] = ()
        if adapter is not None and adapter.method == "mole" and adapter.router_scope == "sample":
            self._instructions = (
                InstructionRouter(configs.language, parallel.groups, adapter, run.train.seed, parallel.device),
            )
        plan = specs.AdapterPlan(adapter, run.train.seed, parallel, backend, *self._instructions)
        self.language_model = GPTModel(
            configs.language,
            specs.decoder_block(configs.language, layers, plan),
            vocab_size=padded_vocab_size,
            max_sequence_length=size.language.max_length,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=size.language.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=size.language.rope_theta,
            rope_scaling=size.language.rope_scaling == "llama3",
            rope_scaling_factor=size.language.rope_factor,
            seq_len_interpolation_factor=size.language.rope_factor if size.language.rope_scaling == "linear" else None,
            # images are spliced in first
            scatter_embedding_sequence_parallel=False,
            pg_collection=parallel.groups,
        )
        for instructions in self._instructions:
            self.language_model.router = instructions
        # vocabulary rows that only pad it to a multiple of TP; they lie on the last rank
        part = padded_vocab_size // tp
        self._num_real_logits = min(part, vocab_size - parallel.tp_rank * part)
        mixture.prefetch_along([block.experts for block in self.mole_layers() if isinstance(block, MixtureLayer)])
        self.to(parallel.device)
        self._freeze(train_projector=adapters and run.train.projector)
        if run.fp8.store_base and run.model.backend == "transformer_engine":
            fp8.forget_initial_weights(self.language_model.decoder)
        elif run.fp8.store_base:
            # all that is wide; embeddings, output layer and projector stay in the model's dtype
            last = size.language.num_layers
            for layer in self.language_model.decoder.layers:
                if not (run.fp8.first_last_layers_bf16 and layer.layer_number in (1, last)):
                    fp8.make_room(layer, run.fp8.scale)
            if self.pre_process:
                fp8.make_room(self.vision_model.decoder, run.fp8.scale)

    def _freeze(self, *, train_projector: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad = hasattr(parameter, "placement") and not hasattr(parameter, "moved_by_load")
        if train_projector and self.pre_process:
            self.vision_projection.requires_grad_(True)

    def routers(self) -> list[MoLERouter]:
        """This stage's routers, in layer order."""
        return [module for module in self.modules() if isinstance(module, MoLERouter)]

    def mole_layers(self) -> list[MoLELayer]:
        """This stage's MoLE blocks, in layer order."""
        return [module for module in self.modules() if isinstance(module, MoLELayer)]

    def lora_pairs(self) -> list[Pair]:
        """Handles on this stage's LoRA pairs, in layer order."""
        return [pair for module in self.modules() if isinstance(module, HasPairs) for pair in module.pairs()]

    def router_parameters(self) -> list[torch.nn.Parameter]:
        """Those of all this stage's routers."""
        modules: list[MegatronModule] = [*self.routers(), *self._instructions]
        return [parameter for module in modules for parameter in module.parameters()]

    def shared_parameters(self) -> list[torch.nn.Parameter]:
        """Trainable ones of which every stage has a copy: their gradients are to be summed over the pipeline."""
        return [parameter for module in self._instructions for parameter in module.parameters()]

    @torch.no_grad()
    def read_instructions(self, instructions: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """What the samples of the micro-batches ask that `forward` gets next, in this order: tokens and a mask of their
        instruction's text, [B, S] each. All ranks call it before a schedule; only `router_scope` sample listens."""
        if not self._instructions:
            return
        parallel, hidden_size = self.parallel, self.size.language.hidden_size
        table_NH = torch.empty(sum(len(tokens) for tokens, _ in instructions), hidden_size, device=parallel.device)
        if self.pre_process:
            means = []
            for tokens, mask in instructions:
                tokens, mask = tokens.to(parallel.device), mask.to(parallel.device)
                embeddings = self.language_model.embedding(
                    input_ids=tokens.masked_fill(~mask, 0), position_ids=torch.zeros_like(tokens)
                ).transpose(0, 1)
                text = embeddings.float().masked_fill(~mask[..., None], 0)
                means.append(text.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))
            table_NH = torch.cat(means) if means else table_NH
        if parallel.pp_size > 1:
            group = parallel.groups.pp
            dist.broadcast(table_NH, src=dist.get_process_group_ranks(group)[0], group=group)
        self._instructions[0].hear(table_NH)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron-Core's schedules hand over what the previous stage sent."""
        self.language_model.set_input_tensor(input_tensor)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels [N, 3, h, w] -> features [N, P, H], as wide as the decoder. The frozen tower runs without grad."""
        with torch.no_grad():
            features = self.vision_model(pixels.to(self.config.params_dtype))[:, 1:]
        return self.vision_projection(features)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        padding_mask: torch.Tensor,
        image_mask: torch.Tensor,
        pixels: torch.Tensor,
        labels: torch.Tensor | None = None,
        domains: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """tokens, position_ids, labels [B, S]; padding_mask and image_mask [B, S] bool (True: a real token; an image
        place); pixels [N, 3, h, w], N may be 0. With `domains` [B] the routers count tokens by source and modality,
        and those that route by task know it.
        With a `cache` the places stand behind those that it holds of earlier passes (models/decode.py).

        Returns, by stage: hidden states for the next one; on the last, logits [B, S, V] (padded vocabulary rows at
        -inf), or the loss of every place [B, S] when `labels` (each place's next token) are given. Under context
        parallelism the places of what is returned are this rank's (context.py).
        """
        part = ContextPart.of(self.parallel)
        assert part.size == self.config.context_parallel_size, "attention would see this rank's places alone"
        decoder_input = self._embed(tokens, position_ids, image_mask, pixels) if self.pre_process else None
        routed_padding = ~padding_mask if domains is None else place_groups(domains, image_mask, padding_mask)
        for instructions in self._instructions:
            groups = routed_padding if domains is not None else torch.where(padding_mask, 0, -1)
            routed_padding = number_places(groups, instructions.next_rows(len(tokens)))
        routed_padding = part.take(routed_padding)
        if self.config.sequence_parallel:
            # MoELayer sees this rank's part of the sequence
            routed_padding = routed_padding.chunk(self.parallel.tp_size, dim=1)[self.parallel.tp_rank]
        return self.language_model(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=None if cache is None else cache.expect(position_ids),
            inference_context=cache,
            decoder_input=decoder_input,
            labels=None if labels is None else part.take(labels),
            padding_mask=routed_padding,
            output_processor=self._output,
        )

    def _embed(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, image_mask: torch.Tensor, pixels: torch.Tensor
    ) -> torch.Tensor:
        # image places hold an id that need not be in the vocabulary
        embeddings = self.language_model.embedding(
            input_ids=tokens.masked_fill(image_mask, 0), position_ids=position_ids
        ).transpose(0, 1)
        if pixels.shape[0]:
            embeddings = splice(embeddings, self.encode_images(pixels), image_mask)
        elif image_mask.any():
            raise ValueError(f"{int(image_mask.sum())} image places in the text, but no images")
        hidden = ContextPart.of(self.parallel).take(embeddings).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.parallel.groups.tp)
        # A recomputed layer whose input needs no gradient is never run backward: its adapters would stand still. And of
        # expert-parallel ranks all must send back what they were sent, those too whose tokens came without an image.
        needed = self.config.recompute_granularity == "full" or self.parallel.ep_size > 1
        if self.training and needed and not hidden.requires_grad:
            hidden.requires_grad_()
        return hidden

    def _output(self, *, hidden_states: torch.Tensor, output_layer: Any, output_weight: Any, labels: Any,
                compute_language_model_loss: Any, **_: Any) -> torch.Tensor:  # fmt: skip
        logits, _ = output_layer(hidden_states, weight=output_weight)
        if self._num_real_logits < logits.shape[-1]:
            logits[..., max(self._num_real_logits, 0) :] = float("-inf")
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return compute_language_model_loss(labels.clamp(min=0), logits)
