"""The numbers that follow from a configuration, in a few lines of text."""

from collections.abc import Iterator

from rlhfjax.config.arithmetic import updates_per_step
from rlhfjax.config.meshes import least_devices, mesh_shape
from rlhfjax.config.schema import Batch, Evaluate, Offline, Online, Optimizer, Ptx, RankedBatch, Run, Sft
from rlhfjax.config.shape import Shape, active_count, adapter_count, model_shape, parameter_count

_OFFLOADED = {"moments": "moments", "frozen": "frozen models", "all": "moments and frozen models"}


def describe(run: Run, devices: int | None = None) -> str:
    """One line a part: mesh, model, and for each stage its batches, accumulation, updates, tokens and episodes.

    `devices` None takes the smallest number that the mesh fits. Raises ConfigError when the mesh does not fit.
    """
    rows = [*_meshes(run, devices), ("model", _model(run)), ("tokenizer", _tokenizer(run)), *_stages(run)]
    label = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{label}}  {text}" for name, text in rows)


def _meshes(run: Run, devices: int | None) -> Iterator[tuple[str, str]]:
    count = devices or least_devices(run.mesh)
    for key, mesh in run.mesh.all.items():
        shown = " x ".join(f"{axis} {size}" for axis, size in mesh_shape(mesh, count, key).items())
        slices = f" on {mesh.slices} slices" if mesh.slices > 1 else ""
        slices += "" if mesh.offload == "none" else f", {_OFFLOADED[mesh.offload]} in their hosts' memory"
        assumed = "" if devices or key != "mesh" else " (the fewest that fit; --devices N for another number)"
        yield key.removeprefix("stages."), f"{shown} = {_count(count, 'device')}{slices}{assumed}"


def _model(run: Run) -> str:
    lora = run.model.lora
    adapted = f"; LoRA rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}" if lora else ""
    if run.model.checkpoint:
        return f"from checkpoint {run.model.checkpoint}{adapted}"
    shape = model_shape(run.model)
    heads = f"{shape.heads} heads of {shape.head_dim}"
    if shape.kv_heads != shape.heads:
        heads += f" ({shape.kv_heads} for keys and values)"
    text = f"{run.model.family}: {shape.layers} layers of width {shape.width:,}, {heads}, {_inside(shape)}, "
    text += f"context {shape.context:,}"
    if not run.tokenizer.path:
        text += f"; {parameter_count(shape, run.tokenizer.vocab_size):,} parameters"
        text += f", {active_count(shape, run.tokenizer.vocab_size):,} active" if shape.experts else ""
    return f"{text}{adapted}: {adapter_count(shape, lora):,} trainable parameters" if lora else text


def _inside(shape: Shape) -> str:
    if not shape.experts:
        return f"{shape.mlp_width:,} inside"
    return f"{shape.experts:,} experts with {shape.mlp_width:,} inside, {shape.experts_per_token:,} per token"


def _tokenizer(run: Run) -> str:
    if run.model.checkpoint:
        return "the checkpoint's"
    if run.tokenizer.path:
        return f"from {run.tokenizer.path}"
    return (
        f"{run.tokenizer.kind}, {run.tokenizer.vocab_size:,} pieces, from at most {run.tokenizer.documents:,} documents"
    )


def _stages(run: Run) -> Iterator[tuple[str, str]]:
    for name, section in run.stages:
        match section:
            case Offline(batch=Batch() as batch):
                yield name, _token_stage(section, batch) + _mixed_in(section)
            case Offline(batch=RankedBatch() as batch):
                yield name, _rankings(section, batch)
            case Online():
                yield name, _online(section)
                if section.ptx:
                    yield "", _ptx(section, section.ptx)
            case Evaluate():
                yield name, _evaluate(section)


def _mixed_in(stage: Offline) -> str:
    mix = stage.pretraining if isinstance(stage, Sft) else None
    return f"; {mix.fraction:.0%} pretraining sequences mixed in" if mix else ""


def _token_stage(stage: Offline, batch: Batch) -> str:
    tokens = batch.size * batch.length
    total = f", {stage.steps * tokens:,} in all" if stage.steps else ""
    return (
        f"{_duration(stage)} of {batch.size:,} sequences x {batch.length:,} = {tokens:,} tokens per step{total}; "
        f"{_accumulation(batch.size, batch.micro)}; {_rate(stage.optimizer)}"
    )


def _rankings(stage: Offline, batch: RankedBatch) -> str:
    pairs = batch.candidates * (batch.candidates - 1) // 2
    return (
        f"{_duration(stage)} of {batch.size:,} prompts x up to {batch.candidates} responses of up to {batch.length:,} "
        f"tokens = up to {batch.size * pairs:,} pairs per step; {_accumulation(batch.size, batch.micro)}; "
        f"{_rate(stage.optimizer)}"
    )


def _online(stage: Online) -> str:
    batch, response = stage.batch, stage.sampling.max_new_tokens
    minibatch, updates = batch.minibatch or batch.size, updates_per_step(batch)
    prompts = stage.prompts
    each = "" if prompts == batch.size else f" ({prompts:,} prompts x {batch.size // prompts} responses)"
    return (
        f"{stage.steps:,} steps x {batch.size:,} rollouts{each} = {stage.steps * batch.size:,} episodes; "
        f"{_count(batch.epochs, 'epoch')} of {_count(batch.size // minibatch, 'minibatch')} of {minibatch:,} = "
        f"{_count(updates, 'update')} per step, "
        f"{stage.steps * updates:,} in all; {_accumulation(minibatch, batch.micro)}; up to "
        f"{batch.prompt_length:,} + {response:,} = {batch.prompt_length + response:,} tokens; {_rate(stage.optimizer)}"
    )


def _ptx(stage: Online, ptx: Ptx) -> str:
    sequences = int((stage.batch.minibatch or stage.batch.size) * ptx.ratio)
    return f"ptx: {sequences:,} sequences x {ptx.length:,} = {sequences * ptx.length:,} tokens per update"


def _evaluate(stage: Evaluate) -> str:
    batches = -(-stage.samples // stage.batch.size)
    return f"{stage.samples:,} samples in {_count(batches, 'batch')} of {stage.batch.size:,}"


def _duration(stage: Offline) -> str:
    return f"{stage.steps:,} steps" if stage.steps else f"{stage.epochs:g} epoch{'' if stage.epochs == 1 else 's'}"


def _accumulation(size: int, micro: int | None) -> str:
    parts = size // (micro or size)
    return "no accumulation" if parts == 1 else f"{parts} micro batches of {micro:,} accumulated"


def _rate(optimizer: Optimizer) -> str:
    warmup = f", {optimizer.warmup_steps:,} warm-up" if optimizer.warmup_steps else ""
    kind = "" if optimizer.kind == "adamw" else f"{optimizer.kind} "
    return f"{kind}lr {optimizer.lr:g} {optimizer.schedule}{warmup}"


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") and noun != "epoch" else "s")
    return f"{number:,} {noun if number == 1 else plural}"
