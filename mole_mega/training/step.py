"""One training step, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from mole_mega.adapters.routers import RoutingSummary, router_loss_gradients
from mole_mega.config import RunConfig
from mole_mega.data.collate import Batch
from mole_mega.monitor.metrics import StepResult
from mole_mega.platform.parallel import Parallel
from mole_mega.training.loss import LossSums, sum_loss


class Stepper:
    """Runs steps of one model under one layout."""

    def __init__(
        self, run: RunConfig, model: DistributedDataParallel, optimizer: MegatronOptimizer, parallel: Parallel,
        num_domains: int,
    ) -> None:  # fmt: skip
        self.run, self.model, self.optimizer, self.parallel = run, model, optimizer, parallel
        self.num_domains = num_domains
        self._routing: RoutingSummary | None = None
        model.config.finalize_model_grads_func = self._finalize

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one optimizer step on the global batch."""
        self.backward(micro_batches)
        return self.apply()

    def backward(self, micro_batches: Sequence[Batch], *, whole_gradients: bool = False) -> None:
        """Accumulate and reduce the gradient of the mean loss over the global batch.

        `whole_gradients` leaves each rank with all of its gradients, also under the distributed optimizer, which
        otherwise reduces only the part that a rank steps.
        """
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._forward_backward(micro_batches, forward_only=False, force_all_reduce=whole_gradients)
        self._totals = self._reduce(sums, micro_batches)

    def apply(self) -> StepResult:
        """Step the optimizer with the reduced gradient, unless it or the loss is not finite."""
        domain_loss, domain_tokens, places = self._totals
        loss = float(domain_loss.sum() / domain_tokens.sum().clamp(min=1))
        applied, grad_norm = self._gradients_are_finite() and loss == loss and abs(loss) != float("inf"), float("nan")
        if applied:
            _, grad_norm, _ = self.optimizer.step()
        return StepResult(
            loss=loss,
            domain_loss=domain_loss / domain_tokens.clamp(min=1),
            domain_tokens=domain_tokens,
            places=places,
            grad_norm=float(grad_norm),
            applied=applied,
            routing=self._routing,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss sums and label counts by domain, [D] each, over all ranks' micro-batches."""
        self.model.eval()
        sums = self._forward_backward(micro_batches, forward_only=True)
        domain_loss, domain_tokens, _ = self._reduce(sums, micro_batches)
        return domain_loss, domain_tokens

    def _forward_backward(
        self, micro_batches: Sequence[Batch], *, forward_only: bool, force_all_reduce: bool = False
    ) -> list[LossSums]:
        return get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            # shapes travel with the tensors (variable_seq_lengths); these only have to be numbers
            seq_length=self.run.data.max_length,
            micro_batch_size=self.run.train.micro_batch_size,
            forward_only=forward_only,
            force_all_reduce=force_all_reduce,
        )

    def _forward(self, batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch: Batch = next(batches).to(self.parallel.device)
        output = model(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            padding_mask=batch.padding_mask,
            image_mask=batch.image_mask,
            pixels=batch.pixels,
            labels=batch.labels,
        )
        return output, partial(sum_loss, batch=batch, num_domains=self.num_domains)

    def _finalize(self, models: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
        """Megatron-Core's gradient sync, with the routers' own losses added to their gradients first."""
        routers = models[0].module.routers()
        if self.run.adapter.method == "mole":
            assert num_tokens is not None
            total = num_tokens.clone()  # known on the last stage of each data-parallel rank
            groups = self.parallel.groups
            dist.broadcast(total, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
            dist.all_reduce(total, group=groups.dp_cp)
            self._routing = router_loss_gradients(routers, groups, self.run.adapter, total.to(torch.float32))
        finalize_model_grads(models, num_tokens, **kwargs)

    def _gradients_are_finite(self) -> bool:
        sums = [buffer.grad_data.sum() for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers)]
        finite = torch.isfinite(torch.stack(sums)).all() if sums else torch.tensor(True)
        flag = finite.to(self.parallel.device, torch.int)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def _reduce(self, sums: list[LossSums], micro_batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Totals over all ranks. Each sample is counted by one rank: the last stage's first tensor-parallel one."""
        table = torch.zeros(2 * self.num_domains + 1, dtype=torch.float64, device=self.parallel.device)
        if self.parallel.is_last_stage and self.parallel.tp_rank == 0:
            table[: self.num_domains] = sum(s.loss for s in sums)
            table[self.num_domains : -1] = sum(s.tokens for s in sums)
            table[-1] = sum(int(batch.padding_mask.sum()) for batch in micro_batches)
        dist.all_reduce(table)
        table = table.cpu()
        return table[: self.num_domains], table[self.num_domains : -1], int(table[-1])
