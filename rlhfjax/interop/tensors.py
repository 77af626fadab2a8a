"""Our parameters and the tensors of transformers' models: names, shapes, and how one is seen as the other."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rlhfjax.models import DecoderConfig


@dataclass(frozen=True)
class Weight:
    """One parameter here and there, of one layer.

    `path` is ours, `name` theirs with {layer} (and {expert}) to fill in, `shape` theirs. `to_ours` takes their tensor,
    `to_theirs` our parameter; both only look at it in another way, whatever its float type. Where `part` is (i, n),
    their tensor is n of ours side by side on its last axis: `to_ours` takes the whole tensor, `to_theirs` gives part i.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    part: tuple[int, int] = (0, 1)


def same(path: str, name: str, shape: tuple[int, ...]) -> Weight:
    """A tensor that is alike here and there."""
    return Weight(path, name, shape, lambda x: x, lambda x: x)


def linear(path: str, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Weight:
    """A matrix of torch.nn.Linear, [outputs, inputs]; ours is [*inputs, *outputs]."""
    rows, columns = math.prod(outputs), math.prod(inputs)
    return Weight(
        path, name, (rows, columns), lambda x: x.T.reshape(inputs + outputs), lambda x: x.reshape(columns, rows).T
    )


def flattened(path: str, name: str, shape: tuple[int, ...]) -> Weight:
    """A vector, ours with several axes."""
    return Weight(path, name, (math.prod(shape),), lambda x: x.reshape(shape), lambda x: x.reshape(-1))


def columns(path: str, name: str, ours: tuple[int, ...], axis: int, part: tuple[int, int] = (0, 1)) -> Weight:
    """A matrix or vector as GPT-2 has them, with the inputs first; our outputs begin at `axis`."""
    index, count = part
    inputs, size = (math.prod(ours[:axis]),) if axis else (), math.prod(ours[axis:])
    here = slice(index * size, (index + 1) * size)
    theirs = (*inputs, count * size)
    return Weight(path, name, theirs, lambda x: x[..., here].reshape(ours), lambda x: x.reshape(*inputs, size), part)


def gpt_weights(c: DecoderConfig, tokens: str, positions: str, final_norm: str | None) -> tuple[Weight, ...]:
    """GPT and GPT-2: query, key and value are one matrix."""

    def block() -> Iterator[Weight]:
        for i, ours in enumerate(("query", "key", "value")):
            at, path, shape = "transformer.h.{layer}.attn.c_attn", f"blocks/attention/{ours}", (c.heads, c.head_dim)
            yield columns(f"{path}/kernel", f"{at}.weight", (c.width, *shape), 1, (i, 3))
            yield columns(f"{path}/bias", f"{at}.bias", shape, 0, (i, 3))
        for path, at, inputs, output in (
            ("attention/out", "attn.c_proj", (c.heads, c.head_dim), c.width),
            ("mlp/up", "mlp.c_fc", (c.width,), c.mlp_width),
            ("mlp/down", "mlp.c_proj", (c.mlp_width,), c.width),
        ):
            at = "transformer.h.{layer}." + at
            yield columns(f"blocks/{path}/kernel", f"{at}.weight", (*inputs, output), len(inputs))
            yield same(f"blocks/{path}/bias", f"{at}.bias", (output,))
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            yield from _layer_norm(f"blocks/{ours}", "transformer.h.{layer}." + theirs, c.width)

    found = [same("embed/embedding", f"transformer.{tokens}.weight", (c.vocab_size, c.width))]
    found += [same("positions/embedding", f"transformer.{positions}.weight", (c.context, c.width)), *block()]
    if final_norm:
        found += _layer_norm("final_norm", f"transformer.{final_norm}", c.width)
    return (*found, *_unembedding(c))


def llama_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Llama and everything that is named like it: Mistral, Qwen, Gemma."""
    return (
        same("embed/embedding", "model.embed_tokens.weight", (c.vocab_size, c.width)),
        *llama_attention(c),
        *llama_norms(c),
        *llama_feed_forward(c),
        same("final_norm/scale", "model.norm.weight", (c.width,)),
        *_unembedding(c),
    )


def llama_attention(c: DecoderConfig) -> Iterator[Weight]:
    """Projections, their biases and the norms of queries and keys."""
    at = "model.layers.{layer}.self_attn."
    for name, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads)):
        path, theirs = f"blocks/attention/{name}", f"{at}{name[0]}_proj"
        yield linear(f"{path}/kernel", f"{theirs}.weight", (c.width,), (heads, c.head_dim))
        if c.qkv_biases:
            yield flattened(f"{path}/bias", f"{theirs}.bias", (heads, c.head_dim))
    yield linear("blocks/attention/out/kernel", f"{at}o_proj.weight", (c.heads, c.head_dim), (c.width,))
    if c.qk_norm:
        yield same("blocks/attention/query_norm/scale", f"{at}q_norm.weight", (c.head_dim,))
        yield same("blocks/attention/key_norm/scale", f"{at}k_norm.weight", (c.head_dim,))


def llama_norms(c: DecoderConfig) -> Iterator[Weight]:
    """The norms around the blocks; their names change their meaning where there are four."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.norm_place == "sandwich":
        names |= {"attention_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
        names |= {"mlp_post_norm": "post_feedforward_layernorm"}
    for ours, theirs in names.items():
        yield same(f"blocks/{ours}/scale", "model.layers.{layer}." + f"{theirs}.weight", (c.width,))


def llama_feed_forward(c: DecoderConfig) -> Iterator[Weight]:
    """The gated feed-forward block."""
    for name, inputs, outputs in (
        ("gate", c.width, c.mlp_width),
        ("up", c.width, c.mlp_width),
        ("down", c.mlp_width, c.width),
    ):
        theirs = "model.layers.{layer}.mlp." + f"{name}_proj.weight"
        yield linear(f"blocks/mlp/{name}/kernel", theirs, (inputs,), (outputs,))


def _layer_norm(path: str, name: str, width: int) -> Iterator[Weight]:
    yield same(f"{path}/scale", f"{name}.weight", (width,))
    yield same(f"{path}/bias", f"{name}.bias", (width,))


def _unembedding(c: DecoderConfig) -> Iterator[Weight]:
    if not c.tied:
        yield linear("unembed/kernel", "lm_head.weight", (c.width,), (c.vocab_size,))
