import pytest

from rlhfjax.errors import DataError
from rlhfjax.evaluation.diversity import distinct_n, distinct_without_each, mean_length, repetition_rate

RESPONSES = [["the", "cat", "sat", "the", "cat"], ["the", "dog", "sat"]]


def test_distinct_n_by_hand():
    """Words {the, cat, sat, dog} of 8. Pairs: the-cat cat-sat sat-the the-cat | the-dog dog-sat: 5 of 6."""
    assert distinct_n(RESPONSES, 1) == 4 / 8
    assert distinct_n(RESPONSES, 2) == 5 / 6
    assert distinct_n([[1, 2, 3], [4, 5]], 2) == 1.0  # no n-gram crosses from one response to the next
    assert distinct_n([[7, 7, 7, 7]], 2) == 1 / 3
    assert distinct_n([[1]], 2) == 0.0


def test_repetition_counts_within_a_response_only():
    """The first response repeats 'the cat' (1 of its 4 pairs), the second nothing; 'sat' in both is no repetition."""
    assert repetition_rate(RESPONSES, 2) == pytest.approx(1 / 6)
    assert repetition_rate([[1, 2, 3], [1, 2, 3]]) == 0.0
    assert repetition_rate([[5] * 12]) == pytest.approx(0.9)
    assert repetition_rate([[]]) == 0.0


def test_mean_length():
    assert mean_length(RESPONSES) == 4.0
    assert mean_length([[], [1, 2]]) == 1.0


def test_wrong_input_is_named():
    with pytest.raises(DataError, match="split"):
        distinct_n(["a string"], 1)
    with pytest.raises(DataError, match="n = 0"):
        repetition_rate(RESPONSES, 0)
    with pytest.raises(DataError, match="at least one response"):
        mean_length([])


@pytest.mark.parametrize("groups", [None, [0, 1, 0, 2]])
def test_distinct_without_each_is_counted_again(groups):
    responses = [[1, 2, 1, 2], [2, 1, 3], [3], [1, 2, 3]]
    names = groups or [0, 1, 2, 3]
    for n in (1, 2):
        again = [
            distinct_n([r for r, own in zip(responses, names, strict=True) if own != name], n)
            for name in dict.fromkeys(names)
        ]
        assert distinct_without_each(responses, n, groups) == pytest.approx(again)
