"""A model as a Hugging Face directory that plain transformers loads: weights, configuration, tokenizer, card, proof.

A scalar model becomes `…ForSequenceClassification` with one label. Its head has a bias here and none there. Where the
last norm has a bias of its own (GPT, GPT-2), the head's b goes into it: with δ = b·w / |w|², w·(h + δ) = w·h + b. The
root-mean-square norm has no constant direction that could carry it. Of those models b is written into config.json, as
`rlhfjax_score_bias`, which reading it back applies; transformers' bare scores are without it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax.errors import ConfigError
from rlhfjax.interop import verify_export
from rlhfjax.interop.adapted import Merged
from rlhfjax.interop.families import hf_config
from rlhfjax.interop.huggingface import INDEX, SCORE_BIAS, open_directory
from rlhfjax.interop.model_card import model_card
from rlhfjax.interop.parity import Proof, compared, same_bits
from rlhfjax.interop.safetensors_files import STORED, Written
from rlhfjax.interop.weight_files import Plan, from_json, to_json
from rlhfjax.interop.whole_directories import Alone, Peers, check_target, shared_directory
from rlhfjax.leaves import InMemory, Leaves, Overlaid, read
from rlhfjax.models import DecoderConfig, LanguageModel, SequenceModel
from rlhfjax.models.lora import LEAVES
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import AnyTokenizer, not_exported, to_huggingface
from rlhfjax.types import Params

PARITY = verify_export.CERTIFICATE  # also what marks a directory as an export
CHECK = "verify.py"
_TOLD = ".written-by-"  # what a process wrote, for the first


def export_model(
    target: Path,
    what: str,
    model: SequenceModel,
    params: Params,
    tokenizer: AnyTokenizer | None,
    **settings: Any,
) -> dict[str, Any]:
    """`export_leaves` of a model in memory."""
    check_target(target, PARITY, settings.get("force", False))
    leaves = InMemory(params if isinstance(model, LanguageModel) else {})
    return export_leaves(target, what, model, leaves, tokenizer, **settings)


def export_leaves(
    target: Path,
    what: str,
    model: SequenceModel,
    leaves: Leaves,
    tokenizer: AnyTokenizer | None,
    *,
    dtype: str = "float32",
    shard_size: int = 5 * 10**9,
    force: bool = False,
    lineage: Mapping[str, Mapping[str, Any]] | None = None,
    peers: Peers | None = None,
) -> dict[str, Any]:
    """Write `target`, read it back, compare, and return the certificate of parity; adapters are merged first.

    `what` is policy, average, value or reward, `shard_size` the most bytes of a file of weights. Of `peers` on one file
    system each writes some of those, and the first all others; what is written is the same. In memory is a tensor at a
    time, and then a layer. Raises ConfigError where no architecture fits or `target` is taken, IntegrityError when
    what was read back is or computes something else.
    """
    check_target(target, PARITY, force)
    if dtype not in STORED:
        raise ConfigError(f"dtype: expected {', '.join(STORED)}, got {dtype!r}")
    lineage = dict(lineage or {})
    model, leaves = as_there(model, leaves, lineage)
    if scalar := "head/kernel" in leaves.shapes:
        tokenizer = _padding_apart(tokenizer)
    stored = _folded(leaves) if scalar else leaves
    described = _described(model.config, stored, tokenizer, dtype)
    plan, known = Plan(model.config, stored, dtype, shard_size), {}
    peers = peers or Alone()
    with shared_directory(target, PARITY, force, peers, known) as part:
        written = _written(part, plan, peers)
        known |= {file: {"size": one.size, "sha256": one.sha256} for file, one in written.items()}

        def finish() -> str:
            certified = plan.certified(written)
            files = _texts(described, plan, tokenizer, scalar)
            for name, text in files.items():
                (part / name).write_text(text, encoding="utf-8")
            leaves.check()
            proof = Proof(model.config, leaves, stored, open_directory(part), same_bits(dtype))
            leaves.check()
            parity = compared(*proof.found, dtype, scalar)
            digests = {path.name: verify_export.sha256(path) for path in map(part.joinpath, files)}
            parity["sha256"] = dict(sorted((digests | {name: one.sha256 for name, one in written.items()}).items()))
            parity |= certified
            parity["certificate"] = verify_export.digest_of(parity)
            said = () if tokenizer is None else not_exported(tokenizer)
            card = model_card(target.name, what, described, parity, lineage, said)
            (part / "README.md").write_text(card, encoding="utf-8")
            (part / PARITY).write_text(_json(parity), encoding="utf-8")
            return json.dumps(parity)

        return json.loads(peers.by_first(finish, "export"))


def as_there(model: SequenceModel, leaves: Leaves, lineage: dict[str, Any]) -> tuple[LanguageModel, Leaves]:
    """The model with its adapters merged, without what no architecture has a place for, which `lineage` then says."""
    if not isinstance(model, LanguageModel):
        raise ConfigError("export: expected a decoder, got an encoder–decoder, which has no architecture there")
    if any(path.endswith(LEAVES) for path in leaves.shapes):
        leaves = Merged(leaves, model.config.lora_alpha)
    if heads := model.config.mtp_heads:  # the next token does without them
        model = LanguageModel(replace(model.config, mtp_heads=0, mtp_coef=DecoderConfig.mtp_coef))
        if any(path.startswith("mtp_heads/") for path in leaves.shapes):
            lineage["Left out"] = {"mtp_heads": f"{heads}, which predict tokens further ahead (speculative decoding)"}
    return model, _Without(leaves, "mtp_heads/")


def _written(part: Path, plan: Plan, peers: Peers) -> dict[str, Written]:
    """Write the files of weights that are this process's, and wait for the others; what all of them wrote."""
    own = jax.process_index() if peers.count() > 1 else 0
    mine = {file: plan.write(part, file) for file in list(plan.files)[own :: peers.count()]}
    if peers.count() == 1:
        return mine
    (part / f"{_TOLD}{own}").write_text(to_json(mine), encoding="utf-8")
    peers.barrier("weights")
    told = [part / f"{_TOLD}{process}" for process in range(peers.count())]
    written = {file: one for path in told for file, one in from_json(path.read_text(encoding="utf-8")).items()}
    peers.barrier("told")
    (part / f"{_TOLD}{own}").unlink()
    return {file: written[file] for file in plan.files}


