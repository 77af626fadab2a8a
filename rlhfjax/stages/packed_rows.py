"""Parts: the packed rows that go through the models together, and the sequences that share a row."""

from functools import partial

import jax

from rlhfjax.algorithms.packing import packed_ranking, row_width
from rlhfjax.config import schema
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import constrain_parts, row_shards
from rlhfjax.target import current
from rlhfjax.training.update import Pack

_WIDEST = 4  # times the width of the model: attention over longer rows costs over a third of the products of a layer


def rows_at_a_time(c: schema.Ppo | schema.Evaluate, mesh: jax.sharding.Mesh, group: int = 1) -> int:
    """`batch.micro`, or enough rows for a device to do, and for no more parts of a minibatch than the target wants.

    Smaller parts skip more of what short responses leave empty, but gradients are added up once a part. Every device
    has rows of a part. `group` responses share a row.
    """
    minibatch = (c.batch.minibatch or c.batch.size) // group
    width = row_width(c.batch.prompt_length, c.sampling.max_new_tokens, group, token_shards(mesh))
    return _rows(mesh, width, minibatch, c.batch.micro)


def _rows(mesh: jax.sharding.Mesh, width: int, minibatch: int, micro: int | None) -> int:
    shards, target = row_shards(mesh), current()
    enough = -(-target.part_tokens * shards // width)
    if target.most_parts:
        enough = max(enough, -(-minibatch // target.most_parts))
    rows = micro or min(minibatch, enough)
    return -(-rows // shards) * shards


def responses_a_row(c: schema.Ppo, group: int, policy: SequenceModel, *others: SequenceModel) -> int:
    """How many of `group` responses to one prompt share it: a divisor of the group."""

    def fits(count: int) -> bool:
        width = row_width(c.batch.prompt_length, c.sampling.max_new_tokens, count)
        return group % count == 0 and _sharing(policy, width) and all(model.shares_prompts(width) for model in others)

    return max(filter(fits, range(2, group + 1)), default=1)


def ranking_packer(
    batch: schema.RankedBatch,
    mesh: jax.sharding.Mesh,
    model: SequenceModel,
    width: int,
    ends: bool = False,
) -> Pack | None:
    """How comparisons of up to `width` tokens become packed rows with each prompt once, `batch.micro` rows at a time.

    None where candidates are read one per row: by models that can't share a prompt, and where comparisons are
    very long. `ends` as in `packed_ranking`.
    """
    width = -(-width // token_shards(mesh)) * token_shards(mesh)
    if not _sharing(model, width):
        return None
    part = _rows(mesh, width, batch.size, batch.micro)
    return partial(packed_ranking, part, width, place=partial(constrain_parts, mesh), ends=ends)


def token_shards(mesh: jax.sharding.Mesh) -> int:
    """How many devices share the tokens of a row: what the width of packed rows is a multiple of."""
    return mesh.shape["sequence"]


def _sharing(model: SequenceModel, width: int) -> bool:
    return model.shares_prompts(width) and width <= _WIDEST * model.config.width
