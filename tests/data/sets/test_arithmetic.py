"""The drawn sums: what their records are, and that no held-out pair of numbers is learned from."""

import re

from rlhfjax.data.sets.arithmetic import KINDS, LARGEST, SIZES, Arithmetic, pairs


def operands(text):
    """The numbers of each sum in a text, in the order of their size."""
    return [tuple(sorted(map(int, pair))) for pair in re.findall(r"(\d+)\+(\d+)=", text)]


def test_no_pair_of_numbers_is_in_two_splits_in_either_order():
    # fails with pairs that are only different in their order
    tables = Arithmetic.compute()
    assert set(tables) == set(KINDS)
    asked = {
        split: operands(" ".join(row["prompt"] for row in rows())) for split, rows in tables["demonstrations"].items()
    }
    assert {split: len(found) for split, found in asked.items()} == SIZES
    for split, found in asked.items():
        assert len(set(found)) == len(found)
        for kind, text in (("prompts", "prompt"), ("text", "text")):  # all kinds of a split have its pairs
            assert operands(" ".join(row[text] for row in tables[kind][split]())) == found
    train, validation, test = (set(asked[split]) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not (train | validation) & test


def test_sums_are_right_and_answers_are_beside_their_prompts():
    tables = Arithmetic.compute()
    shown = list(tables["demonstrations"]["test"]())
    for row, prompt in zip(shown, tables["prompts"]["test"](), strict=True):
        [(low, high)] = operands(row["prompt"])
        assert row["completion"] == str(low + high)
        assert prompt == {"prompt": row["prompt"], "extra": {"answer": row["completion"]}}
    document = next(tables["text"]["test"]())["text"]
    assert document.startswith(f"{shown[0]['prompt']}{shown[0]['completion']}, {shown[1]['prompt']}")


def test_pairs_are_all_there_are_and_the_same_every_time():
    drawn = pairs(LARGEST)
    assert drawn == pairs(LARGEST)
    assert len(drawn) == sum(SIZES.values()) == 100 * 101 // 2
    assert {tuple(sorted(pair)) for pair in drawn} == {(a, b) for b in range(100) for a in range(b + 1)}
    in_order = sum(low <= high for low, high in drawn)
    assert 0.45 < in_order / len(drawn) < 0.55
