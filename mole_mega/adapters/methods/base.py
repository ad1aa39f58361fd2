"""What a method is: something that works around the optimizer step, over handles of LoRA pairs.

A penalty is a gradient term, a preconditioner reshapes gradients, a mask projects weights. None is part of the forward
pass, so each is written once for every layout: a rank treats the pairs that it holds, and asks their handles
(adapters/pairs.py) for what concerns a whole tensor. Ranks that hold the same tensor compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from mole_mega.adapters.pairs import Factor, Pair
from mole_mega.adapters.sharding import Placement
from mole_mega.config import RunConfig


class Held(NamedTuple):
    """The part of a parameter that this rank's optimizer steps: its fp32 master weights (the parameter itself in fp32),
    the moments that it keeps of them (of Adam two, of SGD none), and where the first number lies in the flat parameter.
    All of it; under the distributed optimizer a range, whose tensors may be flat."""

    master: torch.Tensor
    moments: Sequence[torch.Tensor]
    start: int


@dataclass(frozen=True)
class Step:
    """The optimizer step that a method works around. `number` counts the steps that moved the weights, from 1; `lr` is
    the adapters' learning rate; `held(parameter)` gives what the optimizer holds of a parameter."""

    number: int
    lr: float
    held: Callable[[torch.nn.Parameter], Iterable[Held]]


class StateTensor(NamedTuple):
    """This rank's part of a tensor that a method remembers, and how the whole is cut over ranks."""

    tensor: torch.Tensor
    placement: Placement


class PairSize(NamedTuple):
    """One rank's part of a LoRA pair (adapters/pairs.py) in numbers, from which is counted what a method will take
    before a model is built. `A` and `B` are those of one expert's factors; `experts`, how many the rank holds, is None
    for plain LoRA; with `shares_A` the A is one for all."""

    projection: str
    rank: int
    A: int
    B: int
    experts: int | None
    shares_A: bool

    @property
    def numbers(self) -> int:
        """Of both factors, all experts'."""
        experts = self.experts or 1
        return self.A * (1 if self.shares_A else experts) + self.B * experts


class Method:
    """A method that does nothing: the defaults of the methods. One object a process and run.

    A method's file holds its options too, as a frozen dataclass `Options` of which `adapter.methods` has the values.
    """

    Options: ClassVar[type]
    # what it makes of the gradient holds for the whole gradient: no other method may add to it afterwards
    reshapes_gradients: ClassVar[bool] = False
    # it moves experts that had no token yet; and: it takes an expert whose B is 0 for one that had none
    moves_idle_experts: ClassVar[bool] = False
    wants_idle_experts_still: ClassVar[bool] = False

    def __init__(
        self, options: Any, run: RunConfig, pairs: Sequence[Pair], groups: ProcessGroupCollection, device: torch.device
    ) -> None:
        self.options, self.run, self.groups, self.device = options, run, groups, device

    @classmethod
    def check(cls, options: Any, run: RunConfig) -> None:
        """Raise ConfigError where the options do not go with the rest of the run."""

    @classmethod
    def shortened(cls, options: Any, steps: int) -> Any:
        """The options for a run of only so many steps on a small model, so that all that the method does happens in
        it."""
        return options

    @classmethod
    def state_bytes(cls, options: Any, pairs: Sequence[PairSize]) -> int:
        """What the tensors of `state` take of the device that computes, over a rank's pairs."""
        return 0

    @classmethod
    def workspace_bytes(cls, options: Any, pairs: Sequence[PairSize]) -> int:
        """What is there at once of a step's own tensors, besides; pieces of a single pair on the way not counted."""
        return 0

    def init(self, pairs: Sequence[Pair]) -> None:
        """Change the adapters that a fresh run begins with; not called where weights come from a checkpoint."""

    def before_step(self, pairs: Sequence[Pair], step: Step) -> None:
        """Add to the reduced gradients or reshape them, in place, before they are clipped. If one is not finite then,
        the step is skipped, without its `after_step`, and the next one has its number."""

    def after_step(self, pairs: Sequence[Pair], step: Step) -> None:
        """Project the stepped weights, and whatever of them the optimizer holds."""

    def metrics(self) -> dict[str, torch.Tensor]:
        """Scalars of the last step, fp64: this rank's share of each, which the ranks of all stages and of all
        expert-parallel parts add up. Every rank names the same."""
        return {}

    def state(self) -> dict[str, StateTensor]:
        """The tensors that a checkpoint holds, by names that are their own in the whole model. A resumed run writes
        into the same tensors."""
        return {}


def once_over_experts(factor: Factor) -> bool:
    """Whether this rank's number of a factor counts where expert-parallel ranks' numbers are added up: of a bank each
    rank has its own experts', what has no experts is the same on all."""
    return factor.placement.expert_axis is not None or factor.groups.ep.rank() == 0
