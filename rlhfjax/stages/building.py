"""Building a stage apart from running it: its programs and what they are called with, from a configuration alone.

There is no directory, no data, no thread and no parameter. What a stage runs is made by the same functions, of the same
learner; so a plan lowers these programs for devices that are not here, and they are those that run there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhfjax.config import schema
from rlhfjax.config.recipe import FACTS, compared, section_of, stages_of, starts_of
from rlhfjax.generation import SamplingParams
from rlhfjax.host_memory import on_device
from rlhfjax.layout import laid_out_by
from rlhfjax.models.heads import with_head, zero_head
from rlhfjax.models.lora import has_adapters, init_lora, join, split
from rlhfjax.sharding import batch_shapes, state_shapes
from rlhfjax.sharding.activations import layout_of
from rlhfjax.stages import offline, online_programs
from rlhfjax.stages.batches import loss_batch, mixed_batch
from rlhfjax.stages.compilation import in_turn, unbound
from rlhfjax.stages.measures.responses import sampler
from rlhfjax.stages.measures.validation import loss_meter
from rlhfjax.stages.models import new_model, sampling_params
from rlhfjax.stages.starts import Started, offloads
from rlhfjax.stages.work import offline_work, online_work
from rlhfjax.target import Target, building_for
from rlhfjax.training.checkpoint import find_checkpoint, model_shapes
from rlhfjax.training.digests import program_on
from rlhfjax.training.optimizer import make_optimizer
from rlhfjax.training.state import init_state_shapes
from rlhfjax.types import PromptBatch, RankedBatch, TokenBatch


@dataclass(frozen=True)
class Vocabulary:
    """What programs know of a tokenizer: how many ids it has, and which of them are special."""

    size: int
    end_ids: tuple[int, ...] = (2,)
    pad_id: int = 0
    begin_id: int = 1


@dataclass(frozen=True)
class Built:
    """A jitted function with what it is called with, as shapes with their layouts, for a mesh and a target.

    `held` is what the stage keeps all the time, among the arguments or beside them, as a tree of the same shapes.
    `flops` are those of the model in one run where all rows are full, on all devices together, as `training/flops.py`
    counts them.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: jax.sharding.Mesh
    target: Target
    held: Any = ()
    flops: float = 0.0

    def lower(self) -> Any:
        """jax's `Lowered`, traced once. What `partial` binds is among the arguments of the program."""
        return self._lowered

    @cached_property
    def _lowered(self) -> Any:
        bound, jitted = unbound(self.function)
        with building_for(self.target), laid_out_by(layout_of(self.mesh)):
            return jitted.lower(*bound, *self.arguments)

    def shapes(self) -> Any:
        """What it gives, as shapes with their layouts."""
        return self.lower().out_info


def build(
    run: schema.Run,
    stage: str,
    mesh: jax.sharding.Mesh,
    target: Target,
    vocabulary: Vocabulary,
    *,
    steps: int | None = None,
    longest: int | None = None,
) -> dict[str, Built]:
    """The programs of a stage on a mesh, whose devices need not be here, by name.

    Of a stage that trains on data: `step`, and `validation` where it has held-out data. Of one that samples: `rollout`,
    `score`, `estimate`, `update`, and where it draws more than once `informative` and `merged`. Of both, where the host
    does not hold the arrays, the `digests` of a save. Of an evaluation: `responses` of each policy that is compared,
    and `losses`. The tokenizer's has none.

    Two numbers are of the data: `steps` of a stage that is measured in epochs (the learning rate follows them), and
    `longest`, the tokens of the longest comparison with its prompt counted once. Left out, they are 1, and the most
    that the section admits. A text at which sampling stops takes the place of the vocabulary's ends. Raises ConfigError
    for a model that the mesh cannot hold, and IntegrityError where the configuration names a checkpoint that is not
    there.
    """
    starts, c = Shapes(run, stage, mesh, vocabulary), section_of(run, stage)
    with building_for(target):
        if FACTS[stage].online:
            return _online(c, starts, target)
        if FACTS[stage].measures:
            return _evaluation(c, starts, target)
        return _offline(c, starts, target, steps, longest) if FACTS[stage].role else {}


