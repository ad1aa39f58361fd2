"""Riemannian preconditioning of LoRA experts ("A Stronger Mixture of Low-Rank Experts", arXiv 2502.15828).

    dA = (B^T B + delta I)^-1 grad_A        dB = grad_B (A A^T + delta I)^-1

by expert, of the whole factors, both from the weights before the step (Jacobi order), in place of the gradient that
the optimizer gets: with `train.optimizer` sgd the paper's RSGD, with adam its RAdamW. To first order a step of SGD then
moves B A by P_col(B) G + G P_row(A), G the gradient of the product, whatever basis the factors are written in:
A -> S A, B -> B S^-1 changes nothing.

In the released RAdamW, though not in its RSGD, B's preconditioner reads A after A's own step, for the tensor that was
saved is the parameter itself. `order: released` does so, for comparison: an optimizer step cannot be split, so it works
out where Adam will take A. Further departures: there Adam has no bias correction and epsilon 1e-6 (`train.adam_eps`
here), the gate has an optimizer of its own, and a failed inverse is passed over, where the damped system here is
solved, in fp64: beside a Gram matrix of 16 and more fp32 loses a delta of 1e-6, and factors that are not of full rank
would divide by zero.

The gradient is clipped after it was preconditioned. With B = 0, A's first step is 0 and its next gradients are up to
1 / delta larger: with SGD `train.clip_grad` would shrink all other steps with it, so set it to 0 or well above. The
paper's rescaling of gates is `adapter.rescale_gate` (adapters/mixing.py).

Adam forgets a constant factor of its gradients, but not one that changes within its memory: dA goes as 1 / ||B|| and dB
as 1 / ||A||, so they shrink as the factors grow. At large learning rates that is fast, and second moments that remember
the first steps (`train.adam_beta2` 0.999: about a thousand) then hold the factors back. What helps is a `delta` as
large as the Gram matrices become, so that the first steps are not divided by much less than the last, a smaller
`adam_beta2`, or clipping; the figures are in examples/methods. With rank 1 the preconditioner is a number, of which
Adam forgets all but its changes: there is next to nothing to gain.

Shape suffixes as in adapters/pairs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mole_mega.adapters.methods.base import Method, PairSize, Step
from mole_mega.adapters.pairs import Factor, Pair, gram_matrices, whole_sums
from mole_mega.config import ConfigError, Positive, RunConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class RiemannianOptions:
    """`delta`: the damping. `order`: whether B's preconditioner reads A as it was, or as it will be (released)."""

    delta: Positive = 1e-6
    order: Literal["jacobi", "released"] = "jacobi"


class Riemannian(Method):
    """Preconditions the reduced gradient of every pair before Adam or SGD."""

    Options = RiemannianOptions
    reshapes_gradients = True

    @classmethod
    def check(cls, options: RiemannianOptions, run: RunConfig) -> None:
        if run.adapter.method == "mole" and run.adapter.share_A:
            raise ConfigError(
                "adapter.methods riemannian preconditions an expert's A by its B; with adapter.share_A one A serves "
                "all experts: set it to false"
            )
        if options.order == "released":
            for key, wanted in (("optimizer", "adam"), ("clip_grad", 0), ("distributed_optimizer", False)):
                if (value := getattr(run.train, key)) != wanted:
                    raise ConfigError(
                        "adapter.methods riemannian, order released, works out where Adam will take the whole of A: "
                        f"train.{key} must be {str(wanted).lower()}, got {str(value).lower()}; or set order to jacobi"
                        + (", which is the released SGD's" if value == "sgd" else "")
                    )

    @classmethod
    def workspace_bytes(cls, options: RiemannianOptions, pairs: Sequence[PairSize]) -> int:
        """Both Gram matrices of every pair, and (dA, dB) of one."""
        grams = sum(2 * (pair.experts or 1) * pair.rank**2 for pair in pairs)
        return torch.float64.itemsize * (grams + max((pair.numbers for pair in pairs), default=0))

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        delta, grams = self.options.delta, gram_matrices(pairs)
        for pair, (_, gram_B) in zip(pairs, grams, strict=True):
            pair.A.gradient.copy_(solve(gram_B, pair.A.gradient, delta))
        grams_A = [gram_A for gram_A, _ in grams]
        if self.options.order == "released":
            stepped = (after_adam(pair.A, step, self.run.train) for pair in pairs)
            grams_A = whole_sums([pair.A for pair in pairs], [A @ A.mT for A in stepped])
        for pair, gram_A in zip(pairs, grams_A, strict=True):
            pair.B.gradient.copy_(solve(gram_A, pair.B.gradient.mT, delta).mT)


def solve(gram: torch.Tensor, gradient: torch.Tensor, delta: float) -> torch.Tensor:
    """(gram + delta I)^-1 gradient, [..., R, N], in the dtype of gram [..., R, R]: of the whole factor, where N may be
    a part of it."""
    damping = delta * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # the check that solve_ex leaves out would wait for the device; the damped matrices are positive definite
    return torch.linalg.solve_ex(gram + damping, gradient.to(gram.dtype)).result


def after_adam(factor: Factor, step: Step, train: TrainConfig) -> torch.Tensor:
    """This rank's part of a factor as Adam will leave it, which holds all of it and steps by the gradient as it stands;
    fp64, of the numbers that the parameter can hold."""
    ((master, moments, _),) = step.held(factor.parameter)
    gradient, beta1, beta2 = factor.gradient.double(), train.adam_beta1, train.adam_beta2
    first, second = (moment.double() for moment in moments) if moments else (torch.zeros_like(gradient),) * 2
    first = torch.lerp(gradient, first, beta1) / (1 - beta1**step.number)
    second = torch.lerp(gradient.square(), second, beta2) / (1 - beta2**step.number)
    values = master.detach().double() * (1 - step.lr * train.weight_decay)
    values -= step.lr * first / (second.sqrt() + train.adam_eps)
    return values.to(factor.parameter.dtype).double()
