"""Tiny models for tests. Their parameters are nowhere 0 or 1, and are made without compiling anything."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax.algorithms.language_modelling import predicted
from rlhfjax.algorithms.packing import packed_experience
from rlhfjax.config import schema
from rlhfjax.functional import entropy, token_log_probs
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.types import Experience, RankedBatch, Rollout, TokenBatch, TokenExperience

VOCAB = 16
SHAPE = {"vocab_size": VOCAB, "layers": 2, "width": 16, "heads": 4, "context": 32}
STYLES = {
    "gpt2": ("gpt2", {}),
    "gpt2-gqa": ("gpt2", {"kv_heads": 2}),
    "llama": ("llama", {}),
    "llama-gqa": ("llama", {"kv_heads": 2}),
}
_STRETCHED = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_context": 16, "rope_attention_factor": 1.2}
_MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4}
# What later families have: blocks beside each other, and (with layers of several kinds) everything else at once.
LATER = {
    "gpt_neox": ("gpt_neox", {"rope_fraction": 0.5}),
    "gpt_oss": ("gpt_oss", {"experts": 4, "experts_per_token": 2, "window": 3, "kv_heads": 2}),
    "mixed": (
        "olmo3",
        {"layers": 4, "kv_heads": 2, "window": 3, "window_pattern": "LLG", "rope_pattern": "RN", "logit_divisor": 0.5}
        | _STRETCHED
        | _MULTIPLIED,
    ),
}
# Windows shorter than the sequences of any test, in every layer or some.
WINDOWED = {
    "mistral": ("mistral", {"kv_heads": 2, "window": 3}),
    "gemma2": ("gemma2", {"kv_heads": 2, "window": 3}),
    "gemma3": ("gemma3", {"layers": 3, "window": 3, "window_pattern": "LLG"}),
}


def stored(path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, and the file closed."""
    with np.load(path) as file:
        return dict(file)


def tiny(style: str = "llama-gqa", **changes) -> LanguageModel:
    """A decoder of width 16, of two layers unless the style has more."""
    family, own = (STYLES | WINDOWED | LATER)[style]
    return LanguageModel(decoder_config(family, **(SHAPE | own | changes)))


def random_tree(shapes, seed: int = 0, std: float = 0.4):
    """Normal values for a tree of shapes; scales of norms are around 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        return jnp.asarray(rng.normal(float(path[-1].key == "scale"), std, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@cache
def shapes_of(model: LanguageModel, init: str = "init"):
    """Of the parameters; found once for equal models, since each time is a trace of the model."""
    return jax.eval_shape(getattr(model, init), jax.random.key(0))


def params_of(model: LanguageModel, seed: int = 0, std: float = 0.4):
    """Parameters of a policy; a smaller `std` makes all tokens likelier."""
    return random_tree(shapes_of(model), seed, std)


def scalar_params_of(model: LanguageModel, seed: int = 0, std: float = 0.4):
    """Parameters of a reward or value model."""
    return random_tree(shapes_of(model, "init_scalar"), seed, std)


def random_tokens(*shape: int, seed: int = 0, low: int = 0, high: int = VOCAB):
    """Token ids, uniform."""
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.int32)


def right_mask(lengths, width: int):
    """True on the first `lengths[i]` of `width` tokens."""
    return jnp.asarray(np.arange(width) < np.asarray(lengths)[..., None])


def left_mask(lengths, width: int):
    """True on the last `lengths[i]` of `width` tokens."""
    return jnp.asarray(np.arange(width) >= width - np.asarray(lengths)[..., None])


def token_batch(rows: int, length: int, seed: int = 0) -> TokenBatch:
    """Rows of very different lengths, some of two packed documents; only part of the tokens are targets."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, rows)
    lengths[:2] = 2, length
    first = np.minimum(rng.integers(1, length + 1, rows), lengths)
    slots = np.arange(length)[None, :]
    segments = np.where(slots < first[:, None], 1, 2) * (slots < lengths[:, None])
    positions = np.where(slots < first[:, None], slots, slots - first[:, None]) * (segments > 0)
    targets = (segments > 0) & (rng.random((rows, length)) < 0.7)
    targets[:, 1] = True
    tokens = random_tokens(rows, length, seed=seed)
    return TokenBatch(tokens, jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32), jnp.asarray(targets))


