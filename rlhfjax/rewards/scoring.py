"""The rewards of a stage at work: asked for while the device computes, and judged when the numbers are needed."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from rlhfjax.errors import ConfigError, RewardError
from rlhfjax.rewards.code import CodeFile, facts_of, files_of, source_of
from rlhfjax.rewards.example import Example
from rlhfjax.rewards.rules import Rule, Unscored, rule_of
from rlhfjax.rewards.scores import Scores, numbers_of
from rlhfjax.rewards.workers import Failed, Pool

Calls = list[tuple[int, "Future[dict[str, Any]]"]]  # how many examples each call has, and its answer to come


class Rewards:
    """The rewards of a stage that are found on the host, each in threads and processes of its own.

    `terms` are the entries of a `rewards` section; models among them are left to the device. Close it, or use `with`.
    """

    def __init__(self, terms: Sequence[Any], say: Callable[[str], None] = lambda text: None):
        self._facts, self._say, self._said = facts_of(terms), say, set[str]()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="rules")
        self._scorers = [_Scorer(term, self._threads) for term in terms if term.kind != "model"]

    @classmethod
    def open(cls, terms: Sequence[Any], say: Callable[[str], None] = lambda text: None) -> "Rewards":
        """Start what the rewards run in. Raises ConfigError where code is missing or cannot be loaded.

        `say` is told what fails where that does not end the run, and of edits, once for each reward.
        """
        rewards = cls(terms, say)
        try:
            for scorer in rewards._scorers:
                scorer.start()
        except BaseException:
            rewards.close()
            raise
        return rewards

    def facts(self) -> dict[str, dict[str, Any]]:
        """By the name of each reward its kind and weight, and what of it is code, with SHA-256: for the manifest."""
        return self._facts

    def submit(self, step: int, examples: Sequence[Example]) -> "Pending":
        """Ask for the rewards of some responses, and return at once.

        Raises RewardError where a command was edited since the start; of an edited function what was loaded then runs.
        """
        for scorer in self._scorers:
            for file in scorer.files:
                if (scorer.term.title, file.name) not in self._said and file.edited():
                    self._edited(scorer.term, file)
        return Pending(self, step, len(examples), [(each.term, each.submit(examples)) for each in self._scorers])

    def _edited(self, term: Any, file: CodeFile) -> None:
        if term.kind in ("command", "moderation"):  # read again by a worker that takes another's place
            raise RewardError(
                f"reward {term.title}: {file.name} was edited since this run began: expected SHA-256 "
                f"{file.sha256[:12]}…; put it back, or do the stage again"
            )
        self.note(
            (term.title, file.name),
            f"reward {term.title}: {file.name} was edited; what was loaded when this "
            f"run began (SHA-256 {file.sha256[:12]}…) goes on to its end",
        )

    def note(self, what: Any, text: str) -> None:
        """Say something that is to be said once."""
        if what not in self._said:
            self._said.add(what)
            self._say(text)

    def close(self) -> None:
        """End all workers, and their children; what is under way is given up."""
        for scorer in self._scorers:
            scorer.close()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> "Rewards":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pending:
    """The rewards of a batch that are being found."""

    def __init__(self, rewards: Rewards, step: int, count: int, calls: list[tuple[Any, Calls]]):
        self._rewards, self._step, self._count, self._calls = rewards, step, count, calls

    def done(self) -> bool:
        """Whether `result` would not wait."""
        return all(future.done() for _, calls in self._calls for _, future in calls)

    def result(self) -> Scores:
        """Wait for the rewards. Raises RewardError where one failed and `on_error` is stop."""
        return self._scores

    @cached_property
    def _scores(self) -> Scores:
        values, failures, failed, skip = {}, [], 0, False
        total = np.zeros(self._count, np.float64)
        for term, calls in self._calls:
            found, problem = numbers_of([(count, _answer(future)) for count, future in calls])
            missing = ~np.isfinite(found)
            if problem:
                failures.append(f"reward {term.title}, step {self._step}: {problem}")
                failed += int(missing.sum())
                skip = self._judged(term, failures[-1]) or skip
                if term.on_error == "value":
                    found = np.where(missing, np.float32(term.value), found)
            values[term.title] = found
            total += term.weight * found.astype(np.float64)
        total = np.full(self._count, np.nan) if skip else total
        return Scores(values, total.astype(np.float32), failures, failed, skip)

    def _judged(self, term: Any, failure: str) -> bool:
        """Whether the update is to be skipped. Raises RewardError where the run is to stop."""
        if term.on_error == "stop":
            raise RewardError(f"{failure}; correct it, or set on_error: skip or value (docs/rewards.md)")
        skip = term.on_error == "skip"
        then = "the update is skipped" if skip else f"{term.value:g} stands in its place"
        more = "more of this is only counted (objective/reward_failures)"
        self._rewards.note(term.title, f"{failure}; {then}; {more}")
        return skip


def _answer(future: "Future[dict[str, Any]]") -> Mapping[str, Any]:
    try:
        return future.result()
    except Failed as why:
        return {"error": str(why)}


class _Scorer:
    """One reward at work."""

    def __init__(self, term: Any, threads: ThreadPoolExecutor):
        self.term, self._threads = term, threads
        self.files: list[CodeFile] = files_of(term)
        self._pool: Pool | None = None
        self._rule: Rule = lambda example: 0.0
        if spec := self._spec():
            self._pool = Pool(spec, term.workers, term.timeout)
        else:
            self._rule = rule_of(term.kind, getattr(term, term.kind))

    def _spec(self) -> dict[str, Any] | None:
        """What a worker loads; None for a rule, which needs none."""
        match self.term.kind:
            case "function":
                path, _, name = self.term.function.rpartition(":")
                source, file = source_of(path)
                self.files = [file]
                # No order of a set that another worker does not have, and none of the run's devices.
                environment = {"PYTHONHASHSEED": "0", "JAX_PLATFORMS": "cpu"}
                return {"kind": "function", "path": path, "name": name, "source": source, "environment": environment}
            case "command":
                return {"kind": "command", "argv": list(self.term.command)}
            case "moderation":
                return {"kind": "moderation", "policy": self.term.moderation.policy}
            case "format":
                form = self.term.format
                return {"kind": "pattern", "pattern": form.pattern, "full": form.match == "full"}
        return None

    def start(self) -> None:
        """Start its workers. Raises ConfigError where what they run is missing or cannot be loaded."""
        if self.term.kind == "command" and shutil.which(self.term.command[0]) is None:
            raise ConfigError(
                f"reward {self.term.title}: expected a program that may be run, got {self.term.command[0]}; relative "
                f"paths are of {os.getcwd()}, the directory that the run is started in"
            )
        try:
            if self._pool:
                self._pool.start()
        except Failed as why:
            raise ConfigError(f"reward {self.term.title} cannot be loaded: {why}") from None

    def submit(self, examples: Sequence[Example]) -> Calls:
        """Ask for its numbers. How examples are shared out among calls depends on nothing but `per_call`."""
        if self._pool is None:
            return [(len(examples), self._threads.submit(self._ruled, examples))]
        size = self.term.per_call or len(examples)
        calls = [examples[start : start + size] for start in range(0, len(examples), size)]
        return [(len(call), self._pool.submit([example.as_json() for example in call])) for call in calls]

    def _ruled(self, examples: Sequence[Example]) -> dict[str, Any]:
        values: list[float | str] = []
        for example in examples:
            try:
                values.append(self._rule(example))
            except Unscored as why:
                values.append(str(why))
        return {"values": values}

    def close(self) -> None:
        if self._pool:
            self._pool.close()
