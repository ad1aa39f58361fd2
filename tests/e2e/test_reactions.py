"""What an alarm sets off is part of the run: a run that was killed and goes on sounds, and reacts, as the straight one
does, bit for bit, with reactions before the checkpoint, between it and the kill, and after."""

import json
from functools import partial

import commands
import pytest
import torch
from commands import kill_before_step, read_checkpoint, read_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

KILLED = -9
# experts enough that some have no token in a step of four samples; every limit is soon reached
ADAPTER = {"num_experts": 16, "rank": 2, "alpha": 4, "dropout": 0.0, "balance_weight": 0.01}
ALARMS = {
    "raise_balance": {"reaction": "raise_balance", "collapse": 2, "dead_steps": 0, "repeat_every": 2,
                      "balance_factor": 3.0, "max_balance_weight": 100.0},
    "reseed": {"reaction": "reseed", "collapse": 0, "dead_steps": 1, "repeat_every": 2},
}  # fmt: skip
CASES = [("raise_balance", {}, 1, {}), ("reseed", {}, 1, {}),
         ("reseed", {"expert": 2}, 2, {"precision": "bf16", "distributed_optimizer": True})]  # fmt: skip


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def runs(request, make_run, tmp_path_factory):
    """(reaction, folder of the straight run, of the one that was killed before step 6 and went on after step 3)."""
    reaction, layout, nproc, train = request.param
    folder = tmp_path_factory.mktemp("reactions")
    sections = {"adapter": ADAPTER, "parallel": layout, "train": train}
    monitor = {"alarms": ALARMS[reaction], "experts_every": 2, "pictures_every": 3}

    def run(name, prepare=None):
        board = {"tensorboard": name == "straight"}
        path = make_run(folder, name, monitor=monitor | board, **sections)
        return commands.run([path], folder / "log", nproc, prepare)

    code, text = run("straight")
    assert code == 0, text
    code, _ = run("split", partial(kill_before_step, 6))
    assert code == KILLED
    lost = events(folder / "split")
    assert {event["step"] for event in lost} & {4, 5}
    code, text = run("split")
    assert code == 0, text
    assert "going on after step 3" in text
    return reaction, folder / "straight", folder / "split"


def test_reactions_are_replayed_and_the_run_ends_bit_for_bit_the_same(runs):
    reaction, straight, split = runs
    expected = events(straight)
    word = {"raise_balance": "balance weight", "reseed": "reseeded from expert"}[reaction]
    steps = [event["step"] for event in expected if event["reaction"].startswith(word)]
    assert min(steps) <= 3 and max(steps) > 3
    assert events(split) == expected
    assert read_rows(split) == read_rows(straight)
    measured, weights = (read_checkpoint(folder / "checkpoints/step_6") for folder in (split, straight))
    assert measured.keys() == weights.keys()
    assert all(torch.equal(measured[name], tensor) for name, tensor in weights.items())
    state, expected_state = (json.loads((f / "checkpoints/step_6/state.json").read_text()) for f in (split, straight))
    assert state["routers"] == expected_state["routers"] and state["routers"]["told"]


def test_the_tokens_that_experts_have_seen_add_up_over_the_split(runs):
    _, straight, split = runs
    (*_, last), rows = read_rows(split), read_rows(straight)
    seen = {key: value for key, value in last.items() if key.startswith("expert/tokens/layer_0/")}
    assert len(seen) == ADAPTER["num_experts"]
    assert sum(seen.values()) == sum(row["tokens"] for row in rows)


def test_a_reaction_shows_in_the_progress_line_and_on_the_board(runs):
    _, straight, _ = runs
    accumulator = EventAccumulator(str(straight / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    accumulator.Reload()
    told = {
        event.step: event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors("alarms/text_summary")
    }
    for event in events(straight):
        assert f"{event['kind']} layer {event['layer']}" in told[event["step"]]
    assert [event.step for event in accumulator.Images("pictures/load")] == [3, 6]
