"""`policy.yaml`: what is read, what becomes of categories, the audit log, and the verb that shows it."""

import hashlib
import json
import os
import re
import stat
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.moderation import CATEGORIES, Judgement, Moderator, Rules, Treatment, Verdict, open_policy, read_policy
from rlhfjax.moderation.audit import Audit
from rlhfjax.moderation.combining import judged, together
from rlhfjax.moderation.rule_files import read_rules
from rlhfjax.moderation.verdicts import BackendError, Span

RULES = """
patterns:
  harassment: [{find: [[rude]], score: 0.6}, {find: [[rudest]], score: 0.95}]
  hate: [{find: [[nasty]]}]
  violence: [{find: [[fight]]}]
"""


@pytest.fixture
def policy(tmp_path, monkeypatch):
    """Writes a policy over the rules above and opens it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.yaml").write_text(RULES, encoding="utf-8")

    def write(text, backends="[{rules: {files: [rules.yaml], shipped: false}}]"):
        (tmp_path / "policy.yaml").write_text(f"backends: {backends}\n{text}", encoding="utf-8")
        return open_policy("policy.yaml")

    return write


def test_a_category_has_an_action_for_each_side_a_threshold_and_a_filler(policy):
    made = policy(
        """
action: flag
filler: "Not about {category}."
categories:
  harassment: {threshold: 0.9, action: replace}
  hate: {input: block, output: allow}
  violence: {output: replace, filler: Peace!}
