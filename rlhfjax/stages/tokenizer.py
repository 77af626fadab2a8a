"""The tokenizer of a run."""

import itertools

from rlhfjax.config import Run
from rlhfjax.config.schema import Data
from rlhfjax.data.datasets import RandomAccess
from rlhfjax.data.sources import open_either
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.host import processes
from rlhfjax.stages.job import Job
from rlhfjax.stages.learning import Facts
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import find_checkpoint, read_meta, tokenizer_of


def tokenizer(job: Job) -> Facts:
    """Train the tokenizer on documents, or take the one that the configuration or the starting model has."""
    processes.by_first(lambda: _tokenizer_of(job).save(job.dir), "tokenizer")
    made = load_tokenizer(job.dir)
    return {"vocab_size": made.vocab_size, "fingerprint": made.fingerprint}


def given_tokenizer(run: Run) -> AnyTokenizer | None:
    """The tokenizer that the configuration names, or that its model brings; None where one is to be trained.

    Raises ConfigError where a starting model has none.
    """
    if run.tokenizer.path:
        return load_tokenizer(run.tokenizer.path)
    if not run.model.checkpoint:
        return None
    made = tokenizer_of(read_meta(find_checkpoint(run.model.checkpoint)))
    if made is None:
        raise ConfigError(
            f"model.checkpoint: expected a model with a tokenizer, got {run.model.checkpoint} with none; "
            "import it again with its tokenizer files beside the weights"
        )
    return made


def _tokenizer_of(job: Job) -> AnyTokenizer:
    c = job.run.tokenizer
    if given := given_tokenizer(job.run):
        return given
    sources = [_texts(job, entry) for entry in c.data]
    texts = []
    for entry, source, count in zip(
        c.data, sources, shares([len(source) for source in sources], c.documents), strict=True
    ):
        if count < len(source):
            job.report(
                f"{entry.name}: the tokenizer is trained on the first {count:,} of {len(source):,} documents; raise "
                "tokenizer.documents to take more"
            )
        texts.append(record["text"] for record in itertools.islice(source, count))
    return Tokenizer.train(itertools.chain.from_iterable(texts), c.vocab_size, model_type=c.kind, seed=job.run.seed)


def _texts(job: Job, entry: Data) -> RandomAccess:
    opened = open_either(entry.source, entry.split, job.data_dir, "document", entry.reading)
    if not isinstance(opened, RandomAccess):
        raise DataError(
            f"{entry.name}: expected texts to train a tokenizer on, got tokens of another; name the source that they "
            f"were made of ({opened.facts['source']}), or give tokenizer.path"
        )
    return opened


def shares(sizes: list[int], total: int) -> list[int]:
    """How many of each of several sources make `total`: the same number of each, all of those that have fewer."""
    given = [0] * len(sizes)
    for left, i in zip(range(len(sizes), 0, -1), sorted(range(len(sizes)), key=sizes.__getitem__), strict=True):
        given[i] = min(sizes[i], (total - sum(given)) // left)
    return given
