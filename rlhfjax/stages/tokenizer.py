"""The tokenizer of a run."""

import itertools

from rlhfjax.data.datasets import open_source
from rlhfjax.errors import ConfigError
from rlhfjax.sharding import processes
from rlhfjax.stages.job import Job
from rlhfjax.stages.offline import Facts
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import find_checkpoint, read_meta, tokenizer_of


def tokenizer(job: Job) -> Facts:
    """Train the tokenizer on documents, or take the one that the configuration or the starting model has."""
    processes.by_first(lambda: _tokenizer_of(job).save(job.dir), "tokenizer")
    made = load_tokenizer(job.dir)
    return {"vocab_size": made.vocab_size, "fingerprint": made.fingerprint}


def _tokenizer_of(job: Job) -> AnyTokenizer:
    c = job.run.tokenizer
    if c.path:
        return load_tokenizer(c.path)
    if job.run.model.checkpoint:
        made = tokenizer_of(read_meta(find_checkpoint(job.run.model.checkpoint)))
        if made is None:
            raise ConfigError(
                f"model.checkpoint: expected a model with a tokenizer, got {job.run.model.checkpoint} with none; "
                "import it again with its tokenizer files beside the weights"
            )
        return made
    texts = itertools.chain.from_iterable(
        (record["text"] for record in open_source(entry.source, entry.split, job.data_dir, kind="document"))
        for entry in c.data
    )
    return Tokenizer.train(itertools.islice(texts, c.documents), c.vocab_size, model_type=c.kind, seed=job.run.seed)
