"""A checkpoint in memory."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfjax.api.model import Model
from rlhfjax.errors import ConfigError
from rlhfjax.integrity import unverified
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.training.checkpoint import find_checkpoint, load_model, read_meta, tokenizer_of


def load(
    checkpoint: str | Path,
    verify: bool = True,
    date: datetime.date | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a checkpoint, stage or run directory (of a run: its last policy).

    It writes conversations as it was trained on them: with the date of its run (or import) and its
    chat_template_kwargs, unless others are given here. Raises ConfigError when there is no checkpoint, or for what its
    chat template does not read, IntegrityError when it cannot be read, or is not what was written; `verify=False` does
    not compare it with its digests.
    """
    step_dir = find_checkpoint(checkpoint)
    with unverified(not verify):
        meta = read_meta(step_dir)
        network, params = load_model(step_dir)
    return Model(meta["role"], network, params, _speaking(tokenizer_of(meta), date, chat_template_kwargs), step_dir)


def _speaking(
    tokenizer: AnyTokenizer | None, date: datetime.date | str | None, kwargs: Mapping[str, Any] | None
) -> AnyTokenizer | None:
    if tokenizer is None or (date is None and kwargs is None):
        return tokenizer
    try:
        given = datetime.date.fromisoformat(date) if isinstance(date, str) else date
    except ValueError:
        raise ConfigError(f"date: expected one such as 2026-01-31, got {date!r}") from None
    own = tokenizer.chat
    return tokenizer.with_chat(ChatSettings({**own.kwargs, **(kwargs or {})}, given or own.date))
