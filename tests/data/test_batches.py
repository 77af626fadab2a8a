"""Token rows and the arrays of a batch, each against a brute-force version of the same rule."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfjax.algorithms.language_modelling import predicted
from rlhfjax.data import batches, token_rows
from rlhfjax.data.batches import PackedRows, PromptItems, RankedItems, pack
from rlhfjax.data.token_rows import Ragged, RankedRows, Rules, TokenRows, within
from rlhfjax.errors import DataError
from rlhfjax.text.tokenizer import BOS, EOS, PAD, Tokenizer
from rlhfjax.types import TokenBatch

WORDS = ["the", "film", "was", "a", "warm", "and", "very", "dull", "story", "of", "music"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], 300)


class Source(list):
    """Records as a prepared dataset gives them: several at once, by index."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


rows_of_ids = st.lists(st.lists(st.integers(4, 99), min_size=1, max_size=9), min_size=1, max_size=12)


def test_ragged_rows_come_back_whole():
    rows = [[5], [], [6, 7, 8], []]
    made = Ragged.of(rows)
    assert [made[i].tolist() for i in range(len(made))] == rows
    assert made.lengths.tolist() == [1, 0, 3, 0]
    assert [made.select(np.array([2, 0, 2]))[i].tolist() for i in range(3)] == [[6, 7, 8], [5], [6, 7, 8]]
    assert len(Ragged.of([])) == 0


# Documents -----------------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join), min_size=1, max_size=6),
       length=st.integers(2, 16), packed=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_token_of_every_document_is_a_target_exactly_once(tokenizer, texts, length, packed):
    source = Source({"text": text} for text in texts)
    made = PackedRows(token_rows.document_rows(source, tokenizer, length), length, packed=packed, pad_id=PAD)
    items = [made[i] for i in range(len(made))]
    batch = TokenBatch(**{name: np.stack([item[name] for item in items]) for name in items[0]})
    counted = Counter()
    for tokens, is_target in zip(batch.tokens, np.asarray(predicted(batch)), strict=True):
        counted.update((int(a), int(b)) for (a, b), target in zip(pairwise(tokens), is_target, strict=True) if target)
    documents = [[BOS, *tokenizer.encode(text), EOS] for text in texts]
    assert counted == Counter(pair for document in documents for pair in pairwise(document))


def test_windows_overlap_by_one_token(tokenizer):
    text = " ".join(WORDS * 3)
    whole = [BOS, *tokenizer.encode(text), EOS]
    for length in (2, 5, len(whole) - 1, len(whole), len(whole) + 1):
        rows = token_rows.document_rows(Source([{"text": text}]), tokenizer, length).tokens
        windows = [rows[i].tolist() for i in range(len(rows))]
        assert 1 < min(map(len, windows)) <= max(map(len, windows)) <= length  # one token alone predicts nothing
        assert all(before[-1] == after[0] for before, after in pairwise(windows))
        assert [*windows[0], *(token for window in windows[1:] for token in window[1:])] == whole


def test_documents_are_read_in_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr(token_rows, "CHUNK", 2)
    source = Source({"text": word} for word in WORDS[:5])
    rows = token_rows.document_rows(source, tokenizer, 32).tokens
    assert [tokenizer.decode(rows[i]) for i in range(len(rows))] == WORDS[:5]


# Packing -------------------------------------------------------------------------------------------------------------


def best_fit_decreasing(lengths, capacity):
    """The rule in words: longest first, each into the fullest bin that still has room. Returns the bins' fills."""
    fills = []
    for need in sorted(lengths, reverse=True):
        room = [fill for fill in fills if fill + need <= capacity]
        if room:
            fills.remove(max(room))
        fills.append(max(room, default=0) + need)
    return sorted(fills)


