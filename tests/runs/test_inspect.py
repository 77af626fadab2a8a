"""`data inspect` shows what a batch really holds."""

import re

import pytest
from stages.conftest import rows_of
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.text.tokenizer import Tokenizer


@pytest.fixture
def shown(config, finished):
    """The lines that `data inspect` prints of a stage."""

    def inspect(stage, *options, run_dir=finished, code=0):
        words = ["data", "inspect", str(config), stage, "--run-dir", str(run_dir), *options]
        result = CliRunner().invoke(app, words, prog_name="rlhfjax")
        assert result.exit_code == code, result.output
        return result.stdout.splitlines() if code == 0 else result.stderr

    return inspect


def test_packed_documents_token_by_token(shown, finished):
    title, header, *rows = shown("pretrain")
    assert re.fullmatch(r"pretrain: \d+ rows an epoch, batches of 8; row 0 is row 0 of step 0", title)
    assert header.split() == ["slot", "segment", "position", "target", "id", "piece"]
    tokenizer = Tokenizer.load(finished / "tokenizer")
    cells = [row.split() for row in rows]
    assert [int(row[0]) for row in cells] == list(range(32))
    for before, row in zip([None, *cells], cells, strict=False):
        segment, position, target, token, piece = row[1:]
        starts = before is None or before[1] != segment
        assert segment == "0" or int(position) == (0 if starts else int(before[2]) + 1)
        assert target == ("yes" if segment != "0" and not starts else "-")
        assert [piece] == tokenizer.pieces([int(token)])


def test_only_answers_are_targets(shown):
    cells = [row.split() for row in shown("sft")[2:]]
    targets = [row[5] for row in cells if row[3] == "yes"]
    assert targets
    assert targets[-1] == "</s>"
    assert "<|user|>" not in targets
    assert "<s>" not in targets


def test_rankings_show_where_the_score_is_read(shown, files):
    title, *lines = shown("reward", "--index", "9")
    assert title.endswith("; row 9 is row 1 of step 1")
    heads, texts = lines[::2], lines[1::2]
    assert 2 <= len(heads) <= 4
    for place, (head, text) in enumerate(zip(heads, texts, strict=True)):
        found = re.fullmatch(r"candidate (\d), rank (\d), (\d+) tokens, score read at </s>", head)
        assert int(found[1]) == place
        assert len(text.split()) == int(found[3])
        assert text.split()[0] == "<s>"
    ranks = [int(re.search(r"rank (\d)", head)[1]) for head in heads]
    assert ranks in [record["ranks"] for record in rows_of(files / "comparisons.jsonl")]


def test_prompts_show_their_padding(shown, files, finished):
    _, head, text = shown("ppo", "--index", "3")
    padding, count = map(int, re.fullmatch(r"(\d+) slots of padding on the left, then (\d+) tokens", head).groups())
    assert padding + count == 10
    tokenizer = Tokenizer.load(finished / "tokenizer")
    asked = [tokenizer.encode(record["prompt"]) for record in rows_of(files / "prompts.jsonl")]
    assert text.split() in [["<s>", *tokenizer.pieces(ids)] for ids in asked]


def test_without_a_tokenizer_it_says_how_to_make_one(shown, tmp_path):
    message = shown("ppo", run_dir=tmp_path, code=2)
    assert f"{tmp_path} has no tokenizer yet; `rlhfjax run CONFIG --only tokenizer` makes it" in message
    assert "expected a stage of tiny that reads batches, got 'tokenizer'" in shown("tokenizer", code=2)


def test_without_a_tokenizer_that_of_the_checkpoint_is_taken(config, finished, files, tmp_path):
    options = [
        f"model={{checkpoint: {finished / 'sft'}}}",
        "tokenizer={}",
        "stages.pretrain=null",
        "stages.ppo.ptx=null",
    ]
    words = ["data", "inspect", str(config), "ppo", *options, "--index", "3", "--run-dir", str(tmp_path / "none")]
    result = CliRunner().invoke(app, words, prog_name="rlhfjax")
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer.load(finished / "tokenizer")
    asked = [tokenizer.encode(record["prompt"]) for record in rows_of(files / "prompts.jsonl")]
    assert result.stdout.splitlines()[2].split() in [["<s>", *tokenizer.pieces(ids)] for ids in asked]
    assert not (tmp_path / "none").exists()
