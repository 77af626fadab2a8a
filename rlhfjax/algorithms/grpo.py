"""Group relative policy optimisation: the other responses to a prompt take the place of a value model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhfjax.algorithms.groups import differing
from rlhfjax.algorithms.objective import OnlineAlgorithm
from rlhfjax.algorithms.responses import response_counts, response_sums, update_metrics
from rlhfjax.algorithms.scored_rollouts import final_scores, kept_in_groups, mean_over_kept, measured
from rlhfjax.functional import (
    group_relative,
    importance_ratio,
    kl_estimate,
    masked_sum,
    overlong_penalty,
    sequence_kl,
    surrogates,
)
from rlhfjax.types import Experience, Params, Rollout, TokenExperience

AVERAGES = ("sequence", "token", "constant")


@dataclass(frozen=True)
class Grpo(OnlineAlgorithm):
    """GRPO of Shao et al. 2024, eq. 3 and 4: each token of a response has the advantage of the response in its group.

    Rows come in groups of `group` next to each other, responses to one prompt. `log_probs` is that of `Ppo`; `params`
    is {"policy": …}. `beta` weighs the k3 estimate of the KL to the reference in the loss; `kl_coef` of `estimate`
    takes the KL from the score instead.

    Dr. GRPO (Liu et al. 2025) is `deviation="none", average="constant", beta=0`: the loss is the sum over the tokens of
    a response divided by `longest`, whatever its length, and then the mean over responses.
    DAPO (Yu et al. 2025) is `clip_high=0.28, average="token", overlong=…, dynamic_sampling=True, beta=0`: a wider bound
    above (eq. 10), no share in the batch for groups of which all scores are the same (eq. 11), the mean over all
    tokens (eq. 12), and up to 1 less for the last `overlong` of `longest` tokens (eq. 13).

    How this differs from the paper:

    1. `deviation` is `sample` (n − 1), as in TRL, verl and OpenRLHF; Shao et al. do not say which one they take.
    2. The deviation has 1e-8 added to its square, where others add 1e-4 or 1e-6 to itself: small differences of scores
       count as much as large ones, and scores that are the same give exactly 0.
    3. A response without an end scores as `missing_eos` says; the paper has no rule for it.
    4. A group is informative by its scores after that rule, before the penalties for length and KL; DAPO asks whether
       all answers are right or all wrong, which is the same for scores of two values.
    5. KL and entropies are those at the temperature of the rollouts.
    """

    log_probs: Callable[[Params, Any], tuple[Array, Array]]
    group: int
    clip: float = 0.2
    clip_high: float | None = None  # None: as `clip`
    beta: float = 0.04
    deviation: str = "sample"  # sample | population | none
    average: str = "sequence"  # sequence | token | constant
    longest: int | None = None  # tokens that a response may have: for `constant` and `overlong`
    overlong: int | None = None
    dynamic_sampling: bool = False
    missing_eos: str = "replace"  # replace | subtract | keep
    missing_eos_value: float = -1.0

    def __post_init__(self):
        if self.average not in AVERAGES:
            raise ValueError(f"expected average 'sequence', 'token' or 'constant', got {self.average!r}")
        if self.longest is None and (self.average == "constant" or self.overlong is not None):
            raise ValueError("expected longest, the most tokens of a response, with average 'constant' and overlong")

    def predict(self, params: Params, rows: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies, and 0 for state values: there is no value model."""
        log_probs, entropies = self.log_probs(params, rows)
        return log_probs, entropies, jnp.zeros_like(log_probs)

    def informative(self, rollout: Rollout) -> Bool[Array, "G"]:
        """Groups in which a response scores better than another."""
        scores = final_scores(rollout, self.missing_eos, self.missing_eos_value)
        return differing(scores, self.group, kept_in_groups(rollout, self.group))

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, dict[str, Array]]:
        """Scores, less kl_coef x KL and the penalty for length, compared within each group."""
        mask, scores = rollout.response_mask, final_scores(rollout, self.missing_eos, self.missing_eos_value)
        penalties = -kl_coef * sequence_kl(rollout.log_probs, rollout.ref_log_probs, mask, "k1")
        metrics = {"objective/groups_alike": 1.0 - self.informative(rollout).astype(jnp.float32).mean()}
        if self.overlong is not None and self.longest is not None:
            length = overlong_penalty(mask.sum(axis=1), self.longest, self.overlong)
            penalties, metrics = (
                penalties + length,
                metrics | {"objective/overlong_penalty": mean_over_kept(length, rollout)},
            )
        kept = kept_in_groups(rollout, self.group)
        each = group_relative((scores + penalties).reshape(-1, self.group), deviation=self.deviation, present=kept)
        metrics |= measured(rollout, scores, penalties, kl_coef)
        if self.dynamic_sampling:  # a response without tokens has no share in any mean
            taught = jnp.repeat(self.informative(rollout), self.group)
            mask = mask & taught[:, None]
            rollout = replace(rollout, response_mask=mask)
        advantages = jnp.where(mask, each.reshape(-1)[:, None], 0.0)
        return Experience(rollout, advantages, jnp.zeros_like(advantages)), metrics

    def weight(self, experience: Experience | TokenExperience) -> dict[str, Array]:
        """Responses in the batch, and their tokens."""
        return response_counts(experience)

    def loss(
        self,
        params: Params,
        experience: Experience | TokenExperience,
        weight: dict[str, Array],
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Clipped surrogate + beta x KL to the reference, where each token counts as `average` says."""
        old, mask = experience.log_probs, experience.mask
        log_probs, entropies = self.log_probs(params, experience.rows)
        share = self._shares(experience, weight)

        ratio = importance_ratio(log_probs, old, mask)
        high = self.clip if self.clip_high is None else self.clip_high
        unclipped, clipped = surrogates(ratio, experience.advantages, self.clip, high)
        policy = masked_sum(share * jnp.maximum(unclipped, clipped), mask)
        # Padding is 0 before exp: it may hold anything, and infinity times zero would be NaN in the gradient.
        real, ref = jnp.where(mask, log_probs, 0.0), jnp.where(mask, experience.ref_log_probs, 0.0)
        kl = masked_sum(share * kl_estimate(real, ref, "k3"), mask)
        metrics = {
            "loss/policy_avg": policy,
            "loss/kl_avg": kl,
            "policy/clipfrac_avg": masked_sum(clipped > unclipped, mask) / weight["tokens"],
        }
        return policy + self.beta * kl, metrics | update_metrics(experience, log_probs, entropies, weight)

    def _shares(self, experience: Experience | TokenExperience, weight: dict[str, Array]) -> Float[Array, "*N T"]:
        """What each token counts in the loss; 0 where there is none."""
        real = experience.mask.astype(jnp.float32)
        if self.average == "token":
            return real / weight["tokens"]
        length = response_sums(experience, real) if self.average == "sequence" else jnp.float32(self.longest or 1)
        return real / (jnp.maximum(length, 1.0) * weight["responses"])
