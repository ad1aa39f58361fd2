"""LoRASculpt (arXiv 2503.16843): sparse factors, and a pull away from what the frozen weights hold.

**Masks.** At step `prune_step` each factor keeps the floor(density * numel) largest magnitudes of its whole tensor, by
expert; the support stays, and is re-imposed on weights and Adam's moments after every step, so that what is saved is
sparse (the released code masks before a step, and its last step is left dense). With `ramp_steps` the density falls to
its end in as many steps along a cubic (Zhu and Gupta, arXiv 1710.01878, equation 1), supports nested. An expert's
factors wait while its B is 0, for without tokens there is nothing to rank by (`waiting` counts these pairs); an A that
experts share waits for the first of them.

**Conflict regulariser.** Added to the loss, by its gradient (M held fixed):

    lambda * mean over pairs ||M o (B A)||_F       M = tanh(omega S), S = |1 / ln(|W| / ||W||_F + 1e-15)|

of the `regularise` projections, each expert a pair of its own; the norm is not squared, and s not included, as in the
released code. B A is never whole: it is built, weighed and given up a few rows at a time.

The published density 0.1 at rank 32 makes B A 27.5% dense by the paper's own formula 1 - (1 - s_A s_B)^r, not 5%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters.methods.base import Method, PairSize, StateTensor, Step, once_over_experts
from mole_mega.adapters.pairs import Factor, Pair, reduce_together
from mole_mega.adapters.sharding import Placement
from mole_mega.config import AdapterConfig, ConfigError, Count, NonNegative, Positive, PositiveInt, Range, RunConfig

# as wide as W, in fp32: what the regulariser takes beside its gradients, whatever W's size and the number of experts
# (of more than 127, a row of each one's products and of M)
_CHUNK_ROWS = 256
_TINY = 1e-15
# of the few numbers of a scaled-down model's factors some must stay
_SMALL_DENSITY = 1 / 16


@dataclass(frozen=True, kw_only=True)
class LoRASculptOptions:
    """`density` is rho, the share of each factor that stays; `conflict_weight` is lambda."""

    density: Annotated[float, Range(0, 1, low_open=True)] = 0.1
    prune_step: PositiveInt = 100
    ramp_steps: Count = 0
    conflict_weight: NonNegative = 1e-3
    omega: Positive = 1.0
    regularise: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = ("q", "k", "v")


class LoRASculpt(Method):
    """The masks and the regulariser. Its state: the masks, and the density that each expert's factor was cut to."""

    Options = LoRASculptOptions
    wants_idle_experts_still = True

    def __init__(
        self, options: Any, run: RunConfig, pairs: Sequence[Pair], groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        super().__init__(options, run, pairs, groups, device)
        self._masks = {f.name: torch.ones_like(f.parameter, dtype=torch.bool) for p in pairs for f in p.factors}
        self._placements = {f.name: f.placement for p in pairs for f in p.factors}
        # by expert of this rank, on the CPU, where reading them waits for nothing
        self._densities = {f.name: torch.ones(_num_held(f), dtype=torch.float64) for p in pairs for f in p.factors}
        self._pairs = pairs
        self._regularised = [p for p in pairs if options.conflict_weight and p.projection in options.regularise]
        if emptied := next((f for p in pairs for f in p.factors if not _number(options.density, f)), None):
            raise ConfigError(
                f"adapter.methods lorasculpt: density {options.density} keeps none of the {emptied.numel():,} numbers "
                f"of {emptied.name}, whose pair would add nothing for good; it needs {1 / emptied.numel():.2g} or more"
            )
        self._base_norms: list[torch.Tensor] = []  # of what is frozen: measured once, at the first step
        self._conflict = torch.zeros((), dtype=torch.float64, device=device)
        self._waiting = 0
        number = torch.tensor(sum(pair.num_experts for pair in self._regularised), device=device)
        dist.all_reduce(number, group=groups.pp)
        self._num_regularised = int(number)
        numbers = torch.tensor(sum(f.num_experts * f.numel() for p in pairs for f in p.factors), device=device)
        dist.all_reduce(numbers, group=groups.pp)
        self._num_numbers = int(numbers)

    @classmethod
    def check(cls, options: LoRASculptOptions, run: RunConfig) -> None:
        if options.density < 1 and options.prune_step + options.ramp_steps > run.train.steps:
            raise ConfigError(
                f"adapter.methods lorasculpt prunes from step {options.prune_step} over {options.ramp_steps} steps on, "
                f"but train.steps is {run.train.steps}: the run would end before"
            )
        if options.conflict_weight and not options.regularise:
            raise ConfigError(
                f"adapter.methods lorasculpt has conflict_weight {options.conflict_weight} and regularises nothing; "
                "name projections in `regularise`, or set conflict_weight to 0"
            )
        if options.conflict_weight:
            cls._check_regularised(options, run.adapter)
        if run.monitor.alarms.reaction == "reseed":
            raise ConfigError(
                "adapter.methods lorasculpt keeps each expert's own support, which monitor.alarms.reaction reseed "
                "would overwrite with another expert's weights"
            )

    @staticmethod
    def _check_regularised(options: LoRASculptOptions, adapter: AdapterConfig) -> None:
        carry = ("q", "k", "v", "o") * adapter.attention + ("gate", "up", "down") * bool(adapter.layers)
        if bare := [name for name in options.regularise if name not in carry]:
            raise ConfigError(
                f"adapter.methods lorasculpt has conflict_weight {options.conflict_weight} and regularises "
                f"{', '.join(bare)}, which carry no LoRA in this run; leave them out of `regularise`, or set "
                "conflict_weight to 0"
            )
        shares_A = adapter.method == "mole" and adapter.share_A
        if shared := [name for name in options.regularise if shares_A and name in ("gate", "up", "down")]:
            raise ConfigError(
                f"adapter.methods lorasculpt regularises each expert's B A, and with adapter.share_A "
                f"{', '.join(shared)} have one A for all of them; leave them out of `regularise`"
            )

    @classmethod
    def shortened(cls, options: LoRASculptOptions, steps: int) -> LoRASculptOptions:
        ramp_steps = min(options.ramp_steps, steps // 3)
        prune_step = min(options.prune_step, steps - ramp_steps)
        density = max(options.density, _SMALL_DENSITY)
        return replace(options, density=density, prune_step=prune_step, ramp_steps=ramp_steps)

    @classmethod
    def state_bytes(cls, options: LoRASculptOptions, pairs: Sequence[PairSize]) -> int:
        return torch.bool.itemsize * sum(pair.numbers for pair in pairs)  # the densities lie in the host's memory

    @classmethod
    def workspace_bytes(cls, options: LoRASculptOptions, pairs: Sequence[PairSize]) -> int:
        if not options.conflict_weight:
            return 0
        # the regulariser's gradients
        return torch.float32.itemsize * sum(pair.numbers for pair in pairs if pair.projection in options.regularise)

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        if not self._regularised:
            return
        if not self._base_norms:
            squares = [sum(_square(block) for block in pair.frozen()) for pair in self._regularised]
            self._base_norms = [s.sqrt() for s in reduce_together(squares, self.groups.tp)]  # type: ignore[arg-type]
        weight = self.options.conflict_weight / self._num_regularised
        total = torch.zeros_like(self._conflict)
        parts = []
        for pair, base_norm in zip(self._regularised, self._base_norms, strict=True):
            parts.append(conflict_parts(pair.A.values, pair.B.values, pair.frozen(), base_norm, self.options.omega))
        # over tensor-parallel ranks: every square is a part; of the gradients, those of the factor that each has whole
        summed = []
        for pair, (square, grad_A, grad_B) in zip(self._regularised, parts, strict=True):
            summed += [square, grad_B if pair.A.is_cut else grad_A]
        reduced = reduce_together(summed, self.groups.tp)
        for index, (pair, (_, grad_A, grad_B)) in enumerate(zip(self._regularised, parts, strict=True)):
            square, whole = reduced[2 * index], reduced[2 * index + 1]
            grad_A, grad_B = (grad_A, whole) if pair.A.is_cut else (whole, grad_B)
            norm = square.sqrt()
            factor = torch.where(norm > 0, weight / norm, 0.0)[..., None, None]
            pair.A.gradient.add_(factor * grad_A)
            pair.B.gradient.add_(factor * grad_B)
            if once_over_experts(pair.B):
                total += weight * norm.sum()
        self._conflict = total

    def after_step(self, pairs: Sequence[Pair], step: Step) -> None:
        density = density_at(step.number, self.options)
        pending = [pair for pair in pairs if any(self._is_above(density, factor) for factor in pair.factors)]
        moved = _have_moved(pending, self.groups)
        # a bank's experts may wait on one expert-parallel rank and not on another; an A that they share is on all alike
        shares = [pair.shares_A and self._is_above(density, pair.A) for pair in pending]
        anyones = [flags.max().reshape(1) for flags, is_shared in zip(moved, shares, strict=True) if is_shared]
        anyones = reduce_together(anyones, self.groups.ep, dist.ReduceOp.MAX)
        of_A, of_B = iter(_on_host(anyones)), _on_host(moved)
        for pair, is_shared, is_ready in zip(pending, shares, of_B, strict=True):
            self._cut(pair.B, density, is_ready)
            if is_shared or not pair.shares_A:
                self._cut(pair.A, density, next(of_A) if is_shared else is_ready)
        counted = [pair.B for pair in pairs if once_over_experts(pair.B)]
        self._waiting = sum(int((self._densities[B.name] > density).sum()) for B in counted)
        for pair in pairs:
            for factor in pair.factors:
                if (self._densities[factor.name] < 1).any():
                    _impose(self._masks[factor.name], factor, step)

    def _is_above(self, density: float, factor: Factor) -> bool:
        return bool((self._densities[factor.name] > density).any())

    def _cut(self, factor: Factor, density: float, is_ready: torch.Tensor) -> None:
        """Leave of a factor's experts that are ready no more than the density says."""
        these = is_ready & (self._densities[factor.name] > density)
        if not these.any():  # so on all that hold parts of them
            return
        mask = self._masks[factor.name]
        largest = factor.largest(_number(density, factor), among=mask)
        mask.copy_(torch.where(these.to(mask.device).view(-1, 1, 1), largest, mask).view(mask.shape))
        self._densities[factor.name][these] = density

    def metrics(self) -> dict[str, torch.Tensor]:
        factors = [factor for pair in self._pairs for factor in pair.factors if once_over_experts(factor)]
        kept = sum(_number(density, f) for f in factors for density in self._densities[f.name].tolist())
        return {
            "conflict": self._conflict,
            "density": torch.full_like(self._conflict, kept / max(1, self._num_numbers)),
            "waiting": torch.full_like(self._conflict, self._waiting),
        }

    def state(self) -> dict[str, StateTensor]:
        masks = {f"mask.{name}": StateTensor(mask, self._placements[name]) for name, mask in self._masks.items()}
        return masks | {
            f"density.{name}": StateTensor(density, Placement(expert_axis=self._placements[name].expert_axis))
            for name, density in self._densities.items()
        }


def _num_held(factor: Factor) -> int:
    """Of how many experts this rank holds the factor; 1 where it has no axis of experts."""
    return 1 if factor.placement.expert_axis is None else len(factor.parameter)


def _number(density: float, factor: Factor) -> int:
    """How many numbers of one expert's whole factor stay: floor(density * numel), of the density as it is written, and
    not of the float below it (0.29 * 100 is 28.999999999999996)."""
    return math.floor(round(density * factor.numel(), 6))


def density_at(step: int, options: LoRASculptOptions) -> float:
    """The share that stays after optimizer step `step` (the first is 1): 1 before `prune_step`, then down to rho."""
    if step < options.prune_step:
        return 1.0
    done = min(1.0, (step - options.prune_step + 1) / (options.ramp_steps + 1))
    return options.density + (1 - options.density) * (1 - done) ** 3


def conflict_mask(frozen: torch.Tensor, base_norm: torch.Tensor, omega: float) -> torch.Tensor:
    """M = tanh(omega |1 / ln(|W| / ||W||_F + 1e-15)|) of some of W's entries; fp32 or what `frozen` has above."""
    share = frozen.abs().to(base_norm.dtype).div_(base_norm)
    return share.add_(_TINY).log_().reciprocal_().abs_().mul_(omega).tanh_()


def conflict_parts(
    A: torch.Tensor, B: torch.Tensor, frozen: Sequence[torch.Tensor], base_norm: torch.Tensor, omega: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For N = ||M o (B A)||_F over the rows and columns at hand: (N^2, N dN/dA, N dN/dB), by expert.

    A [E, R, I] or [R, I], B [E, O, R] or [O, R]; `frozen`, blocks of the O rows of W, [rows, I].
    """
    square, grad_A, grad_B = A.new_zeros(A.shape[:-2]), torch.zeros_like(A), torch.empty_like(B)
    square_E = square.view(-1)
    A_E, B_E, grad_A_E, grad_B_E = (x.view(-1, *x.shape[-2:]) for x in (A, B, grad_A, grad_B))
    height = max(1, _CHUNK_ROWS // (1 + 2 * len(A_E)))  # of M, and each expert's `delta` and `pull`
    start = 0
    for block in frozen:
        for rows in block.split(height):
            here = slice(start, start + len(rows))
            weight = conflict_mask(rows, base_norm, omega).square_()
            delta = B_E[:, here] @ A_E
            pull = weight * delta
            square_E += (pull.flatten(1).unsqueeze(1) @ delta.flatten(1).unsqueeze(2)).flatten()
            grad_A_E.baddbmm_(B_E[:, here].mT, pull)
            grad_B_E[:, here] = pull @ A_E.mT
            start = here.stop
            del weight, delta, pull  # or they would stay while the next ones are made
    assert start == B.shape[-2], (start, B.shape)
    return square, grad_A, grad_B


def _square(block: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(block, dtype=torch.float32).square()


def _have_moved(pairs: Sequence[Pair], groups: ProcessGroupCollection) -> list[torch.Tensor]:
    """Of each pair, by expert of this rank, whether the whole of B is not zero: 1 or 0."""
    moved = [pair.B.parameter.detach().ne(0).flatten(-2).any(-1).int().reshape(-1) for pair in pairs]
    return reduce_together(moved, groups.tp, dist.ReduceOp.MAX)


def _on_host(flags: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """As bool, after one wait for the device."""
    return list(torch.cat(list(flags)).bool().cpu().split([len(f) for f in flags])) if flags else []


def _impose(mask: torch.Tensor, factor: Factor, step: Step) -> None:
    """Zero what the mask leaves out, in the weights and in what the optimizer holds of them."""
    with torch.no_grad():
        factor.parameter.mul_(mask)
        flat = mask.view(-1)
        for master, moments, start in step.held(factor.parameter):
            part = flat[start : start + master.numel()]
            for tensor in (master, *moments):
                tensor.detach().view(-1).mul_(part)
