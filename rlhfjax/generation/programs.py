"""Sampling for those who hold lists of ids: prompts of any number and length by a few compiled programs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.generation.sampling import Sampler, SamplingParams
from rlhfjax.generation.slots import rollout
from rlhfjax.types import Params, PromptBatch, Rollout


class Programs:
    """A model with weights that stay arranged. Rows and widths are padded to powers of two, one program each.

    Padding is never sampled: the number of prompts is an argument of the program.
    """

    def __init__(self, model: Sampler, params: Params, slots: int = 64, narrowest: int = 16):
        self.arrange = jax.jit(model.arrange, static_argnums=1)
        self.params, self.weights = params, {}
        self.slots, self.narrowest = slots, narrowest

        def run(weights, prompts, key, asked, sampling: SamplingParams, samples: int) -> Rollout:
            return rollout(model, weights, prompts, key, sampling, sampling.slots or self.slots, samples, asked)

        self.run = jax.jit(run, static_argnames=("sampling", "samples"))

    def generate(
        self, prompts: Sequence[Sequence[int]], key: jax.Array, sampling: SamplingParams, samples: int = 1
    ) -> Rollout:
        """`samples` responses to each prompt, in numpy; sample j of prompt i has the uid i · samples + j."""
        rows = _power_of_two(len(prompts))
        width = max(self.narrowest, _power_of_two(max(map(len, prompts))))
        tokens, mask = np.full((rows, width), sampling.pad_id, np.int32), np.zeros((rows, width), bool)
        mask[len(prompts) :, -1] = True  # a row of padding is a prompt of one token that nobody asks
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, True
        batch = PromptBatch(jnp.asarray(tokens), jnp.asarray(mask), jnp.arange(rows, dtype=jnp.int32))
        alone = rows * samples == 1
        if alone not in self.weights:
            self.weights = {alone: self.arrange(self.params, 1 if alone else None)}  # one copy at a time
        made = self.run(self.weights[alone], batch, key, jnp.int32(len(prompts)), sampling=sampling, samples=samples)
        return jax.tree.map(lambda x: np.asarray(x)[: len(prompts) * samples], made)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
