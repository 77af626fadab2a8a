"""Models that are replaced on the disk: loaded beside those that answer, and put in their place between requests."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhfjax.api import Model
from rlhfjax.errors import RlhfjaxError
from rlhfjax.serving.asking import Hall
from rlhfjax.serving.models import fingerprint, replaced
from rlhfjax.training.checkpoint import find_checkpoint


class Replacing:
    """Looks every few seconds whether a checkpoint, a stage or a run has another model than the one that is served.

    Who is being answered goes on with the model that began the answer, which is let go after the last of them; until
    then both are in memory. What cannot be loaded is said once, and the model that was there stays.
    """

    def __init__(self, hall: Hall, paths: Mapping[str, str], load: Callable[[str], Model], say: Callable[[str], None]):
        self._hall, self._paths, self._load, self._say = hall, dict(paths), load, say
        self._tried: dict[str, tuple[Path, str]] = {}
        self._over = threading.Event()

    def look(self) -> None:
        """Replace what has changed."""
        for name, path in self._paths.items():
            try:
                self._look_at(name, path)
            except (RlhfjaxError, OSError) as error:
                self._say(f"{name}: goes on as it was: {error}")

    def _look_at(self, name: str, path: str) -> None:
        served = self._hall.models[name]
        there = find_checkpoint(path)
        now = there, fingerprint(there)
        if now == self._tried.setdefault(name, (there, served.fingerprint)):
            return
        self._tried[name] = now
        if now[1] == served.fingerprint:
            return
        made = replaced(served, self._load(path), self._hall.limits)
        self._hall.models[name] = made
        self._say(f"{name}: replaced by {there}")

    def start(self, every: float) -> threading.Thread:
        """Look every so many seconds, in a thread of its own, until `stop`."""

        def run() -> None:
            while not self._over.wait(every):
                self.look()

        thread = threading.Thread(target=run, name="replacing", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        self._over.set()
