"""A trained model in memory, to compute with, sample from and score with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.api.prompts import Prompt, check_ids, pair_ids, prompt_ids
from rlhfjax.api.responses import Completion, completions, cut_at
from rlhfjax.api.session import Session, Stream
from rlhfjax.api.settings import (
    Further,
    Settings,
    check_names,
    check_seed,
    check_stop,
    end_ids,
    pad_id,
    sampling_params,
)
from rlhfjax.data.batches import left_padded, right_padded
from rlhfjax.errors import ConfigError
from rlhfjax.generation import BeamParams, Engine, Programs, Room, SamplingParams, Speculation, beam_search
from rlhfjax.layout import laid_out_on
from rlhfjax.models import DecoderConfig, EncoderDecoder, EncoderDecoderConfig, SequenceModel
from rlhfjax.sharding import row_shards
from rlhfjax.sharding.activations import layout_of
from rlhfjax.sharding.sampling import sampling_on
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.training.checkpoint import SCALAR, read_meta
from rlhfjax.types import Params, PromptBatch

_MOST = 2**20  # responses of one call
_STEEPEST = 100.0  # beyond this a search asks for length alone
_SCORED = 64  # responses that are scored at a time
_BLOCK = 8  # tokens between two looks for stop strings, where nobody waits for the first


@dataclass(frozen=True)
class Model:
    """A checkpoint in memory: a policy, a reward model or a value model (`role`)."""

    role: str
    network: SequenceModel
    params: Params
    tokenizer: AnyTokenizer | None
    step_dir: Path | None = None  # where it was read from
    mesh: Mesh | None = None  # of several devices, where its parameters lie

    @property
    def config(self) -> DecoderConfig | EncoderDecoderConfig:
        return self.network.config

    def logits(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Next-token logits, float32; `mask` marks real tokens, padding on either side. Scalar models have none."""
        self._expect(scalar=False, what="logits")
        check_ids("tokens", np.asarray(tokens), self.config.vocab_size, axes=2)
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
        **further: Unpack[Further],
    ) -> list[list[Completion]]:
        """`n` responses to each prompt; temperature 0 is greedy. Further keywords are those of `settings.Further`.

        A prompt is a text, a list of ids as they are, a list of messages, or a record such as {"messages": […],
        "tools": […]}; conversations are written as the model was trained on them (`load`).
        The tokens `stop_ids` end a response as the tokenizer's own does. So does any text of `stop`, as soon as the
        response contains it; the response's text is cut before it. Log-probabilities are of the whole distribution at
        this temperature, whatever top_k, top_p and min_p leave of it. A model without a tokenizer takes ids only, stops
        at `stop_ids` alone, and its completions have no text. `speculate` is the number of draft tokens per call, from
        the model's own heads where it has as many, else by lookup in the text; responses stay what they are. Raises
        ConfigError when a prompt and `max_new_tokens` do not fit the model's context, or the arguments make no sense,
        TypeError on a keyword that there is not.
        """
        self._expect(scalar=False, what="generate")
        check_names("generate", further, Further)
        settings: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **further}
        stop, speculate = settings.pop("stop", ()), settings.pop("speculate", 0)
        sampling = sampling_params(self.tokenizer, self.config.vocab_size, max_new_tokens=max_new_tokens, **settings)
        check_stop(stop, self.tokenizer)
        rows = self._prompt_ids(prompts)
        if not n >= 1 or n * len(rows) > _MOST:
            raise ConfigError(
                f"generate: expected n >= 1 and at most {_MOST:,} responses at a time, got n={n} for {len(rows)} "
                "prompts"
            )
        check_seed(seed)
        if not rows:
            return []
        self._check_length(max(map(len, rows)) + max_new_tokens)
        sampling = replace(sampling, speculation=self._speculation(speculate))
        if stop and not speculate:
            made = self._until(rows, sampling, seed, n, stop)
        else:
            made = completions(self.programs.generate(rows, jax.random.key(seed), sampling, n), self.tokenizer)
            if stop and self.tokenizer:
                made = [cut_at(one, self.tokenizer, rows[i // n][-1], stop) for i, one in enumerate(made)]
        return [made[i : i + n] for i in range(0, len(made), n)]

    def stream(self, prompt: Prompt, stop: Sequence[str] = (), seed: int = 0, **settings: Unpack[Settings]) -> Stream:
        """The text of one response in pieces, as it is written; its `completion` says the rest of it.

        It is the text that `generate` gives with these arguments, of which it takes all but `n` and `speculate`. Where
        nobody asks for more, no more is written. Raises as `generate`.
        """
        self._expect(scalar=False, what="stream")
        check_names("stream", settings, Settings)
        asked = sampling_params(self.tokenizer, self.config.vocab_size, **settings)
        [row] = self._prompt_ids([prompt])
        self._check_length(len(row) + asked.max_new_tokens)
        return self._opened(self.programs.room(1, len(row), asked)).submit(row, stop, seed, **settings)

    def session(self, slots: int = 8, context: int | None = None, top_log_probs: int = 0, block: int = 1) -> Session:
        """Room for `slots` responses at a time to prompts that come and go (`Session.submit`).

        A prompt and its response have `context` tokens at most together (None: as many as the model can read).
        """
        room = self.room(slots, context, top_log_probs)
        if block < 1:
            raise ConfigError(f"session: expected block >= 1, got {block}")
        return self._opened(room, block)

    def room(self, slots: int, context: int | None = None, top_log_probs: int = 0) -> Room:
        """What fits into a session of so many slots. Raises ConfigError as `session`."""
        self._expect(scalar=False, what="session")
        most = self.config.context if context is None else context
        if not 1 <= slots <= _MOST or not 2 <= most <= self.config.context:
            raise ConfigError(
                f"session: expected slots >= 1 and context of 2 to {self.config.context}, got slots={slots}, "
                f"context={context}"
            )
        shared = most if isinstance(self.config, DecoderConfig) else None
        return Room(slots, most, most, shared, top_log_probs=top_log_probs)

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
        stop, *others = end_ids(self.tokenizer)
        search = BeamParams(max_new_tokens, stop, pad_id(self.tokenizer), beams, length_penalty, tuple(others))
        found = self._beam_search(self.params, self._prompt_batch(rows, max_new_tokens), search)
        return completions(found, self.tokenizer)

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
        known = self.tokenizer, self.config.vocab_size
        pairs = [pair_ids(*known, str(i), *pair) for i, pair in enumerate(zip(prompts, responses, strict=True))]
        return np.concatenate([self._scored(pairs[i : i + _SCORED]) for i in range(0, len(pairs), _SCORED)])

    def export(self, target: str | Path, dtype: str = "float32", force: bool = False) -> None:
        """Write a Hugging Face directory with a model card, and proof that what was written computes the same.

        Raises ConfigError when `target` holds something (an earlier export is replaced with `force`) or transformers
        has no such model, IntegrityError when what is read back computes something else.
        """
        from rlhfjax.interop.exporting import export_model
        from rlhfjax.transfer import lineage

        what, origin = self.role, None
        if self.step_dir:
            what, origin = read_meta(self.step_dir)["serve"], lineage(self.step_dir)
        settings = {"dtype": dtype, "force": force, "lineage": origin}
        export_model(Path(target), what, self.network, self.params, self.tokenizer, **settings)

    @cached_property
    def _logits(self):
        if isinstance(self.network, EncoderDecoder):
            raise ConfigError("logits: expected a decoder, got an encoder–decoder, whose logits are of a response")
        return self.compiled(self.network.logits)

    @cached_property
    def _scores(self):
        return self.compiled(self.network.scores)

    @cached_property
    def programs(self) -> Programs:
        """What samples from this model, compiled as it is needed."""
        sampled = partial(sampling_on, self.mesh) if self.mesh else lambda program: program
        return Programs(self.network, self.params, laid_out=sampled)

    def compiled_as(self, other: "Model") -> "Model":
        """This model with the programs that another of its shape has compiled for sampling."""
        made = replace(self)
        made.__dict__["programs"] = other.programs.over(self.params)
        return made

    @cached_property
    def _beam_search(self):
        def search(params: Params, prompts: PromptBatch, settings: BeamParams) -> Any:
            return beam_search(self.network, params, prompts, settings)

        return jax.jit(sampling_on(self.mesh, search) if self.mesh else search, static_argnums=2)

    def compiled(self, program: Callable[..., Any], donate: int | None = None) -> Callable[..., Any]:
        """A jitted program of arrays, on all the devices of the mesh, which share its rows; one may be `donate`d."""
        laid_out = laid_out_on(layout_of(self.mesh), program) if self.mesh else program
        return jax.jit(laid_out, donate_argnums=() if donate is None else donate)

    def _opened(self, room: Room, block: int = 1) -> Session:
        return Session(Engine(self.programs, room, block), self.tokenizer, self.config.vocab_size)

    def _until(
        self, rows: list[list[int]], sampling: SamplingParams, seed: int, n: int, stop: Sequence[str]
    ) -> list[Completion]:
        """`n` responses to each row, none of which is written further than to its first stop string."""
        room = self.programs.room(n * len(rows), max(map(len, rows)), sampling)
        session = self._opened(room, _BLOCK)
        streams = [session.start(row, sampling, stop, seed, i * n + j) for i, row in enumerate(rows) for j in range(n)]
        while session.busy:
            session.step()
        return [stream.completion for stream in streams]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        count = len(pairs)
        if self.mesh:  # rows that all devices have as many of
            pairs = [*pairs, *[pairs[-1]] * (-count % row_shards(self.mesh))]
        tokens, mask = right_padded([prompt + response for prompt, response in pairs], pad_id(self.tokenizer))
        self._check_length(tokens.shape[1])
        lengths = np.asarray([len(prompt) for prompt, _ in pairs], np.int32)
        return np.asarray(self._scores(self.params, tokens, mask, lengths))[:count]

    def _prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return prompt_ids(self.tokenizer, self.config.vocab_size, prompts)

    def _prompt_batch(self, rows: list[list[int]], max_new_tokens: int) -> PromptBatch:
        tokens, mask = left_padded(rows, pad_id(self.tokenizer))
        self._check_length(tokens.shape[1] + max_new_tokens)
        return PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(len(tokens), dtype=jnp.int32))

    def _speculation(self, tokens: int) -> Speculation | None:
        if not tokens:
            return None
        if not 0 <= tokens <= self.config.context or not isinstance(self.config, DecoderConfig):
            raise ConfigError(
                "speculate: expected a decoder, and 0 tokens or more up to its context, got "
                f"{self.config.family}, {tokens}"
            )
        return Speculation("heads" if self.config.mtp_heads >= tokens else "ngram", tokens)

    def _expect(self, scalar: bool, what: str) -> None:
        if (self.role in SCALAR) != scalar:
            kind = "a reward or value model" if scalar else "a policy"
            raise ConfigError(f"{what}: expected {kind}, got a {self.role} checkpoint; load another stage")

    def _check_length(self, length: int) -> None:
        if length > self.config.context:
            raise ConfigError(f"expected at most {self.config.context} tokens (the model's context), got {length}")
