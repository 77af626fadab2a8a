"""One stage of one run, and how the parts of a configuration become objects."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rlhfjax.config import schema
from rlhfjax.data.pipeline import Reader
from rlhfjax.errors import ConfigError
from rlhfjax.generation import SamplingParams
from rlhfjax.models import LanguageModel, compute_dtype, decoder_config
from rlhfjax.sharding import place_batch
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import find_checkpoint, load_model
from rlhfjax.training.state import place
from rlhfjax.types import Params

NAMES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")


@dataclass(frozen=True)
class Job:
    """One stage of one run, with what all stages share."""

    run: schema.Run
    stage: str
    run_dir: Path
    data_dir: Path
    mesh: jax.sharding.Mesh
    report: Callable[[str], None]
    shared: dict[str, Any]  # what the jobs of a run open once between them

    @property
    def config(self) -> Any:
        return getattr(self.run.stages, self.stage)

    @property
    def dir(self) -> Path:
        return self.run_dir / self.stage

    def key(self, use: str) -> jax.Array:
        """A key of its own for each use in each stage: fold_in(fold_in(key(seed), stage), use)."""
        stage_key = jax.random.fold_in(jax.random.key(self.run.seed), NAMES.index(self.stage))
        return jax.random.fold_in(stage_key, ("init", "steps", "samples").index(use))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.reader.tokenizer

    @property
    def reader(self) -> Reader:
        if "reader" not in self.shared:
            tokenizer = Tokenizer.load(self.run_dir / "tokenizer")
            self.shared["reader"] = Reader(tokenizer, self.data_dir, self.run.seed, self.report)
        return self.shared["reader"]

    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches on the mesh."""
        return (place_batch(self.mesh, batch) for batch in batches)

    def load(self, stage: str, item: str | None = None) -> tuple[LanguageModel, Params]:
        """The model that an earlier stage of this run left."""
        return self._load(self.run_dir / stage, item)

    def _load(self, path: Path | str, item: str | None = None) -> tuple[LanguageModel, Params]:
        settings = self.run.model
        return load_model(find_checkpoint(path), self.mesh, item=item, dtype=settings.dtype, remat=settings.remat)

    def policy_from(self, *stages: str) -> tuple[LanguageModel, Params]:
        """The policy of the first of `stages` that the recipe has; else the model's checkpoint; else a fresh one."""
        for stage in stages:
            if getattr(self.run.stages, stage):
                return self.load(stage)
        if self.run.model.checkpoint:
            return self._load(self.run.model.checkpoint)
        model = new_model(self.run.model, self.tokenizer.vocab_size)
        return model, place(self.mesh, jax.jit(model.init)(self.key("init")))


def new_model(settings: schema.Model, vocab_size: int) -> LanguageModel:
    """The decoder that the `model` section describes."""
    shape = settings.model_dump(exclude={"checkpoint", "architecture", "dtype"})
    style = settings.architecture.model_dump(exclude={"experts"})
    experts = settings.architecture.experts.model_dump()
    style |= {"experts": experts.pop("count"), "experts_per_token": experts.pop("per_token")} | experts
    config = decoder_config(**shape, **style, vocab_size=vocab_size, dtype=compute_dtype(settings.dtype))
    return LanguageModel(config)


def sampling_params(sampling: schema.Sampling, tokenizer: Tokenizer) -> SamplingParams:
    """The sampler's settings; raises ConfigError when `stop` is not a single token."""
    stop = [tokenizer.eos_id] if sampling.stop is None else tokenizer.encode(sampling.stop)
    if len(stop) != 1:
        raise ConfigError(
            f"sampling.stop: expected text of one token, got {sampling.stop!r}, which is {len(stop)}; give a shorter "
            "text, or leave it out to stop at EOS"
        )
    return SamplingParams(
        max_new_tokens=sampling.max_new_tokens,
        stop_id=stop[0],
        pad_id=tokenizer.pad_id,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        stop_after=sampling.stop_after,
    )
