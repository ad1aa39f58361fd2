"""The conflict meter's arithmetic: gradients of known cosine under known noise, losses of known difference."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from mole_mega.conflict import command, describe
from mole_mega.conflict.statistics import (
    KINDS,
    Cosine,
    Loss,
    Measurement,
    Rule,
    corrected_cosine,
    find,
    half_cosine,
    jackknife_variance,
)
from mole_mega.report.document import to_html, to_markdown

RULE = Rule()
WIDTH = 400


def gradients(rng, cosine, noise, batches, sources=2):
    """[S, K, n]: batches' gradients of sources whose true ones have norm 1 and, the first two, this cosine; noise of
    this norm is added to each."""
    true = np.zeros((sources, WIDTH))
    true[:, 0] = 1
    true[1, :2] = cosine, math.sqrt(1 - cosine**2)
    return true[:, None] + noise / math.sqrt(WIDTH) * rng.normal(size=(sources, batches, WIDTH))


def products(vectors):
    return np.einsum("skn,tln->sktl", vectors, vectors)


def losses(rng, difference, noise=0.0, chunks=6, repeats=2, run_noise=0.0):
    """(alone, mix) [repeats, chunks, 2]: chunks differ much, and the mix from alone by `difference` and noise of each
    chunk and of each repeat."""
    tokens = np.broadcast_to(rng.integers(50, 150, size=chunks).astype(float), (repeats, chunks))
    alone = np.broadcast_to(rng.normal(2.0, 0.5, size=chunks), (repeats, chunks))
    mix = alone + difference + noise * rng.normal(size=chunks) + run_noise * rng.normal(size=(repeats, 1))
    return np.stack([alone * tokens, tokens], axis=-1), np.stack([mix * tokens, tokens], axis=-1)


def measurement(cosines, differences, noise=0.5, seed=0, batches=8, loss_noise=0.0):
    """Two sources whose gradients have `cosines[layer]` in the MLPs, 0.5 in the attention, and which lose
    `differences[s]` on the mix."""
    rng = np.random.default_rng(seed)
    table = {("mlp", layer): products(gradients(rng, c, noise, batches)) for layer, c in enumerate(cosines)}
    table |= {("attention", layer): products(gradients(rng, 0.5, noise, batches)) for layer in range(len(cosines))}
    table["projector", None] = products(gradients(rng, 0.5, noise, batches))
    pairs = [losses(rng, difference, loss_noise) for difference in differences]
    alone, mix = [a for a, _ in pairs], [m for _, m in pairs]
    kinds = {"alone": alone, "mix": mix, "alone_samples": alone, "mix_samples": mix}
    return Measurement(
        sources=("digits", "scans"), steps=50, mix_steps=100, warm_steps=10, batch_size=32, own_steps=(50, 50),
        mix_samples=(1600, 1600), products=table, losses=kinds, held_out="data.validation", seen=(0.0, 0.0),
        repeated=(0.0, 0.0),
    )  # fmt: skip


# cosines


def test_without_noise_the_cosine_is_the_plain_one():
    vectors = gradients(np.random.default_rng(0), -0.3, 0.0, 4)
    found = corrected_cosine(products(vectors), 0, 1)
    assert found.value == pytest.approx(-0.3) and found.plain == pytest.approx(-0.3)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert half_cosine(products(vectors), 1) == pytest.approx(1)


@pytest.mark.parametrize("cosine", [-0.8, 0.0, 1.0])
def test_noise_hides_the_plain_cosine_and_not_the_corrected_one(cosine):
    rng = np.random.default_rng(1)
    found = [corrected_cosine(products(gradients(rng, cosine, 2.0, 8)), 0, 1) for _ in range(200)]
    values, errors = np.array([f.value for f in found]), np.array([f.error for f in found])
    assert abs(values.mean() - cosine) < 0.03
    if cosine:
        assert abs(np.mean([f.plain for f in found])) < 0.72 * abs(cosine)
    # the error that each measurement states is the spread of the measurements
    assert 0.7 < np.sqrt((errors**2).mean()) / values.std() < 1.6


def test_the_formula_equals_a_naive_loop():
    vectors = gradients(np.random.default_rng(2), 0.4, 1.0, 5)
    first, second = vectors
    different = [(i, j) for i in range(5) for j in range(5) if i != j]
    powers = [np.mean([own[i] @ own[j] for i, j in different]) for own in (first, second)]
    cross = np.mean([a @ b for a in first for b in second])
    found = corrected_cosine(products(vectors), 0, 1)
    assert found.value == pytest.approx(cross / math.sqrt(powers[0] * powers[1]))
    means = first.mean(0), second.mean(0)
    assert found.plain == pytest.approx(means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1]))
    halves = first[::2].mean(0), first[1::2].mean(0)
    expected = halves[0] @ halves[1] / np.linalg.norm(halves[0]) / np.linalg.norm(halves[1])
    assert half_cosine(products(vectors), 0) == pytest.approx(expected)


def test_pure_noise_is_said_to_be_noise():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(2, 6, WIDTH))
    states = [corrected_cosine(products(rng.normal(size=(2, 6, WIDTH))), 0, 1).state(RULE) for _ in range(100)]
    assert states.count("unclear") >= 95
    assert math.isnan(corrected_cosine(-products(vectors), 0, 1).value)


def test_the_jackknife_of_a_mean_is_its_textbook_variance():
    values = np.random.default_rng(4).normal(size=9)
    variance = jackknife_variance(9, lambda kept: float(values[kept].mean()))
    assert variance == pytest.approx(values.var(ddof=1) / 9)


def test_too_few_batches_or_chunks_are_refused():
    with pytest.raises(ValueError, match="2 batches"):
        corrected_cosine(np.ones((2, 2, 2, 2)), 0, 1)
    one_chunk = measurement([0.0], [0.0, 0.0])
    shorter = {kind: [table[:, :1] for table in tables] for kind, tables in one_chunk.losses.items()}
    with pytest.raises(ValueError, match="1 chunks"):
        find(dataclasses.replace(one_chunk, losses=shorter), RULE)


@pytest.mark.parametrize(
    ("value", "error", "state"),
    [
        (-0.5, 0.1, "opposed"), (-0.5, 0.3, "unclear"), (-0.05, 0.001, "unclear"), (0.5, 0.1, "aligned"),
        (0.5, 0.3, "unclear"), (0.05, 0.001, "unclear"), (math.nan, math.nan, "unclear"),
    ],
)  # fmt: skip
def test_a_cosine_is_opposed_only_when_far_and_sure(value, error, state):
    assert Cosine(value, error, value).state(RULE) == state


@pytest.mark.parametrize(
    ("difference", "error", "state"),
    [(0.1, 0.01, "loses"), (0.1, 0.06, "even"), (0.01, 0.0001, "even"), (-0.1, 0.01, "gains"), (0.1, math.nan, "even")],
)
def test_a_source_loses_only_when_much_and_sure(difference, error, state):
    assert Loss(1.0, 1.0 + difference, difference, error).state(RULE) == state


# the verdict


@pytest.mark.parametrize(
    ("cosines", "differences", "verdict"),
    [
        ([-0.6, -0.6, 0.1, 0.2], (0.3, 0.0), "conflict"),
        ([-0.6, -0.6, 0.1, 0.2], (0.0, -0.3), "gradients only"),
        ([0.3, 0.2, 0.1, 0.2], (0.3, 0.0), "losses only"),
        ([0.3, 0.2, 0.1, 0.9], (0.0, 0.0), "none"),
        # one layer of four, outweighed by the others: a quarter of the layers is enough
        ([-0.6, 0.9, 0.9, 0.9], (0.3, 0.0), "conflict"),
        ([-0.6, 0.9, 0.9, 0.9, 0.9], (0.0, 0.0), "none"),
    ],
)
def test_the_verdict_asks_gradients_and_losses(cosines, differences, verdict):
    assert find(measurement(cosines, differences), RULE).verdict == verdict


def test_layers_are_named_where_the_gradients_are_opposed():
    measured = measurement([-0.6, 0.9, -0.6, -0.6], (0.3, 0.3))
    found = find(measured, RULE)
    assert found.layers == {(0, 1): (0, 2, 3)}
    sentence = describe.verdict(measured, found, RULE)
    assert sentence.startswith("Conflict.") and "layers 0 and 2 to 3" in sentence and "digits (+0.300" in sentence


def test_gradients_that_are_all_noise_allow_no_verdict():
    measured = measurement([0.0, 0.0], (0.0, 0.0), noise=60.0, batches=3)
    found = find(measured, RULE)
    assert found.verdict == "too noisy"
    assert "Cannot tell" in describe.verdict(measured, found, RULE)


def test_all_layers_together_are_the_sum_of_their_inner_products():
    measured = measurement([-0.6, 0.2], (0.0, 0.0))
    both = measured.products["mlp", 0] + measured.products["mlp", 1]
    assert find(measured, RULE).cosines["mlp", None][0, 1] == corrected_cosine(both, 0, 1)


def test_the_difference_of_losses_is_weighed_by_places_and_paired():
    rng = np.random.default_rng(5)
    alone, mix = losses(rng, 0.25, noise=0.01, chunks=40)
    measured = measurement([0.0], (0.0, 0.0))
    tables = {kind: [alone, alone] for kind in measured.losses} | {"mix_samples": [mix, mix]}
    found = find(dataclasses.replace(measured, losses=tables), RULE)
    loss = found.same_samples[0]
    assert loss.alone == pytest.approx(alone[..., 0].sum() / alone[..., 1].sum())
    assert loss.difference == pytest.approx(loss.mix - loss.alone) and abs(loss.difference - 0.25) < 0.01
    assert loss.error < 0.003  # chunks differ by 0.5: unpaired it would be 0.1
    assert found.same_steps[0].difference == 0


def test_the_error_of_a_loss_holds_what_differs_between_runs():
    rng = np.random.default_rng(6)
    measured, found = measurement([0.0], (0.0, 0.0)), []
    for _ in range(300):
        pairs = [losses(rng, 0.0, noise=0.02, repeats=3, run_noise=0.1) for _ in range(2)]
        tables = {"alone_samples": [a for a, _ in pairs], "mix_samples": [m for _, m in pairs]}
        found += find(dataclasses.replace(measured, losses=measured.losses | tables), RULE).same_samples
    spread = np.std([loss.difference for loss in found])
    assert 0.8 < np.sqrt(np.mean([loss.error**2 for loss in found])) / spread < 1.2
    once = {kind: [table[:1] for table in tables] for kind, tables in measured.losses.items()}
    assert "once" in describe.warnings(dataclasses.replace(measured, losses=once))[0]


# what is written


@pytest.mark.parametrize("verdict", ["conflict", "gradients only", "losses only", "none", "too noisy"])
def test_every_verdict_has_its_words(verdict):
    measured = measurement([0.5], (0.0, 0.0))
    found = dataclasses.replace(find(measured, RULE), verdict=verdict)
    assert len(describe.verdict(measured, found, RULE)) > 50


def test_terminal_page_and_json_tell_the_same_figures():
    measured = measurement([-0.6, 0.9], (0.3, 0.0))
    found = find(measured, RULE)
    cosine = found.cosines["mlp", 0][0, 1]
    cell = f"{cosine.value:+.2f} ± {cosine.error:.2f}"
    plain = describe.text(measured, found, RULE, colour=False)
    page = describe.document(measured, found, RULE)
    assert cell in plain and cell in to_html(page).replace("&#177;", "±") and cell in to_markdown(page)
    assert "\033" not in plain and "\033[41" in describe.text(measured, found, RULE, colour=True)
    rows = json.loads(json.dumps(describe.rows(measured, found, RULE), allow_nan=False))
    (row,) = [r for r in rows["cosines"] if r["group"] == "mlp" and r["layer"] == 0]
    assert row["cosine"] == cosine.value and row["state"] == "opposed" and row["sources"] == ["digits", "scans"]
    assert rows["verdict"] == "conflict" and rows["losses"][0]["state"] == "loses"


def test_what_noise_hides_is_said_and_is_null_in_json():
    measured = measurement([0.0], (0.0, 0.0))
    hidden = {place: -table for place, table in measured.products.items()}
    measured = dataclasses.replace(measured, products=hidden)
    found = find(measured, RULE)
    assert "noise" in describe.text(measured, found, RULE, colour=False)
    assert {row["cosine"] for row in describe.rows(measured, found, RULE)["cosines"]} == {None}


def test_rows_that_repeat_or_were_seen_are_warned_of():
    measured = dataclasses.replace(
        measurement([0.0], (0.0, 0.0)), repeated=(0.4, 0.0), seen=(0.0, 1.0), own_steps=(50, 2)
    )
    first, second, third = describe.warnings(measured)
    assert "digits: 40%" in first and "scans: 100%" in second and "scans" in third


def test_one_is_not_told_as_many():
    rng = np.random.default_rng(0)
    once = {kind: [a[:1] for a in losses(rng, 0.1)] for kind in KINDS}
    measured = dataclasses.replace(
        measurement([0.0], (0.0, 0.0)), losses=once, steps=1, mix_steps=2, warm_steps=1, own_steps=(1, 1)
    )
    text = describe.text(measured, find(measured, RULE), RULE, colour=False)
    assert "all of it once." in text and "times" not in text and "taken after 1 step on the mix" in text
    assert not re.search(r"\b1 (steps|batches|times)\b", text)


# the command's own input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batches", "2"], "--batches must be at least 3, got 2"),
        (["--chunks", "1"], "--chunks must be at least 2"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--warm", "0"], "--warm must be at least 1"),
        (["--margin", "nan"], "--margin must be at least 0, got nan"),
        (["--cosine", "nan"], "--cosine must be at least 0, got nan"),
        (["--cosine", "inf"], "--cosine must be a finite number, got inf"),
        (["--out", "/dev/null"], "--out: /dev/null is a file, not a folder that can be written to"),
        (["--json", "/"], "--json: / is a folder, not a file that can be written"),
        ([], "cannot read nowhere.yaml"),
    ],
)
def test_flags_out_of_range_are_one_line(capsys, arguments, said):
    assert command.main(["nowhere.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
