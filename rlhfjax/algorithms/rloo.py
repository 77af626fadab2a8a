"""REINFORCE leave-one-out: the baseline of a response is the mean score of the others to its prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhfjax.algorithms.groups import differing
from rlhfjax.algorithms.objective import OnlineAlgorithm
from rlhfjax.algorithms.responses import first_tokens, response_counts, response_sums, update_metrics
from rlhfjax.algorithms.scored_rollouts import final_scores, kept_in_groups, measured
from rlhfjax.functional import leave_one_out, masked_sum, sequence_kl, surrogates
from rlhfjax.types import Experience, Params, Rollout, TokenExperience


@dataclass(frozen=True)
class Rloo(OnlineAlgorithm):
    """RLOO of Ahmadian et al. 2024, eq. 9: the gradient is that of the mean over responses of (R_i − b_i) log π(y_i).

    R = score − kl_coef · log(π(y) / π_ref(y)), and b_i is the mean of R over the other responses to the prompt. Rows
    come in groups of `group` next to each other, responses to one prompt. `log_probs` is that of `Ppo`; `params` is
    {"policy": …}.

    How this differs from the paper:

    1. The loss is −A ρ with the importance ratio ρ = π(y) / π_old(y), whose gradient at ρ = 1 is REINFORCE's: a rollout
       may be learned from in several updates. With one update a rollout it is the paper's algorithm.
    2. `clip` bounds ρ as PPO does, which changes no first update; None leaves it unbounded. `ratio` is that of the
       whole response (`sequence`, as in TRL: the response is one action, as the paper has it) or of each token with the
       advantage of its response (`token`, as in OpenRLHF). Both have the same first gradient.
    3. Advantages are not standardised, as in the paper; TRL and OpenRLHF can.
    4. A response without an end scores as `missing_eos` says; the paper has no rule for it.
    5. KL and entropies are those at the temperature of the rollouts.
    """

    log_probs: Callable[[Params, Any], tuple[Array, Array]]
    group: int
    clip: float | None = 0.2
    ratio: str = "sequence"  # sequence | token
    missing_eos: str = "replace"  # replace | subtract | keep
    missing_eos_value: float = -1.0

    def __post_init__(self):
        if self.ratio not in ("sequence", "token"):
            raise ValueError(f"expected ratio 'sequence' or 'token', got {self.ratio!r}")

    def predict(self, params: Params, rows: Any) -> tuple[Array, Array, Array]:
        """Log-probabilities, entropies, and 0 for state values: there is no value model."""
        log_probs, entropies = self.log_probs(params, rows)
        return log_probs, entropies, jnp.zeros_like(log_probs)

    def estimate(self, rollout: Rollout, kl_coef: Float[Array, ""]) -> tuple[Experience, dict[str, Array]]:
        """Scores less kl_coef x KL, less the mean of the others in the group."""
        mask, scores = rollout.response_mask, final_scores(rollout, self.missing_eos, self.missing_eos_value)
        non_score = -kl_coef * sequence_kl(rollout.log_probs, rollout.ref_log_probs, mask, "k1")
        kept = kept_in_groups(rollout, self.group)
        each = leave_one_out((scores + non_score).reshape(-1, self.group), present=kept)
        advantages = jnp.where(mask, each.reshape(-1)[:, None], 0.0)
        alike = 1.0 - differing(scores, self.group, kept).astype(jnp.float32).mean()
        metrics = measured(rollout, scores, non_score, kl_coef) | {"objective/groups_alike": alike}
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
        """Mean over responses of −A ρ, bounded by the clip; with `token`, of the sum over the tokens of each."""
        log_probs, entropies = self.log_probs(params, experience.rows)
        log_ratio = jnp.where(experience.mask, log_probs - experience.log_probs, 0.0)
        if self.ratio == "sequence":  # the same at every token of a response, which counts at its first one
            log_ratio, counted, count = response_sums(experience, log_ratio), first_tokens(experience), "responses"
        else:
            counted, count = experience.mask, "tokens"
        bound = jnp.inf if self.clip is None else self.clip
        unclipped, clipped = surrogates(jnp.exp(log_ratio), experience.advantages, bound, bound)
        loss = masked_sum(jnp.maximum(unclipped, clipped), counted) / weight["responses"]
        metrics = {
            "loss/policy_avg": loss,
            "policy/clipfrac_avg": masked_sum(clipped > unclipped, counted) / weight[count],
        }
        return loss, metrics | update_metrics(experience, log_probs, entropies, weight)
