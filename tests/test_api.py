"""The Python interface against the models it stands for, computed directly."""

import datetime
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import left_mask, params_of, random_tokens, right_mask, scalar_params_of, tiny

import rlhfjax
from rlhfjax.data.token_rows import Rules, ranked_rows
from rlhfjax.errors import ConfigError, DataError, IntegrityError
from rlhfjax.text.chat import encode_prompt, encode_response
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer, to_huggingface
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import Checkpoints, meta_of, tokenizer_of

CONTEXT, WORDS = 40, 300
NETWORK = tiny("llama-gqa", vocab_size=WORDS, context=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, WORDS)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer):
    """A run with an SFT policy, a reward model and a PPO stage that keeps an average."""
    run = tmp_path_factory.mktemp("run")
    made = {
        "sft": ("policy", {"policy": params_of(NETWORK, seed=1, std=0.2)}),
        "reward": ("reward", {"reward": scalar_params_of(NETWORK, seed=2)}),
        "ppo": (
            "policy",
            {
                "policy": params_of(NETWORK, seed=3, std=0.2),
                "average": params_of(NETWORK, seed=4, std=0.2),
                "value": scalar_params_of(NETWORK, seed=5),
            },
        ),
    }
    for stage, (role, models) in made.items():
        checkpoints = Checkpoints(run / stage / "checkpoints", keep=1)
        meta = meta_of(role, NETWORK, tokenizer, averaged="average" in models, stage=stage)
        checkpoints.save(2, models, (jnp.int32(2),), meta)
        checkpoints.close()
        (run / stage / "complete.json").write_text(json.dumps({"step": 2}))
    return run


@pytest.fixture(scope="module")
def policy(run_dir):
    return rlhfjax.load(run_dir / "sft")


@pytest.fixture(scope="module")
def reward(run_dir):
    return rlhfjax.load(run_dir / "reward")


def test_what_a_path_means(run_dir, tokenizer):
    served = rlhfjax.load(run_dir)
    assert served.role == "policy"  # a run's last policy, its average where there is one
    wanted = params_of(NETWORK, seed=4, std=0.2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(served.params), jax.device_get(wanted))
    assert served.config == NETWORK.config
    assert served.tokenizer.fingerprint == tokenizer.fingerprint
    step = rlhfjax.load(str(run_dir / "sft" / "checkpoints" / "2"))
    assert step.role == "policy"
    with pytest.raises(ConfigError, match="checkpoint"):
        rlhfjax.load(run_dir / "nothing")


