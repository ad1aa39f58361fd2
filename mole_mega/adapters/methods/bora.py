"""BoRA's prior (arXiv 2407.15857): experts that share a mean, theta_e ~ N(Theta, I / tau), Theta learned with them.

To the mean loss over tokens is added, once a step and whatever the layout,

    squared (the paper):    tau/2 sum_e ||theta_e - Theta||^2
    released (their code):  tau   sum_e sum_tensors ||theta_e - Theta||

theta_e all factors of expert e. tau -> 0: independent experts; tau -> inf: one shared adapter. The paper adds its prior
to the NLL summed over all tokens of the data, so its tau is this one times their number.

With one expert a task, each token at its own task's, this is BoRA; with a router it ties experts to one another. Theta
is a tensor a factor, in full on every expert-parallel rank. It begins as the experts' mean and follows its gradient,

    -tau sum_e w_e (theta_e - Theta)      w_e = 1, or 1 / ||theta_e - Theta||

by the step 1 / (tau sum_e w_e), which ends at the weighted mean sum_e w_e theta_e / sum_e w_e: for the squared form
that is the minimum, for the released one an iteration of Weiszfeld's towards it, the geometric median. (The paper's
code steps Theta by Adam, which near the optimum, where the experts' pulls cancel, magnifies rounding to whole steps.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters import sharding
from mole_mega.adapters.methods.base import Method, PairSize, StateTensor, Step
from mole_mega.adapters.pairs import Factor, Pair, reduce_together, whole_sums
from mole_mega.config import ConfigError, NonNegative, RunConfig

_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, kw_only=True)
class BoRAOptions:
    """`init_noise`: a fresh run's experts begin as copies of one adapter, plus N(0, init_noise^2) (published: 1e-3;
    that perturbs B too, so the model does not begin as the frozen one). None: as they would without the method."""

    tau: NonNegative
    prior: Literal["squared", "released"] = "squared"
    init_noise: NonNegative | None = None


class BoRA(Method):
    """The prior. Its state: Theta, fp32, a tensor a factor."""

    Options = BoRAOptions
    moves_idle_experts = True

    def __init__(
        self, options: Any, run: RunConfig, pairs: Sequence[Pair], groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        super().__init__(options, run, pairs, groups, device)
        self._factors = [f for pair in pairs for f in pair.factors if f.placement.expert_axis is not None]
        self._thetas = [torch.zeros_like(factor.values[0]) for factor in self._factors]
        self._prior = torch.zeros((), dtype=torch.float64, device=device)

    @classmethod
    def check(cls, options: BoRAOptions, run: RunConfig) -> None:
        if run.adapter.method != "mole" or run.adapter.num_experts < 2:
            number = run.adapter.num_experts if run.adapter.method == "mole" else 0
            raise ConfigError(
                f"adapter.methods bora ties experts to one another: it needs adapter.method mole with at least 2 "
                f"experts, this run has {number}"
            )
        if run.train.weight_decay:
            raise ConfigError(
                f"adapter.methods bora with train.weight_decay {run.train.weight_decay}: that is a second prior, at 0; "
                "set it to 0"
            )

    @classmethod
    def state_bytes(cls, options: BoRAOptions, pairs: Sequence[PairSize]) -> int:
        return torch.float32.itemsize * sum(
            pair.B + (0 if pair.shares_A else pair.A) for pair in pairs if pair.experts is not None
        )

    @classmethod
    def workspace_bytes(cls, options: BoRAOptions, pairs: Sequence[PairSize]) -> int:
        return torch.float32.itemsize * sum(  # the experts' gaps
            pair.experts * (pair.B + (0 if pair.shares_A else pair.A)) for pair in pairs if pair.experts is not None
        )

    def init(self, pairs: Sequence[Pair]) -> None:
        if self.options.init_noise is None:
            return
        with torch.no_grad():
            for pair in pairs:
                for factor, start in ((pair.A, sharding.kaiming_uniform), (pair.B, sharding.zeros)):
                    if factor.placement.expert_axis is not None:
                        factor.parameter.copy_(self._noisy_copies(factor, start))

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        if step.number == 1 and self._factors:
            self._move_thetas([torch.ones(len(f.parameter), device=self.device) for f in self._factors])
        if not self.options.tau or not self._factors:
            return
        gaps, squares = self._gaps()
        self._prior = torch.zeros_like(self._prior)
        for factor, gap, square_E in zip(self._factors, gaps, squares, strict=True):
            energy_E, weight_E = prior(square_E, self.options.tau, self.options.prior)
            factor.gradient.add_(weight_E[:, None, None] * gap)
            self._prior += energy_E.sum()

    def after_step(self, pairs: Sequence[Pair], step: Step) -> None:
        # at tau 0 too: a run may go on with another one
        if not self._factors:
            return
        _, squares = self._gaps()
        self._move_thetas([prior(square_E, 1.0, self.options.prior)[1] for square_E in squares])

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"prior": self._prior}

    def state(self) -> dict[str, StateTensor]:
        return {
            f"theta.{factor.name}": StateTensor(theta, without_experts(factor.placement))
            for factor, theta in zip(self._factors, self._thetas, strict=True)
        }

    def _gaps(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """theta_e - Theta of this rank's part of each factor, and its squared norm over the whole, [E]."""
        gaps = [factor.values - theta for factor, theta in zip(self._factors, self._thetas, strict=True)]
        return gaps, whole_sums(self._factors, [gap.square().sum((-2, -1)) for gap in gaps])

    def _move_thetas(self, weights_E: Sequence[torch.Tensor]) -> None:
        """To the weighted mean over the experts of all ranks."""
        sums = []
        for factor, weight_E in zip(self._factors, weights_E, strict=True):
            sums += [torch.einsum("e,eij->ij", weight_E, factor.values), weight_E.sum()]
        reduced = reduce_together(sums, self.groups.ep)
        for theta, total, weight in zip(self._thetas, reduced[0::2], reduced[1::2], strict=True):
            theta.copy_(total / weight)

    def _noisy_copies(self, factor: Factor, start: Callable[[torch.Tensor, torch.Generator], None]) -> torch.Tensor:
        """One adapter's factor, drawn anew, for every expert of this rank, and noise of each one's own."""
        shape, seed = factor.whole_shape(), self.run.train.seed
        placement = without_experts(factor.placement)
        one = sharding.draw_part(f"{factor.name}.global", placement, shape[1:], start, self.groups, seed=seed)
        noise = sharding.draw_part(
            f"{factor.name}.noise", factor.placement, shape, sharding.normal, self.groups, seed=seed
        )
        return one + self.options.init_noise * noise


def prior(
    square_E: torch.Tensor, tau: float, form: Literal["squared", "released"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the prior adds to the loss, tau w_e) of one factor by expert, [E] both.

    `square_E` is ||theta_e - Theta||^2 of the whole factor. The gradient to theta_e is tau w_e (theta_e - Theta), that
    to Theta minus the sum over the experts. At theta_e = Theta the released form has a kink; its gradient there is 0.
    """
    if form == "squared":
        return tau / 2 * square_E, torch.full_like(square_E, tau)
    norm_E = square_E.sqrt()
    return tau * norm_E, tau / norm_E.clamp(min=_SMALLEST_NORM)


def without_experts(placement: sharding.Placement) -> sharding.Placement:
    """The placement of one tensor that stands for all experts' in a bank, whose first axis is theirs."""
    axis = placement.tensor_axis
    return replace(placement, expert_axis=None, tensor_axis=None if axis is None else axis - 1)
