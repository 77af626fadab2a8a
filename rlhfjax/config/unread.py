"""Settings that nothing would read: given, and without effect where they stand. Each is an error with its reason.

What belongs to a switch of its own section (`kl.target` of the adaptive controller, `speculate_tokens`) may stay while
that is off. A value that is its default counts as not given: a resolved configuration names every key.
"""

from collections.abc import Iterator
from typing import Any

from rlhfjax.config.recipe import FACTS, STAGES, held_at, offline, online, section_of, stages_of
from rlhfjax.config.schema import Optimizer, Run, Section
from rlhfjax.config.shape import model_shape

_WINDOWLESS = ("gpt1", "gpt2", "llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")  # unless attention.window is given


def unread(run: Run) -> Iterator[str]:
    """What to take out of a configuration, a line each."""
    stages = run.stages
    yield from _tokenizer(run)
    yield from _positions(run)
    for name, section in [*offline(run), *online(run)]:
        yield from _optimizer(f"stages.{name}.optimizer", section.optimizer)
    if stages.pretrain:
        why = "documents always fill rows and go on in the next one"
        yield from _named("stages.pretrain.batch", stages.pretrain.batch, ("pack", "overlong"), why)
    if stages.reward and stages.reward.normalize.on == "none":
        yield from _named("stages.reward.normalize", stages.reward.normalize, ("scale", "count"), "on is none")
    if stages.evaluate:
        yield from _named("stages.evaluate.batch", stages.evaluate.batch, ("epochs",), "an evaluation updates nothing")
        why = "an evaluation has no old policy"
        yield from _named("stages.evaluate.sampling", stages.evaluate.sampling, ("old_log_probs",), why)
    yield from _weights(run)
    if run.model.lora and not any(FACTS[name].adapts for name in stages_of(run)):
        yield "model.lora: no stage of this recipe trains adapters; remove it, or add stages.sft"
    yield from _profile(run)


def _tokenizer(run: Run) -> Iterator[str]:
    if run.tokenizer.path or run.model.checkpoint:
        why = "a tokenizer that is there already is not trained"
        yield from _named("tokenizer", run.tokenizer, ("vocab_size", "kind", "documents"), why)


def _positions(run: Run) -> Iterator[str]:
    if run.model.checkpoint or run.model.family == "transformer_2017":
        return  # neither has an architecture of its own to give
    style, key = run.model.architecture, "model.architecture.attention"
    if model_shape(run.model).positions != "rope":
        yield from _named("model.architecture", style, ("rope_theta",), "positions are learned")
        yield from _named(key, style.attention, ("rope_local_theta",), "positions are learned")
    elif not style.attention.window and run.model.family in _WINDOWLESS:
        yield from _named(key, style.attention, ("rope_local_theta",), "no layer has a window")
    if not style.attention.window and run.model.family in _WINDOWLESS:
        yield from _named(key, style.attention, ("window_pattern",), "no layer has a window")


def _optimizer(key: str, optimizer: Optimizer) -> Iterator[str]:
    kind = optimizer.kind.partition("_")[0]
    if kind == "adafactor":
        yield from _named(key, optimizer, ("b1", "b2", "eps"), "adafactor has none")
    if kind == "lion":
        yield from _named(key, optimizer, ("eps",), "lion has none")
    if optimizer.schedule == "constant":
        yield from _named(key, optimizer, ("final",), "a constant schedule stays at lr")
    if not optimizer.warmup_steps:
        yield from _named(key, optimizer, ("warmup_from",), "there is no warm-up without warmup_steps")


def _weights(run: Run) -> Iterator[str]:
    """Shares are of what a stage mixes; other lists of data are read one after the other, each by itself."""
    for facts in STAGES:
        section = section_of(run, facts.name)
        for reads in facts.reads:
            if not reads.mixed and any(entry.weight != 1.0 for entry in held_at(section, reads.key)):
                yield (
                    f"{facts.place}.{reads.key}: weight is a share of what is mixed, and these are read one after the "
                    "other; remove weight"
                )


def _profile(run: Run) -> Iterator[str]:
    lengths = [section.steps for _, section in [*offline(run), *online(run)]]
    if run.profile and lengths and all(steps and steps < run.profile.start for steps in lengths):
        yield f"profile.start {run.profile.start}: no stage has more than {max(filter(None, lengths))} steps; lower it"


def _named(key: str, section: Section, names: tuple[str, ...], why: str) -> Iterator[str]:
    defaults: dict[str, Any] = {name: type(section).model_fields[name].default for name in names}
    if given := [name for name, default in defaults.items() if getattr(section, name) != default]:
        yield f"{key}: {', '.join(given)} would not be read, since {why}; remove {'it' if len(given) == 1 else 'them'}"