def test_logits_take_padding_on_either_side(policy):
    # meant to catch a mask that is not used
    tokens = random_tokens(2, 6, high=WORDS)
    everything = policy.logits(tokens)
    direct = jax.jit(NETWORK.logits)(params_of(NETWORK, seed=1, std=0.2), tokens, jnp.ones((2, 6), bool))
    assert (everything.shape, everything.dtype) == ((2, 6, WORDS), jnp.float32)
    np.testing.assert_allclose(everything, direct, rtol=1e-5, atol=1e-6)
    alone = policy.logits(tokens[:1, :4])
    left = policy.logits(jnp.roll(tokens, 2, axis=1), left_mask([4, 4], 6))
    right = policy.logits(np.asarray(tokens), np.asarray(right_mask([4, 4], 6)).tolist())
    np.testing.assert_allclose(left[0, 2:], alone[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(right[0, :4], alone[0], rtol=1e-5, atol=1e-5)


def test_greedy_generation_takes_the_largest_logit_each_time(policy, tokenizer):
    [[made]] = policy.generate(["the movie"], max_new_tokens=5, temperature=0.0)
    ids = encode_prompt(tokenizer, {"prompt": "the movie"})
    for token, log_prob in zip(made.tokens, made.log_probs, strict=True):
        scores = np.asarray(policy.logits([ids])[0, -1], np.float64)
        assert token == scores.argmax()
        assert log_prob == pytest.approx(scores.max() - np.log(np.exp(scores).sum()), abs=1e-4)
        ids = [*ids, token]
    assert made.text == tokenizer.decode(made.tokens)
    assert made.finish_reason == ("stop" if made.tokens[-1] == tokenizer.eos_id else "length")


def test_each_prompt_has_n_completions_of_its_own(policy, tokenizer):
    texts = policy.generate(["a bad film", "the"], max_new_tokens=6, n=3, seed=5)
    ids = [encode_prompt(tokenizer, {"prompt": text}) for text in ("a bad film", "the")]
    assert [len(row) for row in texts] == [3, 3]
    assert policy.generate(ids, max_new_tokens=6, n=3, seed=5) == texts
    assert policy.generate(["a bad film", "the"], max_new_tokens=6, n=3, seed=6) != texts
    twice = policy.generate(["the", "the"], max_new_tokens=6, n=3, seed=5)
    for answers in (texts, twice):  # fails where noise belongs to a prompt in place of a sample
        assert len({tuple(made.tokens) for row in answers for made in row}) == 6
    for made in texts[0]:
        assert 1 <= len(made.tokens) == len(made.log_probs) <= 6
        assert (made.finish_reason == "stop") == (made.tokens[-1] == tokenizer.eos_id)
        full = policy.logits([ids[0] + made.tokens])[0, len(ids[0]) - 1 : -1]
        wanted = jax.nn.log_softmax(full)[jnp.arange(len(made.tokens)), jnp.asarray(made.tokens)]
        np.testing.assert_allclose(made.log_probs, wanted, atol=1e-4)


def test_a_finished_response_says_so(policy, tokenizer):
    """At a low temperature, with the most likely token taken for the end, every response is that token."""
    [[first]] = policy.generate(["the"], max_new_tokens=1, temperature=0.0)
    params = jax.tree.map(jnp.copy, policy.params)
    table = params["embed"]["embedding"]
    params["embed"]["embedding"] = table.at[tokenizer.eos_id].set(3.0 * table[first.tokens[0]])
    [[made]] = type(policy)("policy", policy.network, params, tokenizer).generate(["the"], 4, temperature=0.0)
    assert (made.tokens, made.text, made.finish_reason) == ([tokenizer.eos_id], "", "stop")


def test_a_model_without_a_tokenizer_takes_ids(policy, tokenizer):
    ids = encode_prompt(tokenizer, {"prompt": "the movie"})
    alone = type(policy)("policy", policy.network, policy.params, None)
    [[made]] = alone.generate([ids], 4, temperature=0.0)
    [[full]] = policy.generate([ids], 4, temperature=0.0)
    assert made.tokens[: len(full.tokens)] == full.tokens
    assert (made.text, made.finish_reason, len(made.tokens)) == ("", "length", 4)
    with pytest.raises(ConfigError, match="expected lists of ids, got text"):
        alone.generate(["the movie"], 4)


def test_scores_are_read_at_the_end_of_each_response(reward, tokenizer):
    # meant to catch an EOS that is left out, and padding that moves the place
    prompts, responses = ["the movie", "a", "the film was"], [" was good", " long and bad film", ""]
    scores = reward.score(prompts, responses)
    assert (scores.shape, scores.dtype) == ((3,), np.float32)
    params = scalar_params_of(NETWORK, seed=2)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ids = encode_prompt(tokenizer, {"prompt": prompt}) + encode_response(tokenizer, response)
        assert ids[-1] == tokenizer.eos_id
        row = jnp.asarray([ids], jnp.int32)
        np.testing.assert_allclose(score, jax.jit(NETWORK.scores)(params, row, jnp.ones(row.shape, bool))[0], rtol=1e-4)
    assert reward.score([], []).shape == (0,)


def with_thoughts(tokenizer, **settings):
    """The same tokenizer as a published model's, whose template adds an empty thought to the last answer."""
    files = to_huggingface(tokenizer)
    described = {
        "tokenizer": json.loads(files["tokenizer.json"]),
        "named": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "adds_bos": True,
        "eos_ids": [],
        "chat_template": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}()"
        "{% endif %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if open %}()"
        "{% endif %}{% endif %}",
    }
    return HuggingFaceTokenizer(described).with_chat(ChatSettings(**settings))


@pytest.mark.parametrize("kind", ["own", "template"])
def test_messages_are_scored_as_training_saw_them(reward, tokenizer, kind):
    # fails if the answer is tokenised without what the template writes of it: seen
    model = reward if kind == "own" else replace(reward, tokenizer=with_thoughts(tokenizer))
    chat = [{"role": "user", "content": "the movie"}, {"role": "assistant", "content": "a film"}]
    asked = [*chat, {"role": "user", "content": "was it good"}]
    comparison = {"messages": asked, "responses": ["a bad film", "good"], "ranks": [2, 1]}

    class Source(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    rows = ranked_rows(Source([comparison]), model.tokenizer, Rules("ranks")).tokens
    prompts = [asked, {"messages": asked}, encode_prompt(model.tokenizer, {"messages": asked})]
    responses = ["a bad film", "good", rows[1][len(prompts[2]) :].tolist()]
    scores = model.score(prompts, responses)
    params = scalar_params_of(NETWORK, seed=2)
    for row, score in zip((0, 1, 1), scores, strict=True):
        ids = jnp.asarray(rows[row][None], jnp.int32)
        np.testing.assert_allclose(score, jax.jit(NETWORK.scores)(params, ids, jnp.ones(ids.shape, bool))[0], rtol=1e-4)


def test_messages_texts_and_ids_are_answered_alike(policy, tokenizer):
    messages = [{"role": "user", "content": "a bad film"}]
    ids = encode_prompt(tokenizer, {"messages": messages})
    mixed = policy.generate([messages, {"messages": messages}, ids, "the"], max_new_tokens=4, temperature=0.0)
    assert mixed[0] == mixed[1] == mixed[2] != mixed[3]
    for prompts, error, expected in (
        (messages, DataError, r"prompts\[0\]: .* got one message; put it into a list"),
        ({"messages": messages}, ConfigError, "got one alone; put it into a list"),
        (["the", [{"role": "tool", "content": "x"}]], DataError, r"prompts\[1\]: .*messages\[0\] of role tool"),
    ):
        with pytest.raises(error, match=expected):
            policy.generate(prompts, max_new_tokens=4)


def test_a_checkpoint_speaks_as_it_was_trained(run_dir, policy, tokenizer, tmp_path):
    settings = {"kwargs": {"open": True}, "date": datetime.date(2031, 1, 2)}
    spoken = with_thoughts(tokenizer, **settings)
    meta = meta_of("policy", NETWORK, spoken)
    assert json.loads(json.dumps(meta))["chat"] == {"chat_template_kwargs": {"open": True}, "date": "2031-01-02"}
    again = tokenizer_of(json.loads(json.dumps(meta)))
    asked = {"messages": [{"role": "user", "content": "a"}]}
    assert again.chat == ChatSettings(**settings)
    assert encode_prompt(again, asked) == encode_prompt(spoken, asked) != encode_prompt(with_thoughts(tokenizer), asked)
    assert tokenizer_of({**meta, "chat": {}}).chat == ChatSettings()  # older checkpoints say nothing
    assert rlhfjax.load(run_dir / "sft", date="2031-01-02").tokenizer.fingerprint == tokenizer.fingerprint
    for given, expected in (
        ({"date": "today"}, "date: expected one such as 2026-01-31, got 'today'"),
        ({"chat_template_kwargs": {"x": 1}}, "expected none for this project's own tokenizer"),
    ):
        with pytest.raises(ConfigError, match=expected):
            rlhfjax.load(run_dir / "sft", **given)


def test_samples_depend_neither_on_how_many_prompts_nor_on_their_lengths(policy):
    # fails when padding of rows or widths is answered, or shifts the noise: the programs differ, the tokens do not
    ids = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [6, 5]]
    together = policy.generate(ids, max_new_tokens=6, seed=3)
    assert policy.generate(ids[:3], max_new_tokens=6, seed=3) == together[:3]
    assert [c[0].tokens for c in policy.generate([*ids, [5] * 20], max_new_tokens=6, seed=3)[:4]] == [
        c[0].tokens for c in together
    ]


def test_stop_ids_and_the_likeliest_tokens(policy):
    [[free]] = policy.generate(["the"], max_new_tokens=8, temperature=0.0, top_log_probs=2)
    assert [max(top, key=top.__getitem__) for top in free.top_log_probs] == free.tokens
    for top, log_prob in zip(free.top_log_probs, free.log_probs, strict=True):
        assert len(top) == 2
        assert max(top.values()) == pytest.approx(log_prob, abs=1e-5)
    end = free.tokens[3]
    [[cut]] = policy.generate(["the"], max_new_tokens=8, temperature=0.0, stop_ids=[end])
    assert cut.tokens == free.tokens[: free.tokens.index(end) + 1]
    assert (cut.finish_reason, cut.top_log_probs) == ("stop", ())
    [[likeliest]] = policy.generate(["the"], max_new_tokens=8, min_p=1.0)
    assert likeliest.tokens == free.tokens


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "stop_ids": [7, 9]}]
)
def test_a_stream_is_what_generate_gives(policy, settings):
    # fails when the end of the text that was held back is lost: seen
    [[made]] = policy.generate(["the movie"], max_new_tokens=12, seed=4, top_log_probs=2, **settings)
    stream = policy.stream("the movie", seed=4, max_new_tokens=12, top_log_probs=2, **settings)
    pieces = list(stream)
    assert "".join(pieces) == made.text == stream.completion.text
    assert all(pieces)
    assert (stream.completion.tokens, stream.completion.finish_reason) == (made.tokens, made.finish_reason)
    np.testing.assert_allclose(stream.completion.log_probs, made.log_probs, atol=1e-5)
    assert [list(top) for top in stream.completion.top_log_probs] == [list(top) for top in made.top_log_probs]


