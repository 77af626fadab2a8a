"""Our parameters and the tensors of transformers' models: names, shapes, and how one is seen as the other."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from rlhfjax.leaves import Region, cut
from rlhfjax.models import DecoderConfig


@dataclass(frozen=True)
class Weight:
    """One parameter here and there, of one layer.

    `path` is ours, `name` theirs with {layer} (and {expert}) to fill in, `shape` that of their whole tensor. `look`
    sees our parameter in it, whatever its float type, without a copy, so that one is read and written through it. Where
    the tensor is `shared`, others of ours are in it as well.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    look: Callable[[np.ndarray], np.ndarray]
    shared: bool = False


def tensor_of(weights: Sequence[Weight], ours: Sequence[np.ndarray]) -> np.ndarray:
    """Their tensor, of all parameters that are in it."""
    made = np.empty(weights[0].shape, ours[0].dtype)
    for weight, own in zip(weights, ours, strict=True):
        weight.look(made)[...] = own
    return made


def span(weight: Weight, region: Region) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    """The first element of their tensor that a region of ours is in, one after the last, and how it is seen there."""
    seen = _strides(weight)[region]
    strides = seen.strides
    first = (seen.ctypes.data - _NOTHING.ctypes.data) if seen.size else 0
    last = first + sum((size - 1) * stride for size, stride in zip(seen.shape, strides, strict=True)) + 1

    def see(elements: np.ndarray) -> np.ndarray:
        size = elements.dtype.itemsize
        return as_strided(elements, seen.shape, [size * stride for stride in strides], writeable=False)

    return first, last, see


def box(weight: Weight, region: Region) -> tuple[Region, Callable[[np.ndarray], np.ndarray]]:
    """The block of their tensor that a region of ours is in, with a step on each axis, and how it is seen there.

    Each axis of theirs is cut into some of ours, so that the first and the last element are the block's corners.
    """
    first, last, _ = span(weight, region)
    seen = _strides(weight)[region]
    strides = [stride if size > 1 else 0 for stride, size in zip(seen.strides, seen.shape, strict=True)]
    moves = [np.unravel_index(stride, weight.shape) for stride in strides]
    low, high = (np.unravel_index(element, weight.shape) for element in (first, last - 1))
    steps = [max(math.gcd(*(int(move[axis]) for move in moves)), 1) for axis in range(len(weight.shape))]
    theirs = tuple(slice(int(a), int(b) + 1, step) for a, b, step in zip(low, high, steps, strict=True))

    def see(block: np.ndarray) -> np.ndarray:
        own = [int(np.dot(np.floor_divide(move, steps), block.strides)) for move in moves]
        return as_strided(block, seen.shape, own, writeable=False)

    return theirs, see