@dataclass(frozen=True)
class Shapes:
    """What the stages of a recipe start from and hand on (`Starts`), as shapes with their layouts."""

    run: schema.Run
    stage: str
    mesh: jax.sharding.Mesh
    vocabulary: Vocabulary

    def key(self, use: str) -> jax.Array:
        """Any: keys of all uses have one shape."""
        return jax.random.key(0)

    def offloads(self, what: Literal["moments", "frozen"]) -> bool:
        """As `Starts` has it."""
        return offloads(self.run, self.stage, self.mesh, what)

    def policy_from(self, *stages: str) -> Started:
        """As `Starts` has it."""
        for stage in stages or starts_of(self.run, self.stage):
            if section_of(self.run, stage):
                return self._adapted(*self.load(stage))
        if self.run.model.checkpoint:
            model, params = self.load_from(self.run.model.checkpoint)
        else:
            model = new_model(self.run.model, self.vocabulary.size, self.vocabulary.begin_id)
            params = self._laid_out(jax.eval_shape(model.init, self.key("init")))
        return self._adapted(model, params)

    def load(self, stage: str) -> Started:
        """The model that a stage hands on: its policy, or that with a head."""
        model, policy = replace(self, stage=stage).policy_from()
        if FACTS[stage].role == "policy":
            return model, policy
        return model, self._laid_out(with_head(policy, jax.eval_shape(lambda: zero_head(model.config.width))))

    def load_from(self, path: Path | str) -> Started:
        """The model of a checkpoint; its parameters are not read."""
        settings = self.run.model
        here = {"dtype": settings.dtype, "remat": settings.remat, "attention": settings.attention}
        model, params = model_shapes(find_checkpoint(path), **here)
        return model, self._laid_out(params)

    def _adapted(self, model: Any, params: Any) -> Started:
        lora = self.run.model.lora
        if not lora or not FACTS[self.stage].adapts or has_adapters(params):
            return model, params
        adapters = jax.eval_shape(lambda key: init_lora(key, params, lora.rank, lora.targets), self.key("adapters"))
        model = replace(model, config=replace(model.config, lora_alpha=lora.alpha))
        return model, join(params, self._laid_out(adapters))

    def _laid_out(self, params: Any) -> Any:
        return state_shapes(self.mesh, params)


def _offline(c: Any, starts: Shapes, target: Target, steps: int | None, longest: int | None) -> dict[str, Built]:
    kind, mesh = FACTS[starts.stage].reads[0].kind, starts.mesh
    most = c.batch.candidates * c.batch.length if kind == "comparison" else 0
    learner = _module(starts.stage).learner(c, mesh, starts, longest or most)
    optimizer = make_optimizer(c.optimizer, c.steps or steps or 1, width=learner.model.config.width)
    average = offline.average_of(c)
    how = optimizer, average and average.of, starts.offloads("moments")
    state = init_state_shapes(mesh, split(learner.params)[1], *how)
    batch, fixed = _batch(mesh, c.batch), learner.fixed
    step = partial(offline.build(c, mesh, learner, state, optimizer), fixed)
    held = state, fixed
    work = offline_work(c, learner)
    built = {"step": Built(step, (state, batch, starts.key("steps")), mesh, target, held, work)}
    if c.validation:
        whole = on_device(join(fixed, state.params))
        built["validation"] = Built(learner.meter.total, (whole, batch, c.batch.size), mesh, target, held, work / 3)
    return built | _saving(state, mesh, target, held)


def _saving(state: Any, mesh: jax.sharding.Mesh, target: Target, held: Any) -> dict[str, Built]:
    """What a save runs on devices whose memory the host does not share."""
    leaves = tuple(jax.tree.leaves(state))
    types = tuple(str(leaf.dtype) for leaf in leaves)
    return {} if target.platform == "cpu" else {"digests": Built(program_on(mesh), (leaves, types), mesh, target, held)}


