"""Models as the rest of the program sees them: functions of (parameters, arrays).

`response_logits(params, prompt, …)` and `response_values` put a left-padded prompt before a right-padded response, so
that nobody else has to know where in a sequence the response begins.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models import decoding
from rlhfjax.models.attention import takes_prefixes
from rlhfjax.models.cache import Cache, empty_cache
from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.decoder import Decoder
from rlhfjax.models.frozen import in_compute_type
from rlhfjax.models.heads import apply_head, init_head, with_head
from rlhfjax.models.lora import merge
from rlhfjax.models.multi_token import ahead, init_heads
from rlhfjax.models.quantized import is_quantized, quantize
from rlhfjax.models.sampling_weights import Weights, arrange, stacks_layers
from rlhfjax.target import current
from rlhfjax.types import Params, Routing, TokenBatch


def positions_of(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """0, 1, 2 … on real tokens wherever the padding is: cumsum(mask) - mask; 0 on left padding."""
    counts = jnp.cumsum(mask.astype(jnp.int32), axis=-1)
    return jnp.maximum(counts - 1, 0)


def to_front(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Rows whose real tokens, which are next to each other, begin in the first column."""
    shift = jnp.argmax(mask, axis=1).astype(jnp.int32)[:, None]
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    return jnp.take_along_axis(tokens, (columns + shift) % tokens.shape[1], axis=1)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder as pure functions. Scalar models share them with parameters {"decoder": …, "head": …}.

    `precision` is that of sampling: full | int8_weights | int8_cache | int8 (both). Nothing else reads it. What is
    `routed` keeps in its caches which experts each token was sent to.
    """

    config: DecoderConfig
    precision: str = "full"
    routed: bool = False

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters, layers stacked on the first axis."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        c = self.config
        params: Params = Decoder(c).init(key, tokens, tokens, tokens + 1)["params"]
        if not c.mtp_heads:
            return params
        return params | {"mtp_heads": init_heads(jax.random.fold_in(key, 1), c.mtp_heads, c.width, c.init_std)}

    def init_scalar(self, key: jax.Array) -> Params:
        """Fresh parameters of a scalar model of the same shape."""
        return with_head(self.init(key), init_head(key, self.config.width))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        dropout: float = 0.0,
        key: jax.Array | None = None,
        read: Int[Array, "B N"] | None = None,
        prefixes: Int[Array, "B T"] | None = None,
        routes: Int[Array, "B T L K"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; tokens attend to earlier tokens of the same segment. Dropout needs a key.

        With `read` those at these columns of each row alone, [B, N, D]; `prefixes` and `routes` as in `TokenBatch`.
        """
        rngs = None if key is None else {"dropout": key}
        how: dict[str, Any] = {"dropout": dropout if key is not None else 0.0, "rngs": rngs}
        return self._apply("hidden", params, tokens, positions, segments, read, prefixes, routes, **how)

    def batch_hidden(
        self,
        params: Params,
        batch: TokenBatch,
        dropout: float = 0.0,
        key: jax.Array | None = None,
        read: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states of a packed batch; the one at a token predicts what comes after it. `read` as above."""
        shown = batch.prefixes, batch.routes
        return self.hidden(params, batch.tokens, batch.positions, batch.segments, dropout, key, read, *shown)

    def rerouted(self, params: Params, batch: TokenBatch) -> Float[Array, "B T"]:
        """The share of layers that route each token otherwise than `batch.routes` says; -1 where that is not known.

        Every layer chooses for itself: it reads what layers give that chose for themselves, too.
        """
        config = replace(self.config, capacity_factor=None)
        inputs = batch.tokens, batch.positions, batch.segments, None, batch.prefixes
        how = {"method": "hidden", "mutable": ["rerouted"], "routes": batch.routes}
        _, sown = Decoder(config).apply({"params": params}, *inputs, **how)
        (layers,) = jax.tree.leaves(sown)
        known = layers >= 0
        share = jnp.where(known, layers, 0.0).sum(axis=0) / jnp.maximum(known.sum(axis=0), 1).astype(jnp.float32)
        return jnp.where(known.any(axis=0), share, -1.0)

    def shares_prompts(self, width: int) -> bool:
        """Whether rows of so many tokens may hold a prompt once for several responses (`TokenBatch.prefixes`)."""
        return takes_prefixes(self.config.attention, self.config.window, width)

    def unembedding(self, params: Params) -> tuple[Array, dict[str, Any]]:
        """What hidden states are multiplied with to make logits, and the form of it (`functional/vocabulary.py`)."""
        c = self.config
        table = params["embed"]["embedding"] if c.tied else merge(params["unembed"], c.lora_alpha)["kernel"]
        table = table if c.logit_divisor == 1 else table / c.logit_divisor
        return table, {"tied": c.tied, "softcap": c.logit_softcap}

    def scalar(self, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B"]:
        """The head of a scalar model at each hidden state, float32."""
        return apply_head(params["head"], hidden)

    def hidden_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """`hidden` of a mixture of experts in training: within the experts' capacity, with what the routers did."""
        rngs = None if key is None else {"dropout": key}
        decoder = Decoder(self.config, dropout if key is not None else 0.0)
        hidden, sown = decoder.apply(
            {"params": self._read(params)}, tokens, positions, segments, method="hidden", rngs=rngs, mutable=["routing"]
        )
        return hidden, sown["routing"]["blocks"]["experts"]["of"]  # pyright: ignore[reportReturnType]

    def _apply(self, method: str, params: Params, *args: Any, dropout: float = 0.0, rngs: Any = None) -> Any:
        # Capacity is for training: what a model says of a token must not depend on how long or full its row is.
        config = replace(self.config, capacity_factor=None)
        return Decoder(config, dropout).apply({"params": self._read(params)}, *args, method=method, rngs=rngs)

    def _read(self, params: Params) -> Params:
        """Parameters as the loop over layers reads them.

        XLA casts matrices before that loop on a TPU, and not in it. Where that is said, their gradients, which are
        products of that type, are stacked in it as well: half the memory, and the same numbers.
        """
        if current().platform != "tpu":
            return params
        return params | {"blocks": in_compute_type(self.config, params["blocks"])}

    def unembed(self, params: Params | Weights, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states to float32 logits."""
        if isinstance(params, Weights):
            return decoding.unembed(self.config, params, hidden)
        return self._apply("logits", params, hidden)

    def ahead(self, params: Params | Weights, hidden: Float[Array, "*B D"]) -> Float[Array, "N *B D"]:
        """Hidden states whose logits are those of the tokens 2, 3 … N+1 ahead, from heads that the model has."""
        return ahead((params.ends if isinstance(params, Weights) else params)["mtp_heads"], hidden)

    def logits(self, params: Params, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of a padded batch, padding on either side."""
        return self.unembed(params, self.hidden(params, tokens, positions_of(mask), mask.astype(jnp.int32)))

    def _response_hidden(self, params, prompt, prompt_mask, response, response_mask):
        tokens = jnp.concatenate([prompt, response], axis=1)
        mask = jnp.concatenate([prompt_mask, response_mask], axis=1)
        return self.hidden(params, tokens, positions_of(mask), mask.astype(jnp.int32))

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
        return self.unembed(params, hidden[:, prompt.shape[1] - 1 : -1])

    def response_values(self, params: Params, prompt, prompt_mask, response, response_mask) -> Float[Array, "B R"]:
        """The scalar head before each response token is chosen: V(s_t), the state that holds tokens < t."""
        hidden = self._response_hidden(params["decoder"], prompt, prompt_mask, response, response_mask)
        return apply_head(params["head"], hidden[:, prompt.shape[1] - 1 : -1])

    def response_scores(self, params: Params, prompt, prompt_mask, response, response_mask) -> Float[Array, "B"]:
        """The scalar head at the last real token of each response."""
        hidden = self._response_hidden(params["decoder"], prompt, prompt_mask, response, response_mask)
        last = prompt.shape[1] + jnp.maximum(response_mask.sum(axis=1) - 1, 0)
        return apply_head(params["head"], jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]

    def scores(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        prompt_lengths: Int[Array, "B"] | None = None,
        dropout: float = 0.0,
        key: jax.Array | None = None,
    ) -> Float[Array, "B"]:
        """The scalar head at the last real token of each row, padding on either side.

        A decoder reads a prompt and its response alike; where one ends matters to models of two halves.
        """
        last = (mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1))[:, None]
        inputs = tokens, positions_of(mask), mask.astype(jnp.int32)
        return apply_head(params["head"], self.hidden(params["decoder"], *inputs, dropout, key, last))[:, 0]

    def arrange(self, params: Params | Weights, rows: int | None = None) -> Weights:
        """The weights as sampling reads them, `rows` at a time; what takes parameters below takes these too."""
        if self.precision in ("int8", "int8_weights") and not isinstance(params, Weights) and not is_quantized(params):
            params = quantize(merge(params, self.config.lora_alpha))
        return arrange(self.config, params, rows)

    def empty_cache(self, rows: int, prompt: int, new_tokens: int) -> Cache:
        """A cache for prompts of up to `prompt` tokens and responses of up to `new_tokens`, without a token."""
        int8 = self.precision in ("int8", "int8_cache")
        return empty_cache(self.config, rows, prompt + new_tokens, int8, stacks_layers(), self.routed)

    def prefill(
        self, params: Params | Weights, prompt: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], new_tokens: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the first response token, and a cache with room for `new_tokens` more; padding on either side."""
        weights = self.arrange(params)
        hidden, cache = self.start(weights, prompt, prompt_mask, new_tokens)
        return decoding.unembed(self.config, weights, hidden), cache

    def start(
        self, params: Params | Weights, prompt: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], new_tokens: int
    ) -> tuple[Float[Array, "B D"], Cache]:
        """`prefill` with the hidden state of each row's last token in the place of its logits."""
        weights, lengths = self.arrange(params), prompt_mask.sum(axis=1, dtype=jnp.int32)
        front, int8 = to_front(prompt, prompt_mask), self.precision in ("int8", "int8_cache")
        return decoding.prefill(self._sampled, weights, front, lengths, int8, new_tokens, self.routed)

    def decode(
        self, params: Params | Weights, cache: Cache, tokens: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Append one token per row; logits of the next. A row that is full keeps nothing more."""
        weights = self.arrange(params)
        hidden, cache = self.extend(weights, cache, tokens[:, None], jnp.ones_like(tokens))
        return decoding.unembed(self.config, weights, hidden[:, 0]), cache

    def extend(
        self, params: Params | Weights, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Append the first `counts` of T tokens to each row behind its own end; hidden states of them all.

        `unembed` makes logits of them. To take tokens back, replace the cache's `lengths` by smaller ones.
        """
        return decoding.extend(self._sampled, self.arrange(params), cache, tokens, counts)

    @property
    def _sampled(self) -> DecoderConfig:
        return replace(self.config, capacity_factor=None)
