"""Every metric of metrics.jsonl: its unit, what it is taken over, how it becomes one number, of which weights it is.

Imports no jax.

Sums over tokens run over real response tokens, the one that ended the response included; prompts and padding never
count. Batch means are over the global batch, whatever the number of devices, minibatches or micro batches.
"""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Metric:
    """One column of metrics.jsonl; `mask` says which elements count, `reduction` how they become one number.

    `weights` are those that the optimizer moves (`trained`; in PPO they also sample) or those that the stage hands on
    (`served`). The two differ where `optimizer.ema_decay` keeps a moving average.
    """

    name: str
    unit: str
    mask: str
    reduction: str
    weights: str = field(default="trained", kw_only=True)
    meaning: str


_RESPONSE = "response tokens"
_ROLLOUTS = "rollouts"
_TARGETS = "target tokens"
_KL_SUM = "sum over tokens, mean over rollouts"
_TOKEN_MEAN = "mean over tokens"
_UPDATE_MEAN = "mean over tokens, then over updates"

_LEARNING = (
    Metric("step", "steps", "-", "count", "optimizer steps (offline stages) or iterations (online ones) so far"),
    Metric("episode", "episodes", "-", "count", "rollouts sampled so far"),
    Metric("lr", "1/step", "-", "value", "learning rate of the (first) update; skipped ones do not move it"),
    Metric("loss/train", "nats", "target tokens (dpo: pairs without ties)",
           "mean over tokens (dpo: 1/C(K,2) per prompt, mean over prompts)",
           "-log p of the next token (dpo: the preference loss of loss.kind)"),
    Metric("loss/validation", "nats", _TARGETS, _TOKEN_MEAN, "-log p of the next token on held-out data, dropout off"),
    Metric("loss/validation/NAME", "nats", _TARGETS, _TOKEN_MEAN, "the same on the dataset NAME"),
    Metric("eval/reward_score", "score", "validation prompts", "mean", "reward model's score of samples (select_by)"),
    Metric("grad/norm", "-", "parameters", "L2 norm", "gradient before clipping (offline stages)"),
)  # fmt: skip

_GUARDS = (
    Metric("loss/total", "-", "tokens of the batch", "as its terms, then over updates",
           "what the gradient is of: all terms with their coefficients; reliability.guards.loss_spike watches it"),
    Metric("guard/skipped_updates", "updates", "-", "count",
           "updates of this step or iteration that were skipped because a number was not finite"),
    Metric("guard/skipped_in_a_row", "steps", "-", "count",
           "last steps (iterations) of which every update was skipped, this one included"),
    Metric("guard/divergences", "steps", "-", "count", "steps so far at which a guard found a bound crossed"),
    Metric("guard/rollbacks", "rollbacks", "-", "count", "returns of this stage to a checkpoint so far"),
)  # fmt: skip

_ROUTERS = (
    Metric("router/load_balancing", "-", "tokens of the batch", "mean over layers",
           "balancing loss before its coefficient: experts_per_token when balanced, experts at worst"),
    Metric("router/z", "nats^2", "tokens of the batch", "mean over tokens and layers", "logsumexp(router logits)^2"),
    Metric("router/max_load", "-", "tokens of the batch", "mean over layers",
           "tokens of the busiest expert over the mean of all experts: 1 when balanced"),
    Metric("router/dropped", "fraction", "tokens of the batch", "mean over tokens, their experts and layers",
           "assignments beyond an expert's capacity"),
    Metric("router/rerouted", "fraction", "response tokens but each one's last", "mean over tokens and layers",
           "tokens that scoring routes to other experts than sampling did (routing: measured or replayed)"),
)  # fmt: skip

_PREFERENCES = (
    Metric("rewards/chosen", "score", "pairs without ties", "mean over pairs",
           "DPO's implicit reward of the better response: beta x (log-probability - the reference's)"),
    Metric("rewards/rejected", "score", "pairs without ties", "mean over pairs", "the same of the worse one"),
    Metric("rewards/margins", "score", "pairs without ties", "mean over pairs", "chosen - rejected"),
    Metric("rewards/accuracies", "fraction", "pairs without ties", "mean over pairs",
           "pairs whose better response has the higher implicit reward"),
    Metric("logps/chosen", "nats", "pairs without ties", "sum over tokens, mean over pairs",
           "log-probability of the better response"),
    Metric("logps/rejected", "nats", "pairs without ties", "sum over tokens, mean over pairs", "of the worse one"),
    Metric("eval/dpo/accuracy", "fraction", "pairs without ties", "mean over pairs, then datasets",
           "rewards/accuracies of held-out rankings"),
    Metric("eval/dpo/accuracy/NAME", "fraction", "pairs without ties", "mean over pairs", "the same on NAME alone"),
)  # fmt: skip

