"""Speculative decoding: the tokens of plain decoding, from fewer calls."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from tiny import left_mask, lenient, params_of, random_tokens, tiny

from rlhfjax.generation import SamplingParams, generate
from rlhfjax.generation.sampling import Speculation
from rlhfjax.generation.speculative import speculate, verify
from rlhfjax.models import LanguageModel
from rlhfjax.stages.objectives import training_loss
from rlhfjax.types import PromptBatch, TokenBatch

STOP, PAD = 5, 0
NGRAM = Speculation("ngram", tokens=3)
HEADS = Speculation("heads", tokens=2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Read:
    """What a model without a cache keeps in its place: the tokens."""

    tokens: jax.Array
    lengths: jax.Array


@dataclass(frozen=True)
class Rereading:
    """A decoder that reads everything again in every call."""

    model: LanguageModel

    def start(self, params, prompt, mask, room):
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        order = jnp.argsort(~mask, axis=1, stable=True)
        tokens = jnp.pad(jnp.take_along_axis(prompt, order, axis=1), ((0, 0), (0, room + 9)))  # guesses go beyond
        hidden, cache = self._read(params, tokens, lengths)
        return jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0], cache

    def arrange(self, params, rows=None):
        return params

    def extend(self, params, cache, tokens, counts):
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        hidden, new = self._read(params, put(cache.tokens, tokens, cache.lengths), cache.lengths + counts)
        slots = cache.lengths[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        return jnp.take_along_axis(hidden, slots[:, :, None], axis=1), new

    def _read(self, params, tokens, lengths):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        return self.model.hidden(params, tokens, positions, jnp.ones_like(tokens)), Read(tokens, lengths)

    def unembed(self, params, hidden):
        return self.model.unembed(params, hidden)

    def ahead(self, params, hidden):
        return self.model.ahead(params, hidden)


@dataclass(frozen=True)
class Bigram:
    """Logits of the next token are row `token` of the first table; head h guesses by row `token` of the next ones."""

    def start(self, params, prompt, mask, room):
        return jax.nn.one_hot(prompt[:, -1], 6), Read(prompt, mask.sum(axis=1, dtype=jnp.int32))

    def arrange(self, params, rows=None):
        return params

    def extend(self, params, cache, tokens, counts):
        return jax.nn.one_hot(tokens, 6), replace(cache, lengths=cache.lengths + counts)

    def unembed(self, params, hidden):
        return hidden if hidden.shape[-1] == 7 else hidden @ params[0]

    def ahead(self, params, hidden):
        # a seventh column tells these logits from hidden states; nothing draws it
        return jnp.pad(
            jnp.einsum("...d,nde->n...e", hidden, params[1:]), ((0, 0), (0, 0), (0, 1)), constant_values=-1e9
        )


@dataclass(frozen=True)
class Plain:
    """The same table for the plain sampler."""

    def arrange(self, params, rows=None):
        return params

    def prefill(self, params, prompt, prompt_mask, new_tokens):
        return params[0][prompt[:, -1]], prompt[:, -1]

    def decode(self, params, cache, tokens):
        return params[0][tokens], tokens


def prompts(count: int, last: int = 0) -> PromptBatch:
    tokens = jnp.full((count, 2), last, jnp.int32)
    return PromptBatch(tokens, jnp.ones((count, 2), bool), jnp.arange(count, dtype=jnp.int32))


def sampling(**changes) -> SamplingParams:
    return replace(SamplingParams(max_new_tokens=8, stop_id=STOP, pad_id=PAD), **changes)


def tables(seed: int = 0, spread: float = 1.2):
    return jnp.asarray(np.random.default_rng(seed).normal(0, spread, (3, 6, 6)), jnp.float32)


def both(params, batch, key, settings, speculation):
    plain = jax.jit(lambda p, b, k: generate(Plain(), p, b, k, settings))(params, batch, key)
    fast = jax.jit(lambda p, b, k: speculate(Bigram(), p, b, k, settings, speculation))(params, batch, key)
    return plain, fast, Counts(*fast.counts.T)


class Counts(NamedTuple):
    calls: jax.Array
    guessed: jax.Array
    kept: jax.Array


def assert_same(fast, plain):
    for name in ("response", "response_mask", "finished", "prompt", "prompt_mask"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(plain, name), err_msg=name)
    np.testing.assert_allclose(fast.sampled_log_probs, plain.sampled_log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speculation", [NGRAM, HEADS], ids=lambda s: s.kind)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.0, "stop_after": 9},
        {"temperature": 0.6, "top_k": 3, "stop_after": 2},
        {"top_p": 0.7, "max_new_tokens": 7},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_rows_are_those_of_the_plain_sampler(speculation, changes):
    """Stop tokens and the last slot fall everywhere in runs of kept guesses: 300 rows of 8 tokens out of 6."""
    plain, fast, counts = both(tables(), prompts(300), jax.random.key(1), sampling(**changes), speculation)
    assert_same(fast, plain)
    drawn = fast.response_mask.sum(axis=1)
    assert (counts.calls <= drawn - 1).all()  # the first token is the prompt's call
    assert (counts.kept <= counts.guessed).all()
    if changes.get("max_new_tokens") != 1:
        assert counts.kept.sum() > 0
        np.testing.assert_array_equal((drawn - 1).sum() - counts.calls.sum(), counts.kept.sum())


def test_only_rows_that_were_asked_are_answered_and_likeliest_tokens_reported():
    settings = sampling(top_log_probs=2, stop_after=9)
    run = jax.jit(lambda p, b, k, rows: speculate(Bigram(), p, b, k, settings, NGRAM, rows))
    drawn = run(tables(), prompts(5), jax.random.key(1), jnp.int32(3))
    every = run(tables(), prompts(5), jax.random.key(1), jnp.int32(5))
    np.testing.assert_array_equal(drawn.response[:3], every.response[:3])
    assert drawn.counts[3:].sum() == 0
    log_p = np.asarray(jax.nn.log_softmax(tables()[0]))
    before = np.concatenate([np.zeros((5, 1), int), np.asarray(every.response)[:, :-1]], axis=1)
    np.testing.assert_array_equal(every.top_ids, np.argsort(-log_p)[before][:, :, :2])
    np.testing.assert_allclose(every.top_log_probs, -np.sort(-log_p)[before][:, :, :2], rtol=1e-4, atol=1e-5)


def test_what_a_call_keeps():
    # meant to catch a guess kept after a wrong one or after the end, and rows that outgrow their room
    right = [1, 2, 3]
    guesses = jnp.asarray([right, right, right, [9, 2, 3], right, right, right, [-1, -1, -1]])
    drawn = [[1, 2, 3, 4]] * 8
    drawn[1], drawn[2] = [1, 2, 7, 4], [1, 7, 3, 4]
    stops = jnp.zeros((8, 4), bool).at[4, 1].set(True).at[5, 3].set(True)
    room = jnp.asarray([9, 9, 9, 9, 9, 9, 2, 0])
    count, ended = verify(guesses, jnp.asarray(drawn), stops, room)
    assert count.tolist() == [4, 3, 2, 1, 2, 4, 2, 0]
    assert ended.tolist() == [False, False, False, False, True, True, False, False]


def test_right_guesses_save_calls_and_wrong_ones_cost_nothing_but_time():
    """A table that goes round 0 1 2 3 4: heads that know it are always right, heads that repeat are always wrong."""
    ahead = [np.roll(np.eye(6), 1, axis=1) * 60 for _ in range(3)]
    for table, steps in zip(ahead, (1, 2, 3), strict=True):
        table[:] = 0
        for token in range(5):
            table[token, (token + steps) % 5] = 60.0
        table[5, 0] = 60.0
    right = jnp.asarray(np.stack(ahead), jnp.float32)
    wrong = right.at[1:].set(right[0])
    settings = sampling(max_new_tokens=16)
    # 15 tokens after the first, 3 or 1 a call; the last token needs no guess after it, the one before one
    for params, calls, kept, guessed in ((right, 5, 10, 10), (wrong, 15, 0, 27)):
        plain, fast, counts = both(params, prompts(4), jax.random.key(0), settings, HEADS)
        assert_same(fast, plain)
        assert counts.calls.tolist() == [calls] * 4
        assert counts.kept.tolist() == [kept] * 4
        assert counts.guessed.tolist() == [guessed] * 4


@pytest.mark.parametrize("speculation", [NGRAM, HEADS], ids=lambda s: s.kind)
def test_continuations_follow_their_probabilities(speculation):
    """χ² of 20,000 samples of three tokens against the 216 products of the table's probabilities."""
    count, table = 20_000, tables(2, spread=0.7)
    settings = sampling(max_new_tokens=3, stop_after=9, temperature=0.8)
    run = jax.jit(lambda p, b, k: speculate(Bigram(), p, b, k, settings, speculation))
    drawn = run(table, prompts(count, last=2), jax.random.key(11))
    counts = Counts(*drawn.counts.T)
    logits = np.asarray(table[0], np.float64) / 0.8
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = np.asarray([p[2, a] * p[a, b] * p[b, c] for a, b, c in product(range(6), repeat=3)])
    seen = np.bincount(np.asarray(drawn.response) @ [36, 6, 1], minlength=216)
    assert scipy.stats.chisquare(seen, wanted * count).pvalue > 1e-3
    assert 0 < counts.kept.sum() < counts.guessed.sum()


