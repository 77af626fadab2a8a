"""vocab.json with merges.txt: the ids of `tokenizers`, which reads the two files too, and words on what is missing."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.text.loading import load_tokenizer
from tests.golden.word_lines import LINES

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-bpe"  # the real one, where it is at hand


def small(folder, **files):
    """The golden byte-level tokenizer in two files, without its special tokens but the end of text."""
    golden = Path(__file__).parents[1] / "golden" / "tokenizers" / "byte_level" / "tokenizer.json"
    model = json.loads(golden.read_text())["model"]
    vocab = {"<|endoftext|>" if index == 0 else token: index for token, index in model["vocab"].items()}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    pairs = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def as_gpt2(folder):
    made = tokenizers.Tokenizer(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


@pytest.mark.parametrize(
    "files",
    [
        {"config": {"model_type": "gpt2"}},
        {"tokenizer_config": {"tokenizer_class": "GPT2TokenizerFast"}},
        {"tokenizer_config": {"tokenizer_class": "CodeGenTokenizer"}, "config": {"model_type": "llama"}},
    ],
)
def test_ids_of_gpt2(tmp_path, files):
    tokenizer, theirs = load_tokenizer(small(tmp_path, **files)), as_gpt2(tmp_path)
    assert [tokenizer.encode(line) for line in LINES] == [theirs.encode(line).ids for line in LINES]
    assert [tokenizer.decode(tokenizer.encode(line)) for line in LINES] == LINES
    assert (tokenizer.eos_id, tokenizer.end_ids, tokenizer.bos_id) == (0, (0,), None)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(LINES[0]) == tokenizer.encode(LINES[0])


def test_the_class_decides_how_words_are_cut_and_added_tokens_are_read(tmp_path):
    files = {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end|>"}}
    tokenizer = load_tokenizer(small(tmp_path, **files, added_tokens={"<|end|>": 500, "<think>": 501}))
    one_by_one = [index for digit in "1234" for index in tokenizer.encode(digit)]
    assert tokenizer.encode("1234") == one_by_one  # GPT-2 joins digits
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert tokenizer.encode("<think>") == [501]
    assert (tokenizer.eos_id, tokenizer.decode([500])) == (500, "")


@pytest.mark.parametrize(
    ("files", "error", "expected"),
    [
        ({"tokenizer_config": {"tokenizer_class": "WhisperTokenizer"}}, ConfigError, "got WhisperTokenizer in"),
        ({"config": {"model_type": "llama"}}, ConfigError, "got no tokenizer_class in tokenizer_config.json"),
        ({"vocab": [], "config": {"model_type": "gpt2"}}, IntegrityError, "JSON object"),
    ],
)
def test_files_that_do_not_say_enough(tmp_path, files, error, expected):
    with pytest.raises(error, match=expected):
        load_tokenizer(small(tmp_path, **files))


def test_a_line_that_is_no_pair(tmp_path):
    small(tmp_path, config={"model_type": "gpt2"})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nthe\n")
    with pytest.raises(IntegrityError, match=r"merges\.txt:3: expected two parts with a space between, got 'the'"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not (GPT2 / "vocab.json").is_file(), reason="needs the files of GPT-2 beside the checkout")
def test_the_files_of_gpt2_itself(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((GPT2 / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "eos_token_id": 50256}))
    tokenizer, theirs = load_tokenizer(tmp_path), as_gpt2(tmp_path)
    assert [tokenizer.encode(line) for line in LINES] == [theirs.encode(line).ids for line in LINES]
    assert tokenizer.encode("Hello world") == [15496, 995]  # as everywhere
    assert tokenizer.end_ids == (50256,)
