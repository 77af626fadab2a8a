"""One forward pass in which no more of a decoder is in memory than a layer of it, or a part of its vocabulary."""

from dataclasses import replace
from functools import cached_property

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhfjax.models.configuration import DecoderConfig
from rlhfjax.models.decoder import Decoder
from rlhfjax.models.heads import apply_head
from rlhfjax.models.interface import positions_of
from rlhfjax.models.layers import Block, Sight, kinds
from rlhfjax.models.rotary import turns
from rlhfjax.types import Params


class Layerwise:
    """A decoder over a padded batch, layer by layer, in float32: what `LanguageModel.logits` and `scores` compute."""

    def __init__(self, config: DecoderConfig, mask: Bool[Array, "B T"]):
        self._config = replace(config, dtype="float32", remat="none", capacity_factor=None)
        self._mask, self._positions = mask, positions_of(mask)
        self._kinds = kinds(self._config)

    def begin(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What the first layer reads. `params` are `embed` with some rows, which `tokens` number, and `positions`."""
        config = replace(self._config, vocab_size=len(params["embed"]["embedding"]))
        if "positions" in params:
            config = replace(config, context=len(params["positions"]["embedding"]))
        made = Decoder(config).apply({"params": params}, tokens, self._positions, method="beginning")
        return jnp.asarray(made, jnp.float32)

    def layer(self, number: int, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """A layer, from its parameters without the axis of layers."""
        return self._block(params, x, jax.tree.map(lambda side: side[number], self._kinds))

    @cached_property
    def _block(self):
        config, sight = self._config, Sight(self._positions, self._mask.astype(jnp.int32), None, {})
        sight = sight._replace(turns=turns(config, self._positions))
        block = Block(config, 0.0, parent=None)
        return jax.jit(lambda params, x, kind: block.apply({"params": params}, x, kind, sight)[0])  # pyright: ignore

    def end(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Final hidden states; `params` hold the final norm, where there is one."""
        return jnp.asarray(Decoder(self._config).apply({"params": params}, x, method="ending"))

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T v"]:
        """Logits of some tokens, of which `params` hold the rows of `embed`, or the columns of `unembed`."""
        rows = params["embed"]["embedding"].shape[0] if self._config.tied else params["unembed"]["kernel"].shape[-1]
        return self._logits(rows)(params, hidden)

    def _logits(self, rows: int):
        if rows not in self._compiled:
            decoder = Decoder(replace(self._config, vocab_size=rows))
            self._compiled[rows] = jax.jit(lambda params, x: decoder.apply({"params": params}, x, method="logits"))
        return self._compiled[rows]

    @cached_property
    def _compiled(self) -> dict:
        return {}

    def scores(self, head: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B"]:
        """The scalar head at the last real token of each row."""
        last = self._mask.shape[1] - 1 - jnp.argmax(self._mask[:, ::-1], axis=1)
        return apply_head(head, jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