_REWARD_MODEL = (
    Metric("train/rm/loss", "nats", "pairs without ties", "1/C(K,2) a prompt, mean over prompts", "ranking loss"),
    Metric("train/rm/accuracy", "fraction", "pairs without ties", "mean over pairs",
           "pairs whose better response scores higher"),
    Metric("eval/rm/accuracy", "fraction", "pairs without ties", "mean over pairs, then datasets",
           "held-out rankings"),
    Metric("eval/rm/accuracy/NAME", "fraction", "pairs without ties", "mean over pairs", "the same on NAME alone"),
    Metric("eval/rm/normalized_mean", "score", "responses of normalize.data", "mean", "after normalisation: 0"),
    Metric("eval/rm/normalized_std", "score", "responses of normalize.data", "standard deviation",
           "after normalisation: 1 with normalize.scale"),
)  # fmt: skip

_OBJECTIVE = (
    Metric("objective/scores", "score", _ROLLOUTS, "mean", "reward model's score, after the rule for missing EOS"),
    Metric("objective/scores_std", "score", _ROLLOUTS, "standard deviation", "spread of those scores"),
    Metric("objective/rlhf_reward", "score", _RESPONSE, _KL_SUM, "final score + non_score_reward: PPO's objective"),
    Metric("objective/non_score_reward", "score", _RESPONSE, _KL_SUM, "-kl_coef x KL: negative where KL is positive"),
    Metric("objective/kl", "nats", _RESPONSE, _KL_SUM, "KL(policy, reference) of a response, k1 = log p - log p_ref"),
    Metric("objective/kl_k2", "nats", _RESPONSE, _KL_SUM, "the same by k2 = (log p - log p_ref)^2 / 2"),
    Metric("objective/kl_k3", "nats", _RESPONSE, _KL_SUM, "the same by k3 = p_ref/p - 1 - log(p_ref/p) >= 0"),
    Metric("objective/kl_per_token", "nats/token", _RESPONSE, _TOKEN_MEAN, "k1"),
    Metric("objective/kl_k2_per_token", "nats/token", _RESPONSE, _TOKEN_MEAN, "k2"),
    Metric("objective/kl_k3_per_token", "nats/token", _RESPONSE, _TOKEN_MEAN, "k3"),
    Metric("objective/kl_coef", "score/nat", "-", "value", "coefficient of the KL penalty in this iteration"),
    Metric("objective/entropy", "nats", _RESPONSE, _KL_SUM, "-log p of the sampled tokens"),
    Metric("objective/length", "tokens", _RESPONSE, "count, mean over rollouts", "length, the last token included"),
    Metric("objective/eos_rate", "fraction", _ROLLOUTS, "mean", "responses that ended by themselves"),
    Metric("objective/groups_alike", "fraction", "groups of responses", "mean", "groups of which all scores are equal"),
    Metric("objective/overlong_penalty", "score", _ROLLOUTS, "mean", "what groups.overlong adds to the score: -1 to 0"),
)  # fmt: skip

_REWARDS = (
    Metric("objective/reward/NAME", "reward", _ROLLOUTS, "mean", "the reward NAME, before its weight"),
    Metric("objective/reward_std/NAME", "reward", _ROLLOUTS, "standard deviation", "spread of that reward"),
    Metric("objective/flagged/NAME", "responses", _ROLLOUTS, "count", "responses that the moderation NAME flags"),
    Metric("objective/dropped", "responses", _ROLLOUTS, "count", "of these what is not learned from (flagged: drop)"),
    Metric("objective/reward_failures", "rewards", _ROLLOUTS, "count",
           "rewards of responses that were not found (on_error: skip or value)"),
)  # fmt: skip

_UPDATE = (
    Metric("loss/policy_avg", "advantage", _RESPONSE, _UPDATE_MEAN, "clipped surrogate loss"),
    Metric("loss/kl_avg", "nats", _RESPONSE, _UPDATE_MEAN, "k3 to the reference in the loss of GRPO, before kl.coef"),
    Metric("loss/value_avg", "score^2", _RESPONSE, _UPDATE_MEAN, "clipped value loss, with its 1/2, before value.coef"),
    Metric("loss/ptx", "nats", "pretraining targets", _UPDATE_MEAN, "pretraining loss of PPO-ptx, before ptx.coef"),
    Metric("policy/approxkl_avg", "nats/token", _RESPONSE, _UPDATE_MEAN, "1/2 (log p - log p_old)^2 inside the update"),
    Metric("policy/clipfrac_avg", "fraction", _RESPONSE, _UPDATE_MEAN, "tokens whose gradient the clip removes"),
    Metric("policy/entropy_avg", "nats/token", _RESPONSE, _UPDATE_MEAN, "entropy of the policy at its temperature"),
    Metric("policy/first_minibatch_ratio_err", "-", _RESPONSE, _TOKEN_MEAN,
           "|ratio - 1| in the first minibatch: 0 unless sampling and training disagree"),
    Metric("policy/epochs_run", "epochs", "-", "value", "inner epochs done before kl.stop ended them"),
    Metric("val/ratio", "-", _RESPONSE, _UPDATE_MEAN, "p / p_old"),
    Metric("val/ratio_err", "-", _RESPONSE, _UPDATE_MEAN, "|p / p_old - 1|"),
    Metric("val/clipfrac_avg", "fraction", _RESPONSE, _UPDATE_MEAN, "tokens whose value gradient the clip removes"),
    Metric("val/explained_variance", "fraction", _RESPONSE, "1 - Var(return - value) / Var(return)",
           "how well the value model predicts returns, before the update"),
    Metric("grad/policy_norm", "-", "parameters", "L2 norm, mean over updates", "policy gradient before clipping"),
    Metric("grad/value_norm", "-", "parameters", "L2 norm, mean over updates", "value gradient before clipping"),
    Metric("grad/ptx_to_ppo_norm_ratio", "-", "parameters", "ratio of L2 norms, mean over updates",
           "|ptx.coef x pretraining gradient| / |PPO gradient|, of the policy"),
    Metric("rollout_vs_train/logp_absdiff_max", "nats", _RESPONSE, "maximum",
           "|log p while sampling - log p in training| of one token"),
    Metric("rollout_vs_train/logp_absdiff_mean", "nats", _RESPONSE, _TOKEN_MEAN,
           "the same of all tokens: what int8 sampling, for one, adds to rounding"),
)  # fmt: skip

