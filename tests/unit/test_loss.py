"""Losses and scores are sums over labelled places: told apart by domain, and the same however the batch was cut."""

import math

import pytest
import torch
import torch.nn.functional as F

from mole_mega.data.collate import Batch
from mole_mega.data.conversation import IGNORE_INDEX
from mole_mega.training.loss import LOSS_ROWS, SCORE_ROWS, sum_loss, sum_scores

SAMPLES, LENGTH, DOMAINS, VOCABULARY = 6, 7, 4, 9


def make_batch(labels: torch.Tensor, domains: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Batch:
    """A batch of which only labels, domains and padding are read here."""
    empty = torch.zeros_like(labels)
    return Batch(
        tokens=empty, labels=labels, padding_mask=empty == 0 if padding_mask is None else padding_mask,
        position_ids=empty, pixels=torch.zeros(0, 3, 1, 1), image_mask=empty != 0, domains=domains,
        sample_ids=tuple(map(str, range(len(labels)))),
    )  # fmt: skip


def make_places() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss_BS, labels, domains of a batch; domain 2 has no sample, the last sample no label."""
    generator = torch.Generator().manual_seed(0)
    loss_BS = torch.rand(SAMPLES, LENGTH, generator=generator)
    labels = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    labels[torch.rand(SAMPLES, LENGTH, generator=generator) < 0.4] = IGNORE_INDEX
    labels[-1] = IGNORE_INDEX
    labels[0, 0] = 0  # the first word of the vocabulary is a label as good as any
    return loss_BS, labels, torch.tensor([0, 3, 0, 1, 3, 1])


@pytest.fixture
def places():
    return make_places()


CUTS = [[6], [1, 5], [2, 2, 2], [3, 1, 2], [1] * 6]


# --- the loss of a step ---


def test_losses_are_summed_over_labelled_places_by_domain(places):
    loss_BS, labels, domains = places
    padding_mask = torch.arange(LENGTH) < torch.tensor([7, 6, 5, 4, 3, 2])[:, None]
    expected = {row: [0.0] * DOMAINS for row in LOSS_ROWS}
    for sample, domain in enumerate(domains.tolist()):
        for place in range(LENGTH):
            if labels[sample, place] != -100:
                expected["loss"][domain] += float(loss_BS[sample, place])
                expected["tokens"][domain] += 1
        expected["places"][domain] += 7 - sample
    loss, tokens, table = sum_loss(loss_BS, make_batch(labels, domains, padding_mask), DOMAINS)
    for row, values in zip(LOSS_ROWS, table.tolist(), strict=True):
        assert values == pytest.approx(expected[row], rel=1e-6), row
    assert float(loss) == pytest.approx(sum(expected["loss"]), rel=1e-6)
    assert int(tokens) == sum(expected["tokens"]) and expected["tokens"][2] == 0


def test_places_without_a_label_neither_count_nor_get_a_gradient(places):
    loss_BS, labels, domains = places
    unlabelled = labels == IGNORE_INDEX
    loss_BS[unlabelled] = 1e9
    loss_BS.requires_grad_()
    loss, _, _ = sum_loss(loss_BS, make_batch(labels, domains), DOMAINS)
    loss.backward()
    assert torch.equal(loss_BS.grad, (~unlabelled).float()) and float(loss) < SAMPLES * LENGTH


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_micro_batches_add_up_to_the_whole_batch(places, cuts):
    whole_loss, whole_tokens, whole = sum_loss(places[0], make_batch(*places[1:]), DOMAINS)
    parts = [
        sum_loss(loss_BS, make_batch(labels, domains), DOMAINS)
        for loss_BS, labels, domains in zip(*(t.split(cuts) for t in places), strict=True)
    ]
    assert float(sum(loss for loss, _, _ in parts)) == pytest.approx(float(whole_loss), rel=1e-6)
    assert int(sum(tokens for _, tokens, _ in parts)) == int(whole_tokens)
    torch.testing.assert_close(sum(table for _, _, table in parts), whole, rtol=1e-6, atol=0)


def test_padding_the_batch_to_another_length_changes_nothing(places):
    loss_BS, labels, domains = places
    valid = torch.ones_like(labels, dtype=torch.bool)
    narrow = sum_loss(loss_BS, make_batch(labels, domains, valid), DOMAINS)
    wide = make_batch(F.pad(labels, (0, 5), value=IGNORE_INDEX), domains, F.pad(valid, (0, 5)))
    padded = sum_loss(F.pad(loss_BS, (0, 5), value=3.0), wide, DOMAINS)
    for a, b in zip(narrow, padded, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_a_micro_batch_without_any_label_is_zero_and_has_a_zero_gradient(places):
    loss_BS, labels, domains = places
    loss_BS.requires_grad_()
    loss, tokens, table = sum_loss(loss_BS, make_batch(torch.full_like(labels, IGNORE_INDEX), domains), DOMAINS)
    loss.backward()
    assert float(loss) == int(tokens) == 0 and table[:2].abs().sum() == 0 and (loss_BS.grad == 0).all()


def test_the_table_carries_no_gradient_and_loses_no_digits(places):
    loss_BS, labels, domains = places
    _, tokens, table = sum_loss(loss_BS.requires_grad_(), make_batch(labels, domains), DOMAINS)
    assert not table.requires_grad and table.dtype == torch.float64
    assert tokens.dtype == torch.int  # as Megatron-Core counts


def test_a_bf16_models_losses_are_summed_in_fp32():
    """In bf16 the 257th one would be lost."""
    loss_BS, labels = torch.ones(1, 400, dtype=torch.bfloat16), torch.ones(1, 400, dtype=torch.long)
    loss, tokens, _ = sum_loss(loss_BS, make_batch(labels, torch.tensor([0])), 1)
    assert (float(loss), int(tokens), loss.dtype) == (400.0, 400, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_hidden_and_stays_in_its_domain(places, value):
    loss_BS, labels, domains = places
    labels[0, 0], loss_BS[0, 0] = 1, value
    loss, _, table = sum_loss(loss_BS, make_batch(labels, domains), DOMAINS)
    assert not torch.isfinite(loss) and not torch.isfinite(table[0, 0]) and torch.isfinite(table[0, 1:]).all()


# --- the scores of an evaluation ---


@pytest.fixture
def scored():
    """logits_BSV, labels, domains; the model is right in about two places of three, and in all of samples 1 and 3."""
    _, labels, domains = make_places()
    generator = torch.Generator().manual_seed(1)
    logits_BSV = torch.randn(SAMPLES, LENGTH, VOCABULARY, generator=generator)
    right = torch.rand(SAMPLES, LENGTH, generator=generator) < 0.6
    right[1], right[3] = True, True
    right[0, int((labels[0] != IGNORE_INDEX).nonzero()[0])] = False
    boost = 10 * F.one_hot(labels.clamp(min=0), VOCABULARY)
    return torch.where(right[..., None], logits_BSV + boost, logits_BSV - boost), labels, domains


def test_scores_are_what_a_reader_would_count(alone, scored):
    logits_BSV, labels, domains = scored
    expected = {row: [0.0] * DOMAINS for row in SCORE_ROWS}
    for logits_SV, labels_S, domain in zip(logits_BSV, labels, domains.tolist(), strict=True):
        places = [(logits_V, int(label)) for logits_V, label in zip(logits_SV, labels_S, strict=True) if label != -100]
        hits = [int(logits_V.argmax()) == label for logits_V, label in places]
        expected["loss"][domain] -= sum(float(torch.log_softmax(logits_V, 0)[label]) for logits_V, label in places)
        expected["tokens"][domain] += len(places)
        expected["correct"][domain] += sum(hits)
        expected["samples"][domain] += bool(places)
        expected["exact"][domain] += bool(places) and all(hits)
    loss, tokens, table = sum_scores(logits_BSV, make_batch(labels, domains), DOMAINS, alone.groups)
    for row, values in zip(SCORE_ROWS, table.tolist(), strict=True):
        assert values == pytest.approx(expected[row], rel=1e-5, abs=1e-6), row
    assert float(loss) == pytest.approx(sum(expected["loss"]), rel=1e-5) and int(tokens) == sum(expected["tokens"])
    assert sum(expected["samples"]) == SAMPLES - 1 and 0 < sum(expected["exact"]) < SAMPLES - 1


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_the_scores_of_micro_batches_add_up(alone, scored, cuts):
    _, _, whole = sum_scores(scored[0], make_batch(*scored[1:]), DOMAINS, alone.groups)
    tables = [
        sum_scores(logits, make_batch(labels, domains), DOMAINS, alone.groups)[2]
        for logits, labels, domains in zip(*(t.split(cuts) for t in scored), strict=True)
    ]
    torch.testing.assert_close(sum(tables), whole, rtol=1e-6, atol=0)


def test_the_loss_of_an_evaluation_is_the_loss_of_a_step(alone, scored):
    logits_BSV, labels, domains = scored
    loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2), labels.clamp(min=0), reduction="none")
    _, _, of_step = sum_loss(loss_BS, make_batch(labels, domains), DOMAINS)
    _, _, of_evaluation = sum_scores(logits_BSV, make_batch(labels, domains), DOMAINS, alone.groups)
    torch.testing.assert_close(of_evaluation[:2], of_step[:2], rtol=1e-5, atol=1e-6)
