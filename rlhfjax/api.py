"""The Python interface: a trained model to compute with, sample from and score with."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.data.batches import left_padded, right_padded
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.generation import BeamParams, Programs, SamplingParams, Speculation, beam_search
from rlhfjax.integrity import unverified
from rlhfjax.models import DecoderConfig, EncoderDecoder, EncoderDecoderConfig, SequenceModel
from rlhfjax.text.chat import Message, as_record, encode_prompt, encode_response, encode_responses
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.training.checkpoint import SCALAR, find_checkpoint, load_model, read_meta, tokenizer_of
from rlhfjax.types import Params, PromptBatch, Rollout

_NEVER = -1  # an id that no model emits
_SEEDS = 2**32  # beyond these jax keeps the lower 32 bits alone: other numbers would draw the same
_MOST = 2**20  # responses of one call
_HOTTEST, _STEEPEST = 1e6, 100.0  # beyond these a draw is uniform, and a search asks for length alone
_SCORED = 64  # responses that are scored at a time

# A text, ids, a conversation, or a record with `prompt` or `messages` and perhaps `tools`, `chat_template_kwargs`.
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, Any]


@dataclass(frozen=True)
class Completion:
    """One sampled response. `log_probs` are nats of each token, `finish_reason` is "stop" (it ended) or "length".

    `top_log_probs` has the likeliest ids of each position with theirs, likeliest first, where they were asked for.
    `calls` counts how often the model was asked after the prompt, where it read draft tokens; else once per token.
    """

    text: str
    tokens: list[int]
    log_probs: list[float]
    finish_reason: str
    top_log_probs: tuple[dict[int, float], ...] = ()
    calls: int | None = None


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory: a policy, a reward model or a value model (`role`)."""

    role: str
    network: SequenceModel
    params: Params
    tokenizer: AnyTokenizer | None
    step_dir: Path | None = None  # where it was read from

    @property
    def config(self) -> DecoderConfig | EncoderDecoderConfig:
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
        prompts: Sequence[Prompt],
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        n: int = 1,
        min_p: float = 0.0,
        stop_ids: Sequence[int] = (),
        top_log_probs: int = 0,
        speculate: int = 0,
    ) -> list[list[Completion]]:
        """`n` responses to each prompt; temperature 0 is greedy.

        A prompt is a text, a list of ids as they are, a list of messages, or a record such as {"messages": […],
        "tools": […]}; conversations are written as the model was trained on them (`load`).
        The tokens `stop_ids` end a response as the tokenizer's own does. Log-probabilities are of the whole
        distribution at this temperature, whatever top_k, top_p and min_p leave of it. A model without a tokenizer takes
        ids only, stops at `stop_ids` alone, and its completions have no text. `speculate` is the number of
        draft tokens per call, from the model's own heads where it has as many, else by lookup in the text; responses
        stay what they are. Raises ConfigError when a prompt and `max_new_tokens` do not fit
        the model's context, or the arguments make no sense.
        """
        self._expect(scalar=False, what="generate")
        if n < 1 or max_new_tokens < 1 or not 0 <= temperature <= _HOTTEST or top_k < 0 or not 0 < top_p <= 1:
            raise ConfigError(
                f"generate: expected n >= 1, max_new_tokens >= 1, temperature >= 0 (and <= {_HOTTEST:g}), top_k >= 0 "
                "and 0 < top_p <= 1, got "
                f"n={n}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}"
            )
        if not 0 <= min_p <= 1 or not 0 <= top_log_probs <= self.config.vocab_size:
            raise ConfigError(
                f"generate: expected 0 <= min_p <= 1 and top_log_probs of 0 to {self.config.vocab_size}, got "
                f"min_p={min_p}, top_log_probs={top_log_probs}"
            )
        if stop_ids:
            self._check_ids("stop_ids", np.asarray(stop_ids))
        rows = self._prompt_ids(prompts)
        if not rows:
            return []
        if not 0 <= seed < _SEEDS or n * len(rows) > _MOST:
            raise ConfigError(
                f"generate: expected 0 <= seed < 2**32 and at most {_MOST:,} responses at a time, got seed={seed}, "
                f"n={n} for {len(rows)} prompts"
            )
        self._check_length(max(map(len, rows)) + max_new_tokens)
        sampling = SamplingParams(
            max_new_tokens,
            self._ends()[0],
            self._pad_id,
            temperature,
            min(top_k, self.config.vocab_size),
            top_p,
            min_p=min_p,
            stop_ids=(*self._ends()[1:], *(int(i) for i in stop_ids)),
            top_log_probs=top_log_probs,
            speculation=self._speculation(speculate),
        )
        completions = self._completions(self._programs.generate(rows, jax.random.key(seed), sampling, n))
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def beam_search(
        self,
        prompts: Sequence[Prompt],
        beams: int = 4,
        max_new_tokens: int = 64,
        length_penalty: float = 0.6,
    ) -> list[Completion]:
        """The best response to each prompt that a search with `beams` open sequences finds.

        Best is the highest sum of log-probabilities over ((5 + length) / 6)^length_penalty, the stop token counted (Wu
        et al. 2016, eq. 14). Raises ConfigError as `generate`.
        """
        self._expect(scalar=False, what="beam_search")
        if not 1 <= beams <= _MOST or max_new_tokens < 1 or not 0 <= length_penalty <= _STEEPEST:
            raise ConfigError(
                f"beam_search: expected beams >= 1 (and <= {_MOST:,}), max_new_tokens >= 1 and 0 <= length_penalty "
                f"<= {_STEEPEST:g}, got "
                f"beams={beams}, max_new_tokens={max_new_tokens}, length_penalty={length_penalty}"
            )
        if self.tokenizer is None:
            raise ConfigError("beam_search: expected a model with a tokenizer, which says what token ends a response")
        rows = self._prompt_ids(prompts)
        if not rows:
            return []
        stop, *others = self._ends()
        search = BeamParams(max_new_tokens, stop, self._pad_id, beams, length_penalty, tuple(others))
        return self._completions(self._beam_search(self.params, self._prompt_batch(rows, max_new_tokens), search))

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str | Sequence[int]]) -> Float[np.ndarray, "B"]:
        """The reward model's score of each response, float32, read at its end. Only for a reward or value model.

        Prompts are those of `generate`; the score is that of the ids which training on a comparison sees. A response
        that is a list of ids is whole: the score is read at its last.
        """
        self._expect(scalar=True, what="score")
        if len(prompts) != len(responses):
            raise ConfigError(f"score: expected as many responses as prompts, got {len(responses)} for {len(prompts)}")
        if not prompts:
            return np.zeros(0, np.float32)
        pairs = [self._pair_ids(i, *pair) for i, pair in enumerate(zip(prompts, responses, strict=True))]
        return np.concatenate([self._scored(pairs[i : i + _SCORED]) for i in range(0, len(pairs), _SCORED)])

    def export(self, target: str | Path, dtype: str = "float32", force: bool = False) -> None:
        """Write a Hugging Face directory with a model card, and proof that what was written computes the same.

        Raises ConfigError when `target` holds something (an earlier export is replaced with `force`) or transformers
        has no such model, IntegrityError when what is read back computes something else.
        """
        from rlhfjax.interop.exporting import export_model
        from rlhfjax.stages.transfer import lineage

        what, origin = self.role, None
        if self.step_dir:
            what, origin = read_meta(self.step_dir)["serve"], lineage(self.step_dir)
        settings = {"dtype": dtype, "force": force, "lineage": origin}
        export_model(Path(target), what, self.network, self.params, self.tokenizer, **settings)

    @cached_property
    def _logits(self):
        if isinstance(self.network, EncoderDecoder):
            raise ConfigError("logits: expected a decoder, got an encoder–decoder, whose logits are of a response")
        return jax.jit(self.network.logits)

    @cached_property
    def _scores(self):
        return jax.jit(self.network.scores)

    @cached_property
    def _programs(self) -> Programs:
        return Programs(self.network, self.params)

    @cached_property
    def _beam_search(self):
        return jax.jit(partial(beam_search, self.network), static_argnums=2)

    def _pair_ids(self, place: int, prompt: Any, response: str | Sequence[int]) -> tuple[list[int], list[int]]:
        if not isinstance(response, str):
            self._check_ids(f"responses[{place}]", np.asarray(response))
            return self._ids_of(place, prompt), list(response)
        t = self._tokenizer("responses")
        if _is_ids(prompt):
            return self._ids_of(place, prompt), encode_response(t, response)
        try:
            asked, [answer] = encode_responses(t, as_record(prompt), [response])
        except DataError as error:
            raise DataError(f"prompts[{place}]: {error}") from error
        return asked, answer

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        tokens, mask = right_padded([prompt + response for prompt, response in pairs], self._pad_id)
        self._check_length(tokens.shape[1])
        lengths = np.asarray([len(prompt) for prompt, _ in pairs], np.int32)
        return np.asarray(self._scores(self.params, tokens, mask, lengths))

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str | Mapping):
            raise ConfigError("prompts: expected a list of prompts, got one alone; put it into a list")
        return [self._ids_of(place, prompt) for place, prompt in enumerate(prompts)]

    def _ids_of(self, place: int, prompt: Any) -> list[int]:
        try:
            row = list(prompt) if _is_ids(prompt) else encode_prompt(self._tokenizer("prompts"), as_record(prompt))
        except DataError as error:
            raise DataError(f"prompts[{place}]: {error}") from error
        self._check_ids(f"prompts[{place}]", np.asarray(row))
        return row

    def _prompt_batch(self, rows: list[list[int]], max_new_tokens: int) -> PromptBatch:
        tokens, mask = left_padded(rows, self._pad_id)
        self._check_length(tokens.shape[1] + max_new_tokens)
        return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))

    def _ends(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return (_NEVER,) if self.tokenizer is None else self.tokenizer.end_ids

    @property
    def _pad_id(self) -> int:
        return 0 if self.tokenizer is None else self.tokenizer.pad_id

    def _speculation(self, tokens: int) -> Speculation | None:
        if not tokens:
            return None
        if not 0 <= tokens <= self.config.context or not isinstance(self.config, DecoderConfig):
            raise ConfigError(
                "speculate: expected a decoder, and 0 tokens or more up to its context, got "
                f"{self.config.family}, {tokens}"
            )
        return Speculation("heads" if self.config.mtp_heads >= tokens else "ngram", tokens)

    def _completions(self, rollout: Rollout) -> list[Completion]:
        made, t = jax.device_get(rollout), self.tokenizer
        completions = []
        for row, (response, kept, log_probs) in enumerate(
            zip(made.response, made.response_mask, made.sampled_log_probs, strict=True)
        ):
            ids, reason, top = response[kept].tolist(), "stop" if made.finished[row] else "length", ()
            if made.top_ids is not None:
                pairs = zip(made.top_ids[row][kept].tolist(), made.top_log_probs[row][kept].tolist(), strict=True)
                top = tuple(dict(zip(*pair, strict=True)) for pair in pairs)
            text = "" if t is None else t.decode_continuation(ids, int(made.prompt[row][-1]))
            calls = None if made.counts is None else int(made.counts[row, 0])
            completions.append(Completion(text, ids, log_probs[kept].tolist(), reason, top, calls))
        return completions

    def _tokenizer(self, what: str) -> AnyTokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"{what}: expected lists of ids, got text for a model that has no tokenizer")
        return self.tokenizer

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