@given(st.data(), st.integers(1, 30))
@settings(max_examples=200)
def test_packing_is_best_fit_decreasing(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    bins = pack(np.asarray(lengths, int), capacity)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    fills = [sum(lengths[row] for row in rows) for rows in bins]
    assert all(0 < fill <= capacity for fill in fills)
    assert sorted(fills) == best_fit_decreasing(lengths, capacity)


def packed_by_search(lengths, capacity):
    """Best-fit decreasing as it is told: look at every space from the row's length on for a bin that has it."""
    bins, with_space = [], {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        need = lengths[row]
        space = next((s for s in range(need, capacity) if with_space.get(s)), capacity)
        index = len(bins) if space == capacity else with_space[space].pop()
        if index == len(bins):
            bins.append([])
        bins[index].append(row)
        with_space.setdefault(space - need, []).append(index)
    return bins


@settings(deadline=None)
@given(capacity=st.integers(1, 60), data=st.data())
def test_packing_takes_the_bin_that_a_search_of_all_spaces_finds(capacity, data):
    # meant to catch another choice among equally full bins: batches of earlier versions would be others
    lengths = data.draw(st.lists(st.integers(0, capacity), max_size=80))
    assert pack(np.asarray(lengths, int), capacity) == packed_by_search(lengths, capacity)


def test_packing_is_the_same_every_time():
    lengths = np.random.default_rng(0).integers(1, 20, 200)
    assert pack(lengths, 20) == pack(lengths, 20)


@given(rows_of_ids, st.booleans())
@settings(max_examples=100)
def test_packed_rows_hold_each_document_as_a_segment(rows, packed):
    length = 10
    targets = [[token % 3 > 0 for token in row] for row in rows]
    made = PackedRows(TokenRows(Ragged.of(rows), Ragged.of(targets, bool)), length, packed=packed, pad_id=PAD)
    found = []
    for i in range(len(made)):
        item = made[i]
        assert {name: (x.shape, x.dtype.kind) for name, x in item.items()} == {
            "tokens": ((length,), "i"), "segments": ((length,), "i"), "positions": ((length,), "i"),
            "loss_mask": ((length,), "b"),
        }  # fmt: skip
        segments = item["segments"].tolist()
        count = max(segments)
        real = sum(segment > 0 for segment in segments)
        assert segments[:real] == sorted(segments[:real])  # 1 1 1 2 2 …, then nothing but padding
        assert set(segments[:real]) == set(range(1, count + 1))
        assert packed or count == 1
        for name, filler in (("tokens", PAD), ("segments", 0), ("positions", 0), ("loss_mask", False)):
            assert (item[name][real:] == filler).all()
        for segment in range(1, count + 1):
            inside = item["segments"] == segment
            assert item["positions"][inside].tolist() == list(range(inside.sum()))
            found.append((item["tokens"][inside].tolist(), item["loss_mask"][inside].tolist()))
    assert sorted(found) == sorted(zip(rows, targets, strict=True))


# Demonstrations ------------------------------------------------------------------------------------------------------


def conversation(*contents):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


def test_demonstration_targets_are_the_completion_and_its_eos(tokenizer):
    source = Source([{"prompt": "the film", "completion": " was dull"}, conversation("a story", "of music")])
    for train_on in ("last", "all"):
        rows = token_rows.demonstration_rows(source, tokenizer, Rules("chats", train_on=train_on))
        trained = [rows.tokens[i][rows.targets[i]].tolist() for i in range(2)]
        assert trained == [[*tokenizer.encode(text), EOS] for text in (" was dull", "of music")]
        assert rows.tokens[0].tolist() == [BOS, *tokenizer.encode("the film"), *tokenizer.encode(" was dull"), EOS]


def test_train_on_all_adds_the_earlier_answers(tokenizer):
    source = Source([conversation("the", "film", "was", "warm and dull")])
    rules = [Rules("chats", train_on=train_on) for train_on in ("last", "all")]
    last, every = (token_rows.demonstration_rows(source, tokenizer, each) for each in rules)
    assert last.tokens[0].tolist() == every.tokens[0].tolist()
    film, warm = ([*tokenizer.encode(text), EOS] for text in ("film", "warm and dull"))
    assert last.tokens[0][last.targets[0]].tolist() == warm
    assert every.tokens[0][every.targets[0]].tolist() == film + warm


def weighted(*turns):
    messages = conversation(*(text for text, _ in turns))["messages"]
    pairs = zip(messages, turns, strict=True)
    return {"messages": [m | ({} if weight is None else {"weight": weight}) for m, (_, weight) in pairs]}


def test_weights_mask_and_train_answers(tokenizer):
    said: list[str] = []
    two = weighted(("the", None), ("film", 1), ("was", None), ("dull", 0))
    source = Source([two, weighted(("the", None), ("film", 0)), conversation("a", "story")])
    last, every = (
        token_rows.demonstration_rows(source, tokenizer, Rules("chats", "error", said.append, train_on))
        for train_on in ("last", "all")
    )
    film, story = ([*tokenizer.encode(text), EOS] for text in ("film", "story"))
    # fails if the weight is not looked at: seen
    for rows in (last, every):
        assert rows.tokens[0][rows.targets[0]].tolist() == film
        assert len(rows.tokens[1]) == 0  # nothing to train, and the next row keeps its number
        assert rows.tokens[2][rows.targets[2]].tolist() == story
    assert said == ["chats: 1 of 3 conversations with weight 0 alone left out"] * 2
    with pytest.raises(DataError, match="chats: expected answers to train on, got weight 0 for all in 1 rows"):
        token_rows.demonstration_rows(Source([source[1]]), tokenizer, Rules("chats"))


def test_rows_that_cannot_be_written_are_counted(tokenizer):
    tool = {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}
    answered = {"messages": [*tool["messages"], {"role": "assistant", "content": "c"}]}
    ranked = {**tool, "responses": ["c", "d"], "ranks": [1, 2]}
    good = {"prompt": "the", "completion": " film", "responses": [" film", " story"], "ranks": [1, 2]}
    makers = {
        token_rows.demonstration_rows: [good, answered, answered],
        token_rows.prompt_rows: [good, tool, tool],
        token_rows.ranked_rows: [good, ranked, ranked],
    }
    for make, records in makers.items():
        said: list[str] = []
        with pytest.raises(
            DataError, match=r"chats row 1: .*messages\[1\] of role tool.*\(2 of 3 rows cannot be written"
        ):
            make(Source(records), tokenizer, Rules("chats"))
        made = make(Source(records), tokenizer, Rules("chats", "drop", said.append))
        assert said[0].startswith("chats: 2 of 3 rows that cannot be written left out; chats row 1: ")
        rows = made if isinstance(made, Ragged) else made.tokens
        assert [length > 0 for length in rows.lengths.tolist()[:1]] == [True]
        assert not rows.lengths[2 if make is token_rows.ranked_rows else 1 :].any()
        with pytest.raises(DataError, match="row 0"):
            make(Source(records[1:]), tokenizer, Rules("chats", "drop"))


# Rankings ------------------------------------------------------------------------------------------------------------


@st.composite
def rankings(draw):
    groups = draw(st.lists(st.lists(st.integers(1, 3), min_size=2, max_size=4), min_size=1, max_size=6))
    total = sum(map(len, groups))
    keep = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=total, unique=True).map(sorted))
    return groups, keep


