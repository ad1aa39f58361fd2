"""LoRA pairs of given numbers, behind the handles that methods see, and steps on them with torch's Adam."""

import torch

from mole_mega.adapters.methods.base import Held, Step
from mole_mega.adapters.pairs import Factor, Pair
from mole_mega.adapters.sharding import PLACEMENTS, place
from mole_mega.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from mole_mega.training.optimizer import MOMENTS


def made_run(*methods, adapter=None, train=None):
    return RunConfig(
        run_dir="unused",
        model=ModelConfig(base=""),
        adapter=AdapterConfig(methods=methods, **(adapter or {})),
        train=TrainConfig(**{"steps": 1000} | (train or {})),
        data=DataConfig(sources=(SourceConfig(name="made", path="made"),)),
    )


def made_pair(parallel, A, B, W=None, *, name="layers.0.mlp.gate", grad_A=None, grad_B=None):
    """A pair of one process; of a bank, what has three axes."""
    factors = []
    for letter, values, gradient in (("A", A, grad_A), ("B", B, grad_B)):
        parameter = torch.nn.Parameter(values.clone())
        place(parameter, PLACEMENTS[f"{'experts.' if values.dim() == 3 else ''}column.{letter}"])
        parameter.main_grad = torch.zeros(values.shape) if gradient is None else gradient.float().clone()
        factors.append(Factor(f"{name}.{letter}", parameter, parallel.groups))
    experts = range(len(B)) if B.dim() == 3 else None
    frozen = torch.randn(B.shape[-2], A.shape[-1]) if W is None else W
    return Pair(name, 0, name.rpartition(".")[2], *factors, 1.0, experts, lambda: [frozen])


class Trainer:
    """Steps pairs down a gradient with torch's Adam, a method around each step."""

    def __init__(self, method, pairs, lr=0.01):
        self.method, self.pairs, self.lr, self.number = method, pairs, lr, 0
        self.optimizer = torch.optim.Adam([f.parameter for p in pairs for f in p.factors], lr=lr)

    def held(self, parameter):
        state = self.optimizer.state[parameter]
        yield Held(parameter, tuple(state[name] for name in MOMENTS if name in state), 0)

    def step(self, gradient):
        """`gradient(factor)` is the data's part."""
        self.number += 1
        step = Step(self.number, self.lr, self.held)
        for factor in (f for p in self.pairs for f in p.factors):
            factor.gradient.copy_(gradient(factor))
        self.method.before_step(self.pairs, step)
        for factor in (f for p in self.pairs for f in p.factors):
            factor.parameter.grad = factor.gradient.to(factor.parameter.dtype)
        self.optimizer.step()
        self.method.after_step(self.pairs, step)
