"""BoRA's prior (arXiv 2407.15857): experts that share a mean, theta_e ~ N(Theta, I / tau), Theta learned with them.

To the mean loss over tokens is added, once a step and whatever the layout,

    squared (the paper):    tau/2 sum_e ||theta_e - Theta||^2
    released (their code):  tau   sum_e sum_tensors ||theta_e - Theta||

theta_e all factors of expert e. tau -> 0: independent experts; tau -> inf: one shared adapter. The paper adds its prior
to the NLL summed over all tokens of the data, so its tau is this one times their number.

With one expert a task, each token at its own task's, this is BoRA; with a router it ties experts to one another. Theta
is a tensor a factor, in full on every expert-parallel rank: it begins as the experts' mean and is stepped by Adam at
the adapters' learning rate (from its exact gradient, which is not part of the gradient norm that is clipped).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters import sharding
from mole_mega.adapters.methods.base import Method, StateTensor, Step
from mole_mega.adapters.pairs import Factor, Pair, reduce_together, whole_sums
from mole_mega.config import ConfigError, NonNegative, RunConfig


@dataclass(frozen=True, kw_only=True)
class BoRAOptions:
    """`init_noise`: a fresh run's experts begin as copies of one adapter, plus N(0, init_noise^2) (published: 1e-3;
    that perturbs B too, so the model does not begin as the frozen one). None: as they would without the method."""

    tau: NonNegative
    prior: Literal["squared", "released"] = "squared"
    init_noise: NonNegative | None = None


@dataclass
class _Global:
    """Theta of one factor of this rank, and what Adam knows of it; all fp32."""

    factor: Factor
    lr_ratio: float
    theta: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    gradient: torch.Tensor

    @property
    def placement(self) -> sharding.Placement:
        return without_experts(self.factor.placement)


class BoRA(Method):
    """The prior. Its state: Theta and its Adam moments."""

    Options = BoRAOptions

    def __init__(
        self, options: Any, run: RunConfig, pairs: Sequence[Pair], groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        super().__init__(options, run, pairs, groups, device)
        self._globals = []
        for pair in pairs:
            for factor, lr_ratio in ((pair.A, 1.0), (pair.B, run.train.lora_plus_ratio)):
                if factor.placement.expert_axis is not None:
                    zeros = [torch.zeros_like(factor.values[0]) for _ in range(4)]
                    self._globals.append(_Global(factor, lr_ratio, *zeros))
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

    def init(self, pairs: Sequence[Pair]) -> None:
        if self.options.init_noise is None:
            return
        with torch.no_grad():
            for pair in pairs:
                for factor, start in ((pair.A, sharding.kaiming_uniform), (pair.B, sharding.zeros)):
                    if factor.placement.expert_axis is None:
                        continue
                    shape, seed = factor.whole_shape(), self.run.train.seed
                    one = sharding.draw_part(
                        f"{factor.name}.global", without_experts(factor.placement), shape[1:], start, self.groups,
                        seed=seed,
                    )  # fmt: skip
                    noise = sharding.draw_part(
                        f"{factor.name}.noise", factor.placement, shape, sharding.normal, self.groups, seed=seed
                    )
                    factor.parameter.copy_(one + self.options.init_noise * noise)

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        if not self.options.tau or not self._globals:
            return
        ep = self.groups.ep
        if step.number == 1:
            sums = reduce_together([g.factor.values.sum(0) for g in self._globals], ep)
            for g, total in zip(self._globals, sums, strict=True):
                g.theta.copy_(total / (len(g.factor.parameter) * ep.size()))
        gaps = [g.factor.values - g.theta for g in self._globals]
        squares = whole_sums([g.factor for g in self._globals], [gap.square().sum((-2, -1)) for gap in gaps])
        total, pulls = torch.zeros_like(self._prior), []
        for g, gap, square_E in zip(self._globals, gaps, squares, strict=True):
            energy_E, pull = prior(gap, square_E, self.options.tau, self.options.prior)
            g.factor.gradient.add_(pull)
            pulls.append(pull.sum(0))
            total += energy_E.sum()
        for g, pull in zip(self._globals, reduce_together(pulls, ep), strict=True):
            g.gradient.copy_(-pull)
        self._prior = total

    def after_step(self, pairs: Sequence[Pair], step: Step) -> None:
        if not self.options.tau:
            return
        train = self.run.train
        beta1, beta2 = train.adam_beta1, train.adam_beta2
        for g in self._globals:
            g.exp_avg.lerp_(g.gradient, 1 - beta1)
            g.exp_avg_sq.mul_(beta2).addcmul_(g.gradient, g.gradient, value=1 - beta2)
            root = (g.exp_avg_sq / (1 - beta2**step.number)).sqrt_().add_(train.adam_eps)
            g.theta.addcdiv_(g.exp_avg, root, value=-step.lr * g.lr_ratio / (1 - beta1**step.number))

    def metrics(self) -> dict[str, torch.Tensor]:
        return {"prior": self._prior}

    def state(self) -> dict[str, StateTensor]:
        return {
            f"{kind}.{g.factor.name}": StateTensor(getattr(g, kind), g.placement)
            for g in self._globals
            for kind in ("theta", "exp_avg", "exp_avg_sq")
        }


def prior(
    gap: torch.Tensor, square_E: torch.Tensor, tau: float, form: Literal["squared", "released"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the prior adds to the loss [E], its gradient to the factors) of one factor of E experts.

    gap = theta_e - Theta [E, ...], which may be a part of the whole; `square_E` its squared norm over the whole. The
    gradient to Theta is minus the sum over the experts. At theta_e = Theta the released form has a kink: its gradient
    there is taken as 0.
    """
    if form == "squared":
        return tau / 2 * square_E, tau * gap
    norm_E = square_E.sqrt()
    scale_E = torch.where(norm_E > 0, tau / norm_E, 0.0)
    return tau * norm_E, scale_E.reshape(-1, *[1] * (gap.dim() - 1)) * gap


def without_experts(placement: sharding.Placement) -> sharding.Placement:
    """The placement of one tensor that stands for all experts' in a bank, whose first axis is theirs."""
    axis = placement.tensor_axis
    return replace(placement, expert_axis=None, tensor_axis=None if axis is None else axis - 1)
