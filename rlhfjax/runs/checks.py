"""From a configuration to jobs: device mesh, shared reader, the check of all data before anything is compiled."""

import datetime
import difflib
import importlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from rlhfjax import faults
from rlhfjax.config import (
    Run,
    check,
    check_updates,
    guessing_heads,
    needs_documents,
    schema,
    sequence_lengths,
)
from rlhfjax.config.recipe import FACTS, NAMES, TOKENIZER, Entry, entries_of, online
from rlhfjax.config.rewards import RECIPE, on_device
from rlhfjax.data.datasets import default_data_dir
from rlhfjax.data.sources import fingerprint_of, open_either
from rlhfjax.errors import ConfigError, DataError
from rlhfjax.evaluation.judges import require_judges
from rlhfjax.host import exchange, processes
from rlhfjax.layout import laid_out_by
from rlhfjax.models import model_of
from rlhfjax.models.lora import linears, targeted
from rlhfjax.runs.parents import checkpoint_digest
from rlhfjax.runs.sources import rewards_of, two_forms
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.activations import layout_of
from rlhfjax.stages.batches import open_batches
from rlhfjax.stages.job import Job
from rlhfjax.stages.measures.exact_match import pairs_of
from rlhfjax.stages.models import sampling_params
from rlhfjax.text.loading import load_tokenizer
from rlhfjax.training.checkpoint import find_checkpoint, read_meta, require_writable, tokenizer_of
from rlhfjax.training.local import require_local_dir
from rlhfjax.training.metrics_catalogue import METRICS, metric_of


def make_jobs(
    run: Run, run_dir: Path, stages: list[str], report: Callable[[str], None], date: datetime.date
) -> list[Job]:
    """One job per stage; `date` is what chat templates write.

    Raises ConfigError when batch sizes or the mesh do not fit the devices that are here, or these lack a memory.
    """
    check(run, jax.device_count(), _held(run))
    _check_best(run.checkpoints.keep_best)
    for stage in stages:
        if not FACTS[stage].measures:  # which imports matplotlib, a third of all imports
            _function(stage)  # what runs is the code as it is at the start
    if "evaluate" in stages and run.stages.evaluate and run.stages.evaluate.ratings:
        require_judges()  # they are needed last; that they are missing must not be found out last
    data_dir = Path(run.data_dir) if run.data_dir else default_data_dir()
    # One after the other: the first process prepares what is not prepared yet, the others find it where they share it.
    processes.by_first(lambda: _check_sources(run, data_dir, report), "data")
    if not processes.is_first():
        _check_sources(run, data_dir, lambda text: None)
    for checkpoints in (run_dir / stage / "checkpoints" for stage in stages):
        if os.path.lexists(checkpoints):  # a link to another disk, perhaps
            processes.by_first(partial(require_writable, checkpoints), "writable")
    if run.checkpoints.local.dir:
        exchange.by_each(partial(require_local_dir, run.checkpoints.local.dir), "local")
    shared: dict[str, Any] = {"date": date}
    jobs = [Job(run, stage, run_dir, data_dir, mesh_of(run, stage), report, shared) for stage in stages]
    for job in jobs:
        for what in ("moments", "frozen"):
            job.offloads(what)  # that a memory is not there must not be found out last
    return jobs


def mesh_of(run: Run, stage: str) -> jax.sharding.Mesh:
    """The mesh of a stage: its own, or the recipe's."""
    return _made(run.mesh.of(stage))


def _made(mesh: schema.Axes) -> jax.sharding.Mesh:
    return make_mesh(*mesh.axes.values(), slices=mesh.slices)


def _held(run: Run) -> dict[str, int] | None:
    """Sizes of a model from a checkpoint that meshes split."""
    if not run.model.checkpoint:
        return None
    shape = read_meta(find_checkpoint(run.model.checkpoint))["model"]
    return {name: shape[name] for name in ("mlp_width", "width", "experts") if name in shape}


def origins(jobs: list[Job]) -> dict[str, Any]:
    """What the attempt starts from: mesh, digests of its data and of what it was given, and the step it resumes."""
    run, first = jobs[0].run, jobs[0]
    steps = [int(path.name) for path in (first.dir / "checkpoints").glob("*") if path.name.isdigit()]
    return {
        "data": {
            entry.name: fingerprint_of(entry.source, entry.split, first.data_dir, kind, entry.reading)
            for entry, kind in entries(run)
        },
        "rewards": rewards_of(run),
        "started_from": given(run),
        **meshes_now(run),
        "resumed_from": {"stage": first.stage, "step": max(steps, default=0)},
    }


def given(run: Run) -> dict[str, str]:
    """Digests of the checkpoints and the tokenizer that the configuration names, by its keys."""
    named = {"model.checkpoint": run.model.checkpoint}
    if run.stages.sft:
        named["stages.sft.reward_model"] = run.stages.sft.reward_model
    for stage, section in online(run):
        judges = {term.title: term.model for term in on_device(section.rewards) if term.model != RECIPE}
        named |= {f"stages.{stage}.rewards.{title}": path for title, path in judges.items()}
    digests = {key: checkpoint_digest(find_checkpoint(path)) for key, path in named.items() if path}
    if run.tokenizer.path:
        digests["tokenizer.path"] = load_tokenizer(run.tokenizer.path).fingerprint
    return digests