def by_span(weight: Weight, region: Region, most: int) -> Iterator[Region]:
    """A region of ours in parts that each are in about `most` elements of theirs, next to each other."""
    seen = _strides(weight)[region]
    outer = int(np.argmax(seen.strides)) if seen.ndim else 0
    chunk = [part.stop - part.start for part in region]
    if seen.ndim:
        chunk[outer] = max(most // max(seen.strides[outer], 1), 1)
    yield from cut(region, chunk, 1)


_NOTHING = np.zeros(1, np.uint8)


def _strides(weight: Weight) -> np.ndarray:
    """How our parameter lies in their tensor, in elements, of which there are none behind it."""
    strides = [math.prod(weight.shape[axis + 1 :]) for axis in range(len(weight.shape))]
    return weight.look(as_strided(_NOTHING, weight.shape, strides, writeable=False))


def same(path: str, name: str, shape: tuple[int, ...]) -> Weight:
    """A tensor that is alike here and there."""
    return Weight(path, name, shape, lambda x: x)


def linear(path: str, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Weight:
    """A matrix of torch.nn.Linear, [outputs, inputs]; ours is [*inputs, *outputs]."""
    return rows(path, name, inputs, outputs, 0, math.prod(outputs), shared=False)


def rows(
    path: str, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], start: int, total: int, shared: bool = True
) -> Weight:
    """The same, where our outputs are those from `start` on of `total`."""
    here = slice(start, start + math.prod(outputs))
    theirs = (total, math.prod(inputs))
    return Weight(path, name, theirs, lambda x: x[here].T.reshape(inputs + outputs), shared)


def flattened(path: str, name: str, shape: tuple[int, ...]) -> Weight:
    """A vector, ours with several axes."""
    return Weight(path, name, (math.prod(shape),), lambda x: x.reshape(shape))


def columns(path: str, name: str, ours: tuple[int, ...], axis: int, part: tuple[int, int] = (0, 1)) -> Weight:
    """A matrix or vector as GPT-2 has them, with the inputs first; our outputs begin at `axis`, a part of all."""
    index, count = part
    inputs, size = (math.prod(ours[:axis]),) if axis else (), math.prod(ours[axis:])
    here = slice(index * size, (index + 1) * size)
    return Weight(path, name, (*inputs, count * size), lambda x: x[..., here].reshape(ours), count > 1)


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
            yield from layer_norm(f"blocks/{ours}", "transformer.h.{layer}." + theirs, c.width)

    found = [same("embed/embedding", f"transformer.{tokens}.weight", (c.vocab_size, c.width))]
    found += [same("positions/embedding", f"transformer.{positions}.weight", (c.context, c.width)), *block()]
    if final_norm:
        found += layer_norm("final_norm", f"transformer.{final_norm}", c.width)
    return (*found, *unembedding(c))


def llama_weights(c: DecoderConfig) -> tuple[Weight, ...]:
    """Llama and everything that is named like it: Mistral, Qwen, Gemma, OLMo, Granite, SmolLM3."""
    return (
        same("embed/embedding", "model.embed_tokens.weight", (c.vocab_size, c.width)),
        *llama_attention(c),
        *llama_norms(c),
        *llama_feed_forward(c),
        same("final_norm/scale", "model.norm.weight", (c.width,)),
        *unembedding(c),
    )


def llama_attention(c: DecoderConfig) -> Iterator[Weight]:
    """Projections, their biases, the norms of queries and keys, and sinks."""
    at = "model.layers.{layer}.self_attn."
    for name, heads in (("query", c.heads), ("key", c.kv_heads), ("value", c.kv_heads)):
        path, theirs = f"blocks/attention/{name}", f"{at}{name[0]}_proj"
        yield linear(f"{path}/kernel", f"{theirs}.weight", (c.width,), (heads, c.head_dim))
        if c.qkv_biases or c.biases:
            yield flattened(f"{path}/bias", f"{theirs}.bias", (heads, c.head_dim))
    yield linear("blocks/attention/out/kernel", f"{at}o_proj.weight", (c.heads, c.head_dim), (c.width,))
    if c.biases:
        yield same("blocks/attention/out/bias", f"{at}o_proj.bias", (c.width,))
    if c.attention_sinks:
        yield same("blocks/attention/sinks", f"{at}sinks", (c.heads,))
    if c.qk_norm:
        queries, keys = (c.heads, c.kv_heads) if c.qk_norm_whole else (1, 1)
        yield same("blocks/attention/query_norm/scale", f"{at}q_norm.weight", (queries * c.head_dim,))
        yield same("blocks/attention/key_norm/scale", f"{at}k_norm.weight", (keys * c.head_dim,))


def llama_norms(c: DecoderConfig) -> Iterator[Weight]:
    """The norms around the blocks; their names change their meaning where blocks have one behind them."""
    names = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    behind = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    if c.norm_place == "sandwich":
        names |= {"mlp_norm": "pre_feedforward_layernorm"} | behind
    if c.norm_place == "output":
        names = behind
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


def layer_norm(path: str, name: str, width: int) -> Iterator[Weight]:
    """Scale and bias."""
    yield same(f"{path}/scale", f"{name}.weight", (width,))
    yield same(f"{path}/bias", f"{name}.bias", (width,))


def unembedding(c: DecoderConfig, name: str = "lm_head") -> Iterator[Weight]:
    """The output matrix, where it is one of its own."""
    if not c.tied:
        yield linear("unembed/kernel", f"{name}.weight", (c.width,), (c.vocab_size,))
