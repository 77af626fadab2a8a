"""Preparing: the same rows whoever makes them and however often it is killed, and nothing of a source is lost."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from rlhfjax.config import schema
from rlhfjax.data.reading import RECOGNISE
from rlhfjax.data.sources import fingerprint_of, open_either
from rlhfjax.data.tokens import folder as folders
from rlhfjax.data.tokens.plan import Rows, plan_of
from rlhfjax.data.tokens.preparing import prepare_tokens, what_was_made
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.integrity import check
from tests.data.tokens.conftest import ROWS, STEP

PACKED = ("documents", "demonstrations")


def segments(batches):
    """How often each sequence, with its targets, is in an epoch."""
    found = Counter()
    for batch, rows in batches.once():
        for row in range(rows):
            for segment in range(1, batch.segments[row].max() + 1):
                held = batch.segments[row] == segment
                assert batch.positions[row][held].tolist() == [*range(held.sum())]
                found[batch.tokens[row][held].tobytes(), batch.loss_mask[row][held].tobytes()] += 1
    return found


def whole_rows(batches):
    """How often each row, without its place, is in an epoch."""
    found = Counter()
    for batch, rows in batches.once():
        leaves = {name: value for name, value in vars(batch).items() if name != "uid" and value is not None}
        for row in range(rows):
            found[tuple((name, np.asarray(value)[row].tobytes()) for name, value in sorted(leaves.items()))] += 1
    return found


def batches_of(reader, name, source, size=5):
    data = [schema.Data(source=str(source))]
    length = ROWS[name].length
    match name:
        case "documents":
            return reader.documents(data, schema.Batch(size=size, length=length))
        case "demonstrations":
            return reader.demonstrations(data, schema.Batch(size=size, length=length), "last")
        case "comparisons":
            return reader.comparisons(data, schema.RankedBatch(size=size, length=length, candidates=4))
    return reader.prompts(data, schema.RolloutBatch(size=size, prompt_length=length))


@pytest.mark.parametrize("name", ROWS)
def test_rows_hold_what_the_files_give(reader, corpus, name):
    """Against the road that reads the file itself, as multisets: only the order differs, and who shares a row."""
    count = segments if name in PACKED else whole_rows
    files, rows = (batches_of(reader(), name, s) for s in (corpus.folder / f"{name}.jsonl", corpus.rows[name]))
    assert count(files) == count(rows)
    assert len(json.loads((corpus.rows[name] / "tokens.json").read_text())["shards"]) > 2


def test_rows_are_packed_tight(corpus, reader):
    found = segments(batches_of(reader(), "documents", corpus.rows["documents"]))
    tokens = sum(len(tokens) // 4 for tokens, _ in found.elements())
    counts = folders.read_index(corpus.rows["documents"])["counts"]
    assert counts["tokens"] == tokens
    assert counts["rows"] <= 1.2 * -(-tokens // 16)
    assert any("rows, " in line and "full" in line for line in what_was_made(corpus.rows["documents"]))


def digests(folder):
    return {path.name: entry for path in folder.iterdir() if (entry := path.is_file() and path.read_bytes())}


def test_two_processes_make_what_one_makes(corpus):
    two = corpus.make("demonstrations", "by_two", processes=2)
    assert digests(two) == digests(corpus.rows["demonstrations"])


CHILD = """
import os, signal, sys
from pathlib import Path
from rlhfjax.data.tokens import shards
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.data.tokens.preparing import prepare_tokens
from rlhfjax.text.loading import load_tokenizer

source, to, tokenizer, data, after, step = sys.argv[1:]
written = []
sync = shards.sync

def killed(path):  # a shard's rows are in its file, which has not got its name
    written.append(path)
    if len(written) > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

