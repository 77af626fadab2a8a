"""Rows as a run reads them: any by its place, the same for any number of processes, and none that is not right."""

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.config import schema
from rlhfjax.data.sources import open_either
from rlhfjax.data.tokens import opening
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.errors import DataError, IntegrityError
from rlhfjax.text.tokenizer import Tokenizer
from tests.data.tokens.test_preparing import batches_of


def rows_of(batch):
    leaves = [leaf for leaf in vars(batch).values() if leaf is not None]
    return [b"".join(np.asarray(leaf)[row].tobytes() for leaf in leaves) for row in range(len(leaves[0]))]


@pytest.mark.parametrize("name", ["documents", "demonstrations", "comparisons", "prompts"])
def test_batches_are_equal_for_one_two_and_four_processes(reader, corpus, name):
    def read(count, step, size=8):
        parts = []
        for index in range(count):
            here = range(index * size // count, (index + 1) * size // count)
            one = reader(local=lambda _, here=here: here)
            parts += rows_of(batches_of(one, name, corpus.rows[name], size)[step])
        return parts

    for step in (0, 3, 11):
        whole = read(1, step)
        assert whole == read(2, step) == read(4, step)
        assert len(set(whole)) > 1


def test_an_epoch_is_a_permutation_of_all_rows_given_by_seed_and_epoch(reader, corpus):
    def orders(seed):
        batches = batches_of(reader(seed), "documents", corpus.rows["documents"])
        rows = list(itertools.chain.from_iterable(rows_of(batches[step]) for step in range(batches.steps(3))))
        return [rows[i * batches.rows : (i + 1) * batches.rows] for i in range(3)]

    one, again, other = orders(1), orders(1), orders(2)
    assert one == again
    assert len({tuple(order) for order in one}) == 3
    assert one[0] != other[0]
    stored = open_either(str(corpus.rows["documents"]), "train", corpus.folder)
    assert len(one[0]) == len(stored) > 40
    assert Counter(one[0]) == Counter(one[1]) == Counter(other[2])


def test_sources_are_mixed_by_weight_whatever_their_sizes(reader, corpus):
    few = corpus.make("documents", "few", Rows("document", 16))  # not packed: more rows, of other lengths
    data = [schema.Data(source=str(corpus.rows["prompts"]), weight=3.0), schema.Data(source=str(few), weight=1.0)]
    with pytest.raises(DataError, match="expected rows of document records, got prompt"):
        reader().documents(data, schema.Batch(size=8, length=16))
    data = [
        schema.Data(source=str(corpus.rows["documents"]), weight=3.0),
        schema.Data(source=str(corpus.folder / "demonstrations.jsonl"), map={"text": "completion"}),
    ]
    batches = reader().documents(data, schema.Batch(size=8, length=16))
    prepared = set()
    alone = reader().documents(data[:1], schema.Batch(size=8, length=16))
    for step in range(alone.steps(1)):
        prepared |= set(rows_of(alone[step]))
    for step in range(6):
        assert sum(row in prepared for row in rows_of(batches[step])) == 6


def test_rewards_get_the_records_of_prompts(reader, corpus):
    batches = batches_of(reader(), "prompts", corpus.rows["prompts"])
    records = batches.records(2)
    texts = [
        reader().tokenizer.decode(row[mask].tolist())
        for row, mask in zip(batches[2].tokens, batches[2].mask, strict=True)
    ]
    assert [record["prompt"] for record in records] == texts
    assert all(record["prompt"].endswith(f" {record['answer']}") for record in records)


def test_demonstrations_and_comparisons_can_be_taken_apart(reader, corpus):
    sources = corpus.folder / "demonstrations.jsonl", corpus.rows["demonstrations"]
    files, rows = ([schema.Data(source=str(source))] for source in sources)
    one, two = (sorted(reader().demonstration_ids(data, 40, 60)) for data in (files, rows))
    assert one == two
    assert len(one) == 60
    batch = schema.RankedBatch(size=2, length=40)
    of_file = reader().comparison_ids([schema.Data(source=str(corpus.folder / "comparisons.jsonl"))], batch)
    of_rows = reader().comparison_ids([schema.Data(source=str(corpus.rows["comparisons"]))], batch)
    assert sorted(of_file) == sorted(of_rows)


def test_no_more_shards_are_open_than_may_be(corpus, monkeypatch):
    monkeypatch.setattr(opening, "_OPEN", 2)
    shards = open_either(str(corpus.rows["documents"]), "train", corpus.folder)
    found = [shards[row] for row in range(len(shards))]
    backwards = [shards[row] for row in reversed(range(len(shards)))]
    assert found == backwards[::-1]
    assert len(shards._readers) == 2


@pytest.fixture
def copied(corpus, tmp_path):
    return shutil.copytree(corpus.rows["documents"], tmp_path / "copied")


def test_a_flipped_bit_is_found_and_its_shard_is_named(copied, reader):
    shard = sorted(copied.glob("rows-*.arrayrecord"))[1]
    data = bytearray(shard.read_bytes())
    for place in range(100, len(data) // 2, 7):
        data[place] ^= 1
    shard.write_bytes(data)
    batches = batches_of(reader(), "documents", copied)
    with pytest.raises(IntegrityError, match=f"{shard.name}: expected intact rows") as raised:
        list(batches.once())
    assert raised.value.exit_code == 4
    result = CliRunner().invoke(app, ["verify", str(copied)])
    assert result.exit_code == 4
    assert shard.name in result.output


@pytest.mark.parametrize("damage", ["cut", "missing", "index"])
def test_files_that_are_not_as_written_are_found_on_opening(copied, reader, damage):
    shard = sorted(copied.glob("rows-*.arrayrecord"))[2]
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif damage == "missing":
        shard.unlink()
    else:
        index = copied / "tokens.json"
        index.write_text(index.read_text().replace('"length": 16', '"length": 17'))
    with pytest.raises(IntegrityError, match="tokens.json" if damage == "index" else shard.name):
        batches_of(reader(), "documents", copied)


def test_rows_of_another_tokenizer_are_refused_with_the_command_that_makes_them(reader, corpus, tmp_path):
    other = Tokenizer.train(["some other words that were never seen in a film", "and so on"], 290)
    other.save(tmp_path / "run" / "tokenizer")
    mine = reader(place=str(tmp_path / "run" / "tokenizer"))
    object.__setattr__(mine, "tokenizer", other)
    data = [schema.Data(source=str(corpus.rows["documents"]))]
    with pytest.raises(DataError, match=r"rows of the tokenizer") as raised:
        mine.documents(data, schema.Batch(size=4, length=16))
    said = str(raised.value)
    assert other.fingerprint[:12] in said
    assert reader().tokenizer.fingerprint[:12] in said
    command = shlex.split(said.partition("`")[2].partition("`")[0])
    made = CliRunner().invoke(app, [*command[1:], "--data-dir", str(tmp_path / "data"), "--processes", "1"])
    assert made.exit_code == 0, made.output
    folder = made.stdout.splitlines()[-1]
    assert mine.documents([schema.Data(source=folder)], schema.Batch(size=4, length=16)).rows > 0


@pytest.mark.parametrize(
    ("name", "batch", "said", "command"),
    [
        ("documents", schema.Batch(size=4, length=32), "rows packed to 32 tokens .* packed to 16", "--pack 32"),
        ("demonstrations", schema.Batch(size=4, length=40, pack=False), "not packed .*got packed", "--length 40"),
        ("prompts", schema.RolloutBatch(size=4, prompt_length=3, overlong="drop"), "at most 3 ", "3 --overlong drop"),
        ("comparisons", schema.RankedBatch(size=4, length=5), "at most 5 tokens in a row .batch.length", "--length 5"),
        ("comparisons", schema.RankedBatch(size=4, length=40, candidates=2), "at most 2 responses .*got 4", ""),
    ],
)  # fmt: skip
def test_rows_of_another_form_are_refused_with_the_command_that_makes_them(reader, corpus, name, batch, said, command):
    read = {"documents": "documents", "demonstrations": "demonstrations", "prompts": "prompts"}.get(name, "comparisons")
    more = ["last"] if name == "demonstrations" else []
    with pytest.raises(DataError, match=said) as raised:
        getattr(reader(), read)([schema.Data(source=str(corpus.rows[name]))], batch, *more)
    assert raised.value.exit_code == 3
    assert command in str(raised.value)


def test_targets_of_other_answers_are_refused(reader, corpus):
    data = [schema.Data(source=str(corpus.rows["demonstrations"]))]
    with pytest.raises(DataError, match=r"loss\.train_on: all, got targets of train_on last .*--train-on all`"):
        reader().demonstrations(data, schema.Batch(size=4, length=40), "all")


def test_a_source_of_rows_has_one_split_and_no_layout(reader, corpus):
    source = str(corpus.rows["documents"])
    for more in ({"split": "test"}, {"layout": "rlhfjax"}):
        with pytest.raises(DataError, match=r"expected the split train|expected no layout"):
            reader().documents([schema.Data(source=source, **more)], schema.Batch(size=4, length=16))


def test_inspect_shows_rows_as_pieces(corpus):
    result = CliRunner().invoke(app, ["data", "inspect", str(corpus.rows["comparisons"]), "--index", "3"])
    assert result.exit_code == 0, result.output
    assert "40 rows of tokens, comparison" in result.stdout
    assert "\n[3]\n  <s> " in result.stdout


LEAN = """
import json, sys
from pathlib import Path

def heavy():
    return [name for name in ("jax", "grain", "orbax", "tensorflow_datasets", "tensorflow") if name in sys.modules]

from rlhfjax.data.tokens.items import PackedShards
from rlhfjax.data.tokens.opening import TokenShards
folder = Path(sys.argv[1])
shards = TokenShards(folder)
rows = PackedShards(shards, shards.facts["length"], 0)
tokens = rows[len(rows) - 1]["tokens"]
opened = heavy()
from rlhfjax.config import schema
from rlhfjax.data.pipeline import Reader
from rlhfjax.text.loading import load_tokenizer
reader = Reader(load_tokenizer(folder / "tokenizer"), folder, 0)
batches = reader.documents([schema.Data(source=str(folder))], schema.Batch(size=2, length=rows.length))
print(json.dumps([opened, heavy(), tokens.tolist(), batches[0].tokens.tolist()]))
"""


def test_rows_are_read_without_jax_and_batches_without_tfds(corpus):
    words = [sys.executable, "-c", LEAN, str(corpus.rows["documents"])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    opened, batched, tokens, batch = json.loads(done.stdout)
    assert opened == []
    assert "tensorflow_datasets" not in batched
    assert "grain" in batched  # or names that are found nowhere would prove nothing
    assert len(tokens) == len(batch[0]) == len(batch[1])
