"""Batches by step: the same whoever opens them and wherever they start, every row once an epoch, shares as asked."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhfjax.config import schema
from rlhfjax.data.pipeline import Reader
from rlhfjax.errors import DataError
from rlhfjax.text.tokenizer import BOS, EOS, Tokenizer
from rlhfjax.types import PromptBatch

WORDS = ["the", "film", "was", "a", "warm", "and", "very", "dull", "story", "of", "music"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], 300)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Prompts, documents, demonstrations and comparisons of very different lengths."""
    folder = tmp_path_factory.mktemp("files")
    draw = np.random.default_rng(5)

    def words(low, high):
        return " ".join(draw.choice(WORDS, draw.integers(low, high)))

    def write(name, records):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    write("prompts", ({"prompt": f"{words(1, 4)} {i}"} for i in range(22)))
    write("others", ({"prompt": f"{words(1, 4)} ? {i}"} for i in range(7)))
    write("documents", ({"text": words(1, 30)} for _ in range(25)))
    write("demonstrations", ({"prompt": words(1, 4), "completion": words(1, 6)} for _ in range(24)))
    write("comparisons", [ranking(words(1, 3), [words(1, 3) for _ in range(2 + i % 3)]) for i in range(17)])
    return folder


def ranking(prompt, responses, ranks=None):
    return {"prompt": prompt, "responses": responses, "ranks": ranks or list(range(1, len(responses) + 1))}


@pytest.fixture
def reader(tokenizer, files):
    """A reader; `said` holds what it reported."""

    def opened(seed=0):
        said = []
        made = Reader(tokenizer, files / "prepared", seed, said.append)
        return SimpleNamespace(said=said, reader=made)

    return opened


def entry(files, name, **more):
    return schema.Data(source=str(files / f"{name}.jsonl"), **more)


def token_batch(size=5, length=16, **more):
    return schema.Batch(size=size, length=length, **more)


def ranked_batch(size=4, length=24, candidates=4, **more):
    return schema.RankedBatch(size=size, length=length, candidates=candidates, **more)


def rollout_batch(size=4, prompt_length=24, **more):
    return schema.RolloutBatch(size=size, prompt_length=prompt_length, **more)


def kinds(reader, files):
    """The four kinds of batches."""
    return {
        "documents": reader.documents([entry(files, "documents")], token_batch()),
        "demonstrations": reader.demonstrations([entry(files, "demonstrations")], token_batch(length=24), "last"),
        "comparisons": reader.comparisons([entry(files, "comparisons")], ranked_batch()),
        "prompts": reader.prompts([entry(files, "prompts")], rollout_batch()),
    }


def row_names(batch):
    """Each row of a batch as bytes, without its place."""
    leaves = jax.tree.leaves(replace(batch, uid=None) if isinstance(batch, PromptBatch) else batch)
    return [b"".join(np.ascontiguousarray(leaf[i]).tobytes() for leaf in leaves) for i in range(len(leaves[0]))]


def equal(one, other):
    return row_names(one) == row_names(other)


