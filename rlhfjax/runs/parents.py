"""Parents of a stage: the models of earlier stages, by step and digest, and the tokenizer."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhfjax.config import Run
from rlhfjax.config.recipe import parents_of
from rlhfjax.text.loading import CHAT_TEMPLATE, AnyTokenizer
from rlhfjax.training.checkpoint import find_checkpoint, stored_digests, tree_digest


def parents(run: Run, run_dir: Path, stage: str) -> dict[str, dict[str, Any]]:
    """Step and digest of the models that a stage starts from, by the stage that made them."""
    found = {}
    for name in parents_of(run, stage):
        step_dir = find_checkpoint(run_dir / name)
        found[name] = {"step": int(step_dir.name), "digest": checkpoint_digest(step_dir)}
    return found


def checkpoint_digest(step_dir: Path) -> str:
    """SHA-256 of the digests of a checkpoint's arrays: equal arrays give it again, however their files lie.

    Of a checkpoint that an older version wrote, without such digests, it is that of its files.
    """
    leaves = stored_digests(step_dir)
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest() if leaves else tree_digest(step_dir)


def tokenizer_facts(tokenizer: AnyTokenizer) -> dict[str, str]:
    """The digests of the tokenizer and of the way in which it writes conversations."""
    template = getattr(tokenizer, "chat_template", None)
    text = CHAT_TEMPLATE if template is None else template.source
    return {"tokenizer": tokenizer.fingerprint, "chat_template": hashlib.sha256(text.encode()).hexdigest()}
