"""The validation split: exact numbers, every class in proportion, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granet.data import DataConfig, load_data
from granet.data.split import split_validation


def test_shares_are_rounded_by_largest_remainder() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)  # 4 of 10: shares 2.0, 1.2, 0.8 -> 2, 1, 1
    kept, held_out = split_validation(labels, 4, seed=0)
    assert labels[held_out].bincount().tolist() == [2, 1, 1]
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(10))


@given(
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=60),
    count=st.integers(1, 59),
    seed=st.integers(-5, 5),
)
def test_numbers_are_exact_and_classes_within_one_of_their_share(labels: list[int], count: int, seed: int) -> None:
    count = min(count, len(labels) - 1)
    given_labels = torch.tensor(labels)
    kept, held_out = split_validation(given_labels, count, seed)
    assert len(held_out) == count
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(len(labels)))
    assert kept.tolist() == sorted(kept.tolist())
    for label in set(labels):
        share = count * labels.count(label) / len(labels)
        assert abs((given_labels[held_out] == label).sum().item() - share) < 1


def test_same_seed_same_examples() -> None:
    labels = torch.arange(200) % 10
    first, again, other = (split_validation(labels, 0.25, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("nothing", [0, 0.0])
def test_zero_keeps_every_example(nothing: float) -> None:
    kept, held_out = split_validation(torch.arange(4), nothing, seed=0)
    assert kept.tolist() == [0, 1, 2, 3]
    assert held_out.numel() == 0


@pytest.mark.parametrize("validation", [10, 11, 0.01, 0.99], ids=str)
def test_leaving_one_side_empty_is_refused(validation: float) -> None:
    with pytest.raises(ValueError, match=r"data\.validation = .* of the 10 training examples"):
        split_validation(torch.zeros(10, dtype=torch.int64), validation, seed=0)


def test_training_and_validation_share_no_example_and_validation_is_never_augmented() -> None:
    data = load_data(DataConfig(validation=100), seed=7)
    assert data.validation is not None
    assert (data.train.examples, data.validation.examples, data.test.examples) == (1342, 100, 355)
    first, again = (list(data.validation.batches(64, epoch=epoch)) for epoch in (0, 1))
    for (images, labels), (same, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, same_labels)
