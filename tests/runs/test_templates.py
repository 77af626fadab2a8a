"""A tokenizer that was given and is another by now, named by the line of its chat template."""

import json
import shutil
from pathlib import Path

import pytest

from rlhfjax.config import load_config
from rlhfjax.runs.templates import other_template, other_tokenizer
from rlhfjax.text.loading import load_tokenizer

GIVEN = Path(__file__).parents[1] / "golden" / "tokenizers" / "byte_level"
TEMPLATE = """{%- set date = '26 Jul 2024' %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + date + '\\n' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant' + date + '\\n' }}{%- endif %}"""


@pytest.fixture
def run(tmp_path):
    """(The configuration of a run with a published tokenizer, the run's directory, that of the tokenizer)."""
    given = shutil.copytree(GIVEN, tmp_path / "given")
    (given / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    load_tokenizer(given).save(tmp_path / "run" / "tokenizer")
    own = load_config("quickstart", [f"tokenizer={{path: {given}}}"])
    return own, tmp_path / "run", given


def test_nothing_is_said_of_the_same(run):
    own, run_dir, _ = run
    assert list(other_tokenizer(own, run_dir)) == []
    assert list(other_tokenizer(load_config("quickstart"), run_dir)) == []  # which trains its own


def test_a_date_in_its_template_is_named(run):
    own, run_dir, given = run
    (given / "chat_template.jinja").write_text(TEMPLATE.replace("26 Jul", "27 Jul"), encoding="utf-8")
    assert list(other_tokenizer(own, run_dir)) == [
        "chat template of tokenizer.path: line 1: expected \"{%- set date = '26 Jul 2024' %}\", got "
        "\"{%- set date = '27 Jul 2024' %}\""
    ]


def test_another_token_is_told_by_digests(run):
    own, run_dir, given = run
    path = given / "tokenizer_config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(described | {"unk_token": "<|im_end|>"}), encoding="utf-8")
    [line] = other_tokenizer(own, run_dir)
    assert line.startswith("tokenizer of tokenizer.path: expected SHA-256 ")


def test_a_tokenizer_that_is_gone_is_said(run):
    own, run_dir, given = run
    shutil.rmtree(given)
    [line] = other_tokenizer(own, run_dir)
    assert str(given) in line


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ("a\nb", "a\nb", ""),
        ("a" * 99 + "b" * 99, "a" * 99 + "c" * 99,
         f"line 1: expected …'{'a' * 30}{'b' * 30}'…, got …'{'a' * 30}{'c' * 30}'…"),
        ("a", "a\nb", "line 2: expected nothing, got 'b'"),
        ("ab", "a", "line 1: expected 'ab', got 'a'"),
    ],
)  # fmt: skip
def test_the_line_that_changed(then, now, expected):
    assert other_template(then, now) == expected