def test_a_stop_string_ends_a_response_before_it(policy, tokenizer):
    def answers(**settings):
        made = policy.generate(["the movie", [5, 6]], max_new_tokens=24, seed=1, n=3, **settings)
        return [one for row in made for one in row]

    free = answers()
    stop = [free[0].text[5:8], free[4].text[9:11]]  # within words, so seldom where a token begins or ends
    stopped = answers(stop=stop)
    for cut, other, made in zip(stopped, answers(stop=stop, speculate=2), free, strict=True):
        places = [place for text in stop if (place := made.text.find(text)) >= 0]
        assert cut.text == other.text == (made.text[: min(places)] if places else made.text)
        assert cut.tokens == other.tokens == made.tokens[: len(cut.tokens)]
        assert cut.finish_reason == other.finish_reason == ("stop" if places else made.finish_reason)
        assert len(cut.log_probs) == len(cut.tokens)
        if places:  # the last token completed the string
            assert not any(text in tokenizer.decode(cut.tokens[:-1]) for text in stop)
    assert sum(cut.text != made.text for cut, made in zip(stopped, free, strict=True)) >= 2
    stream = policy.stream("the movie", stop, seed=1, max_new_tokens=24)
    assert ("".join(stream), stream.completion.tokens) == (stopped[0].text, stopped[0].tokens)


