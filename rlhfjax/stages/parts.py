"""How many packed rows go through the models together."""

import jax

from rlhfjax.config import schema
from rlhfjax.sharding import row_shards

_CPU_TOKENS, _TOKENS = 512, 8192  # a device wants at least so many at a time


def rows_at_a_time(c: schema.Ppo | schema.Evaluate, mesh: jax.sharding.Mesh) -> int:
    """`batch.micro`, or enough rows for a device to do; on accelerators a quarter of a minibatch at least.

    Smaller parts skip more of what short responses leave empty, but gradients are added up once a part. Every device
    has rows of a part.
    """
    shards, minibatch = row_shards(mesh), c.batch.minibatch or c.batch.size
    width = c.batch.prompt_length + c.sampling.max_new_tokens
    if jax.default_backend() == "cpu":
        enough = -(-_CPU_TOKENS * shards // width)
    else:
        enough = max(-(-minibatch // 4), -(-_TOKENS * shards // width))
    rows = c.batch.micro or min(minibatch, enough)
    return -(-rows // shards) * shards
