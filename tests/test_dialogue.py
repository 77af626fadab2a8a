"""Conversations: each answer against the model asked directly, and the terminal with a script on stdin."""

import json
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, tiny
from typer.testing import CliRunner

from rlhfjax.api.dialogue import Dialogue
from rlhfjax.api.model import Model
from rlhfjax.cli import app, asking
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.host import stopping
from rlhfjax.moderation import Moderator, Rules, Treatment
from rlhfjax.moderation.rules import Pattern, phrase_of
from rlhfjax.text.chat import encode_prompt
from rlhfjax.text.tokenizer import Tokenizer

CONTEXT, WORDS = 64, 300
NETWORK = tiny("llama-gqa", vocab_size=WORDS, context=CONTEXT)
GREEDY = {"max_new_tokens": 6, "temperature": 0.0}


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, WORDS)
    return Model("policy", NETWORK, params_of(NETWORK, seed=1, std=0.2), tokenizer)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def greedy(model, messages):
    return model.generate([messages], **GREEDY)[0][0].text


def test_each_answer_is_that_to_all_messages_before(model):
    talk = Dialogue(model, "good", **GREEDY)
    first = "".join(talk.ask("the film"))
    asked = [{"role": "system", "content": "good"}, user("the film")]
    assert first == greedy(model, asked)
    second = "".join(talk.ask("a movie"))
    asked += [assistant(first), user("a movie")]
    assert second == greedy(model, asked)
    assert talk.messages == [*asked, assistant(second)]
    talk.undo()
    assert talk.messages == asked[:3]
    talk.system("bad")
    assert talk.messages[0] == {"role": "system", "content": "bad"}


def test_probabilities_are_those_of_the_logits(model):
    talk = Dialogue(model, max_new_tokens=5)
    list(talk.ask("the film"))
    made = talk._completion
    prompt = encode_prompt(model.tokenizer, {"messages": [user("the film")]})
    ids = [*prompt, *made.tokens]
    logits = np.asarray(model.logits(jnp.asarray([ids])))[0, len(prompt) - 1 : -1].astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for place, token, row in zip(talk.why(), made.tokens, shares, strict=True):
        assert place.probability == pytest.approx(row[token], rel=1e-4)
        best = np.sort(row)[::-1][:5]
        np.testing.assert_allclose([share for _, share in place.likeliest], best, rtol=1e-4)
        assert place.likeliest[0][0] == model.tokenizer.pieces([int(row.argmax())])[0]


def test_whole_exchanges_leave_the_oldest_first(model):
    talk = Dialogue(model, "good", **GREEDY)
    talk.load([talk.messages[0], user("the movie was good"), assistant("a bad film"), user("a"), assistant("b")])
    size = len(encode_prompt(model.tokenizer, {"messages": [*talk.messages, user("a long one")]}))
    talk._room = size - 1 + GREEDY["max_new_tokens"]
    answer = "".join(talk.ask("a long one"))
    assert talk.dropped == 2
    assert len(talk.messages) == 7  # what is not read is still there
    read = [talk.messages[0], user("a"), assistant("b"), user("a long one")]
    assert answer == greedy(model, read)
    with pytest.raises(ConfigError, match="expected the system messages and the last turn to fit"):
        talk.ask("long " * CONTEXT)
    assert len(talk.messages) == 7


def test_another_answer_is_drawn_anew_and_a_script_gives_the_same_again(model):
    def all_of_it(seed):
        talk = Dialogue(model, max_new_tokens=8, seed=seed)
        return ["".join(talk.ask("the film")), "".join(talk.retry()), "".join(talk.retry()), len(talk.messages)]

    one = all_of_it(3)
    assert one == all_of_it(3)
    assert len({*one}) == 4
    assert one != all_of_it(4)


def test_an_answer_that_is_left_is_kept_as_far_as_it_was_read(model):
    talk = Dialogue(model, max_new_tokens=20, seed=1)
    pieces = talk.ask("the film")
    first = next(pieces)
    pieces.close()
    assert talk.messages[-1] == assistant(first)
    assert not talk._session.busy or talk._session._engine.free == 1


