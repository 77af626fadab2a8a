"""A checkpoint in memory."""

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhfjax.api.model import Model
from rlhfjax.errors import ConfigError
from rlhfjax.integrity import unverified
from rlhfjax.sharding.mesh import AXES, make_mesh
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.training.checkpoint import Bases, find_checkpoint, load_model, model_shapes, read_meta, tokenizer_of

_SHARE = 0.6  # of a device's memory that parameters may take: sampling arranges them anew, in half as many bytes


def load(
    checkpoint: str | Path,
    verify: bool = True,
    date: datetime.date | str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | Mapping[str, int] | None = None,
    bases: Bases | None = None,
) -> Model:
    """The model of a checkpoint, stage or run directory (of a run: its last policy).

    It writes conversations as it was trained on them: with the date of its run (or import) and its
    chat_template_kwargs, unless others are given here. It lies on one device, or where that has no room for it on all
    those of this process (`fsdp`); `mesh` says otherwise, such as {"fsdp": 2, "tensor": 4}. Of adapters whose base is
    among `bases` the base is not read again, but shared.

    Raises ConfigError when there is no checkpoint, or for what its chat template does not read, IntegrityError when it
    cannot be read, or is not what was written; `verify=False` does not compare it with its digests.
    """
    step_dir = find_checkpoint(checkpoint)
    with unverified(not verify):
        meta = read_meta(step_dir)
        chosen = _mesh(mesh, step_dir)
        network, params = load_model(step_dir, chosen, bases=bases)
    tokenizer = _speaking(tokenizer_of(meta), date, chat_template_kwargs)
    return Model(meta["role"], network, params, tokenizer, step_dir, chosen)


def _mesh(mesh: Mesh | Mapping[str, int] | None, step_dir: Path) -> Mesh | None:
    """Of several devices; None is the first device alone. Raises ConfigError for axes that there are not."""
    if isinstance(mesh, Mapping):
        if unknown := sorted(set(mesh) - set(AXES)):
            raise ConfigError(f"mesh: expected sizes of {', '.join(AXES)}, got {unknown[0]!r}")
        count = math.prod(mesh.values())
        here = jax.local_devices()
        some = here if count < 0 else here[:count]
        mesh = make_mesh(**({"data": 1} | dict(mesh)), devices=some)
    if mesh is None and len(jax.local_devices()) > 1 and not _fits(step_dir, jax.local_devices()[0]):
        mesh = make_mesh(data=1, fsdp=-1, devices=jax.local_devices())
    return mesh if mesh is not None and mesh.size > 1 else None


def _fits(step_dir: Path, device: Any) -> bool:
    """Whether a device has room for the parameters and for what sampling makes of them; a host is asked nothing."""
    room = (device.memory_stats() or {}).get("bytes_limit")
    shapes = jax.tree.leaves(model_shapes(step_dir)[1])
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)
    return room is None or size < _SHARE * room


def _speaking(
    tokenizer: AnyTokenizer | None, date: datetime.date | str | None, kwargs: Mapping[str, Any] | None
) -> AnyTokenizer | None:
    if tokenizer is None or (date is None and kwargs is None):
        return tokenizer
    try:
        given = datetime.date.fromisoformat(date) if isinstance(date, str) else date
    except ValueError:
        raise ConfigError(f"date: expected one such as 2026-01-31, got {date!r}") from None
    own = tokenizer.chat
    return tokenizer.with_chat(ChatSettings({**own.kwargs, **(kwargs or {})}, given or own.date))