def _online(c: Any, starts: Shapes, target: Target) -> dict[str, Built]:
    mesh, learner = starts.mesh, _module(starts.stage).learner(c, starts.mesh, starts)
    state = online_programs.first_state_shapes(c, mesh, learner)
    steps = online_programs.build(c, mesh, learner, state, _sampling(c.sampling, starts.vocabulary))
    prompts, mixed = _prompts(mesh, c.prompts, c.batch.prompt_length), None
    if c.ptx:
        mixed = _batch(mesh, mixed_batch(c))

    def later(function: Any, arguments: Callable[[], tuple]) -> Built:
        return Built(function, arguments(), mesh, target, held)

    held = state, learner.frozen
    made = in_turn(steps, state, learner.frozen, prompts, mixed, later)
    built = {name: getattr(made, name) for name in ("rollout", "score", "estimate", "update", "reshard")}
    if steps.refill:
        scored = built["score"].shapes()
        built["informative"] = Built(steps.refill.informative, (scored,), mesh, target, held)
        built["merged"] = Built(steps.refill.merged, (scored, scored), mesh, target, held)
    work = online_work(c, learner)
    built = {name: replace(made, flops=work.get(name, 0.0)) for name, made in built.items() if made is not None}
    return built | _saving(state, mesh, target, held)


def _evaluation(c: schema.Evaluate, starts: Shapes, target: Target) -> dict[str, Built]:
    run, mesh, built = starts.run, starts.mesh, {}
    policies = {stage: starts.load(stage) for stage in compared(run)}
    if len(policies) == 1 and any(FACTS[stage].aligns for stage in policies):
        policies = {"checkpoint": starts.policy_from()} | policies
    reward = starts.load("reward") if run.stages.reward else None
    settings = _sampling(c.sampling, starts.vocabulary)
    prompts = _prompts(mesh, c.batch.size, c.batch.prompt_length)
    everyone = {stage: starts.load(stage) for stage in stages_of(run) if FACTS[stage].role == "policy"} | policies
    held = {stage: params for stage, (_, params) in everyone.items()}, reward and reward[1]
    for stage, policy in policies.items():
        respond = sampler(c, mesh, policy, next(iter(policies.values())), reward, settings)
        built[f"responses/{stage}"] = Built(respond, (prompts, starts.key("samples")), mesh, target, held)
    if c.losses and policies:
        model, params = next(iter(policies.values()))
        documents = _batch(mesh, loss_batch(run, c))
        built["losses"] = Built(loss_meter(mesh, model).total, (params, documents, c.batch.size), mesh, target, held)
    return built


def _batch(mesh: jax.sharding.Mesh, batch: schema.Batch | schema.RankedBatch) -> Any:
    """The shapes of a batch of documents, demonstrations or comparisons."""
    rows = (batch.size,)
    if not isinstance(batch, schema.RankedBatch):
        tokens = _ids(*rows, batch.length)
        return batch_shapes(mesh, TokenBatch(tokens, tokens, tokens, _marks(tokens)))
    ranks, tokens = _ids(*rows, batch.candidates), _ids(*rows, batch.candidates, batch.length)
    return batch_shapes(mesh, RankedBatch(tokens, _marks(tokens), ranks, _marks(ranks), _ids(*rows)))


def _prompts(mesh: jax.sharding.Mesh, size: int, length: int) -> Any:
    tokens = _ids(size, length)
    return batch_shapes(mesh, PromptBatch(tokens, _marks(tokens), _ids(size)))


def _ids(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _marks(ids: Any) -> Any:
    return jax.ShapeDtypeStruct(ids.shape, jnp.bool_)


def _sampling(section: schema.Sampling, vocabulary: Any) -> SamplingParams:
    return sampling_params(section.model_copy(update={"stop": None}), vocabulary)


def _module(stage: str) -> Any:
    return import_module(f"rlhfjax.stages.{FACTS[stage].module}")