def test_heads_share_the_noise_of_what_they_guess():
    """Drawn by inversion, a guess is right where both distributions have the same token in the same place."""
    table = tables(3)
    p = np.asarray(jax.nn.softmax(table[0]), np.float64)
    q = p @ p  # the token after the next
    table = table.at[1].set(jnp.log(jnp.asarray(q, jnp.float32)))
    settings = sampling(stop_after=99, max_new_tokens=30)
    _, drawn, counts = both(table, prompts(500), jax.random.key(2), settings, replace(HEADS, tokens=1))
    tokens = np.concatenate([np.zeros((500, 1), int), np.asarray(drawn.response)], axis=1)
    before, last = tokens[:, :-2].ravel(), tokens[:, 1:-1].ravel()  # what a guess knows, and what it does not
    ends_q, ends_p = np.cumsum(q, axis=1)[before], np.cumsum(p, axis=1)[last]
    same = np.minimum(ends_q, ends_p) - np.maximum(ends_q - q[before], ends_p - p[last])
    kept = counts.kept.sum() / counts.guessed.sum()
    np.testing.assert_allclose(kept, np.maximum(same, 0).sum(axis=1).mean(), rtol=0.1)
    assert kept > 1.3 * (q[before] * p[last]).sum(axis=1).mean()  # what independent draws would reach


