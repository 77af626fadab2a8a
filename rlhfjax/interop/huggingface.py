"""A Hugging Face directory, read without running or believing anything in it.

config.json goes through our own list of what is known, weights come from safetensors alone, and every file that is
opened lies in the directory itself, or in the same model of the hub's cache. Shapes are compared before anything is
allocated.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.interop.families import Weight, config_of, weights
from rlhfjax.interop.hub import blobs_of
from rlhfjax.interop.mxfp4 import Packed, read_block, with_matrices
from rlhfjax.interop.pretrained import Pretrained, names_of
from rlhfjax.interop.safetensors_files import DTYPES, Tensor, read_elements, read_header, read_tensor
from rlhfjax.interop.tensors import box, span
from rlhfjax.interop.text_parts import text_config, text_tensors
from rlhfjax.leaves import Region
from rlhfjax.models import DecoderConfig
from rlhfjax.text.huggingface_files import source_of
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "score.weight"
_UNEMBEDDINGS = ("lm_head.weight", "embed_out.weight")
SCORE_BIAS = "rlhfjax_score_bias"  # in config.json: transformers' heads have no bias
CLASSIFIER = "ForSequenceClassification"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LARGEST_JSON = {"config.json": 1 << 20, INDEX: 1 << 26}
# Constants that older versions of transformers saved beside the weights; they are computed here.
_BUFFERS = (
    *(".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"),
    *(".attention.bias", ".attention.masked_bias"),
)


def open_directory(directory: Path) -> Pretrained:
    """The model of a directory: its configuration, tokenizer and a reader of its weights, all of them checked.

    Raises ConfigError for what is not supported (architecture, setting, kind of file), IntegrityError where files do
    not hold what they should.
    """
    _check_links(directory)
    described = _read_json(directory, "config.json")
    notes = _without_code(directory, described)
    quantised = described.get("quantization_config")
    packed = isinstance(quantised, Mapping) and quantised.get("quant_method") == "mxfp4"
    if packed:
        del described["quantization_config"]
        notes += ("experts are in MXFP4; they are read as the numbers that they stand for",)
    found = None
    if (text := text_config(described)) is not None:
        around, (found, others) = described["architectures"][0], text_tensors(_tensors(directory))
        described = text | {"tie_word_embeddings": _UNEMBEDDINGS[0] not in found}
        notes += (f"the language model of {around} alone, without its {', '.join(others)}",)
    scalar, bias = _score(described)
    config = config_of(described)
    wanted = weights(config, scalar)
    found = _with_prefix(_tensors(directory) if found is None else found, wanted)
    found = with_matrices(found) if packed else found
    head = None
    if scalar:
        kernel = _one(directory, found, HEAD, (1, config.width))
        head = {"kernel": read_tensor(kernel, HEAD)[0], "bias": np.asarray(bias)}
    _check(directory, found, wanted, config, scalar)

    def read(weight: Weight, name: str, region: Region) -> np.ndarray:
        tensor = found[name]
        if isinstance(tensor, Packed):
            block, see = box(weight, region)
            return see(read_block(tensor, name, block))
        first, last, see = span(weight, region)
        return see(read_elements(tensor, name, first, last))

    role = "reward" if scalar else "policy"
    tokenizer, of_tokenizer = _tokenizer(directory, config)
    notes += _notes_on(config) + of_tokenizer
    return Pretrained(config, role, tokenizer, wanted, read, head, notes)


def _without_code(directory: Path, described: dict[str, Any]) -> tuple[str, ...]:
    """Takes `auto_map` out, which asks to run code that comes with the model, and says so.

    Families that transformers took up since are published with the code that they once needed. Any other is an error.
    """
    classes = described.pop("auto_map", None)
    if not classes:
        return ()
    names = described.get("architectures")
    known = str(names[0]) if isinstance(names, list) and names else ""
    stem = known.partition("For")[0]
    own = classes.values() if isinstance(classes, Mapping) else [classes]
    if not stem or not all(isinstance(name, str) and name.rpartition(".")[2].startswith(stem) for name in own):
        raise ConfigError(
            f"{directory / 'config.json'}: expected a model of a known architecture, got auto_map, which asks to run "
            "code that comes with it; rlhfjax never does"
        )
    return (f"config.json names code of its own (auto_map), which is not run: this is {known} of transformers",)


def _notes_on(config: DecoderConfig) -> tuple[str, ...]:
    """What whoever imports it should know of its context."""
    if config.rope_scaling not in ("longrope", "dynamic"):
        return ()
    return (
        f"rotary positions are scaled ({config.rope_scaling}) by the length of a text: up to {config.context:,} tokens "
        "all lengths are read alike, and longer ones are refused",
    )


def _score(described: dict[str, Any]) -> tuple[bool, float]:
    """Whether the model is a classifier of one label, and the bias of its score, which is taken out of `described`."""
    bias, labels = described.pop(SCORE_BIAS, 0.0), described.pop("id2label", None)
    count = described.pop("num_labels", 2)
    count = len(labels) if isinstance(labels, Mapping) else count  # which goes first there
    described.pop("label2id", None)
    names = described.get("architectures")
    if not (isinstance(names, list) and names and isinstance(names[0], str) and names[0].endswith(CLASSIFIER)):
        return False, 0.0
    if count != 1 or isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias):
        raise ConfigError(
            f"config.json: expected a classifier with one label and a finite {SCORE_BIAS}, got {count!r:.50} labels "
            f"and {bias!r:.50}"
        )
    return True, float(bias)


def _tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / WEIGHTS).is_file():
        return read_header(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise ConfigError(
                f"{directory / pickles[0]}: expected {WEIGHTS}, got weights in a pickle, which can run code and is "
                "never opened; convert it to safetensors"
            )
        raise ConfigError(f"{directory}: expected {WEIGHTS} or {INDEX}, got neither")
    index = _read_json(directory, INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise IntegrityError(f"{directory / INDEX}: expected weight_map with a file for each tensor, got none")
    for shard in sorted(set(index.values())):
        inside = Path(shard).name == shard and not {"\\", "\0"} & set(shard) and len(shard) <= 255
        if not inside or not shard.endswith(".safetensors"):
            raise IntegrityError(
                f"{directory / INDEX}: expected names of safetensors files beside it, got {shard[:80]!r}"
            )
        if not (directory / shard).is_file():
            raise IntegrityError(f"{directory}: expected the shard {shard}, which is not there; fetch it")
    return _shards(directory, index)


def _shards(directory: Path, index: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for shard in sorted(set(index.values())):
        held = read_header(directory / shard)
        listed = {name for name, file in index.items() if file == shard}
        if odd := sorted(listed ^ held.keys()):
            where = "the index" if odd[0] in listed else "the file"
            raise IntegrityError(
                f"{directory / shard}: expected the tensors of {INDEX}, got {odd[0][:80]!r} in {where} alone"
            )
        found |= held
    return found


def _with_prefix(found: dict[str, Tensor], wanted: tuple[Weight, ...]) -> dict[str, Tensor]:
    """Names as a model with a head has them; files of a base model lack the first part ("transformer.", "model.")."""
    prefix = wanted[0].name.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in found):
        return found
    return {name if name in (HEAD, *_UNEMBEDDINGS) else prefix + name: tensor for name, tensor in found.items()}


def _check(
    directory: Path, found: dict[str, Tensor], wanted: tuple[Weight, ...], config: DecoderConfig, scalar: bool
) -> None:
    """Every tensor is there in its shape, and no other."""
    names = {HEAD} if scalar else set()
    for weight in wanted:
        for _, name in names_of(weight, config):
            _one(directory, found, name, weight.shape)
            names.add(name)
    for name in sorted(found.keys() - names):
        if name.endswith(_BUFFERS):
            continue
        if name in _UNEMBEDDINGS and config.tied and _same_as_embedding(found, wanted, name):
            continue
        raise IntegrityError(
            f"{directory}: expected the tensors of this architecture, got {name[:80]!r} as well; is config.json theirs?"
        )


def _one(directory: Path, found: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = found.get(name)
    if tensor is None:
        raise IntegrityError(f"{directory}: expected tensor {name!r}, which no file has; fetch the files again")
    if tensor.shape != shape:
        raise IntegrityError(
            f"{tensor.path}: expected tensor {name!r} of shape {list(shape)}, as config.json says, got "
            f"{list(tensor.shape)}"
        )
    if tensor.dtype not in DTYPES:
        raise ConfigError(
            f"{tensor.path}: expected tensor {name!r} of {', '.join(DTYPES)}, got {tensor.dtype}; convert it first"
        )
    return tensor


def _same_as_embedding(found: Mapping[str, Tensor], wanted: tuple[Weight, ...], name: str) -> bool:
    """Whether a saved copy of the tied matrix is one."""
    embedding = next(weight.name for weight in wanted if weight.path == "embed/embedding")
    copy, own = found[name], found[embedding]
    if (copy.dtype, copy.shape) != (own.dtype, own.shape) or copy.dtype not in DTYPES:
        return False
    with copy.path.open("rb") as first, own.path.open("rb") as second:
        first.seek(copy.start)
        second.seek(own.start)
        sizes = (min(1 << 20, copy.end - at) for at in range(copy.start, copy.end, 1 << 20))
        return all(first.read(size) == second.read(size) for size in sizes)


def _tokenizer(directory: Path, config: DecoderConfig) -> tuple[AnyTokenizer | None, tuple[str, ...]]:
    """The tokenizer, and what its user has to know of it."""
    names = source_of(directory)
    if not names:
        return None, ("no tokenizer.json, tokenizer.model or vocab.json with merges.txt; the model takes ids only",)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise IntegrityError(
            f"{directory}: expected a tokenizer of at most {config.vocab_size} ids (vocab_size of config.json), got "
            f"{tokenizer.vocab_size}; is it the tokenizer of this model?"
        )
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer, ()
    read = () if names == ("tokenizer.json",) else (f"the tokenizer is read from {' and '.join(names)}",)
    return tokenizer, read + tokenizer.notes


def _check_links(directory: Path) -> None:
    if not directory.is_dir():
        raise ConfigError(f"{directory}: expected a directory with config.json, got none")
    root = directory.resolve()
    inside = [root] if (blobs := blobs_of(root)) is None else [root, blobs]
    for path in directory.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise IntegrityError(
                f"{path}: expected files that lie in the directory, got a link out of it; make a copy that follows "
                "links (cp -rL) if they are to be trusted"
            )


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    path = directory / name
    if not path.is_file():
        raise ConfigError(f"{directory}: expected {name}, which is not there; is it a Hugging Face directory?")
    if (size := path.stat().st_size) > _LARGEST_JSON[name]:
        raise IntegrityError(f"{path}: expected at most {_LARGEST_JSON[name]:,} bytes, got {size:,}")
    try:
        described = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: expected JSON, got {error}; fetch the file again") from error
    if not isinstance(described, dict):
        raise IntegrityError(f"{path}: expected a JSON object, got {type(described).__name__}; fetch the file again")
    return described
