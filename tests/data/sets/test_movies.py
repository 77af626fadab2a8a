"""The movies benchmark on a small synthetic pair of archives: who sees which batch, labeler, text and speaker."""

import hashlib
import json
import os
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from rlhfjax.data.datasets import default_data_dir, open_source
from rlhfjax.data.records import KINDS as RECORD_KINDS
from rlhfjax.data.records import parse_record
from rlhfjax.data.sets import benchmark, movies
from rlhfjax.data.sets.benchmark import is_prepared, prepare
from rlhfjax.data.sets.movie_archives import Snippet, read_snippets
from rlhfjax.data.sets.movie_tasks import Batch, Ratings, labeler_rankings, shuffled
from rlhfjax.data.sets.movies import KINDS, Movies, movie_tables
from rlhfjax.errors import DataError

from ..conftest import CONSTANT, CONTRARY, ratings_rows, snippet_texts

SPLITS = {
    "chat": ["train", "validation"],
    "snippets": ["train", "validation"],
    "demonstrations": ["train", "validation"],
    "prompts": ["train", "test"],
    "comparisons": ["train", "validation", "heldout"],
    "across": ["train", "validation"],
    "elsewhere": ["train"],
    "ratings": ["judge", "rm", "rm_validation", "test"],
}


@pytest.fixture(scope="module")
def tables(archives):
    """Every record of every split."""
    return {
        config: {split: list(start()) for split, start in splits.items()}
        for config, splits in movie_tables(*archives).items()
    }


def movies_text(raw: str) -> str:
    return " ".join(raw.replace("&amp;", "&").split())


def ratings_of(tables) -> dict[str, list[int]]:
    """Text → the row of ratings that the source gives for it."""
    source = ratings_rows().tolist()
    return {r["text"]: source[int(r["text_id"]) - 1] for split in tables["ratings"].values() for r in split}


def texts_of(comparison) -> list[str]:
    """The snippets that a comparison ranks: a response goes on where the prompt `Review:` ends, so with a space."""
    assert all(response.startswith(" ") for response in comparison["responses"])
    return [response[1:] for response in comparison["responses"]]


def batches_of(records):
    return {record["batch"] for record in records}


def test_configs_splits_and_kinds(tables):
    assert {config: list(splits) for config, splits in tables.items()} == SPLITS
    for config, splits in tables.items():
        for records in splits.values():
            assert records
            if KINDS[config] in RECORD_KINDS:
                assert [parse_record(KINDS[config], record, "here") for record in records] == records


def test_batches_and_texts_are_in_one_split_only(tables):
    ratings = tables["ratings"]
    for one, other in combinations(ratings, 2):
        assert batches_of(ratings[one]).isdisjoint(batches_of(ratings[other]))
    texts = Counter(record["text"].lower() for split in ratings.values() for record in split)
    assert set(texts.values()) == {1}
    assert set(texts) == {movies_text(text).lower() for text in snippet_texts()}
    sizes = [len(batches_of(ratings[split])) for split in SPLITS["ratings"]]
    assert sizes == [63, 81, 9, 27]  # of 180: judge 35 %, reward model 50 % (a tenth of it to validate on), test 15 %


def test_every_training_text_comes_from_rm_and_every_check_from_test(tables):
    fit, check, test = ({r["text"] for r in tables["ratings"][split]} for split in ("rm", "rm_validation", "test"))
    rm = fit | check
    whole = lambda record: f"{record['prompt']}{record['completion']}".removeprefix("Review: ")  # noqa: E731
    assert {record["text"].removeprefix("Review: ") for record in tables["snippets"]["train"]} == rm
    assert {record["text"].removeprefix("Review: ") for record in tables["snippets"]["validation"]} == test
    assert set(map(whole, tables["demonstrations"]["train"])) < rm
    assert set(map(whole, tables["demonstrations"]["validation"])) < test
    for config, split, allowed in [
        ("comparisons", "train", fit),
        ("comparisons", "validation", check),
        ("comparisons", "heldout", test),
        ("across", "train", fit),
        ("across", "validation", check),
    ]:
        assert {text for record in tables[config][split] for text in texts_of(record)} <= allowed


