"""The drawn strings: what their records are, and that no held-out one is trained on."""

from rlhfjax.data.sets.reversal import KINDS, SIZES, Reversal, strings


def test_completions_are_prompts_backwards_and_none_is_in_both_splits():
    tables = Reversal.compute()
    assert set(tables) == set(KINDS)
    pairs = {split: list(start()) for split, start in tables["pairs"].items()}
    assert {split: len(rows) for split, rows in pairs.items()} == SIZES
    for row in pairs["train"][:200]:
        assert row["completion"].split() == row["prompt"].split()[::-1]
        assert row["prompt"].startswith(" ")
    train, test = ({row["prompt"] for row in pairs[split]} for split in ("train", "test"))
    assert len(train) == SIZES["train"]
    assert not train & test
    assert [row["prompt"] for row in tables["prompts"]["test"]()] == [row["prompt"] for row in pairs["test"]]
    assert next(tables["text"]["train"]()) == {"text": pairs["train"][0]["prompt"]}


def test_strings_are_the_same_every_time_and_of_every_length():
    drawn = strings(2000, 4, 8)
    assert drawn == strings(2000, 4, 8)
    assert len(set(drawn)) == 2000
    assert {len(text) for text in drawn} == {4, 5, 6, 7, 8}
