"""The drawn sums: what their records are, and that no held-out pair of numbers is learned from."""

import re

from rlhfjax.data.sets.arithmetic import KINDS, SIZES, WORKED_OUT, Arithmetic, pairs, worked_out


def operands(text):
    """The numbers of each sum that is asked in a text, in the order of their size; steps stand in parentheses."""
    return [tuple(sorted(map(int, pair))) for pair in re.findall(r"(?:^|(?<= ))(\d+)\+(\d+)=", text)]


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
    for split in SIZES:
        shown, said = list(tables["demonstrations"][split]()), []
        for row, prompt in zip(shown, tables["prompts"][split](), strict=True):
            [(low, high)] = operands(row["prompt"])
            assert row["completion"].rpartition(")")[2] == str(low + high)
            assert prompt == {"prompt": row["prompt"], "extra": {"answer": str(low + high)}}
            said.append(row["prompt"] + worked_out(tuple(map(int, row["prompt"].strip("=").split("+")))))
        assert " ".join(row["text"] for row in tables["text"][split]()) == " ".join(said)
        share = sum("(" in row["completion"] for row in shown) / len(shown)
        assert abs(share - WORKED_OUT) < 0.05


def test_steps_are_the_columns_from_the_right_with_what_is_carried():
    assert worked_out((47, 85)) == "(7+5=12,4+8+1=13)132"
    assert worked_out((80, 10)) == "(0+0=0,8+1=9)90"
    for low, high in pairs():
        steps, _, answer = worked_out((low, high)).strip("(").partition(")")
        found = [
            (sum(map(int, terms.split("+"))), int(total)) for terms, total in (s.split("=") for s in steps.split(","))
        ]
        assert all(made == total for made, total in found)
        ones, tens = (total for _, total in found)
        assert tens * 10 + ones % 10 == low + high == int(answer)


def test_pairs_are_different_and_the_same_every_time():
    drawn = pairs()
    assert drawn == pairs()
    assert len({tuple(sorted(pair)) for pair in drawn}) == len(drawn) == sum(SIZES.values())
    numbers = [number for pair in drawn for number in pair]
    assert (min(numbers), max(numbers)) == (10, 99)
    in_order = sum(low <= high for low, high in drawn)
    assert 0.45 < in_order / len(drawn) < 0.55