"""
    )
    assert [made.input(text).action for text in ("calm", "rude", "rudest", "nasty", "fight")] == [
        *("allow", "allow", "replace", "block", "flag")
    ]
    assert [made.output(text).action for text in ("rudest", "nasty", "fight")] == ["replace", "allow", "replace"]
    assert made.input("rudest").filler == "Not about harassment."
    assert made.output("fight").filler == "Peace!"
    assert made.input("nasty").filler is None
    assert made.output("nasty").flagged == ()
    both = made.input("a nasty fight, rudest of all")
    assert (both.action, both.category, both.flagged) == ("block", "hate", ("harassment", "hate", "violence"))


def test_a_verdict_is_what_openai_answers(policy):
    result = policy("").input("so rude").as_openai()
    assert result["flagged"] is True
    assert [name for name, flagged in result["categories"].items() if flagged] == ["harassment"]
    assert result["category_scores"]["harassment"] == 0.6
    assert list(result["categories"]) == list(result["category_scores"]) == list(CATEGORIES)
    assert result["category_applied_input_types"]["hate"] == ["text"]
    assert json.loads(json.dumps(result)) == result
    assert not policy("").input("calm").as_openai()["flagged"]


def test_the_shipped_policy_has_a_filler_for_everything():
    treatments = read_policy("default").treatments()
    assert list(treatments) == list(CATEGORIES)
    assert {(each.input, each.output) for each in treatments.values()} == {("replace", "replace")}
    assert all(each.filler for each in treatments.values())


def test_the_policy_and_the_rules_that_the_document_shows_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    page = (Path(__file__).resolve().parents[2] / "docs" / "moderation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    for name, block in zip(("policy.yaml", "rules.yaml"), blocks, strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    assert open_policy(tmp_path / "policy.yaml").decide("input", Judgement({"violence": 0.8})).action == "flag"
    rules = Rules(read_rules(tmp_path / "rules.yaml"))
    assert rules.judge(["How to hotwire a car, you are worthless"])[0].scores == {"illicit": 1.0, "harassment": 0.8}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "policy.yaml: expected a moderation policy (backends, categories), got an empty file"),
        ("action: flag", "policy.yaml:1: backends: missing; expected a list of at least 1"),
        ("backends: []", "policy.yaml:1: backends: expected a list of at least 1"),
        ("backends: [{ruels: {}}]", "policy.yaml:1: backends.0: expected a section with one of rules, url"),
        ("backends: [{ruels: {}}]", "got ruels; did you mean rules?"),
        ("backends: [rules]", "got a value without keys"),
        ('backends: [{url: {url: "ftp://x/v1"}}]', "backends.0.url: expected text that matches ^https?://"),
        ('backends: [{url: {url: "http://x", tmeout: 1}}]', "backends.0.tmeout: unknown key; did you mean"),
        ("backends: [{rules: {}}]\nfilers: x", "policy.yaml:2: filers: unknown key; did you mean filler"),
        ("backends: [{rules: {}}]\ncategories:\n  hate: {action: repalce}", "policy.yaml:3: categories.hate.action"),
        ("backends: [{rules: {}}]\ncategories: {hat: {}}", "got hat; did you mean hate?"),
        ("backends: [{rules: {}}]\nthreshold: 1.5", "threshold: expected a number >= 0 and <= 1, got 1.5"),
        (
            "backends: [{rules: {files: [none.yaml]}}]",
            "none.yaml: expected a file of rules (lists, patterns), got No such",
        ),
        (
            'backends: [{url: {url: "http://x", key_env: RLHFJAX_NO_KEY}}]',
            "expected its key in the variable RLHFJAX_NO_KEY",
        ),
    ],
)
def test_mistakes_in_a_policy_are_named(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text(text, encoding="utf-8")
    result = CliRunner().invoke(app, ["moderate", "policy.yaml", "hi"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_a_policy_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: expected a file of a moderation policy"):
        read_policy(tmp_path / "nowhere.yaml")


# Several back ends ---------------------------------------------------------------------------------------------------


class Fixed:
    """A back end with the same scores for every text, or a failure."""

    every = 1

    def __init__(self, scores, name="fixed"):
        self.scores, self.name, self.asked = scores, name, 0

    def judge(self, texts):
        self.asked += 1
        if self.scores is None:
            raise BackendError("it is away")
        return [Judgement(self.scores) for _ in texts]

    def look(self, text, ended):
        raise NotImplementedError


def test_judgements_are_taken_together_by_the_highest_the_lowest_or_the_first():
    one = Judgement({"hate": 0.2, "violence": 0.9}, (Span(0, 2, "violence", 0.9),))
    two = Judgement({"hate": 0.7})
    assert together("any", [one, two]).scores == {"hate": 0.7, "violence": 0.9}
    assert together("all", [one, two]).scores == {"hate": 0.2, "violence": 0.9}
    assert together("first", [one, two]) is one
    assert together("any", [one, two]).spans == one.spans
    assert together("all", []).scores == {}


@pytest.mark.parametrize(("how", "asked"), [("any", [1, 1, 1]), ("all", [1, 1, 1]), ("first", [1, 1, 0])])
def test_back_ends_are_asked_as_their_combination_needs(how, asked):
    three = [Fixed(None, "a"), Fixed({"hate": 0.1}, "b"), Fixed({"hate": 0.9}, "c")]
    found, failed = judged(three, how, ["text"])
    assert [each.asked for each in three] == asked
    assert [each.scores["hate"] for [each] in found] == ([0.1] if how == "first" else [0.1, 0.9])
    assert failed == (None if how == "first" else "a: it is away")
    assert judged([Fixed(None, "a")], how, ["text"]) == ([], "a: it is away")


@pytest.mark.parametrize(
    ("on_error", "scores", "how", "action"),
    [
        ("closed", [None], "any", "replace"),
        ("open", [None], "any", "allow"),
        ("closed", [None, {"hate": 0.1}], "any", "replace"),
        ("open", [None, {"hate": 0.1}], "any", "allow"),
        ("open", [None, {"hate": 0.8}], "any", "block"),
        ("closed", [None, {"hate": 0.8}], "any", "block"),
        ("closed", [None, {"hate": 0.1}], "first", "allow"),
        ("closed", [None, None], "first", "replace"),
        ("open", [None, None], "all", "allow"),
    ],
)
def test_a_failure_closes_or_leaves_open_what_the_others_do_not_stop(on_error, scores, how, action):
    treatments = {name: Treatment("block", "block", 0.5, "no") for name in CATEGORIES}
    made = Moderator([Fixed(each) for each in scores], treatments, how, on_error, "[away]")
    verdict = made.input("text")
    assert verdict.action == action
    assert verdict.filler == ("[away]" if action == "replace" else None)
    assert made.input("").action == "allow"  # nothing is asked of nothing


# The audit log -------------------------------------------------------------------------------------------------------


def test_the_audit_log_has_what_became_of_a_text_and_not_a_word_of_it(policy, tmp_path):
    made = policy("audit: audit.jsonl\ncategories: {harassment: {action: flag}}")
    for text in ("calm", "so RUDE of Zacharias", "fight"):
        made.input(text)
    guard = made.guard()
    assert guard.feed("what a fight") + guard.end() == "what a \n\n" + made.output("fight").filler
    path = tmp_path / "audit.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["side"], row["category"], row["score"], row["action"]) for row in rows] == [
        ("input", "harassment", 0.6, "flag"),
        ("input", "violence", 1.0, "replace"),
        ("output", "violence", 1.0, "replace"),
        ("output", "violence", 1.0, "replace"),
    ]
    assert rows[0]["sha256"] == hashlib.sha256(b"so RUDE of Zacharias").hexdigest()
    assert "zacharias" not in path.read_text(encoding="utf-8").casefold()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_threads_write_whole_lines(tmp_path):
    audit, verdict = Audit(tmp_path / "audit.jsonl"), Verdict("input", "flag", "hate", {"hate": 0.75}, ("hate",))
    threads = [threading.Thread(target=lambda: [audit("x", verdict) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["score"] for row in rows] == [0.75] * 200


def test_a_log_that_takes_no_line_is_an_error_and_keeps_no_half_of_one(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    audit, verdict = Audit(path), Verdict("input", "flag", "hate", {"hate": 0.75}, ("hate",))
    audit("x", verdict)
    whole, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with pytest.raises(DataError, match=r"audit\.jsonl: the audit log cannot be written"):
        audit("y", verdict)
    assert path.read_bytes() == whole
    monkeypatch.undo()
    with pytest.raises(DataError, match="No such file or directory"):
        Audit(tmp_path / "none" / "audit.jsonl")("x", verdict)


# The verb ------------------------------------------------------------------------------------------------------------


def moderate(*words, **given):
    result = CliRunner().invoke(app, ["moderate", *words], **given)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_verb_says_what_becomes_of_a_text(policy, tmp_path):
    policy("audit: audit.jsonl\nfiller: Peace!")
    assert moderate("policy.yaml", "what a\nfight").splitlines() == ["replace", '  violence 1  "fight"', "Peace!"]
    assert moderate("policy.yaml", "calm") == "allow\n"
    assert not (tmp_path / "audit.jsonl").exists()


def test_the_verb_reads_lines_and_writes_json(policy):
    policy("categories: {violence: {output: flag}}")
    out = moderate("policy.yaml", "-", "--side", "output", input="calm\nso rude\r\nfight\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["action"], row["category"], row["spans"]) for row in rows] == [
        ("allow", None, []),
        ("replace", "harassment", [[3, 7, "harassment"]]),
        ("flag", "violence", [[0, 5, "violence"]]),
    ]
    result = CliRunner().invoke(app, ["moderate", "policy.yaml", "-"], input=b"calm\n\xff\n")
    assert (result.exit_code, "line 2: expected UTF-8" in result.stderr) == (3, True)


def test_the_verb_shows_a_policy(policy):
    policy("categories: {violence: {output: flag, threshold: 0.25}}")
    lines = {line.split()[0]: line.split()[1:4] for line in moderate("policy.yaml").splitlines()}
    assert lines["violence"] == ["replace", "flag", "0.25"]
    assert lines.keys() == {"category", *CATEGORIES}
