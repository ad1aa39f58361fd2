"""Riemannian preconditioning of LoRA experts ("A Stronger Mixture of Low-Rank Experts", arXiv 2502.15828).

    dA = (B^T B + delta I)^-1 grad_A        dB = grad_B (A A^T + delta I)^-1

by expert, of the whole factors, both from the weights before the step (Jacobi order), in place of the gradient that
the optimizer gets: with `train.optimizer` sgd the paper's RSGD, with adam its RAdamW. To first order a step of SGD then
moves B A by P_col(B) G + G P_row(A), G the gradient of the product, whatever basis the factors are written in:
A -> S A, B -> B S^-1 changes nothing.

Where this departs from the released code: there B's preconditioner sees A after its own update (`released_sgd_step` is
that order, for comparison; one optimizer step cannot be split so), Adam has no bias correction and epsilon 1e-6
(`train.adam_eps` here), and a failed inverse is passed over, where the damped system here is solved, in fp64: beside a
Gram matrix of 16 and more fp32 loses a delta of 1e-6, and factors that are not of full rank would divide by zero.

The gradient is clipped after it was preconditioned. With B = 0, A's first step is 0 and its next gradients are up to
1 / delta larger: with SGD `train.clip_grad` would shrink all other steps with it, so set it to 0 or well above. The
paper's rescaling of gates is `adapter.rescale_gate` (adapters/mixing.py).

Adam forgets a constant factor of its gradients, but not one that changes within its memory: dA goes as 1 / ||B|| and dB
as 1 / ||A||, so they shrink as the factors grow. At large learning rates that is fast, and second moments that remember
the first steps (`train.adam_beta2` 0.999: about a thousand) then hold the factors back. What helps is a `delta` as
large as the Gram matrices become, so that the first steps are not divided by much less than the last, a smaller
`adam_beta2`, or clipping; the figures are in examples/methods.

Shape suffixes as in adapters/pairs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mole_mega.adapters.methods.base import Method, PairSize, Step
from mole_mega.adapters.pairs import Pair, gram_matrices
from mole_mega.config import ConfigError, Positive, RunConfig


@dataclass(frozen=True, kw_only=True)
class RiemannianOptions:
    """`delta`: the damping."""

    delta: Positive = 1e-6


class Riemannian(Method):
    """Preconditions the reduced gradient of every pair before Adam."""

    Options = RiemannianOptions
    reshapes_gradients = True

    @classmethod
    def check(cls, options: RiemannianOptions, run: RunConfig) -> None:
        if run.adapter.method == "mole" and run.adapter.share_A:
            raise ConfigError(
                "adapter.methods riemannian preconditions an expert's A by its B; with adapter.share_A one A serves "
                "all experts: set it to false"
            )

    @classmethod
    def workspace_bytes(cls, options: RiemannianOptions, pairs: Sequence[PairSize]) -> int:
        """Both Gram matrices of every pair, and (dA, dB) of one."""
        grams = sum(2 * (pair.experts or 1) * pair.rank**2 for pair in pairs)
        return torch.float64.itemsize * (grams + max((pair.numbers for pair in pairs), default=0))

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        for pair, (gram_A, gram_B) in zip(pairs, gram_matrices(pairs), strict=True):
            dA, dB = precondition(pair.A.gradient, pair.B.gradient, gram_A, gram_B, self.options.delta)
            pair.A.gradient.copy_(dA)
            pair.B.gradient.copy_(dB)


def precondition(
    grad_A: torch.Tensor, grad_B: torch.Tensor, gram_A: torch.Tensor, gram_B: torch.Tensor, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dA, dB) of the formula above, in the dtype of the Gram matrices. grad_A [..., R, I] and grad_B [..., O, R] may
    be parts of the whole along I and O; gram_A = A A^T and gram_B = B^T B, [..., R, R], are of the whole factors."""
    damping = delta * torch.eye(gram_A.shape[-1], dtype=gram_A.dtype, device=gram_A.device)
    # the check that solve_ex leaves out would wait for the device; the damped matrices are positive definite
    dA = torch.linalg.solve_ex(gram_B + damping, grad_A.to(gram_B.dtype)).result
    dB = torch.linalg.solve_ex(gram_A + damping, grad_B.mT.to(gram_A.dtype)).result.mT
    return dA, dB


def sgd_step(
    A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, lr: float, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of plain gradient descent along (dA, dB), both from the factors before it: (A, B) after it."""
    dA, dB = precondition(grad_A, grad_B, A @ A.mT, B.mT @ B, delta)
    return A - lr * dA, B - lr * dB


def released_sgd_step(
    A: torch.Tensor, B: torch.Tensor, grad_A: torch.Tensor, grad_B: torch.Tensor, lr: float, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in the order of the released AdamW code, where the saved A aliases the parameter: B's preconditioner
    reads A after A's own update."""
    new_A = A - lr * precondition(grad_A, grad_B, A @ A.mT, B.mT @ B, delta)[0]
    return new_A, B - lr * precondition(grad_A, grad_B, new_A @ new_A.mT, B.mT @ B, delta)[1]