def meshes_now(run: Run) -> dict[str, Any]:
    """Facts of the recipe's mesh, and of those that stages have of their own."""
    own = {stage: mesh_facts(mesh_of(run, stage)) for stage in run.mesh.stages}
    return {"mesh": mesh_facts(_made(run.mesh))} | ({"meshes": own} if own else {})


def mesh_facts(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Sizes of the axes, and the ids of the devices in their order."""
    return {"shape": dict(mesh.shape), "device_order": [device.id for device in mesh.devices.flat]}


def agree_on_data(begins: dict[str, Any]) -> None:
    """Raise DataError in every process where they do not all read the same data, or start from the same checkpoint."""
    facts = {f"data {name}": str(told) for name, told in begins["data"].items()}
    facts |= {f"rewards of {name}": str(told) for name, told in begins["rewards"].items()}
    facts |= {f"checkpoint {name}": told for name, told in begins["started_from"].items()}
    facts |= {"resumed step": json.dumps(begins["resumed_from"])}
    processes.agree(facts, DataError)


def agree_on_tokenizer(job: Job) -> None:
    """Raise ConfigError in every process where they do not all read the same tokenizer."""
    processes.agree({"tokenizer": job.tokenizer.fingerprint})


def execute(job: Job) -> dict[str, Any]:
    """Run one stage."""
    faults.reach(job.stage, 0)
    with laid_out_by(layout_of(job.mesh)):
        return _function(job.stage)(job)


def _function(stage: str) -> Callable[[Job], dict[str, Any]]:
    return getattr(importlib.import_module(f"rlhfjax.stages.{FACTS[stage].module}"), stage)


def check_data(jobs: list[Job]) -> None:
    """Read every record that any stage will use, and check that model and tokenizer belong together."""
    for job in jobs:
        if job.stage != TOKENIZER:
            opened = open_batches(job)
            if epochs := getattr(job.config, "epochs", None):
                check_updates(job.stage, job.config.optimizer, opened["train"].steps(epochs))
            _check_rest(job)
    run, words = jobs[0].run, jobs[0].tokenizer.vocab_size
    if run.model.checkpoint:
        shape = read_meta(find_checkpoint(run.model.checkpoint))["model"]
        rows = shape["vocab_size"]
        if words > rows:  # rows that no id uses are padding, which published models have
            raise ConfigError(
                f"model.checkpoint has a vocabulary of {rows}, the tokenizer one of {words}; use the tokenizer "
                "that the model was trained with (leave tokenizer out of the file to take it from the checkpoint)"
            )
        problems = needs_documents(run) if shape.get("family") == "transformer_2017" else iter(())
        for problem in (*problems, *guessing_heads(run, shape.get("mtp_heads", 0))):
            raise ConfigError(problem)
        for name, length in sequence_lengths(run):
            if length > shape["context"]:
                raise ConfigError(
                    f"{name} {length} is more than the context {shape['context']} of model.checkpoint; shorten it"
                )
        if run.model.lora:
            targeted(linears(jax.eval_shape(model_of(shape).init, jax.random.key(0))), run.model.lora.targets)


def _check_rest(job: Job) -> None:
    """What a stage reads beside its batches, so that nothing is trained before it is known to be there."""
    c = job.config
    if isinstance(c, schema.Online | schema.Evaluate):
        sampling_params(c.sampling, job.tokenizer)
    if isinstance(c, schema.Evaluate) and c.exact_match:
        for entry in c.exact_match.data:
            pairs_of(c, job.reader, entry)
    if isinstance(c, schema.Evaluate):
        job.reader.comparison_ids(c.comparisons, c.batch)
    if isinstance(c, schema.Reward) and c.normalize.on != "none":
        job.reader.demonstration_ids(c.normalize.data, c.batch.length, c.normalize.count, c.batch.refused)
    if isinstance(c, schema.Sft) and c.reward_model:
        meta = read_meta(find_checkpoint(c.reward_model))
        own = tokenizer_of(meta)
        if own is None or own.fingerprint != job.tokenizer.fingerprint:
            raise ConfigError(
                f"stages.sft.reward_model: expected a model with this run's tokenizer, got {c.reward_model} with "
                "another; train it on the ids that this tokenizer makes"
            )


def _check_best(metric: str | None) -> None:
    if metric and metric_of(metric.removeprefix("-")) is None:
        near = difflib.get_close_matches(metric.removeprefix("-"), METRICS, n=1)
        hint = f"did you mean {near[0]}" if near else "see `rlhfjax metrics`"
        raise ConfigError(
            f"checkpoints.keep_best: expected a metric, or -METRIC for the lowest, got {metric!r}; {hint}"
        )


def _check_sources(run: Run, data_dir: Path, report: Callable[[str], None]) -> None:
    """Open every data entry once, so that a missing file fails at once and not after the stages before it.

    Reports, once for each, what files were taken for and what of them nobody reads, and prompts of two forms.
    """
    said, forms = set(), {}
    for stage in NAMES:
        for entry, kind in entries_of(run, stage):
            opened = open_either(entry.source, entry.split, data_dir, kind, entry.reading)
            lines = [line for line in opened.notes if (entry.source, line) not in said]
            said |= {(entry.source, line) for line in lines}
            for line in lines:
                report(f"{entry.source}: {line}")
            forms.setdefault(stage, set()).update(opened.forms)
    for line in two_forms(forms):
        report(line)


def entries(run: Run) -> list[Entry]:
    return [entry for stage in NAMES for entry in entries_of(run, stage)]
