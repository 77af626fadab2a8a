"""The models of a server by name: what each is, and the batch and the programs that answer with it."""

from dataclasses import dataclass, replace
from pathlib import Path

from rlhfjax.api import Model
from rlhfjax.errors import ConfigError
from rlhfjax.generation import Engine
from rlhfjax.serving.limits import MOST_BIASES, Limits
from rlhfjax.serving.problems import Problem
from rlhfjax.serving.reading import TOP, Reader
from rlhfjax.serving.worker import Batch
from rlhfjax.target import current
from rlhfjax.text.loading import AnyTokenizer
from rlhfjax.training.checkpoint import read_meta
from rlhfjax.training.checkpoint.models import item_digest

_CHUNK, _WIDE_CHUNK = 64, 256  # tokens of a prompt that are read at a time: on CPUs, and where products are wide


@dataclass(frozen=True, eq=False)
class Served:
    """A model under its name. A policy writes (`batch`) and reads; a reward model reads alone."""

    name: str
    model: Model
    reader: Reader
    batch: Batch | None
    created: int
    fingerprint: str  # of its weights

    @property
    def tokenizer(self) -> AnyTokenizer | None:
        return self.model.tokenizer

    @property
    def context(self) -> int:
        """Tokens of a prompt and its response together."""
        return self.reader.context

    @property
    def writer(self) -> Batch:
        """Raises Problem for a model that writes nothing."""
        if self.batch is None:
            raise Problem(400, f"the model {self.name!r} is a {self.model.role} model, which scores and writes nothing")
        return self.batch

    def warm_up(self) -> None:
        """Compile all that requests may need."""
        self.reader.warm_up()
        if self.batch:
            self.batch.engine.warm_up()


def replaced(before: Served, model: Model, limits: Limits) -> Served:
    """Another model under a name, warm: compiled anew only where its shape is another one."""
    if (before.model.network, before.model.role, before.model.mesh) != (model.network, model.role, model.mesh):
        made = serve_model(before.name, model, limits)
    else:
        model = model if before.reader.scalar else model.compiled_as(before.model)
        batch = Batch(Engine(model.programs, before.batch.engine.room)) if before.batch else None
        made = Served(before.name, model, before.reader.over(model), batch, *_origin(model))
    made.warm_up()
    return made


def serve_model(name: str, model: Model, limits: Limits) -> Served:
    """A model made ready to answer, not yet compiled. Raises ConfigError for a context that it has not."""
    most = model.config.context
    context = most if limits.context is None else limits.context
    if not 2 <= context <= most:
        raise ConfigError(f"--context: expected 2 to {most} tokens, which is what {name} can read, got {context}")
    chunk = _CHUNK if current().platform == "cpu" else _WIDE_CHUNK
    reader = Reader(model, context, chunk)
    batch = None
    if not reader.scalar:
        room = replace(model.room(limits.slots, context, min(TOP, model.config.vocab_size)), biases=MOST_BIASES)
        if not reader.whole and model.mesh is None:
            room = replace(room, chunk=reader.chunk)
        batch = Batch(Engine(model.programs, room))
    return Served(name, model, reader, batch, *_origin(model))


def _origin(model: Model) -> tuple[int, str]:
    """When a model was written, in seconds since 1970, and what its weights are known by."""
    if model.step_dir is None:
        return 0, "fp_none"
    return int(model.step_dir.stat().st_mtime), fingerprint(model.step_dir)


def fingerprint(step_dir: Path) -> str:
    """What the weights of a checkpoint are known by, from the digests beside them."""
    return f"fp_{item_digest(step_dir / read_meta(step_dir)['serve'])[:12]}"
