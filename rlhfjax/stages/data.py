"""The batches of each stage, by name. Opening them reads and checks every record that the stage will use."""

from collections.abc import Iterator

from rlhfjax.config import schema
from rlhfjax.data.pipeline import Batches
from rlhfjax.stages.job import Job


def open_batches(job: Job) -> dict[str, Batches]:
    """`train`, one `validation/SOURCE` for each held-out set, and `ptx` where the stage has one.

    Raises DataError for records that are wrong, missing or too long, before anything is compiled.
    """
    kinds = {
        "pretrain": _pretrain,
        "sft": _sft,
        "reward": _rankings,
        "dpo": _rankings,
        "ppo": _ppo,
        "evaluate": _evaluate,
    }
    return kinds[job.stage](job)


def _pretrain(job: Job) -> dict[str, Batches]:
    c: schema.Pretrain = job.config
    held_out = {name: job.reader.documents([entry], c.batch, shuffle=False) for name, entry in _named(c.validation)}
    return {"train": job.reader.documents(c.data, c.batch)} | held_out


def _sft(job: Job) -> dict[str, Batches]:
    c: schema.Sft = job.config
    held_out = {
        name: job.reader.demonstrations([entry], c.batch, c.loss.train_on, shuffle=False)
        for name, entry in _named(c.validation)
    }
    return {"train": job.reader.demonstrations(c.data, c.batch, c.loss.train_on, c.pretraining)} | held_out


def _rankings(job: Job) -> dict[str, Batches]:
    c: schema.Reward | schema.Dpo = job.config
    held_out = {name: job.reader.comparisons([entry], c.batch, shuffle=False) for name, entry in _named(c.validation)}
    return {"train": job.reader.comparisons(c.data, c.batch)} | held_out


def _ppo(job: Job) -> dict[str, Batches]:
    c: schema.Ppo = job.config
    opened = {"train": job.reader.prompts(c.data, c.batch)}
    if c.ptx:
        mix = schema.Batch(size=int(c.batch.size * c.batch.epochs * c.ptx.ratio), length=c.ptx.length)
        opened["ptx"] = job.reader.documents(c.ptx.data, mix)
    return opened


def _evaluate(job: Job) -> dict[str, Batches]:
    c: schema.Evaluate = job.config
    length = (
        job.run.model.context if not job.run.model.checkpoint else c.batch.prompt_length + c.sampling.max_new_tokens
    )
    documents = schema.Batch(size=c.batch.size, length=length)
    losses = {name: job.reader.documents([entry], documents, shuffle=False) for name, entry in _named(c.losses)}
    return {"train": job.reader.prompts(c.data, c.batch, shuffle=False)} | losses


def _named(entries: list[schema.Data]) -> Iterator[tuple[str, schema.Data]]:
    """Each held-out entry with its name: the last part of its source, and its split where that is not enough."""
    short = [entry.source.split("/")[-1] for entry in entries]
    long = [f"{entry.source.replace('/', '.')}@{entry.split}" for entry in entries]
    for entry, name, whole in zip(entries, short, long, strict=True):
        yield f"validation/{name if short.count(name) == 1 else whole}", entry


def held_out(opened: dict[str, Batches]) -> dict[str, Batches]:
    """The held-out sets among a stage's batches, by the last part of their source's name."""
    return {name.removeprefix("validation/"): data for name, data in opened.items() if name.startswith("validation/")}