def _is_ids(prompt: Any) -> TypeGuard[Sequence[int]]:
    """Whether a prompt is ids: an array, or a sequence of other things than messages."""
    return not isinstance(prompt, str | Mapping) and not (len(prompt) and isinstance(prompt[0], Mapping))


def load(
    checkpoint: str | Path,
    verify: bool = True,
    date: datetime.date | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a checkpoint, stage or run directory (of a run: its last policy).

    It writes conversations as it was trained on them: with the date of its run (or import) and its
    chat_template_kwargs, unless others are given here. Raises ConfigError when there is no checkpoint, or for what its
    chat template does not read, IntegrityError when it cannot be read, or is not what was written; `verify=False` does
    not compare it with its digests.
    """
    step_dir = find_checkpoint(checkpoint)
    with unverified(not verify):
        meta = read_meta(step_dir)
        network, params = load_model(step_dir)
    return Model(meta["role"], network, params, _speaking(tokenizer_of(meta), date, chat_template_kwargs), step_dir)


def _speaking(
    tokenizer: AnyTokenizer | None, date: datetime.date | str | None, kwargs: Mapping[str, Any] | None
) -> AnyTokenizer | None:
    if tokenizer is None or (date is None and kwargs is None):
        return tokenizer
    try:
        given = datetime.date.fromisoformat(date) if isinstance(date, str) else date
    except ValueError:
        raise ConfigError(f"date: expected one such as 2026-01-31, got {date!r}") from None
    own = tokenizer.chat
    return tokenizer.with_chat(ChatSettings({**own.kwargs, **(kwargs or {})}, given or own.date))
