"""Scores of texts that are there already, by a reward model."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhfjax.data.batches import right_padded
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.sharding import batch_sharding, put, row_shards
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params

_ROWS = 64  # that are scored at a time, or a few more where devices share them


class RowScorer:
    """Scores of rows of ids, a batch at a time, whose rows are split over the devices of a mesh."""

    def __init__(self, mesh: jax.sharding.Mesh, model: SequenceModel, pad_id: int):
        self._mesh, self._pad_id, self._score = mesh, pad_id, jax.jit(model.scores)
        self.size = -(-_ROWS // row_shards(mesh)) * row_shards(mesh)

    def __call__(self, params: Params, rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> np.ndarray:
        """One score per row of at most `width` tokens, the first `lengths` of which are its prompt."""
        scores, layout = np.zeros(len(rows), np.float32), batch_sharding(self._mesh)
        for start in range(0, len(rows), self.size):
            some, begins = list(rows[start : start + self.size]), list(lengths[start : start + self.size])
            missing = self.size - len(some)
            tokens, mask = right_padded([*some, *[some[0]] * missing, [self._pad_id] * width], self._pad_id)
            batch = tokens[:-1], mask[:-1], np.asarray([*begins, *[begins[0]] * missing], np.int32)
            scored = self._score(params, *(put(part, layout) for part in batch))
            scores[start : start + self.size] = processes.fetch(scored)[: len(some)]
        return scores


class RewardScorer:
    """Scores of (prompt, response) pairs by a reward model, in batches of one shape.

    `gain` is what normalisation multiplied its scores with. Rows are split over the devices of a `mesh`.
    """

    def __init__(
        self,
        model: SequenceModel,
        params: Params,
        tokenizer: AnyTokenizer,
        gain: float = 1.0,
        report: Callable[[str], None] = lambda text: None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._split = RowScorer(mesh, model, tokenizer.pad_id) if mesh is not None and mesh.size > 1 else None
        self.model, self.params, self.tokenizer, self.gain, self.report = model, params, tokenizer, gain, report
        self.score = jax.jit(model.scores)

    def __call__(self, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> np.ndarray:
        """One score per pair of ids, the response with its end; equal pairs are computed once.

        A text beyond the context is read without its last words, and that is told.
        """
        distinct = list(dict.fromkeys(zip(prompts, responses, strict=True)))
        t, size, limit = self.tokenizer, self._split.size if self._split else _ROWS, self.model.config.context
        whole = [[*prompt, *response] for prompt, response in distinct]
        if cut := sum(len(row) > limit for row in whole):
            self.report(
                f"evaluate: the reward model reads {cut:,} of {len(whole):,} comparisons' and ratings' texts without "
                f"their end, which is beyond its context of {limit} tokens"
            )
        rows = [[*row[:-1][: limit - 1], row[-1]] for row in whole]
        order = np.argsort([len(row) for row in rows], kind="stable")  # batches of like lengths need less padding
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            length = min(-(-len(rows[chosen[-1]]) // 32) * 32, limit)
            begins = [min(len(distinct[i][0]), len(rows[i]) - 1) for i in chosen]
            if self._split:
                scores[chosen] = self._split(self.params, [rows[i] for i in chosen], begins, length)
                continue
            filler = [[t.eos_id] * length] * (size - len(chosen) + 1)  # also sets the padded length
            tokens, mask = right_padded([rows[i] for i in chosen] + filler, t.pad_id)
            lengths = np.ones(size + 1, np.int32)
            lengths[: len(chosen)] = begins
            scores[chosen] = processes.fetch(self.score(self.params, tokens, mask, lengths))[: len(chosen)]
        place = {pair: i for i, pair in enumerate(distinct)}
        return scores[[place[pair] for pair in zip(prompts, responses, strict=True)]]
