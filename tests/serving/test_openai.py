"""The official client, as it is, against what the model itself says."""

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from rlhfjax.text.chat import encode_prompt

from .conftest import alone, served

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the movie?"}]


def said(policy, ids, response, temperature=1.0, bias=()):
    """Log-probabilities over all ids at each place of a response, from the logits of the whole text."""
    row = np.zeros((1, 64), np.int32)
    row[0, : len(ids) + len(response)] = [*ids, *response]
    logits = policy.logits(row)[0, len(ids) - 1 : len(ids) + len(response) - 1]
    for token, value in bias:
        logits = logits.at[:, token].add(value)
    return np.asarray(jax.nn.log_softmax(logits / temperature))


def test_models_are_those_that_are_served(client):
    assert [model.id for model in client.models.list()] == ["tiny", "judge"]
    assert client.models.retrieve("judge").owned_by == "rlhfjax"


def test_a_chat_is_what_the_model_writes_itself_whole_and_streamed(client, policy):
    how = {"model": "tiny", "messages": ASKED, "max_tokens": 24, "seed": 5, "temperature": 0.8, "n": 3}
    texts, ends, tokens, _ = zip(*alone(policy, ASKED, 24, n=3, temperature=0.8, seed=5), strict=True)
    whole = client.chat.completions.create(**how)
    assert [choice.message.content for choice in whole.choices] == [*texts]
    assert [choice.finish_reason for choice in whole.choices] == [*ends]
    read, drawn = len(encode_prompt(policy.tokenizer, {"messages": ASKED})), sum(map(len, tokens))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (read, drawn)
    assert whole.usage.total_tokens == read + drawn

    streamed, reasons, last = [""] * 3, [None] * 3, None
    for last in client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            streamed[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert (streamed, reasons) == ([*texts], [*ends])
    assert (last.choices, last.usage) == ([], whole.usage)


def test_a_seed_draws_the_same_from_another_server(client, policy):
    how = {"model": "tiny", "prompt": "a bad film", "max_tokens": 16, "seed": -(2**40)}
    texts = [client.completions.create(**how).choices[0].text for _ in range(2)]
    with served({"tiny": policy}) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as other:
        texts.append(other.completions.create(**how).choices[0].text)
    assert len(set(texts)) == 1
    assert client.completions.create(**{**how, "seed": 4}).choices[0].text != texts[0]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_those_of_the_models_logits(client, policy, stream):
    bias = {"17": 3.0, "299": -100.0}
    how = {"temperature": 0.7, "logit_bias": bias, "seed": 3, "max_tokens": 12, "logprobs": True, "top_logprobs": 4}
    made = client.chat.completions.create(model="tiny", messages=ASKED, stream=stream, **how)
    if stream:
        found = [one for chunk in made for c in chunk.choices if c.logprobs for one in c.logprobs.content]
    else:
        found = made.choices[0].logprobs.content
    ids, pieces = (
        encode_prompt(policy.tokenizer, {"messages": ASKED}),
        [policy.tokenizer.decode([i]) for i in range(300)],
    )
    response = []
    for place, one in enumerate(found):  # the id is the one whose text and log-probability are told
        known = said(policy, ids, [*response, 0], 0.7, [(17, 3.0), (299, -100.0)])[place]
        near = np.flatnonzero(np.abs(known - one.logprob) < 2e-3)
        assert near.size
        fits = [i for i in near if pieces[i] == one.token or "\ufffd" in pieces[i] or not pieces[i]]
        response.append(int(fits[0]))
        np.testing.assert_allclose([top.logprob for top in one.top_logprobs], np.sort(known)[::-1][:4], atol=2e-3)
    assert len(response) == 12 or response[-1] == policy.tokenizer.eos_id


def test_a_stop_string_ends_a_response_wherever_it_lies_within_tokens(client, policy):
    [(text, *_)] = alone(policy, "the movie", 40, seed=2)
    how = {"model": "tiny", "prompt": "the movie", "max_tokens": 40, "seed": 2}
    assert len(text) > 12
    for begin, end in ((3, 6), (5, 12), (0, 2)):
        stop = text[begin:end]
        whole = client.completions.create(**how, stop=["never in it", stop]).choices[0]
        assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**how, stop=stop, stream=True)]
        assert "".join(pieces) == whole.text


def test_echo_tells_the_log_probabilities_of_a_prompt_of_ids(client, policy):
    """What lm_eval's local-completions asks for: ids of context and continuation, one token more, and greedy."""
    rows = [encode_prompt(policy.tokenizer, {"prompt": "a bad film, and a long one " * 8}), [1, 40, 50]]
    assert len(rows[0]) > 64  # more than one chunk
    made = client.completions.create(model="tiny", prompt=rows, max_tokens=1, temperature=0, logprobs=1, echo=True)
    for row, choice in zip(rows, made.choices, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(told.top_logprobs) == len(row) + 1
        assert told.token_logprobs[0] is None
        known = np.asarray(jax.nn.log_softmax(policy.logits([row])[0]))
        expected = known[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(told.token_logprobs[1:-1], expected, atol=2e-3)
        np.testing.assert_allclose([max(top.values()) for top in told.top_logprobs[1:]], known.max(-1), atol=2e-3)
        assert told.token_logprobs[-1] == max(told.top_logprobs[-1].values())
        assert choice.text.startswith(policy.tokenizer.decode(row))
        spaces = [b - a for a, b in zip(told.text_offset, [*told.text_offset[1:], len(choice.text)], strict=True)]
        assert all(space >= 0 for space in spaces)
    nothing = client.completions.create(model="tiny", prompt=rows[1], max_tokens=0, logprobs=2, echo=True)
    assert nothing.choices[0].logprobs.token_logprobs == made.choices[1].logprobs.token_logprobs[:-1]
    assert nothing.usage.completion_tokens == 0


def test_the_best_of_several_have_the_highest_mean_log_probability(client, policy):
    all_of_them = list(alone(policy, "the", 10, n=4, seed=9))
    best = sorted(all_of_them, key=lambda one: -np.mean(one[3]))[:2]
    made = client.completions.create(model="tiny", prompt="the", max_tokens=10, seed=9, n=2, best_of=4)
    assert [choice.text for choice in made.choices] == [text for text, *_ in best]
    assert made.usage.completion_tokens == sum(len(tokens) for _, _, tokens, _ in all_of_them)


def test_embeddings_are_the_last_hidden_state(client, policy):
    texts = ["the movie was good", "a bad film " * 20]
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, one, packed in zip(
        texts, numbers.data, client.embeddings.create(model="tiny", input=texts).data, strict=True
    ):
        ids = jnp.asarray([encode_prompt(policy.tokenizer, {"prompt": text})], jnp.int32)
        places = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]
        hidden = jax.jit(policy.network.hidden)(policy.params, ids, places, jnp.ones_like(ids))[0, -1]
        np.testing.assert_allclose(one.embedding, hidden, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(packed.embedding, one.embedding, rtol=1e-6)


def test_scores_are_those_of_the_reward_model(web, reward):
    responses = [" good", " a bad film, and a long one" * 6, ""]
    for prompt in ({"prompt": "the movie was"}, {"messages": ASKED}):
        answer = web.post("/v1/score", json={"model": "judge", **prompt, "responses": responses}).json()
        [asked] = prompt.values()
        np.testing.assert_allclose(answer["scores"], reward.score([asked] * 3, responses), rtol=2e-3, atol=2e-3)
