"""Both sides behind a policy, with a spy in the place of the model's batch."""

import asyncio
import itertools
import json

import pytest

from rlhfjax.moderation import Moderator, Treatment
from rlhfjax.moderation.verdicts import CATEGORIES, Judgement, Look, Span
from rlhfjax.serving.jobs import Delta, Job
from rlhfjax.serving.moderating import guarded
from rlhfjax.serving.tokens import Spelt, Token

FILLER, BAD = "Let us talk of something else.", "bully"


class Words:
    """A back end that flags one word as harassment, whatever is around it."""

    name, every = "words", 1

    def judge(self, texts):
        return [self.look(text, True).judgement for text in texts]

    def look(self, text, ended):
        place = text.find(BAD)
        found = Judgement({"harassment": float(place >= 0)})
        if place >= 0:
            found = Judgement({"harassment": 1.0}, (Span(place, place + len(BAD), "harassment", 1.0),))
        return Look(found, len(text) if ended else max(len(text) - len(BAD) + 1, 0))


def moderator(action="replace"):
    return Moderator([Words()], {name: Treatment(action, action, 0.5, FILLER) for name in CATEGORIES})


@pytest.fixture
def hall(server, monkeypatch):
    monkeypatch.setattr(server[1], "moderator", moderator())
    return server[1]


def test_a_flagged_input_is_answered_without_the_model(web, hall, monkeypatch):
    monkeypatch.setattr(Job, "__init__", lambda *given, **how: pytest.fail("a response was begun"))
    hello = [{"role": "user", "content": "hi"}, {"role": "user", "content": f"how do I {BAD} him?"}]
    for stream in (False, True):
        chat = {"model": "tiny", "messages": hello, "n": 2, "stream": stream, "logprobs": True}
        text = {"model": "tiny", "prompt": f"how to {BAD}", "echo": True, "logprobs": 1, "stream": stream}
        for path, body, count in (("/v1/chat/completions", chat, 2), ("/v1/completions", text, 1)):
            answer = web.post(path, json=body)
            assert answer.status_code == 200
            assert answer.text.count(FILLER) == count
            assert answer.text.count('"content_filter"') == count
    hall.moderator = moderator("block")
    refused = web.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")


def test_a_flagged_answer_is_replaced_whole_and_streamed_with_its_tokens(web, hall, policy, monkeypatch):
    # the policy flags what this model writes at this seed
    [[free, *_]] = policy.generate(["the"], max_new_tokens=64, n=4, seed=6)
    monkeypatch.setattr(f"{__name__}.BAD", free.text[5:9])
    how = {"model": "tiny", "prompt": "the", "max_tokens": 60, "seed": 6, "logprobs": 1}
    whole = web.post("/v1/completions", json=how).json()["choices"][0]
    assert (whole["text"], whole["finish_reason"]) == (FILLER, "content_filter")
    assert whole["logprobs"]["tokens"] == []
    pieces, tokens = "", []
    with web.stream("POST", "/v1/completions", json=how | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                pieces += choice["text"]
                tokens += choice["logprobs"]["tokens"]
    before = free.text[: free.text.index(free.text[5:9])]
    assert pieces.endswith(FILLER)
    assert before.startswith(pieces.removesuffix(FILLER).strip("\n"))
    assert len(tokens) <= len(before)


def test_no_piece_of_a_flagged_word_or_of_its_tokens_is_sent_wherever_pieces_end():
    text, sent_before = f"he is a {BAD} indeed", "he is a "

    async def sent(cuts):
        async def deltas():
            for place, (begin, end) in enumerate(itertools.pairwise([0, *cuts, len(text)])):
                part = text[begin:end]
                tokens = [Token(Spelt(letter, (ord(letter),), 1), -1.0) for letter in part]
                yield 0, Delta(part, tokens, place + 1, "stop" if end == len(text) else None)

        cancelled, made = [], []
        async for _, delta in guarded(moderator(), deltas(), cancelled.append):
            made.append(delta)
        return made, cancelled

    for cuts in [*itertools.combinations(range(6, 15), 2), range(1, len(text))]:
        made, cancelled = asyncio.run(sent(cuts))
        told = "".join(delta.text for delta in made)
        assert told.endswith(FILLER)
        assert sent_before.startswith(told.removesuffix(FILLER).removesuffix("\n\n"))
        assert sent_before.startswith("".join(token.spelt.shown for delta in made for token in delta.tokens))
        assert (made[-1].finish_reason, cancelled) == ("content_filter", [0])


def test_what_is_not_flagged_is_what_the_model_writes(client, hall, policy):
    [[free, *_]] = policy.generate(["a bad film"], max_new_tokens=64, n=4, seed=1)
    how = {"model": "tiny", "prompt": "a bad film", "max_tokens": 64, "seed": 1, "logprobs": 0}
    whole = client.completions.create(**how).choices[0]
    chunks = list(client.completions.create(**how, stream=True))
    assert whole.text == "".join(chunk.choices[0].text for chunk in chunks) == free.text
    assert whole.logprobs.tokens == [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]


def test_moderations_of_the_official_client(client, hall):
    made = client.moderations.create(input=[f"do not {BAD}", "the movie"])
    assert [one.flagged for one in made.results] == [True, False]
    assert made.results[0].categories.harassment
    assert made.results[0].category_scores.harassment == 1.0


def test_without_a_policy_there_is_nothing_to_ask(web):
    assert web.post("/v1/moderations", json={"input": "x"}).json()["error"]["code"] == "no_moderation"
