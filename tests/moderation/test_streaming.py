"""The guard of an answer under way: what it sends, at every border that an answer can be cut at."""

import itertools
import random

import pytest

from rlhfjax.moderation import Guard, Judgement, Look, Moderator, Rules, Treatment, Verdict, open_policy
from rlhfjax.moderation.rules import Pattern, phrase_of
from rlhfjax.moderation.verdicts import CATEGORIES, BackendError

FILLER = "[filler]"
ASKING, BULLYING = ("how do you", "how to"), ("bully", "harass*", "make fun of")


def pattern(*parts, category="harassment", within=3, **others):
    return Pattern(category, tuple(tuple(map(phrase_of, part)) for part in parts), within=within, **others)


RULES = Rules([pattern(ASKING, BULLYING), pattern(("you are",), ("worthless", "a waste of space"), within=1)])


def moderator(*backends, action="replace", how="any", **others):
    treatments = {name: Treatment(action, action, 0.5, FILLER) for name in CATEGORIES}
    return Moderator(backends or (RULES,), treatments, how, **others)


def sent(pieces, made):
    guard = made.guard()
    return "".join([*map(guard.feed, pieces), guard.end()]), guard


def cuts(text, count):
    """The text in `count` + 1 pieces, cut in every way."""
    for borders in itertools.combinations(range(len(text) + 1), count):
        yield [text[a:b] for a, b in itertools.pairwise((0, *borders, len(text)))]


# The flagged span stands between the bars; it is worked out by hand.
FLAGGED = [
    "Well, |how to quietly bully| John",
    "So |how do you  H\u0430R\u200bassing| him",
    "|You are a waste of space|!",
    "ask |how to b.u.l.l.y| him",
    "it is |you are, worthless|",
    "|HOW TO really make fun of| a friend",
]


@pytest.mark.parametrize("marked", FLAGGED)
def test_no_character_of_a_flagged_span_is_sent_at_any_border(marked):
    before, _, _ = marked.split("|")
    text = marked.replace("|", "")
    for pieces in [*cuts(text, 1), *cuts(text, 2), list(text)]:
        got, guard = sent(pieces, moderator())
        clean = got.removesuffix(FILLER).removesuffix("\n\n")
        assert got.endswith(FILLER)
        assert before.startswith(clean), pieces
        assert guard.stopped
        assert guard.verdict.category == "harassment"
    assert sent(list(text), moderator())[0] == (f"{before}\n\n" if before else "") + FILLER  # and the rest is sent


@pytest.mark.parametrize(
    "text",
    [
        "How to bullyrag, how to cook rice, and how you are a waste",
        "you are not quite so worthless, how do y o u do it",
        "how to b u l",
        "a b c d e\u0301 \u200b, i\u00a0  ",
        "",
        "如何 欺负 how to 你",
    ],
)
def test_a_clean_answer_is_sent_whole_whatever_its_pieces(text):
    for pieces in [
        *cuts(text, 1),
        list(text),
        list(map("".join, itertools.zip_longest(*[iter(text)] * 3, fillvalue=""))),
    ]:
        got, guard = sent(pieces, moderator())
        assert got == text
        assert guard.verdict.action == "allow"


def test_streams_of_random_words_and_pieces_end_as_the_whole_text_is_judged():
    """And what is sent ends before the first character that the rules, over the whole text, call flagged."""
    draw = random.Random(7)
    words = ["how to", "how", "do you", "are", "bully", "b u", "i", "a", "l l y", "of", "worthless", "you", "."]
    stopped = 0
    for _ in range(250):
        text = "".join(draw.choice(words) + draw.choice([" ", " ", ", ", "\u200b", "-"]) for _ in range(14))
        pieces, rest = [], text
        while rest:
            count = draw.randint(1, 9)
            pieces, rest = [*pieces, rest[:count]], rest[count:]
        spans = moderator().output(text).spans
        got, guard = sent(pieces, moderator())
        assert guard.stopped == bool(spans)
        stopped += guard.stopped
        if spans:
            clean = got.removesuffix(FILLER).removesuffix("\n\n")
            assert text.startswith(clean)
            assert len(clean) <= min(span.start for span in spans)
        else:
            assert got == text
    assert 10 < stopped < 240  # both happen


def test_only_what_may_yet_be_flagged_is_held_back():
    guard = moderator().guard()
    assert guard.feed("Rice is eaten. How") == "Rice is eaten. "
    assert guard.feed(" to cook") == ""  # three words may stand between
    assert guard.feed(" rice well and") == ""
    assert guard.feed(" fast ") == "How to cook rice well and fast "
    assert guard.end() == ""


