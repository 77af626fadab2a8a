"""Exact match: the share of demonstrations that a policy's best response, found by beam search, is to the letter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.config import schema
from rlhfjax.data.batches import left_padded
from rlhfjax.data.pipeline import Reader
from rlhfjax.generation import BeamParams, beam_search
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import place_batch
from rlhfjax.types import Params, PromptBatch


def pairs_of(c: schema.Evaluate, reader: Reader, entry: schema.Data) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of the demonstrations that are measured, `samples` of them at most.

    Raises DataError when no prompt leaves room for a response.
    """
    length = c.batch.prompt_length + c.sampling.max_new_tokens
    return reader.demonstration_ids([entry], length, c.samples, c.batch.refused)


def exact_match(
    c: schema.Evaluate, reader: Reader, mesh: jax.sharding.Mesh, model: SequenceModel, params: Params
) -> dict[str, float]:
    """Share of responses that end and have the text of the demonstration, or its last part, by the dataset's name."""
    assert c.exact_match is not None
    t, e = reader.tokenizer, c.exact_match
    stop, *others = t.end_ids
    search = BeamParams(c.sampling.max_new_tokens, stop, t.pad_id, e.beams, e.length_penalty, tuple(others))
    best = jax.jit(partial(beam_search, model, search=search))
    shares = {}
    for entry in e.data:
        pairs, right = pairs_of(c, reader, entry), 0
        tokens, mask = left_padded([prompt for prompt, _ in pairs], t.pad_id)
        for start in range(0, len(pairs), c.batch.size):
            # The last batch is filled up with the first rows.
            rows = (np.arange(start, start + c.batch.size) % len(pairs)).astype(np.int32)
            batch = PromptBatch(jnp.asarray(tokens[rows]), jnp.asarray(mask[rows]), jnp.asarray(rows))
            made = processes.fetch(best(params, place_batch(mesh, batch)))
            for i, (prompt, response) in enumerate(pairs[start : start + c.batch.size]):
                said = t.decode_continuation(made.response[i][made.response_mask[i]].tolist(), prompt[-1])
                wanted = t.decode_continuation(response, prompt[-1])
                right += bool(made.finished[i]) and compared(said, e.after) == compared(wanted, e.after)
        shares[entry.name] = right / len(pairs)
    return shares


def compared(text: str, after: str | None) -> str:
    """What counts of a text: what follows the last `after`, or all of a text without it."""
    return text.rpartition(after)[2] if after else text