def test_prompts_to_measure_on_are_those_of_held_out_texts(tables):
    # fails when prompts/test is made of the texts that training sees: seen
    of = {"train": ("train", ("rm", "rm_validation")), "test": ("validation", ("test",))}
    for split, (shown, rated) in of.items():
        demonstrations = [(record["prompt_id"], record["prompt"]) for record in tables["demonstrations"][shown]]
        assert [(record["prompt_id"], record["prompt"]) for record in tables["prompts"][split]] == demonstrations
        texts = {record["text_id"]: record["text"] for name in rated for record in tables["ratings"][name]}
        assert all(f"Review: {texts[number]}".startswith(prompt) for number, prompt in demonstrations)
    train, test = ({record["prompt_id"] for record in tables["prompts"][split]} for split in of)
    assert train
    assert test
    assert train.isdisjoint(test)


def test_reward_validation_batches_are_not_trained_on_within_or_across(tables):
    seen = {
        split: {text for config in ("comparisons", "across") for r in tables[config][split] for text in texts_of(r)}
        for split in ("train", "validation")
    }
    assert seen["train"].isdisjoint(seen["validation"])
    batches = {
        split: {record["labeler_id"][:3] for record in tables["comparisons"][split]} for split in SPLITS["comparisons"]
    }
    assert [len(batches[split]) for split in ("train", "validation", "heldout")] == [81, 9, 27]


def test_held_out_and_careless_labelers_are_never_trained_on(tables):
    columns = {
        split: {tuple(map(int, record["labeler_id"].split("-"))) for record in tables["comparisons"][split]}
        for split in SPLITS["comparisons"]
    }
    assert all(column % 5 != 4 for split in ("train", "validation") for _, column in columns[split])
    assert all(column % 5 == 4 for _, column in columns["heldout"])
    assert {CONSTANT, CONTRARY}.isdisjoint(columns["train"] | columns["validation"])


def test_dropped_columns_are_the_careless_ones(archives):
    ratings = Ratings.of(read_snippets(archives[0]))
    dropped = {(b.number, j) for split in ratings.splits.values() for b in split for j in np.flatnonzero(b.dropped)}
    assert dropped >= {CONSTANT, CONTRARY}
    assert len(dropped) < 10  # the other labelers agree well by construction


def test_ranks_are_the_labelers_own_ratings(tables):
    own_score = ratings_of(tables)
    for split in SPLITS["comparisons"]:
        for record in tables["comparisons"][split]:
            column = int(record["labeler_id"].split("-")[1])
            scores = [own_score[text][column] for text in texts_of(record)]
            levels = sorted(set(scores), reverse=True)
            assert record["ranks"] == [levels.index(score) + 1 for score in scores]
            assert len(levels) > 1
            assert 4 <= len(scores) <= 9
            assert record["prompt"] == "Review:"


def test_a_labeler_ranks_each_text_of_the_batch_at_most_once_and_cuts_differ(tables):
    groups: dict[str, list[tuple[str, ...]]] = {}
    for record in tables["comparisons"]["train"]:
        groups.setdefault(record["labeler_id"], []).append(tuple(sorted(texts_of(record))))
    for cut in groups.values():
        assert max(Counter(text for group in cut for text in group).values()) == 1
    assert len(set(map(frozenset, groups.values()))) == len(groups)
    sizes = Counter(len(group) for cut in groups.values() for group in cut)
    assert set(sizes) == {4, 5, 6, 7, 8, 9}
    ids = [record["prompt_id"] for split in SPLITS["comparisons"] for record in tables["comparisons"][split]]
    assert len(set(ids)) == len(ids)


def test_a_labeler_is_compared_with_the_others_alone():
    """Columns 1 and 3 are alike, 2 has no relation to them; with its own share in the mean it would have (.45)."""
    rows = [(1, 1, 1), (-1, 1, -1), (1, -1, 1), (-1, -1, -1)]
    snippets = [Snippet(number, f"text {number}", row) for number, row in enumerate(rows, 1)]
    (batch,) = Ratings.of(snippets).batches("judge")
    assert batch.dropped.tolist() == [False, True, False]
    assert batch.train_means.tolist() == [1, -1, 1, -1]