shards.sync = killed
rows = Rows("document", 16, packed=True)
prepare_tokens(source, rows, load_tokenizer(tokenizer), Path(data), to=Path(to), step=int(step))
"""


def test_killed_twice_it_keeps_what_was_finished(corpus, tokenizer, tmp_path):
    # fails when shards are made again: their inodes change; seen
    tokenizer.save(tmp_path / "tokenizer")
    to, kept = corpus.folder / "killed", {}
    source = corpus.folder / "documents.jsonl"
    for finished in (2, 4):
        after = finished - len(kept)
        words = [source, to, tmp_path / "tokenizer", corpus.folder / "data", after, STEP]
        done = subprocess.run([sys.executable, "-c", CHILD, *map(str, words)], check=False)
        assert done.returncode == -signal.SIGKILL
        now = {path.name: path.stat().st_ino for path in to.glob("rows-*.arrayrecord")}
        assert len(now) == finished
        assert kept.items() <= now.items()
        assert len(list(to.glob("*.part"))) == 1
        kept = now
        with pytest.raises(DataError, match="preparation was stopped; run the same"):
            open_either(str(to), "train", corpus.folder / "data")
    said = []
    corpus.make("documents", "killed", report=said.append)
    assert said[0].startswith("4 of ")
    assert kept.items() <= {path.name: path.stat().st_ino for path in to.glob("rows-*.arrayrecord")}.items()
    assert digests(to) == digests(corpus.rows["documents"])
    assert not check(to).differences


def test_the_same_again_is_there_already(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.rows["prompts"].rglob("*")}
    assert corpus.make("prompts", "rows_prompts") == corpus.rows["prompts"]
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rows["prompts"].rglob("*")}


def test_a_folder_is_named_by_what_it_is_made_of(corpus, tokenizer):
    source = str(corpus.folder / "prompts.jsonl")
    made = [
        prepare_tokens(source, rows, tokenizer, corpus.folder / "data")
        for rows in (Rows("prompt", 32), Rows("prompt", 33), Rows("prompt", 32))
    ]
    assert made[0] == made[2] != made[1]
    assert made[0].parent == corpus.folder / "data"
    assert len(open_either(made[0].name, "train", corpus.folder / "data")) == 50


def test_a_folder_of_something_else_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"rows_prompts: expected what was begun there, .*length.*--to"):
        corpus.make("prompts", "rows_prompts", Rows("prompt", 31))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="expected an empty folder"):
        corpus.make("prompts", tmp_path)
    with pytest.raises(DataError, match="which were made already"):
        prepare_tokens(str(corpus.rows["prompts"]), ROWS["prompts"], tokenizer, corpus.folder / "data")


def test_a_source_that_changes_on_the_way_is_refused(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "the film"}\n' * 4)
    plan = plan_of(str(source), "train", ROWS["documents"], tokenizer, tmp_path, RECOGNISE, None)
    source.write_text('{"text": "the story"}\n' * 4)
    with pytest.raises(DataError, match="changed since its preparation began"):
        plan.file(str(source))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_row_of_any_part_is_named_by_its_line(tmp_path, tokenizer, processes):
    lines = [json.dumps({"text": f"the film {i}"}) for i in range(40)]
    lines[29] = '{"text": 3}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    how = {"to": tmp_path / "rows", "step": 101, "processes": processes}
    with pytest.raises(DataError, match=r"a\.jsonl:30: text: expected a string, got a whole number"):
        prepare_tokens(str(tmp_path / "a.jsonl"), ROWS["documents"], tokenizer, tmp_path, **how)


def test_every_line_is_in_one_part_wherever_parts_end(tmp_path, tokenizer):
    # fails when a line at a border is read twice or by nobody; seen
    texts = [f"{'story ' * (i % 4)}{i}" for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    for step in (1, 17, 18, 19, 100):
        folder = prepare_tokens(
            str(tmp_path / "a.jsonl"), ROWS["prompts"], tokenizer, tmp_path, to=tmp_path / f"rows{step}", step=step
        )
        shards = open_either(str(folder), "train", tmp_path)
        assert len(shards) == 30
        assert [json.loads(shards[row][shards[row].index(b"{") :])["prompt"] for row in range(30)] == texts


def test_other_files_are_prepared_as_a_dataset_first(tmp_path, tokenizer):
    source = tmp_path / "a.csv"
    source.write_text("prompt,completion\n" + "".join(f"the film {i}, dull {i}\n" for i in range(20)))
    folder = prepare_tokens(
        str(source), Rows("demonstration", 40), tokenizer, tmp_path / "data", to=tmp_path / "rows", step=6
    )
    index = folders.read_index(folder)
    assert [shard["rows"] for shard in index["shards"]] == [6, 6, 6, 2]
    assert list(index["made_from"]) == [f"{source}@train"]


def test_what_is_too_long_is_an_error_or_dropped_and_counted(corpus):
    with pytest.raises(DataError, match=r"demonstrations\.jsonl:\d+: expected at most 9 tokens, got \d+; raise --pack"):
        corpus.make("demonstrations", "short", Rows("demonstration", 9, packed=True))
    with pytest.raises(DataError, match=r"at most 2 tokens, got none of 60 records, left out: 60 longer"):
        corpus.make("demonstrations", "none", Rows("demonstration", 2, packed=True, overlong="drop"))
    folder = corpus.make("demonstrations", "some", Rows("demonstration", 9, packed=True, overlong="drop"))
    index = folders.read_index(folder)
    left = index["counts"]["overlong"]
    assert 0 < left < 60
    assert index["notes"] == [f"of 60 records, left out: {left} longer than rows may be"]


def test_options_that_cannot_be_are_refused():
    for options, said in [
        (("rating", 16), "--kind rating: expected document, demonstration, comparison, prompt"),
        (("prompt", 16, True), "--pack 16: a prompt has a row of its own; say --length 16"),
        (("document", 1), "--length 1: expected at least 2 tokens"),
        (("demonstration", 16, True, "first"), "--train-on first: expected last or all"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Rows(*options)


def test_a_fingerprint_is_of_rows_and_not_of_where_they_lie(corpus, tmp_path):
    data = corpus.folder / "data"
    first = fingerprint_of(str(corpus.rows["documents"]), "train", data)
    os.symlink(corpus.rows["documents"], tmp_path / "elsewhere")
    assert fingerprint_of(str(tmp_path / "elsewhere"), "train", data) == first
    longer = corpus.make("documents", "longer", Rows("document", 17, packed=True))
    assert fingerprint_of(str(longer), "train", data) != first
