"""The encoder–decoder of 2017 as functions of (parameters, arrays), with the interface of `LanguageModel`.

The encoder reads the prompt, the decoder writes the response: its input is the start token and the response, so slot
t has read t response tokens and predicts the next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax import layout
from rlhfjax.layout import lay
from rlhfjax.models.heads import apply_head, init_head, with_head
from rlhfjax.models.interface import positions_of
from rlhfjax.models.layers import at_columns
from rlhfjax.models.transformer_2017 import EncoderDecoderConfig, Transformer
from rlhfjax.types import Params, TokenBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossCache:
    """Keys and values of every decoder layer, [L, B, S, H, D], and of the encoder's output, [L, B, P, H, D].

    The first `lengths` slots of a row are its own: the start token and its response.
    """

    keys: Array
    values: Array
    cross_keys: Array
    cross_values: Array
    prompt_mask: Bool[Array, "B P"]
    lengths: Int[Array, "B"]

    def take(self, rows: Int[Array, "N"]) -> "CrossCache":
        """The cache of these rows, in this order; a row may come several times."""
        return self._map(lambda x, axis: jnp.take(x, rows, axis=axis), self)

    def repeat(self, count: int) -> "CrossCache":
        """The cache with every row `count` times, beside each other."""
        return self._map(lambda x, axis: jnp.repeat(x, count, axis=axis), self)

    def put(self, part: "CrossCache", rows: Int[Array, "N"]) -> "CrossCache":
        """This cache with the rows of one with at most as many slots at `rows`, distinct; those beyond the end go
        nowhere.
        """

        def write(mine: Array, axis: int, theirs: Array) -> Array:
            place = (slice(None),) * axis + (rows,) + tuple(slice(0, size) for size in theirs.shape[axis + 1 :])
            if mine.dtype == bool:  # a shorter prompt leaves nothing of the one before
                theirs = jnp.pad(theirs, ((0, 0), (0, mine.shape[1] - theirs.shape[1])))
                place = (rows,)
            return mine.at[place].set(theirs, mode="drop", unique_indices=True)

        return self._map(write, self, part)

    @staticmethod
    def _map(function: Any, *caches: "CrossCache") -> "CrossCache":
        """`function` of the arrays of each field and the axis of their rows."""
        fields = zip(*(vars(cache).items() for cache in caches), strict=True)
        made = {}
        for (name, first), *others in fields:
            made[name] = function(first, int(first.ndim == 5), *(other for _, other in others))
        return CrossCache(**made)


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

    def batch_hidden(
        self,
        params: Params,
        batch: TokenBatch,
        dropout: float = 0.0,
        key: jax.Array | None = None,
        read: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of a packed batch, each predicting the next token; what is no target is the prompt of
        what follows it. With `read` those at these columns of each row alone, [B, N, D]."""
        prompt = (batch.segments > 0) & ~batch.loss_mask
        rows = (batch.tokens, batch.positions, batch.segments)
        hidden = self._joined_hidden(params, *rows, prompt, dropout, key)
        return hidden if read is None else at_columns(hidden, read)

    def shares_prompts(self, width: int) -> bool:
        """Never: each prompt is encoded with the response that attends to it."""
        return False

    def unembedding(self, params: Params) -> tuple[Array, dict[str, Any]]:
        """What hidden states are multiplied with to make logits, and the form of it (`functional/vocabulary.py`)."""
        return params["embed"]["embedding"], {}

    def scalar(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """The head of a scalar model at each hidden state, float32."""
        return apply_head(params["head"], hidden)

    def token_logits(
        self, params: Params, batch: TokenBatch, dropout: float = 0.0, key: jax.Array | None = None
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one of a packed batch."""
        return self.unembed(params, self.batch_hidden(params, batch, dropout, key))

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

    def arrange(self, params: Params, rows: int | None = None) -> Params:
        """The parameters as sampling reads them: as they are, on several devices where those read them."""
        devices = layout.current()
        return params if devices is None else devices.weights(params)

    def empty_cache(self, rows: int, prompt: int, new_tokens: int) -> CrossCache:
        """A cache for prompts of up to `prompt` tokens and responses of up to `new_tokens`, without a token."""
        c = self.config

        def empty(slots: int) -> Array:
            return lay("cross_cache", jnp.zeros((c.layers, rows, slots, c.heads, c.head_dim), c.compute_dtype))

        own, crossed = empty(new_tokens + 1), empty(prompt)  # one slot more for the start token
        mask, lengths = jnp.zeros((rows, prompt), bool), jnp.zeros(rows, jnp.int32)
        return CrossCache(own, own, crossed, crossed, mask, lengths)

    def prefill(
        self, params: Params, prompt: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], new_tokens: int
    ) -> tuple[Float[Array, "B V"], CrossCache]:
        """Logits of the first response token, and a cache with room for `new_tokens`: the encoder runs once, here."""
        memory = self._apply("encode", params, prompt, positions_of(prompt_mask), prompt_mask.astype(jnp.int32))
        cache = self.empty_cache(len(prompt), 0, new_tokens)
        start = jnp.full(len(prompt), self.config.start_id, jnp.int32)
        return self._append(params, (cache.keys, cache.values), memory, prompt_mask, cache.lengths, start)

    def decode(
        self, params: Params, cache: CrossCache, tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], CrossCache]:
        """Append one token per row; logits of the next. A row that is full keeps nothing more."""
        kept = (cache.keys, cache.values, cache.cross_keys, cache.cross_values)
        return self._append(params, kept, None, cache.prompt_mask, cache.lengths, tokens)

    def _append(self, params, kept, memory, prompt_mask, lengths, tokens):
        ones = jnp.ones_like(tokens)[:, None]
        args = (tokens[:, None], lengths[:, None], ones, memory, prompt_mask.astype(jnp.int32), kept)
        hidden, (keys, values, crossed_keys, crossed_values) = self._apply("decode", params, *args)
        keys, values, crossed_keys, crossed_values = (
            lay("cross_cache", x) for x in (keys, values, crossed_keys, crossed_values)
        )
        cache = CrossCache(keys, values, crossed_keys, crossed_values, prompt_mask, lengths + 1)
        return self.unembed(params, hidden[:, 0]), cache
