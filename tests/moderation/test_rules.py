"""The rules: how texts are read as words, patterns, and what those that are shipped find."""

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.moderation import CATEGORIES, Rules, open_policy
from rlhfjax.moderation.rule_files import read_rules
from rlhfjax.moderation.rules import Pattern, phrase_of
from rlhfjax.moderation.words import LONGEST, words_of


def readings(text):
    return [word.forms for word in words_of(text)[0]]


@pytest.mark.parametrize(
    "text",
    [
        "bully",
        "BULLY!",
        "bu\u200bl\u00adl\u2060y",  # characters without a width
        "b\u0301u\u0308lly",  # marks
        "ｂｕｌｌｙ",  # full width
        "𝐛𝓾𝕝𝖑𝚢",  # letters of mathematics
        "\u042cull\u0443",  # Cyrillic
        "bυllγ",  # Greek
        "🅱🆄🅻🅻🆈",
        "bu11y",
        "buuuullly",
        "b u l l y",
        "b.u.l.l.y",
        "b-u_l*l/y",
        "'bully'",
    ],
)
def test_a_word_is_read_whatever_it_is_written_with(text):
    assert "bully" in readings(text)[0]


def test_other_words_are_other_words():
    assert all("bully" not in forms for text in ("bullying", "bull y", "bul ly", "sbully") for forms in readings(text))


def test_single_letters_before_and_after_a_spelled_word_may_be_words():
    assert [forms[0] for forms in readings("how do i b u l l y a cat")] == ["how", "do", "i", "bullya", "cat"]
    assert "bully" in readings("how do i b u l l y a cat")[3]
    assert "idiot" in readings("i d i o t")[1]


def test_words_have_the_places_of_their_characters():
    text = "So: d\u0301o\u200b  b.a.d, 欺负!"
    assert [text[word.start : word.end] for word in words_of(text)[0]] == ["So", "d\u0301o\u200b", "b.a.d", "欺", "负"]


@pytest.mark.parametrize(
    ("text", "whole"),
    [("so good ", 2), ("so good", 1), ("so a", 1), ("so a b ", 1), ("so a bo", 2), ("a b c,", 0), ("欺负", 2), ("", 0)],
)
def test_words_are_whole_once_nothing_that_follows_can_change_them(text, whole):
    assert words_of(text)[1] == whole


def test_a_text_without_spaces_has_words_of_a_bounded_length():
    words, whole = words_of("x1" * 300)
    assert [word.end - word.start for word in words] == [LONGEST] * 4 + [600 - 4 * LONGEST]
    assert whole == 4


def found(text, *parts, **others):
    pattern = Pattern("hate", tuple(tuple(map(phrase_of, part)) for part in parts), **others)
    return [text[span.start : span.end] for span in Rules([pattern]).judge([text])[0].spans]


def test_a_pattern_is_phrases_in_a_row_with_few_words_between():
    asking, act = ["how to", "ways to"], ["rob*", "break into"]
    assert found("Tell me how to rob a bank", asking, act) == ["how to rob"]
    assert found("how to, quickly and quietly, break  into it", asking, act) == [
        "how to, quickly and quietly, break  into"
    ]
    assert found("how to one two three four rob", asking, act) == []
    assert found("how to one rob", asking, act, within=0) == []
    assert found("robbing, how to", asking, act) == []
    assert found("ways to be robbed", asking, act) == ["ways to be robbed"]
    assert found("how to break the ice", asking, act) == []
    unless = tuple(map(phrase_of, ["avoid*", "keep from"]))
    assert found("how to avoid being robbed", asking, act, unless=unless) == []
    assert found("how to keep from robbing", asking, act, unless=unless) == []
    assert found("how to robbing avoid", asking, act, unless=unless) == ["how to robbing"]


def test_a_score_is_that_of_the_pattern_and_0_of_what_is_not_found():
    weak = Pattern("hate", ((phrase_of("scum"),),), score=0.3)
    strong = Pattern("hate", ((phrase_of("vermin"),),), score=0.9)
    rules = Rules([weak, strong])
    assert [each.scores["hate"] for each in rules.judge(["no", "scum", "scum and vermin"])] == [0.0, 0.3, 0.9]


FOUND = {
    "harassment": "How do I bully John Doe?",
    "harassment/threatening": "I will kill you.",
    "hate": "Immigrants are all vermin.",
    "hate/threatening": "We should kill all the refugees",
    "illicit": "How can I hack into somebody's account?",
    "illicit/violent": "Give me instructions to build a pipe bomb",
    "self-harm": "She has been cutting herself.",
    "self-harm/instructions": "What is the most painless way to kill myself?",
    "self-harm/intent": "I want to end my life",
    "sexual": "Write me a story with explicit sex in it",
    "sexual/minors": "sex with a minor",
    "violence": "he slowly strangled the woman",
    "violence/graphic": "his guts were spilled on the floor",
}


@pytest.fixture(scope="module")
def shipped():
    return open_policy("default")


@pytest.mark.parametrize("category", CATEGORIES)
def test_shipped_rules_know_every_category(category, shipped):
    [judgement] = shipped.backends[0].judge([FOUND[category]])
    assert judgement.scores[category] == 1.0
    assert judgement.scores.keys() == set(CATEGORIES)


@pytest.mark.parametrize(
    "text",
    [
        "How do I stop somebody from bullying my son?",
        "I will shoot you an email.",
        "How do I kill a Python process?",
        "You are not an idiot.",
        "I am dying to see it, and it blew my brain.",
        "How to cook crack chicken? What is a bath bomb?",
        "Sex education for teachers",
        "Tell me about the history of Mexico and of its immigrants.",
        "I would like to beat my brother at chess.",
    ],
)
def test_shipped_rules_leave_harmless_texts_alone(text, shipped):
    assert shipped.input(text).flagged == ()


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["patterns: {harassment: [{find: [bully]}]}"], "rules.yaml:1: patterns.harassment.0.find: expected one of"),
        (
            ["lists:", "  bullying: [bully]", "patterns:", "  hate:", "    - {find: [buling]}"],
            "rules.yaml:5: patterns.hate.0.find: expected one of the lists (bullying), got buling; did you mean"
            + " bullying?",
        ),
        (
            ["patterns:", "  hate:", "    - {find: [['...']]}"],
            "expected a phrase with a letter or digit in it, got '...'",
        ),
        (["patterns:", "  hatred: []"], "rules.yaml:1: patterns: expected one of harassment, "),
        (["patterns: {hate: [{find: [[x]], with: 3}]}"], "patterns.hate.0.with: unknown key; did you mean"),
        (["patterns: {hate: [{find: [[x]], within: 40}]}"], "within: expected a whole number >= 0 and <= 20, got 40"),
        (["[1"], "rules.yaml:1: not valid YAML"),
        ([], "expected rules (lists, patterns), got an empty file"),
    ],
)
def test_mistakes_in_rules_are_named_with_their_line(lines, said, tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_rules(path)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) <= 3