def test_a_block_ends_an_answer_without_a_filler_and_a_flag_lets_it_through():
    text = "So how to bully him"
    assert sent(list(text), moderator(action="block"))[0] == "So "
    for action in ("flag", "allow"):
        got, guard = sent(list(text), moderator(action=action))
        assert got == text
        assert guard.verdict.flagged == (("harassment",) if action == "flag" else ())


class Words:
    """A back end that sees a text as a whole: flagged where a word stands in it; asked for windows of so many."""

    def __init__(self, word, window=12, every=3, fails=False):
        self.name, self.every, self.fails = word, every, fails
        self.word, self.window, self.asked = word, window, []

    def judge(self, texts):
        if self.fails:
            raise BackendError("it is away")
        self.asked += texts
        return [Judgement({"violence": float(self.word in text)}) for text in texts]

    def look(self, text, ended):
        [judgement] = self.judge([text])
        return Look(judgement, len(text) if ended else max(0, len(text) - self.window))


@pytest.mark.parametrize("how", ["any", "first"])
def test_a_back_end_of_whole_texts_leaks_nothing_as_long_as_its_window(how):
    text = "a calm beginning, then a dagger comes, and more of it"
    for pieces in [*cuts(text, 1), list(text)]:
        got, guard = sent(pieces, moderator(Words("dagger"), how=how))
        assert guard.stopped
        assert text[: text.index("dagger")].startswith(got.removesuffix(FILLER).removesuffix("\n\n"))


def test_where_all_must_agree_what_one_flags_is_kept_until_the_others_have_spoken():
    text = "so how to bully him, with a dagger of course"
    treatments = {name: Treatment("replace", "replace", 0.5, FILLER) for name in CATEGORIES}
    same = Rules([pattern(ASKING, BULLYING, category="violence")])
    both = Moderator([same, Words("dagger")], treatments, "all")
    got, guard = sent(list(text), both)
    assert guard.stopped
    assert got == f"so \n\n{FILLER}"
    one = Moderator([same, Words("sword")], treatments, "all")
    assert sent(list(text), one)[0] == text


def test_a_back_end_that_fails_in_the_middle_closes_the_answer_or_leaves_it_open():
    text = "nothing to see in here, and nothing there either"
    closed = moderator(Words("dagger", fails=True), RULES, on_error="closed", unavailable="[away]")
    assert sent(list(text), closed)[0] == "[away]"
    assert closed.output(text).failed == "dagger: it is away"
    opened = moderator(Words("dagger", fails=True), RULES, on_error="open")
    assert sent(list(text), opened)[0] == text
    assert sent(list(text + " how to bully him"), opened)[1].stopped
    fallback = moderator(Words("dagger", fails=True), Words("sword"), how="first")
    assert sent(list(text), fallback)[0] == text
    assert sent(list(text + " with a sword, or two of them"), fallback)[1].stopped


# Both sides ----------------------------------------------------------------------------------------------------------

CLEAN, BULLY = "What is rice?", "How do I bully John Doe?"


@pytest.mark.parametrize(
    ("prompt", "answer", "calls", "filled"),
    [
        (CLEAN, "A grain.", 1, False),
        (CLEAN, "You are an idiot.", 1, True),
        (BULLY, "A grain.", 0, True),
        (BULLY, "You are an idiot.", 0, True),
    ],
)
def test_the_truth_table_of_input_and_output(prompt, answer, calls, filled):
    shipped, called = open_policy("default"), []

    def model():
        called.append(prompt)
        yield from answer

    got = "".join(shipped.reply(prompt, model))
    assert len(called) == calls
    assert (got != answer) == filled
    if filled:
        assert got == shipped.output("You are an idiot.").filler == shipped.input(BULLY).filler
        assert "bully" in got


def test_a_model_whose_answer_is_stopped_is_not_asked_for_more():
    given = []

    def model():
        for word in ["so", "how", "to", "bully", "him", "and", "very", "much", "more", "of", "this"]:
            given.append(word)
            yield word + " "

    assert "".join(moderator().reply(CLEAN, model)) == f"so \n\n{FILLER}"
    assert given[-1] == "bully"


def test_a_conversation_has_the_strongest_verdict_of_its_messages():
    made = moderator()
    said = [{"role": "user", "content": CLEAN}, {"role": "assistant", "content": [{"type": "text", "text": BULLY}]}]
    assert made.messages(said[:1]).action == "allow"
    assert not made.messages(said).stops  # these rules know only: how do you
    assert open_policy("default").messages(said).category == "harassment"
    assert made.messages([{"role": "assistant", "content": None}]).action == "allow"


def test_a_guard_takes_any_decision():
    guard = Guard([RULES], "any", lambda found, why: Verdict("output", "block" if found.spans else "allow"))
    assert guard.feed("how to bully him") + guard.end() == ""
