"""A model as a Hugging Face directory that plain transformers loads: weights, configuration, tokenizer, card, proof.

A scalar model becomes `…ForSequenceClassification` with one label. Its head has a bias here and none there. Where the
last norm has a bias of its own (GPT, GPT-2), the head's b goes into it: with δ = b·w / |w|², w·(h + δ) = w·h + b. The
root-mean-square norm has no constant direction that could carry it. Of those models b is written into config.json, as
`rlhfjax_score_bias`, which reading it back applies; transformers' bare scores are without it.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.interop.families import Weight, hf_config, weights
from rlhfjax.interop.huggingface import HEAD, INDEX, SCORE_BIAS, WEIGHTS, open_directory
from rlhfjax.interop.model_card import model_card
from rlhfjax.interop.parity import certificate, outputs
from rlhfjax.interop.pretrained import load_parameters, names_of
from rlhfjax.interop.safetensors_files import DTYPES, cast, write_file
from rlhfjax.interop.tensors import tensor_of
from rlhfjax.interop.whole_directories import check_target, whole_directory
from rlhfjax.models import DecoderConfig, LanguageModel, SequenceModel
from rlhfjax.models.lora import has_adapters, merge
from rlhfjax.sharding.rules import path_name
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer, not_exported, to_huggingface
from rlhfjax.types import Params

PARITY = "parity.json"  # also what marks a directory as an export
Entry = tuple[str, tuple[int, ...]]  # type and shape of a stored tensor
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export_model(
    target: Path,
    what: str,
    model: SequenceModel,
    params: Params,
    tokenizer: AnyTokenizer | None,
    *,
    dtype: str = "float32",
    shard_size: int = 5 * 10**9,
    force: bool = False,
    lineage: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write `target`, read it back, compare, and return the certificate of parity; adapters are merged first.

    `what` is policy, average, value or reward, `shard_size` the most bytes of a file of weights. Raises ConfigError
    where no architecture fits or `target` is taken, IntegrityError when what was read back computes something else.
    """
    check_target(target, PARITY, force)
    if dtype not in STORED:
        raise ConfigError(f"dtype: expected {', '.join(STORED)}, got {dtype!r}")
    if not isinstance(model, LanguageModel):
        raise ConfigError("export: expected a decoder, got an encoder–decoder, which has no architecture there")
    if has_adapters(params):
        params = merge(params, model.config.lora_alpha)
    lineage = dict(lineage or {})
    if heads := model.config.mtp_heads:  # no architecture has a place for them, and the next token does without
        model = LanguageModel(replace(model.config, mtp_heads=0, mtp_coef=DecoderConfig.mtp_coef))
        if "mtp_heads" in params:
            params = {name: tree for name, tree in params.items() if name != "mtp_heads"}
            lineage["Left out"] = {"mtp_heads": f"{heads}, which predict tokens further ahead (speculative decoding)"}
    scalar = "head" in params
    if scalar:
        tokenizer = _padding_apart(tokenizer)
    described, stored = _described(model.config, params, tokenizer, dtype), _folded(params) if scalar else params
    before = outputs(model, params)
    with whole_directory(target, PARITY, force) as part:
        _write_weights(part, model.config, stored, dtype, shard_size)
        _write_json(part / "config.json", described)
        files = {} if tokenizer is None else to_huggingface(tokenizer)
        for name, text in files.items():
            (part / name).write_text(text, encoding="utf-8")
        if not scalar:
            _write_json(part / "generation_config.json", {} if tokenizer is None else generation_settings(tokenizer))
        parity = certificate(part, before, _read_back(part, params), dtype, scalar)
        said = () if tokenizer is None else not_exported(tokenizer)
        card = model_card(target.name, what, described, parity, lineage, said)
        (part / "README.md").write_text(card, encoding="utf-8")
        _write_json(part / PARITY, parity)
    return parity


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 200kB. Raises ConfigError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return max(1, int(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]))


def _described(config: DecoderConfig, params: Params, tokenizer: AnyTokenizer | None, dtype: str) -> dict[str, Any]:
    """config.json."""
    # Without a tokenizer none: the default of a class there may lie beyond a small vocabulary.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    described = hf_config(config, scalar="head" in params) | {"dtype": dtype} | none
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        described |= ids
    if "head" in params and (bias := float(_folded(params)["head"]["bias"])):
        described[SCORE_BIAS] = bias
    return described