def _texts(described: Mapping[str, Any], plan: Plan, tokenizer: AnyTokenizer | None, scalar: bool) -> dict[str, str]:
    """The other files that the certificate covers: how the model is to be read, and the check itself."""
    files = {"config.json": _json(described)}
    if index := plan.index():
        files[INDEX] = index
    files |= {} if tokenizer is None else to_huggingface(tokenizer)
    if not scalar:
        files["generation_config.json"] = _json({} if tokenizer is None else generation_settings(tokenizer))
    return files | {CHECK: Path(verify_export.__file__).read_text(encoding="utf-8")}


class _Without:
    """Leaves but for those whose path begins so."""

    def __init__(self, leaves: Leaves, beginning: str):
        self.blocks, self.check = leaves.blocks, leaves.check
        self.shapes = {path: shape for path, shape in leaves.shapes.items() if not path.startswith(beginning)}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 200kB. Raises ConfigError on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKMG]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"--shard-size: expected a size such as 5GB or 500MB, got {text!r}")
    return max(1, int(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]]))


def _described(config: DecoderConfig, stored: Leaves, tokenizer: AnyTokenizer | None, dtype: str) -> dict[str, Any]:
    """config.json."""
    # Without a tokenizer none: the default of a class there may lie beyond a small vocabulary.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    scalar = "head/kernel" in stored.shapes
    described = hf_config(config, scalar=scalar) | {"dtype": dtype} | none
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        described |= ids
    if scalar and (bias := float(read(stored, "head/bias"))):
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


def _folded(leaves: Leaves) -> Leaves:
    """A scalar model whose head has no bias, where its last norm can take it; see the top."""
    kernel, bias = read(leaves, "head/kernel").astype(np.float64), float(read(leaves, "head/bias"))
    # A model with its norms after the blocks ends with the norm of the last block.
    normed = any(path.startswith("final_norm/") for path in leaves.shapes)
    final = "final_norm/bias" if normed else "blocks/mlp_norm/bias"
    if not bias or final not in leaves.shapes or not kernel.any():
        return leaves
    moved = read(leaves, final)
    moved.reshape(-1, len(kernel))[-1] += (bias * kernel / (kernel @ kernel)).astype(moved.dtype)
    return Overlaid(leaves, {final: moved, "head/bias": np.zeros((), np.float32)})


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