@given(rankings())
@settings(max_examples=200)
def test_dropping_candidates_keeps_comparisons_that_still_compare(case):
    groups, keep = case
    ids = np.arange(sum(map(len, groups)))
    ends, ranks = np.cumsum([0, *map(len, groups)]), np.concatenate(groups).astype(np.int32)
    rows = RankedRows(Ragged.of([[10 + i] for i in ids]), ends, ranks, 20 + np.arange(len(groups)))
    expected, lengths, first = [], [], 0
    for number, ranks in enumerate(groups):
        left = [(10 + first + i, rank) for i, rank in enumerate(ranks) if first + i in keep]
        first += len(ranks)
        if len({rank for _, rank in left}) > 1:
            expected.append(left)
            lengths.append(20 + number)
    made = rows.select(np.asarray(keep))
    spans = list(pairwise(made.groups.tolist()))
    assert [[(int(made.tokens[i][0]), int(made.ranks[i])) for i in range(*span)] for span in spans] == expected
    assert made.prompt_lengths.tolist() == lengths
    assert len(made.tokens) == len(made.ranks) == sum(map(len, expected))


def test_the_longest_comparison_has_its_prompt_once():
    """Responses go on from the prompt's last token, which each has again: 4 - 1 + (1 + 2) + (1 + 3), and 0 + 3 + 5."""
    tokens = Ragged.of([[7] * length for length in (6, 7, 3, 5)])
    both = RankedRows(tokens, np.array([0, 2, 4]), np.array([1, 2, 1, 2], np.int32), np.array([4, 1]))
    assert both.longest == 10
    assert both.select(np.array([2, 3])).longest == 8


def test_ranked_rows_are_prompt_response_and_eos(tokenizer):
    source = Source(
        [
            {"prompt": "the", "responses": [" film", " story"], "ranks": [2, 1]},
            {**conversation("a"), "responses": ["of music", "", "dull"], "ranks": [1, 3, 1]},
        ]
    )
    rows = token_rows.ranked_rows(source, tokenizer, Rules("ranks"))
    assert rows.groups.tolist() == [0, 2, 5]
    assert rows.ranks.tolist() == [2, 1, 1, 3, 1]
    plain = [BOS, *tokenizer.encode("the")]
    chat = [BOS, tokenizer.role_ids["user"], *tokenizer.encode("a"), EOS, tokenizer.role_ids["assistant"]]
    assert rows.prompt_lengths.tolist() == [len(plain), len(chat)]
    expected = [(plain, " film"), (plain, " story"), (chat, "of music"), (chat, ""), (chat, "dull")]
    assert [rows.tokens[i].tolist() for i in range(5)] == [[*p, *tokenizer.encode(t), EOS] for p, t in expected]


