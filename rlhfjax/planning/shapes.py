"""What a plan knows of models and tokenizers that are not here: shapes as their makers publish them, by name.

A recipe that starts from `checkpoint: checkpoints/llama3_8b` can be planned before anybody has imported that model. The
numbers are those of the `config.json` files of Meta's and Qwen's releases.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhfjax import stores
from rlhfjax.config import Run
from rlhfjax.config.schema import Model
from rlhfjax.errors import ConfigError, RlhfjaxError
from rlhfjax.places import expanded

_LLAMA3 = {"family": "llama", "context": 8192, "architecture": {"tied": False, "rope_theta": 500000.0}}
_QWEN3 = {"family": "qwen3", "context": 40960}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llama3_8b": (_LLAMA3 | {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336}, 128256),
    "llama3_70b": (_LLAMA3 | {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672}, 128256),
    "qwen3_8b": (
        _QWEN3
        | {"layers": 36, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 12288}
        | {"architecture": {"tied": False, "head_dim": 128}},
        151936,
    ),
    "qwen3_30b_a3b": (
        _QWEN3
        | {"family": "qwen3_moe", "layers": 48, "width": 2048, "heads": 32, "kv_heads": 4, "mlp_width": 768}
        | {"architecture": {"head_dim": 128, "experts": {"count": 128, "per_token": 8}}},
        151936,
    ),
}


def described(run: Run, say: Callable[[str], None]) -> tuple[Run, dict[str, Any]]:
    """A recipe whose model can be built here, and what programs know of its tokenizer.

    A checkpoint that is not here is taken by the name of its directory. Raises ConfigError where nobody published such
    a shape.
    """
    if run.model.checkpoint:
        try:
            return run, _of_checkpoint(run.model.checkpoint)
        except RlhfjaxError:
            return _published(run, say)
    if run.tokenizer.path:
        try:
            return run, _of(_tokenizer(run.tokenizer.path))
        except RlhfjaxError as error:
            say(f"{error}; planned with tokenizer.vocab_size {run.tokenizer.vocab_size}")
    return run, {"size": run.tokenizer.vocab_size}


def _published(run: Run, say: Callable[[str], None]) -> tuple[Run, dict[str, Any]]:
    checkpoint = str(run.model.checkpoint)
    name = Path(checkpoint).name
    if name not in PUBLISHED:
        raise ConfigError(
            f"model.checkpoint {checkpoint}: it is not here, and a plan needs its shape; import it (`rlhfjax import`), "
            f"or name its directory as one of {', '.join(PUBLISHED)}"
        )
    say(f"model.checkpoint {checkpoint} is not here: planned with the published shape of {name}")
    shape, words = PUBLISHED[name]
    model = run.model
    architecture = shape.get("architecture", {}) | {"attention": {"implementation": model.attention}}
    kept = model.model_dump(include={"remat", "dtype", "lora"})
    found = Model.model_validate(shape | {"architecture": architecture} | kept)
    tokenizer = run.tokenizer.model_copy(update={"path": checkpoint})  # as it will bring its own
    return run.model_copy(update={"model": found, "tokenizer": tokenizer}), {"size": words}


def _of_checkpoint(path: str) -> dict[str, Any]:
    from rlhfjax.training.checkpoint import find_checkpoint, read_meta, tokenizer_of

    meta = read_meta(find_checkpoint(path))
    tokenizer = tokenizer_of(meta)
    return _of(tokenizer) if tokenizer else {"size": meta["model"]["vocab_size"]}


def _tokenizer(path: str) -> Any:
    from rlhfjax.text.loading import load_tokenizer

    return load_tokenizer(stores.here(str(expanded(path))))


def _of(tokenizer: Any) -> dict[str, Any]:
    facts = {"size": tokenizer.vocab_size, "end_ids": list(tokenizer.end_ids), "pad_id": tokenizer.pad_id}
    return facts | {"begin_id": tokenizer.begin_id}
