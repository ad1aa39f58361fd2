"""One training step, on one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from mole_mega.adapters.methods import build_methods
from mole_mega.adapters.methods.base import Step
from mole_mega.adapters.routers import move_score_biases, plan_routers, router_loss_gradients, summarize
from mole_mega.config import RunConfig
from mole_mega.data.collate import Batch
from mole_mega.models.context import ContextPart
from mole_mega.monitor.metrics import StepResult
from mole_mega.platform.parallel import Parallel
from mole_mega.training.loss import LOSS_ROWS, SCORE_ROWS, sum_loss, sum_scores
from mole_mega.training.optimizer import current_lr, held_parts


def _nothing() -> None:
    pass


class Evaluator:
    """Runs one model forward under one layout. `each_batch` is called as each micro-batch begins."""

    each_batch: Callable[[], None] = staticmethod(_nothing)

    def __init__(self, run: RunConfig, model: torch.nn.Module, parallel: Parallel, num_domains: int) -> None:
        self.run, self.model, self.parallel, self.num_domains = run, model, parallel, num_domains

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Scores over all ranks' micro-batches: a table [SCORE_ROWS, D] of sums (training/loss.py)."""
        self.model.eval()
        return self._schedule(self._score, micro_batches, len(SCORE_ROWS), forward_only=True)

    def _schedule(
        self, forward_step: Any, micro_batches: Sequence[Batch], num_rows: int, **kwargs: Any
    ) -> torch.Tensor:
        """Run Megatron-Core's schedule; returns the micro-batches' table, summed over all ranks."""
        llava: Any = getattr(self.model, "module", self.model)  # a LLaVA, inside a data-parallel wrapper in training
        llava.read_instructions([(batch.tokens, batch.instruction_mask) for batch in micro_batches])
        tables = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            # shapes travel with the tensors (variable_seq_lengths); these only have to be numbers
            seq_length=self.run.data.max_length,
            micro_batch_size=self.run.train.micro_batch_size,
            **kwargs,
        )
        total = torch.zeros(num_rows, self.num_domains, dtype=torch.float64, device=self.parallel.device)
        # each place is counted by one rank: of its last stage the first tensor-parallel one
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:
            total += sum(tables)
        dist.all_reduce(total)
        return total.cpu()

    def _score(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch: Batch = next(batches).to(self.parallel.device)
        logits = self._run(model, batch, None)
        mine, groups = self._part_of(batch), self.parallel.groups
        return logits, partial(sum_scores, batch=mine, num_domains=self.num_domains, groups=groups)

    def _part_of(self, batch: Batch) -> Batch:
        """The places that the model's output is of."""
        part = ContextPart.of(self.parallel)
        names = ("tokens", "labels", "padding_mask", "position_ids", "image_mask")
        taken: dict[str, Any] = {name: part.take(getattr(batch, name)) for name in names}
        return replace(batch, **taken)

    def _run(self, model: Any, batch: Batch, labels: torch.Tensor | None) -> torch.Tensor:
        self.each_batch()
        return model(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            padding_mask=batch.padding_mask,
            image_mask=batch.image_mask,
            pixels=batch.pixels,
            labels=labels,
            domains=batch.domains,
        )


class Stepper(Evaluator):
    """Runs steps of one model under one layout. `balance_factor` multiplies `adapter.balance_weight`; `applied_steps`
    counts the steps that moved the weights; `methods` are the run's, by name, and work around each step in order."""

    model: DistributedDataParallel
    balance_factor: float = 1.0
    applied_steps: int = 0

    def __init__(
        self,
        run: RunConfig,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        parallel: Parallel,
        num_domains: int,
    ) -> None:
        super().__init__(run, model, parallel, num_domains)
        self.optimizer = optimizer
        self.router_plan = plan_routers(model.module.routers(), num_domains)
        self.pairs = model.module.lora_pairs()
        self.methods = build_methods(run, self.pairs, parallel.groups, parallel.device)
        self._routing_table: torch.Tensor | None = None
        model.config.finalize_model_grads_func = self._finalize

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step on the global batch."""
        self.backward(micro_batches)
        return self.apply()

    def backward(self, micro_batches: Sequence[Batch], *, whole_gradients: bool = False) -> None:
        """Accumulate and reduce the gradient of the mean loss over the global batch.

        `whole_gradients` leaves each rank with all of its gradients, also under the distributed optimizer, which
        otherwise reduces only the part that a rank steps. Methods work on no less.
        """
        whole_gradients |= bool(self.methods)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._table = self._schedule(
            self._forward, micro_batches, len(LOSS_ROWS), forward_only=False, force_all_reduce=whole_gradients
        )

    def apply(self) -> StepResult:
        """Step the optimizer with the reduced gradient, unless it or the loss is not finite, or a method made it so."""
        domain_loss, domain_tokens, places = self._table
        loss = float(domain_loss.sum() / domain_tokens.sum().clamp(min=1))
        applied, grad_norm = self._gradients_are_finite() and math.isfinite(loss), float("nan")
        held = partial(held_parts, optimizer=self.optimizer)
        step = Step(self.applied_steps + 1, current_lr(self.optimizer), held)
        if applied and self.methods:
            for method in self.methods.values():
                method.before_step(self.pairs, step)
            applied = self._gradients_are_finite()
        if applied:
            self.applied_steps += 1
            _, grad_norm, _ = self.optimizer.step()
            for method in self.methods.values():
                method.after_step(self.pairs, step)
        table = self._routing_table
        if applied and table is not None:
            move_score_biases(self.model.module.routers(), self.router_plan, self.run.adapter, table)
        return StepResult(
            loss=loss,
            domain_loss=domain_loss / domain_tokens.clamp(min=1),
            domain_tokens=domain_tokens,
            places=int(places.sum()),
            grad_norm=float(grad_norm),
            applied=applied,
            # only now, when the step's other figures have waited for the device anyway
            routing=None if table is None else summarize(table, self.router_plan, self.run.adapter),
            methods=self._method_metrics() if applied else {},
        )

    def _method_metrics(self) -> dict[str, float]:
        """The methods' own scalars by "method/name", over all stages and expert-parallel ranks."""
        shares = {f"{name}/{key}": v for name, m in self.methods.items() for key, v in m.metrics().items()}
        if not shares:
            return {}
        totals = torch.stack(list(shares.values()))
        for group in (self.parallel.groups.ep, self.parallel.groups.pp):
            dist.all_reduce(totals, group=group)
        return dict(zip(shares, totals.tolist(), strict=True))

    def _forward(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch: Batch = next(batches).to(self.parallel.device)
        loss = self._run(model, batch, batch.labels)
        return loss, partial(sum_loss, batch=self._part_of(batch), num_domains=self.num_domains)

    def _finalize(self, models: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Megatron-Core's gradient sync, with the routers' own losses added to their gradients first."""
        routers = models[0].module.routers()
        if self.run.adapter.method == "mole":
            assert num_tokens is not None
            total = num_tokens.clone()  # known on the last stage of each data-parallel rank
            groups = self.parallel.groups
            dist.broadcast(total, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
            dist.all_reduce(total, group=groups.dp_cp)
            self._routing_table = router_loss_gradients(
                routers,
                self.router_plan,
                self.run.adapter,
                total.to(torch.float32),
                balance_factor=self.balance_factor,
            )
        for parameter in models[0].module.shared_parameters() if self.parallel.pp_size > 1 else ():
            dist.all_reduce(parameter.main_grad, group=self.parallel.groups.pp)
        finalize_model_grads(models, num_tokens, **kwargs)

    def _gradients_are_finite(self) -> bool:
        """With their squares: where these overflow, clipping makes the step 0, and Adam's second moments are lost."""
        buffers = (*self.model.buffers, *self.model.expert_parallel_buffers)
        norms = [torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers]
        finite = torch.isfinite(torch.stack(norms)).all() if norms else torch.tensor(True)
        flag = finite.to(self.parallel.device, torch.int)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)
