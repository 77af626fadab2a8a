"""Settings of chat templates in a run: variables from the configuration, and one date for all of its attempts."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfjax.config import Run
from rlhfjax.text.chat_writing import ChatSettings


def today() -> datetime.date:
    """The date in UTC. It is asked for once, when a run starts or a model is imported, and written down there."""
    return datetime.datetime.now(datetime.UTC).date()


def date_of(run: Run, attempts: Sequence[Mapping[str, Any]]) -> datetime.date:
    """The date that the templates of a run get: the one of its configuration, else that of its first start.

    `attempts` are the lines of its manifest, oldest first; lines of older versions say when they started.
    """
    if run.tokenizer.date:
        return datetime.date.fromisoformat(run.tokenizer.date)
    for attempt in attempts:
        told = attempt.get("chat", {}).get("date") or attempt.get("started", "")[:10]
        if told:
            return datetime.date.fromisoformat(told)
    return today()


def settings_of(run: Run, stage: str, date: datetime.date | None, given: Mapping[str, Any]) -> ChatSettings:
    """The settings of one stage: `given` are the variables that the model's checkpoint was trained with, if any."""
    batch = getattr(getattr(run.stages, stage, None), "batch", None)
    own = {} if batch is None else batch.chat_template_kwargs
    return ChatSettings({**given, **run.tokenizer.chat_template_kwargs, **own}, date)


def facts_of_chat(run: Run, date: datetime.date) -> dict[str, Any]:
    """The date and the variables of each stage, for the manifest."""
    given = variables_of_checkpoint(run)
    stages = [name for name, section in run.stages if section is not None]
    return {"date": date.isoformat()} | {stage: dict(settings_of(run, stage, date, given).kwargs) for stage in stages}


def variables_of_checkpoint(run: Run) -> dict[str, Any]:
    """The variables that the checkpoint which the run starts from was trained with."""
    if not run.model.checkpoint:
        return {}
    from rlhfjax.training.checkpoint import find_checkpoint, read_meta

    return dict(ChatSettings.from_json(read_meta(find_checkpoint(run.model.checkpoint)).get("chat", {})).kwargs)