def test_all_tied_comparisons_are_dropped_and_the_rest_of_a_labeler_kept():
    scores = np.repeat([[1, 2]], 12, axis=0)
    scores[0, 1] = 3
    snippets = tuple(Snippet(number, f"text {number}", ()) for number in range(12))
    batch = Batch(0, snippets, scores, heldout=np.zeros(2, bool), dropped=np.zeros(2, bool))
    (record,) = labeler_rankings([batch], heldout=False)
    assert record["labeler_id"] == "000-01"
    assert sorted(record["ranks"])[:2] == [1, 2]
    assert record["ranks"][texts_of(record).index("text 0")] == 1


def test_across_rankings_mix_batches_and_rank_by_the_training_mean(tables):
    by_text = {r["text"]: r for split in ("rm", "rm_validation") for r in tables["ratings"][split]}
    for split in SPLITS["across"]:
        for record in tables["across"][split]:
            rated = [by_text[text] for text in texts_of(record)]
            assert len({r["batch"] for r in rated}) == len(rated) == 9
            means = [r["mean_train"] for r in rated]
            assert np.all(np.diff(np.array(means)[np.argsort(record["ranks"], kind="stable")]) <= 1e-6)
            assert record["labeler_id"] == "mean"
    counts = Counter(text for record in tables["across"]["train"] for text in texts_of(record))
    assert max(counts.values()) <= 4
    assert np.mean(list(counts.values())) > 3.5


def test_rated_texts_hold_the_source_ratings_and_the_training_mean(tables):
    own_score = ratings_of(tables)
    for record in tables["ratings"]["judge"]:
        assert record["ratings"] == own_score[record["text"]]
        assert record["heldout"] == [column % 5 == 4 for column in range(7)]
        kept = [
            r
            for r, held, drop in zip(record["ratings"], record["heldout"], record["dropped"], strict=True)
            if not held and not drop
        ]
        assert record["mean_train"] == pytest.approx(sum(kept) / len(kept), abs=1e-6)
        assert record["batch"] == (int(record["text_id"]) - 1) // 30


def test_demonstrations_cut_after_4_to_6_words(tables):
    shown = Counter()
    source = {record["text_id"]: record["text"] for split in tables["ratings"].values() for record in split}
    for record in tables["demonstrations"]["train"]:
        words = record["prompt"].split()
        assert words[0] == "Review:"
        assert record["prompt"] + record["completion"] == f"Review: {source[record['prompt_id']]}"
        assert len(record["completion"].split()) >= 3
        shown[len(words) - 1] += 1
    assert set(shown) == {4, 5, 6}
    assert min(shown.values()) > 0.2 * shown.total()
    prompts = [{name: r[name] for name in ("prompt", "prompt_id")} for r in tables["demonstrations"]["train"]]
    assert tables["prompts"]["train"] == prompts
    rated = [r for split in ("rm", "rm_validation") for r in tables["ratings"][split]]
    left_out = {r["text_id"] for r in rated} - {r["prompt_id"] for r in prompts}
    assert max(len(source[number].split()) for number in left_out) == 8  # 6 + 3 words are always enough


def test_nobody_in_validation_chats_speaks_in_training(tables):
    speakers = {}
    for split in SPLITS["chat"]:
        lines = [record["text"].split("\n")[0] for record in tables["chat"][split]]
        speakers[split] = {line.split()[0] for line in lines}  # every line names its pair
    assert speakers["train"].isdisjoint(speakers["validation"])
    assert 0.03 < len(tables["chat"]["validation"]) / len(tables["chat"]["train"]) < 0.15
    everything = "\n".join(record["text"] for split in tables["chat"].values() for record in split)
    assert "example.org" not in everything
    assert "short" not in everything
    assert all(record["text"].count("\n") >= 3 for split in tables["chat"].values() for record in split)


def test_order_does_not_depend_on_the_process():
    by_hand = sorted(range(5), key=lambda i: hashlib.sha256(f"0/salt/{i}".encode()).digest()[:8])
    assert shuffled(range(5), "salt") == by_hand


