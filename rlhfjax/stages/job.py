"""One stage of one run: its place, its data, and the models that it starts from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from rlhfjax.config import schema
from rlhfjax.config.recipe import FACTS, starts_of
from rlhfjax.data.pipeline import Reader
from rlhfjax.host import processes
from rlhfjax.models import SequenceModel
from rlhfjax.models.lora import has_adapters, init_lora, join, merge
from rlhfjax.sharding import local_rows, place_share
from rlhfjax.stages.chat_settings import settings_of, variables_of_checkpoint
from rlhfjax.stages.models import new_model
from rlhfjax.stages.starts import offloads
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer
from rlhfjax.training.checkpoint import (
    Bases,
    Checkpoints,
    find_checkpoint,
    load_model,
    meta_of,
    reference_to,
    save_model,
)
from rlhfjax.training.local import TOKEN, LocalSteps
from rlhfjax.training.state import born
from rlhfjax.training.supervision import Watch
from rlhfjax.types import Params

_USES = {"init": 0, "steps": 1, "samples": 2, "adapters": 3}  # numbers of their keys: never changed, never given anew


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
        stage_key = jax.random.fold_in(jax.random.key(self.run.seed), FACTS[self.stage].key)
        return jax.random.fold_in(stage_key, _USES[use])

    def offloads(self, what: Literal["moments", "frozen"]) -> bool:
        """As `Starts` has it."""
        return offloads(self.run, self.stage, self.mesh, what)

    def watch(self) -> Watch:
        """What stands beside the loop of the stage; several processes stop together."""
        agree = processes.preempted if processes.count() > 1 else None
        return Watch(self.dir, self.run.reliability.deadlines, agree)

    @property
    def tokenizer(self) -> AnyTokenizer:
        return self.reader.tokenizer

    @property
    def reader(self) -> Reader:
        """What opens data; its tokenizer writes conversations with the chat settings of this stage."""
        if "reader" not in self.shared:
            tokenizer = load_tokenizer(self.run_dir / "tokenizer")
            place = str(self.run_dir / "tokenizer")
            self.shared["reader"] = Reader(tokenizer, self.data_dir, self.run.seed, self.report, place=place)
        of_stage = self.shared.setdefault("readers", {})
        if self.stage not in of_stage:
            if "variables" not in self.shared:
                self.shared["variables"] = variables_of_checkpoint(self.run)
            settings = settings_of(self.run, self.stage, self.shared.get("date"), self.shared["variables"])
            whole = self.shared["reader"]
            local = partial(local_rows, self.mesh) if self.mesh.is_multi_process else lambda size: None
            of_stage[self.stage] = replace(whole, tokenizer=whole.tokenizer.with_chat(settings), local=local)
        return of_stage[self.stage]

    def put(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Batches on the mesh."""
        return (place_share(self.mesh, batch) for batch in batches)

    def checkpoints(self, keep_best: bool = False) -> Checkpoints:
        """Where this stage saves; with `keep_best` the step with the highest score stays too."""
        c = self.run.checkpoints
        settings: dict[str, Any] = {"keep_every": c.keep_every, "best_metric": c.keep_best, "report": self.report}
        settings["fall_back"] = c.on_damage == "fall_back"
        return Checkpoints(self.dir / "checkpoints", c.keep, keep_best, **settings)

    def local_steps(self) -> LocalSteps | None:
        """Where this stage saves on each host's own disk, if it does."""
        local = self.run.checkpoints.local
        if local.dir is None:
            processes.by_first(lambda: (self.dir / TOKEN).unlink(missing_ok=True), "local token")
            return None

        def report(text: str) -> None:
            self.report(f"{self.stage}: {text}")

        return LocalSteps(Path(local.dir), local.every, self.dir, f"{self.run.name}-{self.stage}", report)

    def load(self, stage: str, item: str | None = None) -> tuple[SequenceModel, Params]:
        """The model that an earlier stage of this run left."""
        return self.load_from(self.run_dir / stage, item)

    def load_from(self, path: Path | str, item: str | None = None) -> tuple[SequenceModel, Params]:
        """The model of a checkpoint anywhere."""
        settings = self.run.model
        bases = self._bases() if settings.lora else None
        return load_model(find_checkpoint(path), self.mesh, item=item, bases=bases, **self._computed())

    def _bases(self) -> Bases:
        """Those that lie on the mesh of this stage."""
        mesh, bases = self.shared.get("bases", (None, None))
        if bases is None or mesh != self.mesh:
            bases = Bases()
            self.shared["bases"] = self.mesh, bases
        return bases

    def _computed(self) -> dict[str, Any]:
        """How models compute here, whatever the run that they come from chose."""
        settings = self.run.model
        return {"dtype": settings.dtype, "remat": settings.remat, "attention": settings.attention}

    def policy_from(self, *stages: str) -> tuple[SequenceModel, Params]:
        """As `Starts` has it."""
        for stage in stages or starts_of(self.run, self.stage):
            if getattr(self.run.stages, stage):
                return self._adapted(*self.load(stage))
        if self.run.model.checkpoint:
            return self._adapted(*self._start())
        begin = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        model = new_model(self.run.model, self.tokenizer.vocab_size, begin)
        return model, born(self.mesh, model.init, self.key("init"))

    def _start(self) -> tuple[SequenceModel, Params]:
        """The model's checkpoint, without adapters; a run that trains its own keeps a copy, which its stages share."""
        settings, copy = self.run.model, self.run_dir / "base" / "checkpoints" / "0"
        keeps = settings.lora and not self.run.stages.pretrain
        if keeps and copy.is_dir():
            return self.load_from(copy)
        model, params = load_model(find_checkpoint(str(settings.checkpoint)), self.mesh, **self._computed())
        params = merge(params, model.config.lora_alpha)
        if not keeps:
            return model, params
        processes.barrier("base")  # nobody may still be asking whether it is there
        copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_model(copy, "policy", params, meta_of("policy", model, self.tokenizer))
        del params
        return self.load_from(copy)

    def _adapted(self, model: SequenceModel, params: Params) -> tuple[SequenceModel, Params]:
        lora = self.run.model.lora
        if not lora or not FACTS[self.stage].adapts or has_adapters(params):
            return model, params
        shapes = jax.eval_shape(lambda: params)
        adapters = born(self.mesh, lambda key: init_lora(key, shapes, lora.rank, lora.targets), self.key("adapters"))
        return replace(model, config=replace(model.config, lora_alpha=lora.alpha)), join(params, adapters)

    def lineage(self) -> dict[str, Any]:
        """What checkpoints with adapters say of them and of the base that they belong to; nothing without adapters."""
        lora = self.run.model.lora
        if not lora or not FACTS[self.stage].adapts:
            return {}
        base_dir = find_checkpoint(self.run_dir / ("pretrain" if self.run.stages.pretrain else "base"))
        return {"lora": lora.model_dump(), "base": reference_to(base_dir, self.dir)}