def generation_settings(tokenizer: AnyTokenizer) -> dict[str, Any]:
    """generation_config.json: which ids begin, pad and end a text. Sampling is whoever asks for it to choose."""
    ends = tokenizer.eos_id if len(tokenizer.end_ids) == 1 else list(tokenizer.end_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    return {name: index for name, index in ids.items() if index is not None}


def _padding_apart(tokenizer: AnyTokenizer | None) -> AnyTokenizer | None:
    """The tokenizer with padding that ends no text: transformers reads a score at the last token that is no padding.

    Some models pad with the token that ends a text; then another special token takes its place.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer
    ends = set(tokenizer.end_ids)
    if tokenizer.pad_id not in ends:
        return tokenizer
    taken = ends | {tokenizer.bos_id}
    for token in tokenizer.description["tokenizer"]["added_tokens"]:
        if token["special"] and token["id"] not in taken:
            named = tokenizer.description["named"] | {"pad_token": token["content"]}
            return HuggingFaceTokenizer(tokenizer.description | {"named": named})
    raise ConfigError(
        "export: expected a special token beside the end of text to pad with, got none, so transformers would read "
        "scores before the end; add a pad_token to the tokenizer"
    )


def _folded(params: Params) -> Params:
    """A scalar model whose head has no bias, where its last norm can take it; see the top."""
    head, decoder = params["head"], params["decoder"]
    kernel, bias = np.asarray(head["kernel"], np.float64), float(head["bias"])
    # A model with its norms after the blocks ends with the norm of the last block.
    final = decoder["final_norm"] if "final_norm" in decoder else decoder["blocks"]["mlp_norm"]
    if not bias or "bias" not in final or not kernel.any():
        return params
    moved = np.array(final["bias"])
    moved.reshape(-1, len(kernel))[-1] += (bias * kernel / (kernel @ kernel)).astype(moved.dtype)
    if "final_norm" in decoder:
        decoder = decoder | {"final_norm": final | {"bias": moved}}
    else:
        decoder = decoder | {"blocks": decoder["blocks"] | {"mlp_norm": final | {"bias": moved}}}
    return {"decoder": decoder, "head": {"kernel": head["kernel"], "bias": np.zeros((), np.float32)}}


def _write_weights(part: Path, config: DecoderConfig, params: Params, dtype: str, shard_size: int) -> None:
    """One file, or shards and their index."""
    tensors = _grouped(params, config)
    sizes = {name: (STORED[dtype], group[0].shape) for group in tensors for _, name in names_of(group[0], config)}
    if "head" in params:
        sizes[HEAD] = (STORED[dtype], (1, config.width))
    shards = _shards(sizes, shard_size)
    produced = _produced(params, tensors, config, STORED[dtype])
    if len(shards) == 1:
        return write_file(part / WEIGHTS, sizes, produced)
    files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
    for file, shard in files.items():
        write_file(part / file, shard, itertools.islice(produced, len(shard)))
    total = sum(_bytes(entry) for entry in sizes.values())
    placed = {name: file for file, shard in files.items() for name in shard}
    return _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def _grouped(params: Params, config: DecoderConfig) -> list[list[Weight]]:
    """The weights of each of their tensors, which may hold several of our parameters."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights(config, scalar="head" in params):
        groups.setdefault(weight.name, []).append(weight)
    return list(groups.values())


def _produced(
    params: Params, tensors: list[list[Weight]], config: DecoderConfig, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor as it is stored; the parameters of one (of all layers) are on the host at a time."""
    decoder = params.get("decoder", params)
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(decoder)}
    for group in tensors:
        stacked = [np.asarray(leaves[weight.path]) for weight in group]
        for place, name in names_of(group[0], config):
            yield name, cast(tensor_of(group, [own[place] for own in stacked]), dtype, name)
    if "head" in params:
        yield HEAD, cast(np.asarray(params["head"]["kernel"])[None], dtype, HEAD)


def _shards(sizes: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """Consecutive tensors of at most `limit` bytes together; a larger one has a shard of its own."""
    shards, filled = [{}], 0
    for name, entry in sizes.items():
        if shards[-1] and filled + _bytes(entry) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _bytes(entry)
    return shards


def _bytes(entry: Entry) -> int:
    return int(np.prod(entry[1], dtype=np.int64)) * DTYPES[entry[0]].itemsize


def _read_back(part: Path, params: Params) -> np.ndarray:
    source = open_directory(part)
    loaded = load_parameters(source)
    placed = jax.tree.map(lambda new, own: jax.device_put(new, getattr(own, "sharding", None)), loaded, params)
    return outputs(LanguageModel(source.config), placed)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