def ranked_batch(prompts: int, candidates: int, length: int, seed: int = 0) -> RankedBatch:
    """Rankings with ties, absent candidates and rows of different lengths; the first prompt has all candidates."""
    rng = np.random.default_rng(seed)
    present = rng.integers(2, candidates + 1, prompts)
    present[0] = candidates
    lengths = rng.integers(2, length + 1, (prompts, candidates))
    mask = np.arange(candidates) < present[:, None]
    ranks = rng.integers(1, 4, (prompts, candidates))
    ranks[:, :2] = [1, 2]
    token_mask = np.asarray(right_mask(lengths, length)) & mask[:, :, None]
    return RankedBatch(
        random_tokens(prompts, candidates, length, seed=seed),
        jnp.asarray(token_mask),
        jnp.asarray(ranks, jnp.int32),
        jnp.asarray(mask),
        jnp.ones(prompts, jnp.int32),
    )


def one_prompt_each(batch: RankedBatch, seed: int = 0) -> RankedBatch:
    """The same rankings where the candidates of a comparison have a prompt of their own, of 1 token and more."""
    lengths = np.asarray(jnp.where(batch.mask, batch.token_mask.sum(-1), batch.tokens.shape[-1]).min(1))
    prompts = np.random.default_rng(seed).integers(1, lengths)  # at least one token of every response is left
    prompts[0] = lengths[0] - 1
    shared = np.arange(batch.tokens.shape[-1]) < prompts[:, None, None]
    tokens = jnp.where(shared, batch.tokens[:, :1], batch.tokens)
    return replace(batch, tokens=tokens, prompt_lengths=jnp.asarray(prompts, jnp.int32))


def ppo_config(**changes) -> schema.Ppo:
    """The ppo section of a recipe, with `changes` to its fields."""
    sections = {
        "data": [{"source": "unused"}],
        "steps": 3,
        "batch": {"size": 8, "epochs": 1, "prompt_length": 5},
        "sampling": {"max_new_tokens": 6},
        "optimizer": {"lr": 1e-2},
    }
    return schema.Ppo.model_validate(sections | changes)


def experience(rows: int, prompt: int, response: int, seed: int = 0) -> Experience:
    """Responses of 1 to `response` tokens, first rows of the extremes; half of the tokens beyond the clip."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, response + 1, rows)
    lengths[: rows // 2] = np.where(np.arange(rows // 2) % 2, response, 1)

    def normal(mean: float, std: float, *shape: int):
        return jnp.asarray(rng.normal(mean, std, shape), jnp.float32)

    rollout = Rollout(
        random_tokens(rows, prompt, seed=seed + 1),
        left_mask(rng.integers(1, prompt + 1, rows), prompt),
        random_tokens(rows, response, seed=seed + 2),
        right_mask(lengths, response),
        jnp.asarray(rng.random(rows) < 0.7),
        normal(-np.log(VOCAB), 0.3, rows, response),
        normal(-np.log(VOCAB), 0.3, rows, response),
        normal(-np.log(VOCAB), 0.3, rows, response),
        normal(0.0, 0.3, rows, response),
        normal(0.0, 1.0, rows),
    )
    return Experience(rollout, normal(0.0, 1.0, rows, response), normal(0.0, 0.3, rows, response))


def log_probs_from(logits, temperature: float = 1.0):
    """What PPO reads of a policy whose [B, R, V] logits are `logits(params, rollout)`."""

    def log_probs(params, rollout):
        z = logits(params, rollout)
        return token_log_probs(z, rollout.response, temperature), entropy(z, temperature)

    return log_probs


def cross_entropy_from(logits):
    """The summed loss of a language model whose [B, T, V] logits are `logits(params, batch)`."""

    def total(params, batch, key):
        log_probs = token_log_probs(logits(params, batch)[:, :-1], batch.tokens[:, 1:])
        return -jnp.where(predicted(batch), log_probs, 0.0).sum()

    return total


_packed = jax.jit(packed_experience, static_argnums=0)


def first_part(experience: Experience) -> TokenExperience:
    """All of an experience as packed rows, the way the models read it."""
    packed, used = _packed(len(experience.advantages), experience)
    assert int(used) == 1
    return jax.tree.map(lambda x: x[0], packed)


def lenient(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer under the usual type promotion, which Adam of optax needs; what is around it stays strict."""

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


def assert_equal_gradients(grads, wanted, name):
    """To the rounding of float32 sums, which is that of the largest gradient."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=2e-5 * largest, err_msg=name), grads, wanted
    )
