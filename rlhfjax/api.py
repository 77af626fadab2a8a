"""The Python interface: a trained model to compute with, sample from and score with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.data.batches import left_padded, right_padded
from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams, generate
from rlhfjax.models import DecoderConfig, LanguageModel
from rlhfjax.text.chat import encode_prompt, encode_response
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import SCALAR, find_checkpoint, load_model, read_meta, tokenizer_of
from rlhfjax.types import Params, PromptBatch


@dataclass(frozen=True)
class Completion:
    """One sampled response. `log_probs` are nats of each token, `finish_reason` is "stop" (it ended) or "length"."""

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: str


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory: a policy, a reward model or a value model (`role`)."""

    role: str
    network: LanguageModel
    params: Params
    tokenizer: Tokenizer

    @property
    def config(self) -> DecoderConfig:
        return self.network.config

    def logits(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Next-token logits, float32; `mask` marks real tokens, padding on either side. Scalar models have none."""
        self._expect(scalar=False, what="logits")
        self._check_ids("tokens", np.asarray(tokens), axes=2)
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        self._check_length(tokens.shape[1])
        return self._logits(self.params, tokens, mask)

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        n: int = 1,
    ) -> list[list[Completion]]:
        """`n` responses to each prompt (texts, or lists of ids as they are); temperature 0 is greedy.

        Raises ConfigError when a prompt and `max_new_tokens` do not fit the model's context, or the arguments make no
        sense.
        """
        self._expect(scalar=False, what="generate")
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of texts, got one text; put it into a list")
        if n < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                "generate: expected n >= 1, max_new_tokens >= 1, temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}"
            )
        if not prompts:
            return []
        rows = [encode_prompt(self.tokenizer, {"prompt": p}) if isinstance(p, str) else list(p) for p in prompts]
        for i, row in enumerate(rows):
            self._check_ids(f"prompts[{i}]", np.asarray(row))
        tokens, mask = left_padded([row for row in rows for _ in range(n)], self.tokenizer.pad_id)
        self._check_length(tokens.shape[1] + max_new_tokens)
        sampling = SamplingParams(
            max_new_tokens, self.tokenizer.eos_id, self.tokenizer.pad_id, temperature, top_k, top_p
        )
        batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))
        made = jax.device_get(self._generate(self.params, batch, jax.random.key(seed), sampling))
        completions = []
        for response, kept, log_probs, finished in zip(
            made.response, made.response_mask, made.sampled_log_probs, made.finished, strict=True
        ):
            ids = response[kept].tolist()
            reason = "stop" if finished else "length"
            completions.append(Completion(self.tokenizer.decode(ids), ids, log_probs[kept].tolist(), reason))
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, "B"]:
        """The reward model's score of each response, float32, read at its EOS. Only for a reward or value model."""
        self._expect(scalar=True, what="score")
        if len(prompts) != len(responses):
            raise ConfigError(f"score: expected as many responses as prompts, got {len(responses)} for {len(prompts)}")
        if not prompts:
            return np.zeros(0, np.float32)
        rows = [
            encode_prompt(self.tokenizer, {"prompt": prompt}) + encode_response(self.tokenizer, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        tokens, mask = right_padded(rows, self.tokenizer.pad_id)
        self._check_length(tokens.shape[1])
        return np.asarray(self._scores(self.params, tokens, mask))

    @cached_property
    def _logits(self):
        return jax.jit(self.network.logits)

    @cached_property
    def _scores(self):
        return jax.jit(self.network.scores)

    @cached_property
    def _generate(self):
        return jax.jit(partial(generate, self.network), static_argnums=3)

    def _expect(self, scalar: bool, what: str) -> None:
        if (self.role in SCALAR) != scalar:
            kind = "a reward or value model" if scalar else "a policy"
            raise ConfigError(f"{what}: expected {kind}, got a {self.role} checkpoint; load another stage")

    def _check_ids(self, name: str, ids: np.ndarray, axes: int = 1) -> None:
        last = self.config.vocab_size - 1
        if ids.ndim != axes or not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > last:
            got = f"ids {ids.min()} to {ids.max()}" if ids.size and ids.dtype.kind in "iu" else f"type {ids.dtype}"
            raise ConfigError(
                f"{name}: expected at least one id of 0 to {last} on {axes} ax{'e' if axes > 1 else 'i'}s, got shape "
                f"{ids.shape}, {got}"
            )

    def _check_length(self, length: int) -> None:
        if length > self.config.context:
            raise ConfigError(f"expected at most {self.config.context} tokens (the model's context), got {length}")


def load(checkpoint: str | Path) -> Model:
    """The model of a checkpoint, stage or run directory (of a run: its last policy).

    Raises ConfigError when there is no checkpoint, IntegrityError when it cannot be read.
    """
    step_dir = find_checkpoint(checkpoint)
    meta = read_meta(step_dir)
    network, params = load_model(step_dir)
    return Model(meta["role"], network, params, tokenizer_of(meta))
