"""When a layer's routing is sick, and what is done about it: a pure function of the routing and of what is remembered.

Judged on counts of tokens alone, which are whole numbers: every rank, and every layout that routes the same, comes to
the same verdict. What was told and what a reaction changed is in the `RouterMemory` that a checkpoint holds, so that a
resumed run goes on as the straight one does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mole_mega.adapters.routing import RouterMemory, RoutingSummary
from mole_mega.config import AdapterConfig, AlarmsConfig


@dataclass(frozen=True)
class Alarm:
    """One row of `events.jsonl`. `kind` is collapse, dead_expert or low_entropy; `expert` the busiest one, the dead
    one, or none. `value` reached `limit`: the busiest expert over the mean, steps without a token, or nats. `source` is
    the expert whose copy a dead one becomes."""

    step: int
    kind: str
    layer: int
    expert: int | None
    value: float
    limit: float
    reaction: str = "none"
    source: int | None = None

    @property
    def key(self) -> str:
        """What makes it the same alarm as an earlier one. Which expert a layer collapsed on does not matter."""
        return f"{self.kind}/{self.layer}" + (f"/{self.expert}" if self.kind == "dead_expert" else "")

    def row(self) -> dict[str, int | float | str | None]:
        names = ("step", "kind", "layer", "expert", "value", "limit", "reaction")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        expert = "" if self.expert is None else f" expert {self.expert}"
        reaction = "" if self.reaction == "none" else f": {self.reaction}"
        return f"{self.kind} layer {self.layer}{expert} ({self.value:.3g}, limit {self.limit:g}){reaction}"


def observe(
    memory: RouterMemory, routing: RoutingSummary, step: int, alarms: AlarmsConfig, adapter: AdapterConfig
) -> tuple[RouterMemory, list[Alarm]]:
    """What is remembered after a step whose update was applied, and the alarms that it sets off, with what the reaction
    is. Of the reactions, the balance weight is in the memory; copying an expert is left to the caller."""
    counts_LE = routing.counts_LE.long()
    unused_LE = torch.where(counts_LE == 0, memory.unused_steps_LE + 1, 0)
    memory = replace(memory, tokens_LE=memory.tokens_LE + counts_LE, unused_steps_LE=unused_LE)
    found = [
        alarm
        for alarm in _conditions(routing, unused_LE, step, alarms)
        if step - memory.told.get(alarm.key, -alarms.repeat_every) >= alarms.repeat_every
    ]
    if not found:
        return memory, []
    memory = replace(memory, told={**memory.told, **{alarm.key: step for alarm in found}})
    if alarms.reaction == "raise_balance":
        return _raise_balance(memory, found, alarms, adapter.balance_weight)
    if alarms.reaction == "reseed":
        return _plan_reseeds(memory, found, routing)
    return memory, found


def _conditions(routing: RoutingSummary, unused_LE: torch.Tensor, step: int, alarms: AlarmsConfig) -> Iterator[Alarm]:
    if unused_LE.shape[-1] == 1:
        return  # one expert has all the tokens, as it should
    rows = zip(
        routing.layers, routing.counts_LE.argmax(-1).tolist(), routing.max_over_mean_L.tolist(),
        routing.load_entropy_L.tolist(), unused_LE.tolist(), strict=True,
    )  # fmt: skip
    for layer, busiest, ratio, entropy, unused_E in rows:
        if alarms.collapse and ratio >= alarms.collapse:
            yield Alarm(step, "collapse", layer, busiest, ratio, alarms.collapse)
        if entropy < alarms.entropy_floor:
            yield Alarm(step, "low_entropy", layer, None, entropy, alarms.entropy_floor)
        for expert, unused in enumerate(unused_E):
            if alarms.dead_steps and unused >= alarms.dead_steps:
                yield Alarm(step, "dead_expert", layer, expert, unused, alarms.dead_steps)


def _raise_balance(
    memory: RouterMemory, found: list[Alarm], alarms: AlarmsConfig, weight: float
) -> tuple[RouterMemory, list[Alarm]]:
    """Once a step, however many alarms it set off."""
    raised = min(memory.balance_factor * alarms.balance_factor, alarms.max_balance_weight / weight)
    if not raised > memory.balance_factor:
        return memory, found
    reaction = f"balance weight {weight * memory.balance_factor:.4g} -> {weight * raised:.4g}"
    return replace(memory, balance_factor=raised), [replace(alarm, reaction=reaction) for alarm in found]


def _plan_reseeds(
    memory: RouterMemory, found: list[Alarm], routing: RoutingSummary
) -> tuple[RouterMemory, list[Alarm]]:
    """Each dead expert of a layer becomes a copy of another one: the first of the busiest, the next of the second
    busiest, and so on through all that had a token in this step; only then is one copied again."""
    unused_LE, planned = memory.unused_steps_LE.clone(), []
    sources = {layer: itertools.cycle(_by_load(counts_E)) for layer, counts_E in
               zip(routing.layers, routing.counts_LE.tolist(), strict=True)}  # fmt: skip
    for alarm in found:
        if alarm.kind == "dead_expert" and (source := next(sources[alarm.layer], None)) is not None:
            unused_LE[routing.layers.index(alarm.layer), alarm.expert] = 0
            alarm = replace(alarm, reaction=f"reseeded from expert {source}", source=source)
        planned.append(alarm)
    return replace(memory, unused_steps_LE=unused_LE), planned


def _by_load(counts_E: Sequence[float]) -> list[int]:
    """The experts that had tokens, the busiest first; of equals the one with the lower number."""
    return sorted((expert for expert, count in enumerate(counts_E) if count), key=lambda expert: -counts_E[expert])


def progress_note(told: Sequence[Alarm], most: int = 3) -> str:
    """A step's alarms, for the end of its progress line."""
    if not told:
        return ""
    more = f"; and {len(told) - most} more" if len(told) > most else ""
    return f"  ALARM {'; '.join(map(str, told[:most]))}{more}"
