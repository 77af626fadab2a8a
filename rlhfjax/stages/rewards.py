"""The rewards of an online stage: models on the device, and what is found on the host while the device computes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.algorithms.likelihood import token_scores
from rlhfjax.config.rewards import RECIPE, ModelReward, ModerationReward, on_host
from rlhfjax.errors import RewardError
from rlhfjax.functional.masking import at_last
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.rewards import Example, Pending, Rewards
from rlhfjax.sharding import local_rows, place_share
from rlhfjax.stages.starts import Starts
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.types import Params, Rollout, TokenBatch


@dataclass(frozen=True)
class Judges:
    """The terms of a stage's `rewards`, with the model of each that is one, by its title.

    A list that is the recipe's reward model alone is `plain`: its score is the score of a response, and no metric of
    its own says the same again.
    """

    terms: tuple[Any, ...]
    models: Mapping[str, SequenceModel]

    @property
    def plain(self) -> bool:
        return list(self.terms) == [ModelReward(model=RECIPE)]

    @property
    def on_host(self) -> Sequence[Any]:
        return on_host(self.terms)

    def of_recipe(self, params: Mapping[str, Params]) -> tuple[SequenceModel, Params] | None:
        """The reward model of the recipe with its parameters, where it is among the terms."""
        titles = [term.title for term in self.terms if isinstance(term, ModelReward) and term.model == RECIPE]
        return (self.models[titles[0]], params[titles[0]]) if titles else None

    def by_token(self, params: Mapping[str, Params], rows: TokenBatch) -> tuple[jax.Array, ...]:
        """What each model would score a response that ended at each token of packed rows."""
        return tuple(token_scores(model, params[title], rows) for title, model in self.models.items())

    def scored(self, rollout: Rollout, by_token: Iterable[jax.Array]) -> Rollout:
        """The rollout with the scores of the models; those of the host are 0 until they are there."""
        found = [at_last(scores, rollout.response_mask) for scores in by_token]
        if self.plain:
            return replace(rollout, scores=found[0])
        named = dict(zip(self.models, found, strict=True))
        nothing = jnp.zeros(rollout.finished.shape, jnp.float32)
        rewards = {term.title: named.get(term.title, nothing) for term in self.terms}
        return replace(rollout, scores=nothing, rewards=rewards)

    def total(self, rollout: Rollout) -> tuple[Rollout, dict[str, jax.Array]]:
        """The weighted sum as the score of each response, and the mean and deviation of each reward.

        Responses that moderation flags are counted, and with `flagged: drop` marked as not to be learned from.
        """
        if rollout.rewards is None:
            return rollout, {}
        rewards = {term.title: rollout.rewards[term.title] for term in self.terms}
        scores = sum(jnp.float32(term.weight) * rewards[term.title] for term in self.terms)
        means = {f"objective/reward/{title}": x.mean() for title, x in rewards.items()}
        flags = [(term, rewards[term.title] < 0) for term in self.terms if isinstance(term, ModerationReward)]
        means |= {f"objective/flagged/{term.title}": x.sum().astype(jnp.float32) for term, x in flags}
        if dropped := [x for term, x in flags if term.moderation.flagged == "drop"]:
            kept = ~jnp.stack(dropped).any(axis=0)
            rollout, means = (
                replace(rollout, kept=kept),
                means | {"objective/dropped": (~kept).sum().astype(jnp.float32)},
            )
        return replace(rollout, scores=scores), means | {
            f"objective/reward_std/{title}": x.std() for title, x in rewards.items()
        }


class HostRewards:
    """The host's rewards of a stage at work; each process finds those of its own rows. Close it."""

    def __init__(
        self,
        judges: Judges,
        records: Callable[[int], list[dict[str, Any]]],
        tokenizer: AnyTokenizer,
        mesh: jax.sharding.Mesh,
        report: Callable[[str], None],
    ):
        self._records, self._tokenizer, self._mesh = records, tokenizer, mesh
        self.asked = bool(judges.on_host)
        self._rewards = Rewards.open(judges.on_host, report)

    def begin(self, iteration: int, place: int, rollout: Rollout) -> "Asked":
        """Ask for the rewards of an iteration's rollout over the prompts at a place."""
        examples = self._examples(place, rollout)
        return Asked(self._mesh, self._rewards.submit(iteration, examples), len(examples))

    def _examples(self, place: int, rollout: Rollout) -> list[Example]:
        """The rows of this process, each with the record of its prompt."""
        t, made = self._tokenizer, processes.fetch(rollout)
        records = self._records(place)
        rows = local_rows(self._mesh, len(made.finished)) if self._mesh.is_multi_process else None
        rows = np.arange(len(made.finished)) if rows is None else rows
        each = len(rows) // len(records)  # responses to a prompt lie next to each other
        examples = []
        for number, i in enumerate(rows):
            prompt = made.prompt[i][made.prompt_mask[i]].tolist()
            response = made.response[i][made.response_mask[i]].tolist()
            said = response[:-1] if made.finished[i] else response
            examples.append(
                Example(
                    prompt=t.decode(prompt),
                    response=t.decode_continuation(said, prompt[-1]),
                    prompt_ids=tuple(prompt),
                    response_ids=tuple(response),
                    finished=bool(made.finished[i]),
                    record=records[number // each],
                )
            )
        return examples

    def close(self) -> None:
        """End what the rewards run in."""
        self._rewards.close()


@dataclass(frozen=True)
class Asked:
    """Rewards of the rows of this process that the host is finding."""

    mesh: jax.sharding.Mesh
    pending: Pending
    rows: int

    def done(self) -> bool:
        """Whether they are there."""
        return self.pending.done()

    def put(self, scored: Rollout) -> tuple[Rollout, dict[str, float]]:
        """Wait for them, and put them into the rollout.

        Raises RewardError in every process where one of them failed and is to end the run.
        """
        scores, failure = None, ""
        try:
            scores = self.pending.result()
        except RewardError as error:
            failure = str(error)
        processes.agree({"rewards": failure}, RewardError)
        if scores is None:
            raise RewardError(failure)
        put = {title: np.full_like(x, np.nan) if scores.skip else x for title, x in scores.values.items()}
        failed = np.zeros(self.rows, np.float32)
        failed[0] = scores.failed  # summed over processes
        shares = place_share(self.mesh, put | {"failures": failed})
        failures = float(processes.fetch(shares.pop("failures")).sum())
        rewards = {**(scored.rewards or {}), **shares}
        return replace(scored, rewards=rewards), {"objective/reward_failures": failures}


def load_judges(terms: Sequence[Any], starts: Starts) -> tuple[Judges, dict[str, Params]]:
    """The rewards of a stage, with the parameters of those that are models by their title."""
    loaded = {
        term.title: starts.load(RECIPE) if term.model == RECIPE else starts.load_from(term.model)
        for term in terms
        if isinstance(term, ModelReward)
    }
    models = {title: model for title, (model, _) in loaded.items()}
    return Judges(tuple(terms), models), {title: params for title, (_, params) in loaded.items()}
