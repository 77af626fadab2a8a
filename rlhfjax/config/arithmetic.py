"""Arithmetic of a configuration that no single section can see: checked before any device is touched."""

import re
from collections.abc import Iterator, Mapping

from rlhfjax.config.meshes import mesh_problems, sequence_lengths
from rlhfjax.config.recipe import FACTS, SUPERVISED, needs_of, offline, online, sampling, section_of, stages_of
from rlhfjax.config.rewards import on_device
from rlhfjax.config.schema import Optimizer, RolloutBatch, Run
from rlhfjax.config.shape import Shape, linears, model_shape
from rlhfjax.config.unread import unread
from rlhfjax.errors import ConfigError

_MAX_PROBLEMS = 10


def check(run: Run, devices: int, held: Mapping[str, int] | None = None) -> None:
    """Check sizes against the meshes, lengths against the context, and stages against what they start from.

    `held` are the sizes of a model from a checkpoint (`mlp_width`, `width`, `experts`), where they are known. Raises
    ConfigError that lists every problem with its numbers and a remedy.
    """
    found = [*mesh_problems(run, devices, held), *_lengths(run), *_model(run)]
    found += [*_pairs(run), *_inputs(run), *_schedules(run), *_controller(run), *unread(run)]
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        more = [f"… and {len(found) - _MAX_PROBLEMS} more"] if len(found) > _MAX_PROBLEMS else []
        raise ConfigError("\n  ".join([f"{run.name}: {len(found)} problems", *found[:_MAX_PROBLEMS], *more]))


def _lengths(run: Run) -> Iterator[str]:
    context = None if run.model.checkpoint else run.model.context
    for name, length in sequence_lengths(run):
        if context and length > context:
            yield f"{name} {length} is more than model.context {context}; shorten it or raise model.context"


def _model(run: Run) -> Iterator[str]:
    if run.model.lora and not (run.model.checkpoint or run.stages.pretrain):
        yield "model.lora adapts a model that is there already; add model.checkpoint or stages.pretrain"
    if run.model.checkpoint:
        return  # its shape is in the checkpoint
    shape = model_shape(run.model)
    turned = int(shape.head_dim * shape.rope_fraction)
    if shape.positions == "rope" and (turned % 2 or not turned):
        share = "" if shape.rope_fraction == 1 else f" x {shape.rope_fraction:g} of {run.model.family}"
        yield f"model: rope turns pairs, so width / heads (or architecture.head_dim){share} must be even, got {turned}"
    yield from _experts(run, shape)
    yield from _heads(run, shape)
    names = linears(shape)
    for pattern in run.model.lora.targets if run.model.lora else ():
        if not any(re.search(pattern, name) for name in names):
            yield f"model.lora.targets: {pattern!r} matches no linear of this model; its linears are {', '.join(names)}"


def _heads(run: Run, shape: Shape) -> Iterator[str]:
    if shape.mtp_heads and shape.experts:
        yield "model.architecture.embedding.mtp_heads: not beside experts; remove the heads"
    yield from guessing_heads(run, shape.mtp_heads)


def guessing_heads(run: Run, heads: int) -> Iterator[str]:
    """Mistakes of stages that take more draft tokens from the heads of a model than it has."""
    for name, section in sampling(run):
        if section.sampling.speculate == "heads" and section.sampling.speculate_tokens > heads:
            yield (
                f"stages.{name}.sampling.speculate_tokens {section.sampling.speculate_tokens} is more than "
                f"model.architecture.embedding.mtp_heads {heads}; take fewer, or those of ngram"
            )


def _experts(run: Run, shape: Shape) -> Iterator[str]:
    if not shape.experts:
        experts = run.model.architecture.experts  # a resolved configuration names every key, with its default
        defaults = {name: field.default for name, field in type(experts).model_fields.items() if name != "count"}
        given = sorted(name for name, default in defaults.items() if getattr(experts, name) != default)
        if given:
            yield f"model.architecture.experts: {', '.join(given)} without experts; give count or another family"
        return
    if shape.experts_per_token > shape.experts:
        yield (
            f"model.architecture.experts.per_token {shape.experts_per_token} is more than the {shape.experts} experts; "
            "lower it or raise count"
        )
    if shape.activation.startswith("gelu"):
        yield f"model: experts have a gate, got the activation {shape.activation}; take swiglu, or change family"


def _pairs(run: Run) -> Iterator[str]:
    if run.model.family == "transformer_2017":
        yield from needs_documents(run)


