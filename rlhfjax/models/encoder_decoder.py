"""The encoder–decoder of 2017 as functions of (parameters, arrays), with the interface of `LanguageModel`.

The encoder reads the prompt, the decoder writes the response: its input is the start token and the response, so slot
t has read t response tokens and predicts the next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models.heads import apply_head, init_head, with_head
from rlhfjax.models.interface import positions_of
from rlhfjax.models.transformer_2017 import EncoderDecoderConfig, Transformer
from rlhfjax.types import Params, TokenBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache:
    """Keys and values of every decoder layer, [L, B, S, H, D], and of the encoder's output, [L, B, P, H, D]."""

    keys: Array
    values: Array
    cross_keys: Array
    cross_values: Array
    prompt_mask: Bool[Array, "B P"]
    index: Int[Array, ""]

    def take(self, rows: Int[Array, "N"]) -> "CrossCache":
        """The cache of these rows, in this order; a row may come several times."""
        return CrossCache(
            self.keys[:, rows],
            self.values[:, rows],
            self.cross_keys[:, rows],
            self.cross_values[:, rows],
            self.prompt_mask[rows],
            self.index,
        )


@dataclass(frozen=True)
class EncoderDecoder:
    """An encoder–decoder as pure functions. Scalar models share them with parameters {"decoder": …, "head": …}."""

    config: EncoderDecoderConfig

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, layers stacked on the first axis: Xavier-uniform matrices, embeddings N(0, 1/D)."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        return Transformer(self.config).init(key, tokens, tokens, tokens + 1)["params"]

    def init_scalar(self, key: jax.Array) -> Params:
        """Fresh parameters of a scalar model of the same shape."""
        return with_head(self.init(key), init_head(key, self.config.width))

    def _apply(
        self, method: str, params: Params, *args: Any, dropout: float = 0.0, key: jax.Array | None = None
    ) -> Any:
        rngs = None if key is None else {"dropout": key}
        model = Transformer(self.config, dropout if key is not None else 0.0)
        return model.apply({"params": params}, *args, method=method, rngs=rngs)

    def unembed(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states to float32 logits."""
        return self._apply("logits", params, hidden)

    def _joined_hidden(self, params, tokens, positions, segments, prompt, dropout, key) -> Float[Array, "B T D"]:
        """Hidden states of rows that hold prompt and response joined, and perhaps several such pairs as segments.

        Both halves read the whole row and see their own part of it by masks. The slot of the last prompt token is the
        decoder's first, so that slot t predicts token t+1 as in a decoder alone.
        """
        same_next = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
        real = segments > 0
        response = real & ~prompt
        starts = prompt & jnp.pad(response[:, 1:], ((0, 0), (0, 1))) & same_next
        written = starts | response
        slots = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        since_start = slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)
        read, write = jnp.where(prompt, segments, 0), jnp.where(written, segments, 0)
        read_key, write_key = (None, None) if key is None else jax.random.split(key)
        memory = self._apply("encode", params, tokens, positions, read, dropout=dropout, key=read_key)
        inputs = jnp.where(starts, self.config.start_id, tokens)
        args = (inputs, since_start, write, memory, read)
        return self._apply("decode", params, *args, dropout=dropout, key=write_key)[0]

    def token_logits(
        self, params: Params, batch: TokenBatch, dropout: float = 0.0, key: jax.Array | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one of a packed batch; what is no target is the prompt of what follows it."""
        prompt = (batch.segments > 0) & ~batch.loss_mask
        rows = (batch.tokens, batch.positions, batch.segments)
        return self.unembed(params, self._joined_hidden(params, *rows, prompt, dropout, key))

    def scores(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        prompt_lengths: Int[Array, "B"],
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> Float[Array, "B"]:
        """The scalar head at the last real token of each row, which holds a prompt and its response joined."""
        positions = positions_of(mask)
        prompt = mask & (positions < prompt_lengths[:, None])
        rows = (tokens, positions, mask.astype(jnp.int32))
        hidden = self._joined_hidden(params["decoder"], *rows, prompt, dropout, key)
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        return apply_head(params["head"], jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]

    def _response_hidden(self, params, prompt, prompt_mask, response, response_mask) -> Float[Array, "B R1 D"]:
        """R + 1 hidden states: slot t has read the start token and t response tokens."""
        read = prompt_mask.astype(jnp.int32)
        memory = self._apply("encode", params, prompt, positions_of(prompt_mask), read)
        tokens = jnp.pad(response, ((0, 0), (1, 0)), constant_values=self.config.start_id)
        written = jnp.pad(response_mask, ((0, 0), (1, 0)), constant_values=True)
        args = (tokens, positions_of(written), written.astype(jnp.int32), memory, read)
        return self._apply("decode", params, *args)[0]

    def response_logits(
        self,
        params: Params,
        prompt: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        response: Int[Array, "B R"],
        response_mask: Bool[Array, "B R"],
    ) -> Float[Array, "B R V"]:
        """Logits that predict each response token."""
        hidden = self._response_hidden(params, prompt, prompt_mask, response, response_mask)
        return self.unembed(params, hidden[:, :-1])

    def response_values(self, params: Params, prompt, prompt_mask, response, response_mask) -> Float[Array, "B R"]:
        """The scalar head before each response token is chosen: V(s_t), the state that holds tokens < t."""
        hidden = self._response_hidden(params["decoder"], prompt, prompt_mask, response, response_mask)
        return apply_head(params["head"], hidden[:, :-1])

    def response_scores(self, params: Params, prompt, prompt_mask, response, response_mask) -> Float[Array, "B"]:
        """The scalar head at the last real token of each response."""
        hidden = self._response_hidden(params["decoder"], prompt, prompt_mask, response, response_mask)
        last = response_mask.sum(axis=1)
        return apply_head(params["head"], jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]

    def prefill(
        self, params: Params, prompt: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], new_tokens: int
    ) -> tuple[Float[Array, "B V"], CrossCache]:
        """Logits of the first response token, and a cache with room for `new_tokens`: the encoder runs once, here."""
        c = self.config
        memory = self._apply("encode", params, prompt, positions_of(prompt_mask), prompt_mask.astype(jnp.int32))
        # One slot more for the start token.
        own = jnp.zeros((c.layers, len(prompt), new_tokens + 1, c.heads, c.head_dim), c.compute_dtype)
        start = jnp.full(len(prompt), c.start_id, jnp.int32)
        return self._append(params, (own, own), memory, prompt_mask, jnp.int32(0), start)

    def decode(
        self, params: Params, cache: CrossCache, tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], CrossCache]:
        """Append one token a row; logits of the next."""
        kept = (cache.keys, cache.values, cache.cross_keys, cache.cross_values)
        return self._append(params, kept, None, cache.prompt_mask, cache.index, tokens)

    def _append(self, params, kept, memory, prompt_mask, index, tokens):
        ones = jnp.ones_like(tokens)[:, None]
        slots = jnp.ones((len(tokens), kept[0].shape[2]), jnp.int32)
        args = (tokens[:, None], ones * index, ones, memory, prompt_mask.astype(jnp.int32), slots, kept, index)
        hidden, (keys, values, crossed_keys, crossed_values) = self._apply("decode", params, *args)
        cache = CrossCache(keys, values, crossed_keys, crossed_values, prompt_mask, index + 1)
        return self.unembed(params, hidden[:, 0]), cache