_GUESSES = (
    Metric("mtp/loss/NAME", "nats", "targets NAME + 1 ahead", _TOKEN_MEAN, "-log p of head NAME, before mtp_coef"),
    Metric("mtp/hit_rate/NAME", "fraction", "targets NAME + 1 ahead", _TOKEN_MEAN,
           "how often the likeliest token of head NAME is right"),
    Metric("speculation/kept", "fraction", "draft tokens", "mean", "draft tokens that were what the sampler drew"),
    Metric("speculation/tokens_per_call", "tokens", "response tokens after the first", "mean over calls",
           "tokens that a row gains by one call of the model; 1 without speculation"),
)  # fmt: skip

_SPEED = (
    Metric("perf/mfu", "fraction", "tokens of the batch without padding", "per step",
           "model FLOPs over what the devices could do in the step's wall time (rlhfjax.training.flops)"),
    Metric("perf/prefill_tokens_per_s", "tokens/s", "prompt tokens", "per iteration",
           "prompt tokens read, over the wall time of sampling"),
    Metric("perf/decode_tokens_per_s", "tokens/s", _RESPONSE, "per iteration",
           "response tokens sampled, over the wall time of sampling"),
    Metric("perf/train_tokens_per_s", "tokens/s", "tokens of the batch without padding", "per step",
           "tokens trained on; in PPO response tokens x inner epochs"),
    Metric("timing/step_s", "s", "-", "per step", "wall time of a step or an iteration, without validation and saving"),
    Metric("plan/step_ratio", "-", "-", "per step", "wall time of the programs over what the plan says (--plan)"),
    Metric("plan/memory_ratio", "-", "-", "value", "most memory of a device so far over the plan's peak of the stage"),
    Metric("timing/reshard_s", "s", "-", "per iteration", "wall time of making what sampling reads of the parameters"),
    Metric("timing/rollout_s", "s", "-", "per iteration", "wall time of sampling"),
    Metric("timing/score_s", "s", "-", "per iteration", "wall time of scores, values and log-probabilities"),
    Metric("timing/rewards_s", "s", "-", "per iteration", "wall time of waiting for rewards of the host after that"),
    Metric("timing/estimate_s", "s", "-", "per iteration", "wall time of rewards and advantages"),
    Metric("timing/update_s", "s", "-", "per iteration",
           "wall time of all updates of an iteration; the metrics of the one before are written meanwhile"),
    Metric("timing/host_s", "s", "-", "per iteration", "wall time in which no step ran: batches, keys, clocks"),
    Metric("timing/goodput", "fraction", "-", "since the run's first start",
           "productive share of the wall time, pauses between starts included (`rlhfjax goodput`)"),
    *(Metric(f"timing/{part}_share", "fraction", "-", "per iteration", f"{part}_s over step_s")
      for part in ("reshard", "rollout", "score", "rewards", "estimate", "update", "host")),
)  # fmt: skip

_SERVED = ("loss/validation", "eval/")
_OF_NO_MODEL = (
    "step",
    "episode",
    "lr",
    "guard/",
    "objective/kl_coef",
    "policy/epochs_run",
    "perf/",
    "plan/",
    "timing/",
)


def _weights(name: str) -> str:
    return "served" if name.startswith(_SERVED) else "-" if name.startswith(_OF_NO_MODEL) else "trained"


_OFFLINE = (_LEARNING, _GUARDS, _ROUTERS, _REWARD_MODEL, _PREFERENCES)
_ONLINE = (_OBJECTIVE, _REWARDS, _UPDATE, _GUESSES)
METRICS: dict[str, Metric] = {
    metric.name: replace(metric, weights=_weights(metric.name))
    for group in (*_OFFLINE, *_ONLINE, _SPEED)
    for metric in group
}


def metric_of(name: str) -> Metric | None:
    """The entry of a logged name; `loss/validation/chat` is an instance of `loss/validation/NAME`."""
    return METRICS.get(name) or METRICS.get(f"{name.rpartition('/')[0]}/NAME")