def four_prompts() -> PromptBatch:
    return PromptBatch(random_tokens(4, 5), left_mask([5, 3, 1, 4], 5), jnp.asarray([70, 3, 11, 4], jnp.int32))


@cache
def decoder_without(style, temperature):
    """A model, its parameters, settings, and what it answers without guesses."""
    model = tiny(style, mtp_heads=2)
    params, settings = params_of(model, seed=5), sampling(stop_id=1, temperature=temperature, max_new_tokens=10)
    plain = jax.jit(lambda p, b, k: generate(model, p, b, k, settings))(params, four_prompts(), jax.random.key(9))
    return model, params, settings, plain


@pytest.mark.parametrize(
    ("style", "temperature", "speculation", "cached"),
    [
        ("gpt2", 0.7, NGRAM, True),
        ("llama-gqa", 0.0, HEADS, True),
        ("llama-gqa", 0.0, HEADS, False),
        ("mistral", 0.7, HEADS, True),
        pytest.param("gpt2", 0.7, HEADS, True, marks=pytest.mark.slow),
        pytest.param("gpt2", 0.7, HEADS, False, marks=pytest.mark.slow),
        pytest.param("llama-gqa", 0.0, NGRAM, True, marks=pytest.mark.slow),
        pytest.param("mistral", 0.7, NGRAM, True, marks=pytest.mark.slow),
        pytest.param("mistral", 0.7, HEADS, False, marks=pytest.mark.slow),
    ],
)
def test_decoders_answer_as_without(style, temperature, speculation, cached):
    """Learned and rotary positions, a window, prompts of several lengths, both ways of guessing.

    With the cache of the model, and with none at all.
    """
    model, params, settings, plain = decoder_without(style, temperature)
    sampler, guessing = model if cached else Rereading(model), replace(settings, speculation=speculation)
    run = jax.jit(lambda p, b, k: generate(sampler, p, b, k, guessing))
    assert_same(run(params, four_prompts(), jax.random.key(9)), plain)


def test_guesses_at_int8_change_nothing_either():
    model = replace(tiny("llama-gqa"), precision="int8")
    params, settings = params_of(model, seed=8), sampling(stop_id=1, temperature=0.7, max_new_tokens=10)
    batch, key = four_prompts(), jax.random.key(3)
    run = jax.jit(lambda settings: generate(model, params, batch, key, settings), static_argnums=0)
    assert_same(run(replace(settings, speculation=NGRAM)), run(settings))


@pytest.mark.slow  # what right guesses save is counted above
def test_heads_that_learned_to_count_save_most_calls():
    """Trained on 0 1 2 … 9 0 1 …, with the loss of the stages: nearly every guess is kept, three a call."""
    model = tiny("llama", layers=1, width=32, mtp_heads=3, mtp_coef=1.0)
    algorithm, optimizer = training_loss(model, ahead=True), lenient(optax.adam(1e-2))
    starts = jnp.arange(10, dtype=jnp.int32)
    tokens = (starts[:, None] + jnp.arange(20, dtype=jnp.int32)[None]) % 10
    positions = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32)[None], tokens.shape)
    batch = TokenBatch(tokens, jnp.ones_like(tokens), positions, jnp.ones(tokens.shape, bool))
    weight = algorithm.weight(batch)

    def step(carry, _):
        params, state = carry
        grads, metrics = jax.grad(algorithm.loss, has_aux=True)(params, batch, weight)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), metrics

    params = jax.jit(model.init)(jax.random.key(0))
    train = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=80))
    (params, _), metrics = train(params)
    assert min(float(metrics[f"mtp/hit_rate/{n}"][-1]) for n in (1, 2, 3)) > 0.95
    asked = PromptBatch(tokens[:, :4], jnp.ones((10, 4), bool), starts)
    settings = sampling(temperature=0.0, stop_id=-1, max_new_tokens=16, speculation=replace(HEADS, tokens=3))
    drawn = jax.jit(lambda p, b, k: generate(model, p, b, k, settings))(params, asked, jax.random.key(1))
    np.testing.assert_array_equal(drawn.response, tokens[:, 4:])
    calls, guessed, kept = np.asarray(drawn.counts).sum(axis=0)
    assert kept / guessed > 0.95
    assert calls < 0.3 * np.asarray(drawn.response_mask)[:, 1:].sum()