@pytest.mark.parametrize("verb", ["generate", "stream", "submit"])
def test_a_keyword_with_a_typing_mistake_is_named(policy, verb):
    asked = policy.session().submit if verb == "submit" else getattr(policy, verb)
    prompt = ["the"] if verb == "generate" else "the"
    with pytest.raises(TypeError, match=rf"^{verb}\(\) got an unexpected keyword argument 'stop_id'.*stop_ids"):
        asked(prompt, stop_id=[3])
    with pytest.raises(TypeError, match="'vocab_size'"):  # nobody reaches what is inside
        asked(prompt, vocab_size=3)


def test_a_session_writes_for_several_and_forgets_who_leaves(policy):
    session = policy.session(slots=2, context=32)
    prompts = ["the movie", "a bad film", "the", [5, 6]]
    streams = [session.submit(p, seed=2, uid=i, max_new_tokens=9) for i, p in enumerate(prompts)]
    session.step()
    streams[0].close()
    assert list(streams[3])  # waits for its turn, and lets the others go on
    while session.busy:
        session.step()
    wanted = policy.generate(prompts, seed=2, max_new_tokens=9)
    assert [s.take() for s in streams[1:3]] == [wanted[1][0].text, wanted[2][0].text]
    assert [s.completion.tokens for s in streams[1:]] == [row[0].tokens for row in wanted[1:]]
    first = streams[0].completion
    assert (first.tokens, first.finish_reason) == (wanted[0][0].tokens[:2], "cancelled")
    with pytest.raises(ConfigError, match="32 together, got"):
        session.submit("the", max_new_tokens=31)


def test_a_model_without_a_tokenizer_streams_ids(policy):
    alone = type(policy)("policy", policy.network, policy.params, None)
    stream = alone.stream([5, 6], max_new_tokens=4)
    assert list(stream) == []
    assert stream.completion.tokens == alone.generate([[5, 6]], max_new_tokens=4)[0][0].tokens
    with pytest.raises(ConfigError, match="expected a model with a tokenizer"):
        alone.stream([5, 6], stop=["x"], max_new_tokens=4)


def test_other_settings_are_not_another_program(policy):
    policy.generate(["the"], max_new_tokens=9)
    run = policy.programs.run
    programs = run._cache_size()
    for seed in range(12):
        settings = {"temperature": seed / 9, "top_k": seed % 3, "top_p": 1 - seed / 20, "min_p": seed / 99}
        policy.generate(["the"], max_new_tokens=16 - seed, seed=seed, stop_ids=range(1, 1 + seed % 7), **settings)
    assert run._cache_size() == programs