@pytest.mark.parametrize(
    ("responses", "ranks", "expected"),
    [
        ("AA", [1, 2], [1, 1]),
        ("AAB", [1, 2, 3], [1, 1, 2]),
        ("ABA", [1, 2, 3], [1, 1, 1]),  # better and worse than B
        ("ABAB", [2, 4, 1, 1], [1, 2, 1, 2]),  # means 1.5 and 2.5
        ("AAB", [2, 2, 5], [2, 2, 5]),
    ],
)
def test_equal_responses_are_ties(tokenizer, responses, ranks, expected):
    texts, said = {"A": " film", "B": " story"}, []
    source = Source([{"prompt": "the", "responses": [texts[name] for name in responses], "ranks": ranks}])
    rows = token_rows.ranked_rows(source, tokenizer, Rules("ranks", "error", said.append))
    assert rows.ranks.tolist() == expected
    assert said == (
        [] if ranks == expected else ["ranks: 1 of 1 comparisons rank equal responses apart; taken as ties"]
    )


def test_ranked_items_are_padded_on_the_right():
    ranks = np.array([2, 1, 2], np.int32)
    rows = RankedRows(Ragged.of([[5, 6, 7], [8], [9, 9]]), np.array([0, 3]), ranks, np.array([1]))
    [item] = [RankedItems(rows, 4, 5, PAD)[0]]
    assert item["tokens"].tolist() == [[5, 6, 7, 0, 0], [8, 0, 0, 0, 0], [9, 9, 0, 0, 0], [0] * 5]
    # The absent candidate has one slot to read a score at; `mask` says that nobody may use it.
    assert item["token_mask"].sum(axis=1).tolist() == [3, 1, 2, 1]
    assert item["token_mask"][:, 0].all()
    assert item["mask"].tolist() == [True, True, True, False]
    assert item["ranks"].tolist() == [2, 1, 2, 0]
    assert item["prompt_lengths"] == 1


# Prompts and padding -------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left(tokenizer):
    rows = token_rows.prompt_rows(Source([{"prompt": "the film"}, conversation("a")]), tokenizer, Rules("asked"))
    items = PromptItems(rows, np.array([1, 0]), 12, PAD)
    assert len(items) == 2
    for place, row in enumerate([1, 0]):
        item, ids = items[place], rows[row].tolist()
        assert item["tokens"].tolist() == [PAD] * (12 - len(ids)) + ids
        assert item["mask"].tolist() == [False] * (12 - len(ids)) + [True] * len(ids)
    assert rows[1].tolist()[-1] == tokenizer.role_ids["assistant"]


def test_padding_sides():
    tokens, mask = batches.left_padded([[5], [6, 7, 8], [PAD, 9]], PAD)
    assert tokens.tolist() == [[0, 0, 5], [6, 7, 8], [0, 0, 9]]
    assert mask.tolist() == [[False, False, True], [True] * 3, [False, True, True]]  # lengths, never ids
    tokens, mask = batches.right_padded([[5], [6, 7, 8], [9, PAD]], PAD)
    assert tokens.tolist() == [[5, 0, 0], [6, 7, 8], [9, 0, 0]]
    assert mask.tolist() == [[True, False, False], [True] * 3, [True, True, False]]


# Too long ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_too_long_are_an_error_with_row_and_numbers():
    with pytest.raises(DataError) as caught:
        within("chats", np.array([3, 9, 4, 8]), 4, "error")
    assert str(caught.value).startswith("chats row 1: expected at most 4 tokens, got 9 (2 rows of 4 are too long); ")


def test_dropping_reports_how_many():
    said = []
    assert within("chats", np.array([3, 9, 4, 8]), 4, "drop", said.append).tolist() == [0, 2]
    assert said == ["chats: 2 of 4 rows longer than 4 tokens left out (50 %); raise batch.length to keep them"]
    assert within("chats", np.array([3, 4]), 4, "drop", said.append).tolist() == [0, 1]
    assert within("chats", np.array([3, 4]), 4, "error", said.append).tolist() == [0, 1]
    assert len(said) == 1
    with pytest.raises(DataError, match="chats: expected rows of at most 2 tokens, got none among 2 rows"):
        within("chats", np.array([3, 4]), 2, "drop", said.append)
