"""Scores of texts that are there already, by the reward model of the run."""

import json

import jax
import numpy as np

from rlhfjax.data.batches import right_padded
from rlhfjax.host import processes
from rlhfjax.stages.job import Job
from rlhfjax.training.checkpoint import COMPLETE


class RewardScorer:
    """Scores of (prompt, response) pairs by the run's reward model, in batches of one shape."""

    def __init__(self, job: Job):
        self.job, (self.model, self.params) = job, job.load("reward")
        self.score = jax.jit(self.model.scores)
        facts = json.loads((job.run_dir / "reward" / COMPLETE).read_text(encoding="utf-8"))
        self.gain: float = facts.get("normalized_gain", 1.0)  # what normalisation multiplied the scores with

    def __call__(self, prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]]) -> np.ndarray:
        """One score per pair of ids, the response with its end; equal pairs are computed once.

        A text beyond the context is read without its last words, and that is told.
        """
        distinct = list(dict.fromkeys(zip(prompts, responses, strict=True)))
        t, size, limit = self.job.tokenizer, 64, self.model.config.context
        whole = [[*prompt, *response] for prompt, response in distinct]
        if cut := sum(len(row) > limit for row in whole):
            self.job.report(
                f"evaluate: the reward model reads {cut:,} of {len(whole):,} comparisons' and ratings' texts without "
                f"their end, which is beyond its context of {limit} tokens"
            )
        rows = [[*row[:-1][: limit - 1], row[-1]] for row in whole]
        order = np.argsort([len(row) for row in rows], kind="stable")  # batches of like lengths need less padding
        scores = np.zeros(len(rows), np.float32)
        for start in range(0, len(rows), size):
            chosen = order[start : start + size]
            length = min(-(-len(rows[chosen[-1]]) // 32) * 32, limit)
            filler = [[t.eos_id] * length] * (size - len(chosen) + 1)  # also sets the padded length
            tokens, mask = right_padded([rows[i] for i in chosen] + filler, t.pad_id)
            lengths = np.ones(size + 1, np.int32)
            lengths[: len(chosen)] = [min(len(distinct[i][0]), len(rows[i]) - 1) for i in chosen]
            scores[chosen] = processes.fetch(self.score(self.params, tokens, mask, lengths))[: len(chosen)]
        place = {pair: i for i, pair in enumerate(distinct)}
        return scores[[place[pair] for pair in zip(prompts, responses, strict=True)]]