KINDS = ("documents", "demonstrations", "comparisons", "prompts")


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_a_function_of_seed_and_step(reader, files, kind):
    one, again, other = (kinds(reader(seed).reader, files)[kind] for seed in (1, 1, 2))
    steps = [5, 0, 17, 3]
    assert all(equal(one[step], again[step]) for step in steps)
    assert all(equal(one[step], one[step]) for step in steps)
    assert not all(equal(one[step], other[step]) for step in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_iterating_from_a_step_continues_what_came_before(reader, files, kind):
    batches = kinds(reader().reader, files)[kind]
    for start in (0, 1, 13):
        found = batches.iterate(start)
        assert all(equal(next(found), batches[step]) for step in range(start, start + 4))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_visits_every_row_once_in_an_order_of_its_own(reader, files, kind):
    batches = kinds(reader().reader, files)[kind]
    rows, epochs = batches.rows, 3
    visited = [name for step in range(batches.steps(epochs)) for name in row_names(batches[step])]
    orders = [visited[i * rows : (i + 1) * rows] for i in range(epochs)]
    assert rows % batches.size  # epochs end inside a batch
    assert all(Counter(order) == Counter(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs


def test_a_mixture_can_be_read_one_row_at_a_time(reader, files):
    # fails when the parts repeat for ever: the length of the mixture overflows; seen
    sources = [entry(files, "prompts", weight=0.3), entry(files, "others", weight=0.1)]
    assert next(reader().reader.prompts(sources, rollout_batch(size=1)).iterate(3)).tokens.shape[0] == 1


def test_every_prompt_is_there_once_an_epoch(reader, files):
    batches = reader().reader.prompts([entry(files, "prompts")], rollout_batch(size=11))
    assert len({row.tobytes() for step in (0, 1) for row in batches[step].tokens}) == 22
    assert (batches.rows, batches.size, batches.steps(1), batches.steps(0.6), batches.steps(1e-9)) == (22, 11, 2, 2, 1)


def test_the_uid_of_a_prompt_is_its_place_in_the_order(reader, tokenizer, files):
    # fails with row numbers: 22 and 7 prompts share theirs, and come again in each of these batches
    data = [entry(files, "prompts"), entry(files, "others")]
    batches = reader().reader.prompts(data, rollout_batch(size=48))
    assert [batches[step].uid.tolist() for step in (0, 2)] == [[*range(48)], [*range(96, 144)]]
    assert next(batches.iterate(5)).uid.tolist() == [*range(240, 288)]
    assert batches[0].uid.dtype == np.int32
    some = Reader(tokenizer, files / "prepared", 0, local=lambda size: range(3, size, 7))
    here, whole = some.prompts(data, rollout_batch(size=48))[2], batches[2]
    assert here.uid.tolist() == [*range(99, 144, 7)]
    np.testing.assert_array_equal(here.tokens, whole.tokens[3::7])


def test_records_are_those_of_the_prompts_in_a_batch(tokenizer, files, tmp_path):
    """Of two sources, shuffled, some too long, in another epoch, and of the rows that this process makes."""
    for name, mark in (("sums", "+"), ("products", "x")):
        rows = [{"prompt": f"{i} {mark}{' .' * (i % 3 * 9)}", "answer": {"text": [mark, i]}, "n": i} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [entry(tmp_path, "sums"), entry(tmp_path, "products", weight=0.5)]
    batch = rollout_batch(size=7, prompt_length=16, overlong="drop")
    said = []
    for local in (lambda size: None, lambda size: [5, 1]):
        batches = Reader(tokenizer, files / "prepared", 3, said.append, local=local).prompts(data, batch)
        for step in (0, 4):
            made, records = batches[step], batches.records(step)
            ids = [row[mask].tolist() for row, mask in zip(made.tokens, made.mask, strict=True)]
            assert [record["prompt"] for record in records] == [tokenizer.decode(row[1:]) for row in ids]
            assert all(record["answer"] == {"text": [record["prompt"][2], record["n"]]} for record in records)
    assert len(said) == 4  # rows were left out: places are not rows of the file


@pytest.mark.parametrize("kind", KINDS)
def test_once_covers_every_row_once(reader, files, kind):
    opened = reader().reader
    batches = {
        "documents": lambda: opened.documents([entry(files, "documents")], token_batch(), shuffle=False),
        "demonstrations": lambda: opened.demonstrations(
            [entry(files, "demonstrations")], token_batch(length=24), "last", shuffle=False
        ),
        "comparisons": lambda: opened.comparisons([entry(files, "comparisons")], ranked_batch(), shuffle=False),
        "prompts": lambda: opened.prompts([entry(files, "prompts")], rollout_batch(), shuffle=False),
    }[kind]()
    counted = [name for batch, rows in batches.once() for name in row_names(batch)[:rows]]
    shuffled = kinds(reader().reader, files)[kind]
    epoch = [name for step in range(shuffled.steps(1)) for name in row_names(shuffled[step])][: shuffled.rows]
    assert Counter(counted) == Counter(epoch)
    assert all(len(row_names(batch)) == batches.size for batch, _ in batches.once())


# Sources together ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.8), (1.0, 1.0)])
def test_sources_get_their_share_of_the_rows(reader, files, tokenizer, weights):
    data = [entry(files, name, weight=w) for name, w in zip(("prompts", "others"), weights, strict=True)]
    batches = reader().reader.prompts(data, rollout_batch(size=50))
    mark = tokenizer.encode("?")
    drawn = [any(token in row for token in mark) for step in range(8) for row in batches[step].tokens]
    assert batches.rows == 22 + 7
    assert np.mean(drawn) == pytest.approx(weights[1] / sum(weights), abs=0.01)


@pytest.mark.parametrize("fraction", [0.25, 0.1])
def test_pretraining_rows_are_mixed_into_demonstrations(reader, files, fraction):
    mix = schema.PretrainingMix(
        fraction=fraction, data=[entry(files, "documents", weight=5.0), entry(files, "others_as_text")]
    )
    (files / "others_as_text.jsonl").write_text('{"text": "? ? ?"}\n', encoding="utf-8")
    data, batch = [entry(files, "demonstrations", weight=2.0)], token_batch(size=50, length=24)
    alone = reader().reader.demonstrations(data, batch, "last")
    mixed = reader().reader.demonstrations(data, batch, "last", mix)
    # In a row of demonstrations the prompt is no target; in a row of documents every token is one.
    documents = [
        bool(targets[segments > 0].all())
        for step in range(8)
        for targets, segments in zip(mixed[step].loss_mask, mixed[step].segments, strict=True)
    ]
    assert np.mean(documents) == pytest.approx(fraction, abs=0.01)
    # An epoch is still one pass over the demonstrations.
    assert mixed.rows == round(alone.rows / (1 - fraction))


def test_the_same_source_twice_is_read_once(reader, files):
    opened = reader()
    data, batch = [entry(files, "demonstrations")], token_batch(length=12, overlong="drop")
    for shuffle in (True, False):
        opened.reader.demonstrations(data, batch, "last", shuffle=shuffle)
    [line] = opened.said
    assert "rows longer than 12 tokens left out" in line


# Too long, too many --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[1:])
def test_what_is_too_long_is_an_error_or_left_out(reader, files, tokenizer, kind):
    open_kind = {
        "demonstrations": lambda r, rule: r.demonstrations(
            [entry(files, kind)], token_batch(length=10, overlong=rule), "last"
        ),
        "comparisons": lambda r, rule: r.comparisons([entry(files, kind)], ranked_batch(length=10, overlong=rule)),
        "prompts": lambda r, rule: r.prompts([entry(files, kind)], rollout_batch(prompt_length=5, overlong=rule)),
    }[kind]
    limit = 5 if kind == "prompts" else 10
    texts = {
        "prompts": lambda record: [record["prompt"]],
        "demonstrations": lambda record: [record["prompt"] + record["completion"]],
        "comparisons": lambda record: [record["prompt"] + text for text in record["responses"]],
    }[kind]
    ends = 1 if kind == "prompts" else 2
    lines = (files / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = [[ends + len(tokenizer.encode(text)) for text in texts(json.loads(line))] for line in lines]
    first, longest = next((i, max(row)) for i, row in enumerate(lengths) if max(row) > limit)
    with pytest.raises(DataError) as caught:
        open_kind(reader().reader, "error")
    assert f"{kind}.jsonl@train row {first}: expected at most {limit} tokens, got {longest} (" in str(caught.value)
    assert "overlong: drop" in str(caught.value)
    opened = reader()
    open_kind(opened.reader, "drop")
    over = sum(length > limit for row in lengths for length in row)
    assert f": {over} of {sum(map(len, lengths))} rows longer than {limit} tokens left out (" in opened.said[0]
    setting = "batch.prompt_length" if kind == "prompts" else "batch.length"
    assert f"raise {setting} to keep them" in opened.said[0]


def ranked_file(folder, *records):
    (folder / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return [schema.Data(source=str(folder / "own.jsonl"))]


def test_dropped_candidates_leave_the_rest_of_the_comparison(reader, tmp_path):
    long = " ".join(WORDS * 2)
    data = ranked_file(
        tmp_path,
        ranking("the", [" film", long, " dull"], [2, 1, 3]),
        ranking("a", [" film", long], [1, 2]),  # nothing left to compare with
        ranking("the", [" warm", long, " dull"], [1, 2, 1]),  # a tie is left
    )
    opened = reader()
    batches = opened.reader.comparisons(data, ranked_batch(size=1, overlong="drop"))
    assert batches.rows == 1
    assert batches[0].mask.tolist() == [[True, True, False, False]]
    assert batches[0].ranks.tolist() == [[2, 3, 0, 0]]
    assert [line.split("jsonl")[1] for line in opened.said] == [
        "@train responses: 3 of 8 rows longer than 24 tokens left out (38 %); raise batch.length to keep them",
        "@train: 2 of 3 comparisons without a preference left out (67 %)",
    ]


def test_comparisons_without_a_preference_are_an_error(reader, tmp_path):
    data = ranked_file(tmp_path, ranking("the", [" film", " dull"], [1, 1]))
    with pytest.raises(
        DataError, match=r"own\.jsonl@train: expected comparisons that prefer one response, got ties alone"
    ):
        reader().reader.comparisons(data, ranked_batch(size=1))


def test_too_many_candidates_name_the_row(reader, tmp_path):
    data = ranked_file(tmp_path, ranking("the", ["a", "b"]), ranking("the", ["a", "b", "c", "d"]))
    with pytest.raises(DataError) as caught:
        reader().reader.comparisons(data, ranked_batch(candidates=3))
    assert str(caught.value).endswith(
        "own.jsonl@train row 1: expected at most 3 responses per comparison (batch.candidates), got 4; "
        "raise batch.candidates"
    )


def test_demonstration_ids_fit_and_are_spread_over_the_data(reader, files, tokenizer):
    opened = reader().reader
    every = opened.demonstration_ids([entry(files, "demonstrations")], 24, 100)
    lines = (files / "demonstrations.jsonl").read_text(encoding="utf-8").splitlines()
    whole = [
        ([BOS, *tokenizer.encode(record["prompt"])], [*tokenizer.encode(record["completion"]), EOS])
        for record in map(json.loads, lines)
    ]
    assert sorted(every) == sorted(whole)
    some = opened.demonstration_ids([entry(files, "demonstrations")], 12, 5)
    assert len(some) == 5
    assert all(pair in whole and len(pair[0]) + len(pair[1]) <= 12 for pair in some)
    with pytest.raises(DataError, match=r"expected demonstrations of at most 2 tokens, got none"):
        opened.demonstration_ids([entry(files, "demonstrations")], 2, 5)
