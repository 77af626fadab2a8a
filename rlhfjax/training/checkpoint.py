"""Checkpoints: the only place that knows Orbax.

A step directory holds one item a model (`policy`, `value`, `reward`, `average`), so that each can be read alone, the
`training` state, the tokenizer, and `meta`: what is needed to build the models again.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.models import DecoderConfig, LanguageModel, compute_dtype
from rlhfjax.sharding import state_shardings
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.types import Params

STAGES = ("ppo", "sft", "pretrain")  # which stage of a run holds its last policy, newest first
SCALAR = ("reward", "value")  # items with a scalar head
COMPLETE = "complete.json"


class Checkpoints:
    """The checkpoints of one stage; saving is asynchronous, `close` waits for the last one.

    The newest `keep` stay, and with `keep_best` also the one with the highest score.
    """

    def __init__(self, directory: Path, keep: int, keep_best: bool = False):
        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_best:
            policies.append(
                preservation_policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
            )
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            best_fn=_score if keep_best else None,
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step with the highest score; the newest one where scores are not kept."""
        return self._manager.best_step()

    def save(
        self, step: int, models: Mapping[str, Any], training: Any, meta: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Save a step; an error of an earlier asynchronous save is raised here."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in models.items()}
        args = ocp.args.Composite(
            **items, training=ocp.args.StandardSave(training), meta=ocp.args.JsonSave(dict(meta) | {"step": step})
        )
        self._manager.save(step, args=args, force=True, metrics=None if score is None else {"score": score})

    def restore(
        self, step: int, models: Mapping[str, Any], training: Any
    ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        """Models, training state and meta of a step, in the shapes and shardings of the given abstract trees."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in models.items()}
        args = ocp.args.Composite(**items, training=ocp.args.StandardRestore(training), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise IntegrityError(f"checkpoint {self._manager.directory / str(step)} cannot be read: {error}") from error
        return {name: restored[name] for name in models}, restored["training"], restored["meta"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.close()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def meta_of(
    role: str, model: LanguageModel, tokenizer: Tokenizer, averaged: bool = False, **more: Any
) -> dict[str, Any]:
    """What a checkpoint says of itself: what its model is, and the item that is loaded when nobody asks for another.

    With `averaged` that is the moving average of the parameters.
    """
    packed = base64.b64encode(tokenizer.to_bytes()).decode()
    names = {"role": role, "serve": "average" if averaged else role}
    return {"format": 1, **names, "model": asdict(model.config), "tokenizer": packed, **more}


def tokenizer_of(meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer inside a checkpoint's meta."""
    return Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))


def find_checkpoint(path: str | Path) -> Path:
    """The step directory that `path` means: itself, a stage's chosen step, or a run's last policy.

    Raises ConfigError when there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"checkpoint: expected a checkpoint, stage or run directory, got {path}, which is not there")
    if (path / "meta").is_dir() and (path / "_CHECKPOINT_METADATA").exists():
        return path
    if (path / COMPLETE).exists() and (path / "checkpoints").is_dir():
        return path / "checkpoints" / str(json.loads((path / COMPLETE).read_text())["step"])
    if (path / "checkpoints").is_dir():
        steps = [int(entry.name) for entry in (path / "checkpoints").iterdir() if entry.name.isdigit()]
        if steps:
            return path / "checkpoints" / str(max(steps))
    for stage in STAGES:
        if any(entry.name.isdigit() for entry in (path / stage / "checkpoints").glob("*")):
            return find_checkpoint(path / stage)
    raise ConfigError(f"checkpoint: {path} holds no checkpoint; expected {path}/checkpoints/STEP or a run with one")


def read_meta(step_dir: Path) -> dict[str, Any]:
    """The meta item of a step directory."""
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            return reader.restore((step_dir / "meta").absolute())
    except (ValueError, FileNotFoundError, json.JSONDecodeError) as error:
        raise IntegrityError(f"checkpoint {step_dir} has no readable meta: {error}") from error


def load_model(
    step_dir: Path,
    mesh: jax.sharding.Mesh | None = None,
    *,
    item: str | None = None,
    dtype: str = "auto",
    remat: str = "none",
) -> tuple[LanguageModel, Params]:
    """A model of a step directory and its parameters, laid out on the mesh, or on the default device without one.

    `item` is policy, average, value or reward; by default the one that the checkpoint serves. Raises IntegrityError
    when it cannot be read.
    """
    meta = read_meta(step_dir)
    item = str(item or meta["serve"])
    scalar = (meta["role"] if item == "average" else item) in SCALAR
    model = LanguageModel(DecoderConfig(**(meta["model"] | {"dtype": compute_dtype(dtype), "remat": remat})))
    shapes = jax.eval_shape(model.init_scalar if scalar else model.init, jax.random.key(0))
    if mesh is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        places = state_shardings(mesh, shapes)
    target = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)
    try:
        with ocp.StandardCheckpointer() as reader:
            return model, reader.restore((step_dir / item).absolute(), target)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise IntegrityError(f"checkpoint {step_dir} has no readable item {item!r}: {error}") from error
