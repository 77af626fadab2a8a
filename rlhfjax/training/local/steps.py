"""Local steps: frequent ones on each host's own disk, beside the checkpoints that last.

Each process writes the regions of arrays that its devices hold, and those of another process, which a lost host takes
with it. Nothing is shared but RUN/STAGE/local.json, whose token says which files belong to this attempt at the stage.
"""

import contextlib
import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from rlhfjax import faults, stores
from rlhfjax.errors import IntegrityError
from rlhfjax.files import write_json
from rlhfjax.host import exchange, processes
from rlhfjax.training.digests import Pending, fetched, started
from rlhfjax.training.local.copies import blocks_of, distinct
from rlhfjax.training.local.file import ENDING, Block, ShardFile, write
from rlhfjax.training.local.hosts import shift_of, this_host
from rlhfjax.training.local.layout import layout_of, leaves_of

TOKEN = "local.json"
_log = logging.getLogger("rlhfjax")


class LocalSteps:
    """The local steps of one stage, saved every `every` steps while training goes on.

    Two are on the disk at most: the newest that all processes have, and the one after it, which is being written.
    Where one could not be written the run goes on without it, which is said.
    """

    def __init__(
        self, directory: Path, every: int, stage_dir: Path, name: str, report: Callable[[str], None] = _log.warning
    ):
        self.every, self.report, self._directory = every, report, Path(os.path.abspath(directory))
        self._stage_dir, self._name = stage_dir, name
        self._begun: int | None = None  # the step that was written last, here or elsewhere still is
        self._whole: int | None = None  # the newest that all processes have
        self._ended: tuple[int, str] | None = None  # what this process wrote last, and what was wrong with it
        self._said = ""
        self._writing: threading.Thread | None = None
        hosts = exchange.tell_all("hosts", this_host())
        self._shift = shift_of(hosts)
        self._neighbours = [place for place, host in enumerate(hosts) if host == hosts[jax.process_index()]]
        self._use(processes.by_first(self._token, "local token"))

    @property
    def root(self) -> Path:
        """Where all processes of this host keep the steps of this stage, each in a folder of its own."""
        return self._directory / f"{self._name}-{self._identity[:16]}"

    def save(self, step: int, models: Mapping[str, Any], training: Any, meta: Mapping[str, Any]) -> None:
        """Begin to save a step, and return as soon as its arrays may change.

        Where some process still writes the step before, this one is left out.
        """
        decided = processes.by_first(lambda: self._decision(step), "local step")
        if not decided:
            return
        self._begun, self._whole = step, json.loads(decided)
        if self._writing:
            self._writing.join()  # it has said that it is done
        items = {**models, "training": training}
        leaves, same = distinct(leaves_of(items))
        layout, digests = layout_of(leaves), started(items)
        blocks = blocks_of(layout, leaves, self._shift)
        holds = layout_of(leaves_of(items)).digests
        own, other = jax.process_index(), (jax.process_index() - self._shift) % processes.count()
        facts = {"step": step, "same": same, "layout": layout.told, "holds": sorted({holds[own], holds[other]})}
        work = partial(self._write, step, self._whole, blocks, facts | {"meta": dict(meta)}, digests)
        self._writing = threading.Thread(target=work, name=f"local {step}")
        self._writing.start()

    def files(self) -> tuple[list[ShardFile], list[str]]:
        """The whole files of this stage on this host, and what is wrong with others."""
        found, wrong = [], []
        for path in sorted(self.root.glob(f"p*/*{ENDING}")):
            try:
                found.append(ShardFile(path))
            except IntegrityError as error:
                wrong.append(str(error))
        return found, wrong

    def begin(self, step: int, whole: bool) -> None:
        """Training goes on from a step, and with `whole` from a local one, which stays until there is a newer one.

        Later ones go.
        """
        self._begun, self._whole, self._ended = None, step if whole else None, None
        for path in self._mine():
            if _step_of(path) > step:
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """No local step that is there counts any more, on whatever host it is."""
        self._join()
        before = self.root
        self._use(processes.by_first(partial(self._token, new=True), "local token"))
        self._clear(before)
        self._begun = self._whole = self._ended = None

    def finish(self) -> None:
        """The stage is whole without them."""
        self._join()
        processes.by_first(lambda: (self._stage_dir / TOKEN).unlink(missing_ok=True), "local token")
        self._clear(self.root)

    def close(self) -> None:
        """Wait until what is being written is on the disk."""
        self._join()

    def _join(self) -> None:
        if self._writing:
            self._writing.join()
            self._writing = None

    def _use(self, token: str) -> None:
        self._identity = token
        self._folder = self.root / f"p{jax.process_index()}"

    def _token(self, new: bool = False) -> str:
        """In the first process: the token of this attempt at the stage, a new one where there is none."""
        path = self._stage_dir / TOKEN
        try:
            token = "" if new else str(json.loads(path.read_text(encoding="utf-8"))["token"])
        except (OSError, ValueError, KeyError, TypeError):
            token = ""
        self._stage_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not token:
            token = secrets.token_hex(16)
            write_json(path, {"token": token, "step": 0})
        return token

    def _decision(self, step: int) -> str:
        """In the first process: nothing where a process still writes, else the newest step that all have, as JSON."""
        whole = self._whole
        if self._begun is not None:
            told = self._told()
            ended = {place: reason for place, (done, reason) in told.items() if done == self._begun}
            if len(ended) < processes.count():
                return ""
            failed = [f"process {place}: {reason}" for place, reason in sorted(ended.items()) if reason]
            whole = whole if failed else self._begun
            self._say(f"{failed[0]}; the run goes on without it" if failed else "", self._begun)
            if not failed:
                write_json(self._stage_dir / TOKEN, {"token": self._identity, "step": whole})
        return json.dumps(whole)

    def _say(self, wrong: str, step: int) -> None:
        """The same trouble once."""
        if wrong and wrong != self._said:
            self.report(f"{self.root}: step {step} could not be written by {wrong}")
        self._said = wrong

    def _told(self) -> dict[int, tuple[int, str]]:
        if processes.count() == 1:
            return {0: self._ended} if self._ended else {}
        return {place: tuple(json.loads(text)) for place, text in exchange.posted(self._board).items()}

    @property
    def _board(self) -> str:
        return f"local/{self._identity}"

    def _write(
        self,
        step: int,
        whole: int | None,
        blocks: Sequence[Block],
        facts: Mapping[str, Any],
        digests: Pending,
    ) -> None:
        """In a thread: the file, and then word of it; steps that are no longer needed go before."""
        try:
            if whole is not None:
                for path in self._mine():
                    if _step_of(path) != whole:
                        path.unlink(missing_ok=True)
            write(self._folder / f"{step}{ENDING}", blocks, dict(facts) | {"digests": fetched(digests)})
            if processes.is_first():
                stores.send(self._stage_dir)  # the rows up to this step, without which it is not taken
            self._ended = step, ""
        except BaseException as error:
            self._ended = step, getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"[:300]
        if processes.count() > 1:
            exchange.post(self._board, json.dumps(self._ended))
        faults.reach("local", step)

    def _mine(self) -> list[Path]:
        """Files of this process, and of those that once ran on this host and now do not."""
        folders = [
            path for path in self.root.glob("p*") if path == self._folder or _place(path) not in self._neighbours
        ]
        return [path for folder in folders for path in folder.glob(f"*{ENDING}*")]

    def _clear(self, root: Path) -> None:
        for path in root.glob("p*"):
            if path.name == self._folder.name or _place(path) not in self._neighbours:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process of this host has files in it
            root.rmdir()


def _step_of(path: Path) -> int:
    name = path.name.partition(".")[0]
    return int(name) if name.isdigit() else -1


def _place(folder: Path) -> int:
    return int(folder.name[1:]) if folder.name[1:].isdigit() else -1