@pytest.fixture
def cached(archives, tmp_path, monkeypatch):
    """A download cache that already holds the archives, under digests to match."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, path in zip(("RATINGS_SDIST", "CHAT_WHEEL"), archives, strict=True):
        (cache / path.name).write_bytes(path.read_bytes())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(movies, name, replace(getattr(movies, name), sha256=digest))
    return cache


def test_prepared_datasets_are_the_tables(tables, cached, tmp_path):
    data_dir, said = tmp_path / "data", []
    assert not is_prepared(Movies, data_dir)
    folders = prepare(Movies, data_dir, cached, said.append)
    assert is_prepared(Movies, data_dir)
    assert folders == [data_dir / "movies" / config / "1.1.0" for config in KINDS]
    for config, splits in tables.items():
        for split, records in splits.items():
            assert list(open_source(f"movies/{config}", split, data_dir, KINDS[config])) == records
    assert "writing movies/across" in said
    said.clear()
    assert prepare(Movies, data_dir, None, said.append) == folders  # nothing to fetch, nothing to write
    assert said == [f"movies is already prepared in {data_dir}"]


def test_a_failed_preparation_leaves_nothing_and_an_interrupted_one_continues(cached, tmp_path, monkeypatch):
    data_dir = tmp_path / "data"

    def fails_late(builder):
        if builder.builder_config.name == "ratings":
            raise OSError(28, "No space left on device")
        return write(builder)

    write = benchmark.write_builder
    monkeypatch.setattr(benchmark, "write_builder", fails_late)
    with pytest.raises(DataError, match="No space left"):
        prepare(Movies, data_dir, cached)
    assert [path.name for path in data_dir.iterdir()] == [".lock"]
    monkeypatch.setattr(benchmark, "write_builder", write)
    prepare(Movies, data_dir, cached)
    for path in (data_dir / "movies" / "across" / "1.1.0").iterdir():
        path.unlink()
    (data_dir / "movies" / "across" / "1.1.0").rmdir()
    assert not is_prepared(Movies, data_dir)
    said = []
    prepare(Movies, data_dir, cached, said.append)
    assert [text for text in said if text.startswith("writing")] == ["writing movies/across"]
    assert is_prepared(Movies, data_dir)


def test_the_builder_works_as_any_tfds_builder(cached, tmp_path, monkeypatch, tables):
    monkeypatch.setattr(benchmark, "default_cache_dir", lambda: cached)
    Movies(config="prompts", data_dir=str(tmp_path / "tfds")).download_and_prepare(file_format="array_record")
    records = open_source("movies/prompts", "test", tmp_path / "tfds", "prompt")
    assert list(records) == tables["prompts"]["test"]


REAL = Path(os.environ.get("RLHFJAX_DATA_DIR") or default_data_dir())


@pytest.mark.skipif(
    not (os.environ.get("RLHFJAX_TEST_MOVIES") or is_prepared(Movies, REAL)),
    reason="the real movies data is not prepared",
)
def test_the_real_data_has_the_published_counts():
    prepare(Movies, REAL)
    ratings = {split: list(open_source("movies/ratings", split, REAL)) for split in SPLITS["ratings"]}
    assert [len(batches_of(ratings[split])) for split in SPLITS["ratings"]] == [124, 159, 18, 53]
    records = [record for split in ratings.values() for record in split]
    assert len(records) == 10_605 - 2  # two texts are there twice
    assert {len(record["ratings"]) for record in records} == set(range(15, 30))
    columns = {record["batch"]: len(record["ratings"]) for record in records}
    assert sum(columns.values()) == 6_635
    raw = np.concatenate([record["ratings"] for record in records])
    assert abs(raw.mean()) < 0.05
    for config, splits in SPLITS.items():
        for split in splits:
            assert json.dumps(open_source(f"movies/{config}", split, REAL, KINDS[config])[0])


def test_rankings_from_elsewhere_hold_no_film_review_and_follow_the_mean_rating(tables):
    """Fails if ids are joined by position, or if a review is let in: seen for both."""
    reviews = {text.lower() for text in snippet_texts()}
    records = tables["elsewhere"]["train"]
    assert len(records) == 2 * (58 // 9)
    for record in records:
        texts = [text.strip() for text in record["responses"]]
        assert not reviews & {text.lower() for text in texts}
        # "tweets text 7" stands in row 8, which is rated (8 - 15) // 4
        means = [(int(text.split()[-1]) + 1 - 15) // 4 for text in texts]
        order = sorted(set(means), reverse=True)
        assert record["ranks"] == [order.index(mean) + 1 for mean in means]