def moderator(words):
    treatment = Treatment("replace", "replace", 0.5, "no.")
    return Moderator([Rules([Pattern("hate", ((phrase_of(words),),))])], {"hate": treatment})


def test_a_flagged_message_never_reaches_the_model(model, monkeypatch):
    talk = Dialogue(model, moderator=moderator("idiot"), **GREEDY)
    monkeypatch.setattr(Dialogue, "_answer", lambda self: pytest.fail("the model was called"))
    assert list(talk.ask("you idiot")) == ["no."]
    assert talk.messages == []


class Written(list):
    """A stream that was written before."""

    completion = None
    closed = False

    def close(self):
        self.closed = True


def test_a_flagged_answer_is_cut_off_and_not_kept(model):
    talk = Dialogue(model, moderator=moderator("idiot"), **GREEDY)
    stream = Written(["you ", "idi", "ot", ", yes ", "and more"])
    talk.__dict__["_session"] = type("Session", (), {"submit": lambda self, *_, **__: stream})()
    shown = "".join(talk.ask("the film"))
    assert shown.startswith("you")
    assert shown.endswith("no.")
    assert "idi" not in shown
    assert stream.closed
    assert talk.messages == []


def test_what_is_no_conversation_is_refused(model):
    talk = Dialogue(model, **GREEDY)
    for messages in ([], [user("a")], [{"role": "judge", "content": "a"}, assistant("b")], [assistant(3)], ["a"]):
        with pytest.raises(DataError, match="end with an answer"):
            talk.load(messages)
    for act in (talk.retry, talk.undo, talk.why):
        with pytest.raises(DataError, match="expected an answer to"):
            act()
    with pytest.raises(ConfigError, match="expected answers shorter than the 64 tokens"):
        Dialogue(model, max_new_tokens=CONTEXT)


def script(model, monkeypatch, lines, *options):
    monkeypatch.setattr(asking, "load", lambda *_: model)
    words = ["chat", "CKPT", "--temperature", "0", "--max-new-tokens", "6", *options]
    return CliRunner().invoke(app, words, input="".join(f"{line}\n" for line in lines))


def test_a_script_on_stdin(model, monkeypatch, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = [
        "/system good",
        "the film",
        "/why",
        f"/save {file}",
        "//a \\",
        "movie",
        "/undo",
        f"/save {file}",
        "/quit",
        "x",
    ]
    done = script(model, monkeypatch, lines)
    assert done.exit_code == 0, done.output
    record = json.loads(file.read_text())
    asked = [{"role": "system", "content": "good"}, user("the film")]
    first = greedy(model, asked)
    assert record == {"messages": [*asked, assistant(first)]}
    second = greedy(model, [*asked, assistant(first), user("/a \nmovie")])
    written = done.stdout.splitlines()
    assert written[0] == first
    assert written[-1] == second.splitlines()[-1]
    shares = [int(line.split("%")[0].split()[-1]) for line in written[1:-1] if "%" in line]
    assert shares
    assert all(0 <= share <= 100 for share in shares)
    again = script(model, monkeypatch, [f"/load {file}", "/undo", "the film"])
    assert again.stdout.splitlines()[0] == first


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("/foo", 2, "/foo: expected a command, one of /system, /retry"),
        ("/load nowhere", 2, "nowhere: expected a saved conversation, got No such file"),
        ("/save", 2, "/save: expected the name of a file"),
        ("/why", 3, "expected an answer to look into"),
    ],
)
def test_a_mistake_ends_a_script(model, monkeypatch, line, code, said):
    done = script(model, monkeypatch, [line, "the film"])
    assert done.exit_code == code
    assert said in done.output


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_ends_an_answer_and_not_the_conversation_however_often():
    # fails without `interrupts`: the second one ends the process
    with stopping.honoured(print), stopping.interrupts():
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
