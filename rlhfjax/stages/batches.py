"""The batches of each stage, by name. Opening them reads and checks every record that the stage will use."""

from collections.abc import Iterator
from typing import Any

from rlhfjax.config import schema
from rlhfjax.config.recipe import FACTS
from rlhfjax.data.by_step import Batches
from rlhfjax.stages.job import Job


def open_batches(job: Job) -> dict[str, Batches]:
    """`train`, one `validation/SOURCE` for each held-out set, and `ptx` where the stage has one.

    Raises DataError for records that are wrong, missing or too long, before anything is compiled.
    """
    if FACTS[job.stage].measures:
        return _evaluate(job)
    c = job.config
    opened = {"train": _opened(job, c.data, train=True)}
    for name, entry in _named(getattr(c, "validation", [])):
        opened[name] = _opened(job, [entry], train=False)
    if getattr(c, "ptx", None):
        opened["ptx"] = job.reader.documents(c.ptx.data, mixed_batch(c))
    return opened


def mixed_batch(c: Any) -> schema.Batch:
    """The pretraining batch of an iteration."""
    return schema.Batch(size=int(c.batch.size * c.batch.epochs * c.ptx.ratio), length=c.ptx.length)


def loss_batch(run: schema.Run, c: schema.Evaluate) -> schema.Batch:
    """The documents whose loss an evaluation measures at a time, as long as the models' context where that is known."""
    whole = c.batch.prompt_length + c.sampling.max_new_tokens
    return schema.Batch(size=c.batch.size, length=whole if run.model.checkpoint else run.model.context)


def _opened(job: Job, data: list[schema.Data], train: bool) -> Batches:
    """Batches of the records that the stage trains on, in their order where it does not train on these."""
    c, reader = job.config, job.reader
    match FACTS[job.stage].reads[0].kind:
        case "document":
            return reader.documents(data, c.batch, shuffle=train)
        case "demonstration":
            mix = c.pretraining if train else None
            return reader.demonstrations(data, c.batch, c.loss.train_on, mix, shuffle=train)
        case "comparison":
            return reader.comparisons(data, c.batch, shuffle=train)
        case "prompt":
            return reader.prompts(data, c.batch.model_copy(update={"size": c.prompts}), shuffle=train)
        case kind:
            raise NotImplementedError(f"batches of {kind} records")


def _evaluate(job: Job) -> dict[str, Batches]:
    c: schema.Evaluate = job.config
    documents = loss_batch(job.run, c)
    losses = {name: job.reader.documents([entry], documents, shuffle=False) for name, entry in _named(c.losses)}
    return {"train": job.reader.prompts(c.data, c.batch, shuffle=False)} | losses


def _named(entries: list[schema.Data]) -> Iterator[tuple[str, schema.Data]]:
    """Each held-out entry with its name: the last part of its source, and its split where that is not enough."""
    short = [entry.source.split("/")[-1] for entry in entries]
    long = [f"{entry.source.replace('/', '.')}@{entry.split}" for entry in entries]
    for entry, name, whole in zip(entries, short, long, strict=True):
        yield f"validation/{name if short.count(name) == 1 else whole}", entry


def longest(opened: dict[str, Batches]) -> int:
    """Tokens of the longest comparison of a stage, its prompt counted once."""
    return max(batches.longest for batches in opened.values())


def held_out(opened: dict[str, Batches]) -> dict[str, Batches]:
    """The held-out sets among a stage's batches, by the last part of their source's name."""
    return {name.removeprefix("validation/"): data for name, data in opened.items() if name.startswith("validation/")}
