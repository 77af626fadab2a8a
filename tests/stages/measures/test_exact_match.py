"""What of a response and a demonstration must be the same."""

import pytest

from rlhfjax.stages.measures.exact_match import compared


@pytest.mark.parametrize(
    ("text", "after", "counts"),
    [
        ("(7+5=12,4+8+1=13)132", ")", "132"),
        ("132", ")", "132"),  # without the mark all of it counts
        ("a) 1) 2", ") ", "2"),
        ("132)", ")", ""),
        ("(7+5=12)132", None, "(7+5=12)132"),
    ],
)
def test_what_counts_follows_the_last_mark(text, after, counts):
    assert compared(text, after) == counts