def needs_documents(run: Run) -> Iterator[str]:
    """What a recipe cannot ask of an encoder–decoder, which learns from prompts with responses alone."""
    stages, remedy = run.stages, "an encoder–decoder learns from prompts with responses; remove it"
    if stages.pretrain:
        yield f"stages.pretrain reads documents; {remedy}"
    if stages.sft and stages.sft.pretraining:
        yield f"stages.sft.pretraining reads documents; {remedy}"
    if stages.sft and stages.sft.loss.train_on == "all":
        yield "stages.sft.loss.train_on: all is for decoders; an encoder–decoder writes one response to a prompt"
    for name, section in online(run):
        if section.ptx:
            yield f"stages.{name}.ptx reads documents; {remedy}"
    if stages.evaluate and stages.evaluate.losses:
        yield f"stages.evaluate.losses reads documents; {remedy}"
    for name, section in sampling(run):
        if (section.sampling.precision, section.sampling.speculate) != ("full", "none"):
            yield f"stages.{name}.sampling: precision and speculate are for decoders; remove them"


def _inputs(run: Run) -> Iterator[str]:
    stages, checkpoint = run.stages, run.model.checkpoint
    if not any(section for _, section in stages):
        yield "stages: nothing to run; give at least one of " + ", ".join(name for name, _ in stages)
    if checkpoint and (run.tokenizer.path or run.tokenizer.data):
        yield "tokenizer: a model from a checkpoint brings its own; remove tokenizer.path and tokenizer.data"
    if not checkpoint and not run.tokenizer.path and not run.tokenizer.data:
        yield "tokenizer: give data (texts to train one on) or path (a directory that holds one)"
    start = stages.sft or checkpoint
    if stages.reward and stages.reward.start_from == "sft" and not start:
        yield "stages.reward starts from sft; add stages.sft or model.checkpoint, or set start_from: pretrain"
    if stages.reward and stages.reward.start_from == "pretrain" and not (stages.pretrain or checkpoint):
        yield "stages.reward starts from pretrain; add stages.pretrain or model.checkpoint"
    if stages.reward and stages.reward.normalize.on == "samples" and not start:
        yield "stages.reward.normalize.on: samples needs a policy to sample; add stages.sft or model.checkpoint"
    for name, section in stages:
        if section and FACTS[name].aligns and not start:
            yield f"stages.{name} needs a policy to start from; add stages.{SUPERVISED} or model.checkpoint"
    for name, section in online(run):
        rewards = [term.model for term in on_device(section.rewards)]
        for need in needs_of(run, name):
            if not section_of(run, need) and need in rewards:
                yield f"stages.{name} needs a reward model; add stages.{need}, or give other rewards"
            elif not section_of(run, need):
                yield f"stages.{name}.value starts from the reward model; add stages.{need}, or set start_from: policy"
    if stages.evaluate and not (checkpoint or any(FACTS[name].role == "policy" for name in stages_of(run))):
        yield "stages.evaluate needs a model; add a training stage or model.checkpoint"
    if stages.evaluate and stages.evaluate.comparisons and not stages.reward:
        yield "stages.evaluate.comparisons measures the reward model; add stages.reward"


def _schedules(run: Run) -> Iterator[str]:
    for name, section in offline(run):
        if section.steps:
            yield from _warmup(name, section.optimizer, section.steps)
    for name, section in online(run):
        yield from _warmup(name, section.optimizer, section.steps * updates_per_step(section.batch))
    for name, section in sampling(run):
        if section.sampling.stop_after >= section.sampling.max_new_tokens:
            yield (
                f"stages.{name}.sampling.stop_after {section.sampling.stop_after} must be below max_new_tokens "
                f"{section.sampling.max_new_tokens}"
            )


def _controller(run: Run) -> Iterator[str]:
    for name, section in online(run):
        kl, size = section.kl, section.batch.size
        if kl.controller != "adaptive":
            continue
        if kl.coef == 0:
            yield (
                f"stages.{name}.kl: controller adaptive multiplies coef and 0 stays 0; give coef above 0, or "
                "controller fixed"
            )
        if size >= 5 * kl.horizon:  # 1 - 0.2 size / horizon, the factor below the target, is 0 or negative
            yield (
                f"stages.{name}.kl.horizon {kl.horizon:g} is in episodes, and one step has {size} (batch.size): coef "
                f"would lose all of itself at once; give more than {size / 5:g} (Ziegler et al. 2019 take 10,000)"
            )


def updates_per_step(batch: RolloutBatch) -> int:
    """Optimizer updates of one step of an online stage: epochs x minibatches."""
    return batch.epochs * (batch.size // (batch.minibatch or batch.size))


def check_updates(stage: str, optimizer: Optimizer, updates: int) -> None:
    """What `check` cannot ask of a stage given in epochs, once its rows are counted. Raises ConfigError."""
    for problem in _warmup(stage, optimizer, updates):
        raise ConfigError(f"{problem}; give fewer, or more epochs")


def _warmup(stage: str, optimizer: Optimizer, updates: int) -> Iterator[str]:
    if optimizer.warmup_steps > updates:
        yield f"stages.{stage}.optimizer.warmup_steps {optimizer.warmup_steps} is more than its {updates} updates"
