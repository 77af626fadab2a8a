"""A configuration made tiny: stages, algorithms and meshes as they are, widths, lengths, steps and batches small."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhfjax.config import Run, check, resolved
from rlhfjax.config.meshes import least_devices, mesh_shape
from rlhfjax.config.recipe import FACTS, TOKENIZER, entries_of, stages_of
from rlhfjax.config.rewards import KINDS, RECIPE
from rlhfjax.errors import ConfigError

STEPS, LENGTH, RESPONSE = 6, 64, 8  # steps of a stage, tokens of a sequence and of a response
_EVERY = 2  # steps between saves
_VOCABULARY, _HEAD = 320, 8
HEARTBEAT, STEP, JOIN = 20, 20.0, 60.0  # seconds
Tree = dict[str, Any]


def devices_per_node(run: Run, nodes: int, given: int | None) -> int:
    """So many devices of each node that the meshes fit; the fewest where nobody says.

    Raises ConfigError where no number does.
    """
    if given is not None:
        return given
    least = least_devices(run.mesh)
    each = math.lcm(least, nodes) // nodes
    fixed = [axes for axes in run.mesh.all.values() if -1 not in axes.axes.values()]
    if any(math.prod(axes.axes.values()) != each * nodes for axes in fixed):
        raise ConfigError(
            f"--nodes {nodes}: expected a number that divides the {least} devices of a mesh without an axis of "
            "-1; give such a number, or mesh.data=-1"
        )
    return each


@dataclass(frozen=True)
class Made:
    """What a rehearsal has in the place of large things.

    A model from a checkpoint becomes a new one of `family`; `files` are the data by kind of record, prepared in
    `data_dir`. Where they are not `real`, rewards of the host, which may read fields of theirs, are a length.
    """

    family: str
    files: Mapping[str, str]
    data_dir: str
    real: bool


def tiny(run: Run, nodes: int, each: int, given: Made) -> Run:
    """The rehearsed configuration on `nodes` x `each` devices.

    A checkpoint that no stage supervises is stood for by an SFT stage. Raises ConfigError where none can be made.
    """
    tree = resolved(run)
    devices, meshes = nodes * each, run.mesh.all
    shapes = [mesh_shape(axes, devices, key) for key, axes in meshes.items()]
    most = {axis: math.lcm(*(shape[axis] for shape in shapes)) for axis in shapes[0]}
    rows = math.lcm(*(shape["data"] * shape["fsdp"] * shape["expert"] for shape in shapes))
    for mesh in (tree["mesh"], *tree["mesh"]["stages"].values()):
        mesh["offload"] = "none"  # a CPU has no other memory
    tree["model"] = _model(tree["model"], most, given.family)
    tree["tokenizer"] = {"vocab_size": _VOCABULARY, "kind": tree["tokenizer"]["kind"], "documents": 1000}
    for stage, section in tree["stages"].items():
        if section is not None:
            _stage(stage, section, rows)
        for term in (section or {}).get("rewards", ()):
            _reward(term, given.real, run.stages.reward is not None)
    if run.model.checkpoint and not run.stages.sft:
        optimizer, batch = {"lr": 1e-3}, {"size": rows, "length": LENGTH, "overlong": "drop"}
        data = [{"source": given.files["demonstration"]}]
        tree["stages"]["sft"] = {"data": data, "steps": _EVERY, "batch": batch, "optimizer": optimizer}
    _read(run, tree, given.files)
    tree["checkpoints"] |= {"every": _EVERY, "keep": 2, "keep_every": None, "keep_best": None, "local": {}}
    deadlines = {"compile": 600.0, "step": STEP, "save": 60.0, "join": JOIN}
    tree["reliability"] |= {"heartbeat": HEARTBEAT, "deadlines": deadlines, "sizes": {}}
    tree["logging"] |= {"tensorboard": False, "samples_every": 1}
    tree |= {"name": f"{run.name}-rehearsal", "profile": None, "data_dir": given.data_dir}
    try:
        made = Run.model_validate(tree)
    except ValueError as error:
        raise ConfigError(f"{run.name}: no tiny configuration can be made of it: {_first(error)}") from None
    check(made, devices)
    return made


def _first(error: ValueError) -> str:
    problems: Any = getattr(error, "errors", list)()
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in problems[:3]) or str(error)


def _model(model: Tree, axes: Mapping[str, int], family: str) -> Tree:
    """A model that the axes can split: heads by tensor and sequence, widths by fsdp and tensor, experts by expert."""
    heads = math.lcm(2, axes["tensor"] * axes["sequence"])
    grouped = model.get("kv_heads") not in (None, model.get("heads"))
    width = math.lcm(heads * _HEAD, axes["fsdp"])
    made = {
        "family": model.get("family", family) if not model.get("checkpoint") else family,
        "layers": 1,  # programs are traced by every process at every start
        "width": width,
        "heads": heads,
        "kv_heads": math.lcm(heads // 2, axes["tensor"]) if grouped and axes["sequence"] == 1 else None,
        "mlp_width": math.lcm(2 * width, axes["tensor"] * axes["expert"]),
        "context": LENGTH,
        "remat": model["remat"],
        "dtype": model["dtype"],
        "lora": model.get("lora"),
    }
    if model.get("lora"):
        made["lora"] = model["lora"] | {"rank": min(model["lora"]["rank"], 2)}
    architecture = dict(model.get("architecture") or {}) if family != "transformer_2017" else {}
    if architecture and not model.get("checkpoint"):
        attention = dict(architecture["attention"])
        attention["window"] = attention["window"] and min(attention["window"], LENGTH // 4)
        attention["implementation"] = "auto"
        experts = dict(architecture["experts"])
        if experts["count"] or axes["expert"] > 1:
            experts |= {"count": math.lcm(4, axes["expert"]), "per_token": 2}
        made["architecture"] = architecture | {"head_dim": None, "attention": attention, "experts": experts}
    elif axes["expert"] > 1:
        made["architecture"] = {"experts": {"count": math.lcm(4, axes["expert"]), "per_token": 2}}
    return made


def _stage(name: str, section: Tree, rows: int) -> None:
    """Few steps of few and short sequences; each in as many micro batches, minibatches and epochs as two at most."""
    batch, online = section["batch"], FACTS[name].online
    group = 2 if section.get("groups") else 1
    size = math.lcm(rows * group, 4)
    parts = batch.get("minibatch") or batch.get("micro")
    whole = 2 * size if parts and parts != batch["size"] else size
    batch |= {"size": whole, "overlong": "error" if name == "pretrain" else "drop", "chat_template_kwargs": {}}
    batch["micro"] = size if batch.get("micro") else None
    if "prompt_length" in batch:
        batch |= {"prompt_length": LENGTH // 2, "epochs": min(batch["epochs"], 2) if online else batch["epochs"]}
        batch["minibatch"] = size if batch.get("minibatch") else None
        section["sampling"] |= {"max_new_tokens": RESPONSE, "stop": None, "stop_after": 0}
    else:
        batch["length"] = LENGTH
    if "candidates" in batch:
        batch["candidates"] = min(batch["candidates"], 4)
    if group > 1:
        section["groups"] |= {"size": 2} | {name: 1 for name in ("draws",) if name in section["groups"]}
        if section["groups"].get("overlong"):
            section["groups"]["overlong"] = RESPONSE // 2
    if online or "epochs" in section:
        section["steps"] = STEPS
    if "epochs" in section:
        section |= {"epochs": None, "validate_every": STEPS // 2}
    if optimizer := section.get("optimizer"):
        optimizer["warmup_steps"] = min(optimizer["warmup_steps"], 1)
    if section.get("ptx"):
        section["ptx"] |= {"length": LENGTH // 2, "ratio": 1.0}
    if section.get("reward_model"):
        section |= {"reward_model": None, "select_by": "last"}
    if section.get("normalize") and section["normalize"]["on"] != "none":
        section["normalize"]["count"] = 16
    if name == "evaluate":
        section |= {"samples": size, "ratings": None}
        if section["exact_match"]:
            section["exact_match"]["beams"] = min(section["exact_match"]["beams"], 2)


def _reward(term: Tree, real: bool, trained: bool) -> None:
    """A reward that can be found: of another run's model, and of made-up data, another stands in its place."""
    kind = next(name for name in KINDS if name in term)
    if kind == "model" and (term["model"] == RECIPE or trained):
        term["model"] = RECIPE
    elif kind == "function" and real:
        file, _, name = term["function"].rpartition(":")
        term["function"] = f"{Path(file).expanduser().absolute()}:{name}"
    elif not real or kind == "model":
        weight, title = term["weight"], term["name"] or kind
        term.clear()
        term |= {"length": {"target": RESPONSE // 2}, "weight": weight, "name": title}


def _read(run: Run, tree: Tree, files: Mapping[str, str]) -> None:
    """Every data entry by the tiny file of its kind."""
    tree["tokenizer"]["data"] = [{"source": files["document"]}]
    for stage in stages_of(run):
        if stage == TOKENIZER:
            continue
        for reads in FACTS[stage].reads:
            *path, last = reads.key.split(".")
            there: Any = tree["stages"][stage]
            for name in path:
                there = (there or {}).get(name)
            if there and there.get(last):
                there[last] = [{"source": files[reads.kind], "weight": 1.0}]


def kinds_of(run: Run) -> dict[str, list[Any]]:
    """The data entries of a configuration by the kind of their records; documents for the tokenizer always."""
    found: dict[str, list[Any]] = {"document": []} | ({"demonstration": []} if run.model.checkpoint else {})
    for stage in stages_of(run):
        for entry, kind in entries_of(run, stage):
            if kind != "rated_text":
                found.setdefault(kind, []).append(entry)
    return found