def test_any_end_that_the_tokenizer_names_ends_a_response(policy, tokenizer, tmp_path):
    # fails where the first alone ends one: seen
    [[free]] = policy.generate(["the"], max_new_tokens=8, temperature=0.0)
    for name, text in to_huggingface(tokenizer).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free.tokens[3]]}))
    several = rlhfjax.Model("policy", policy.network, policy.params, load_tokenizer(tmp_path))
    [[cut]] = several.generate(["the"], max_new_tokens=8, temperature=0.0)
    assert cut.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    assert cut.finish_reason == "stop"
    [best] = several.beam_search(["the"], beams=1, max_new_tokens=8, length_penalty=0.0)
    assert free.tokens[3] not in best.tokens[:-1]


def test_nothing_to_generate_is_nothing(policy):
    assert policy.generate([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one text"}, "a list of prompts"),
        ({"prompts": ["the"], "n": 0}, "n >= 1"),
        ({"prompts": ["the"], "max_new_tokens": 0}, "max_new_tokens >= 1"),
        ({"prompts": ["the"], "temperature": -0.1}, "temperature >= 0"),
        ({"prompts": ["the"], "temperature": float("nan")}, "temperature >= 0"),
        ({"prompts": [[1, 5], []]}, r"prompts\[1\]: expected at least one id"),
        ({"prompts": [[1, -1]]}, "got shape .2,., ids -1 to 1"),
        ({"prompts": [[1, NETWORK.config.vocab_size]]}, f"of 0 to {NETWORK.config.vocab_size - 1}"),
        ({"prompts": ["the"], "top_k": -1}, "top_k >= 0"),
        ({"prompts": ["the"], "seed": 2**64}, r"0 <= seed < 2\*\*32"),
        ({"prompts": ["the"], "seed": 2**32}, r"0 <= seed < 2\*\*32"),  # which jax takes for 0
        ({"prompts": ["the"], "seed": -1}, r"0 <= seed < 2\*\*32"),
        ({"prompts": ["the"], "n": 2**20 + 1}, "at most 1,048,576 responses"),
        ({"prompts": ["the"], "max_new_tokens": 4, "speculate": 2**31}, "up to its context"),
        ({"prompts": ["the"], "top_p": 0.0}, "top_p"),
        ({"prompts": ["the"], "stop": "film"}, "stop: expected a list of texts, none of them empty, got 'film'"),
        ({"prompts": ["the"], "stop": ["film", ""]}, "none of them empty"),
        ({"prompts": ["the"], "max_new_tokens": CONTEXT}, f"at most {CONTEXT} tokens"),
    ],
)
def test_arguments_of_generate_that_make_no_sense(policy, arguments, message):
    with pytest.raises(ConfigError, match=message):
        policy.generate(**arguments)


def test_a_model_is_asked_for_what_it_has(policy, reward):
    with pytest.raises(ConfigError, match=r"logits: expected a policy, got a reward checkpoint"):
        reward.logits([[1]])
    with pytest.raises(ConfigError, match=r"generate: expected a policy, got a reward checkpoint"):
        reward.generate(["the"])
    with pytest.raises(ConfigError, match=r"score: expected a reward or value model, got a policy checkpoint"):
        policy.score(["the"], ["film"])
    with pytest.raises(ConfigError, match="as many responses as prompts"):
        reward.score(["the"], ["film", "movie"])
    with pytest.raises(ConfigError, match=r"tokens: expected at least one id .* on 2 axes"):
        policy.logits([1, 2])
    with pytest.raises(ConfigError, match=f"at most {CONTEXT} tokens"):
        policy.logits(jnp.zeros((1, CONTEXT + 1), jnp.int32))
    with pytest.raises(ConfigError, match=f"at most {CONTEXT} tokens"):
        reward.score(["the"], ["film " * CONTEXT])


def test_a_checkpoint_that_cannot_be_read(run_dir, tmp_path):
    shutil.copytree(run_dir / "sft", tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft" / "checkpoints" / "2" / "policy")
    with pytest.raises(IntegrityError, match="policy"):
        rlhfjax.load(tmp_path / "sft")


def test_names_of_the_package():
    assert set(rlhfjax.__all__) >= {"Completion", "Model", "functional", "load", "__version__"}
    assert all(hasattr(rlhfjax, name) for name in rlhfjax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlhfjax.nothing
