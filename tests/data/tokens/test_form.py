"""Rows as bytes: what is read is what was written."""

import numpy as np
import pytest

from rlhfjax.data.tokens.form import (
    Comparison,
    Segments,
    comparison_bytes,
    id_type,
    prompt_bytes,
    read_comparison,
    read_prompt,
    read_record,
    read_segments,
    segments_bytes,
)


@pytest.mark.parametrize("ids", ["<u2", "<u4"])
@pytest.mark.parametrize("targets", [None, [False, True, True, False, True, False, False, False, True]])
def test_segments_come_back(ids, targets):
    tokens, mask = np.asarray([3, 1, 65535, 0, 7, 8, 9, 2, 2]), None if targets is None else np.asarray(targets)
    found = read_segments(segments_bytes(Segments(tokens, np.asarray([4, 5]), mask), ids), ids)
    assert (found.tokens.tolist(), found.lengths.tolist()) == (tokens.tolist(), [4, 5])
    assert found.targets is None if targets is None else found.targets.tolist() == targets


def test_ids_take_two_bytes_where_the_vocabulary_fits():
    assert (id_type(65_536), id_type(65_537)) == ("<u2", "<u4")
    one = segments_bytes(Segments(np.arange(100), np.asarray([100]), None), "<u2")
    assert one == np.asarray([1, 100], "<u4").tobytes() + np.arange(100).astype("<u2").tobytes()


def test_comparisons_come_back():
    rows = [np.asarray([5, 6]), np.asarray([7]), np.asarray([8, 9, 10])]
    held = Comparison(np.asarray([1, 2, 3]), rows, np.asarray([1, 2, 2]), np.asarray([1, 2, 3]))
    found = read_comparison(comparison_bytes(held, "<u4"), "<u4")
    assert found.prompt.tolist() == [1, 2, 3]
    assert [row.tolist() for row in found.responses] == [[5, 6], [7], [8, 9, 10]]
    assert (found.ranks.tolist(), found.given.tolist()) == ([1, 2, 2], [1, 2, 3])


def test_prompts_come_back_with_their_records():
    record = {"prompt": "où ?", "extra": {"answer": [1, None]}}
    data = prompt_bytes([4, 70_000], record, "<u4")
    assert (read_prompt(data, "<u4").tolist(), read_record(data, "<u4")) == ([4, 70_000], record)
