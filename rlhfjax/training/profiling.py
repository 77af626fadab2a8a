"""Profiles: seconds of the parts of a step, and traces that XProf and TensorBoard open."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rlhfjax.config.upkeep import Profile


class Clock:
    """Seconds of the parts of one iteration, by name; what no part took is the host's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with jax.profiler.TraceAnnotation(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        """`timing/NAME_s` of every part, of the host and of all, and `timing/NAME_share` of the whole."""
        whole = time.monotonic() - self._began
        parts = self.seconds | {"host": max(whole - sum(self.seconds.values()), 0.0)}
        shares = {f"timing/{name}_share": seconds / max(whole, 1e-9) for name, seconds in parts.items()}
        return {f"timing/{name}_s": seconds for name, seconds in parts.items()} | {"timing/step_s": whole} | shares


class Trace:
    """A trace of some steps in DIRECTORY/profile; `settings` None writes none.

    Steps count from the first that this process takes, which compiles. Each is a step of its name in the viewer.
    """

    def __init__(self, directory: Path, settings: Profile | None, name: str):
        self._directory, self._settings, self._name = directory / "profile", settings, name
        self._taken, self.running = 0, False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step; the first of those that are wanted starts the trace and the last ends it."""
        if self._settings is None:
            yield
            return
        self._taken += 1
        if self._taken == self._settings.start:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would hide what the steps do
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self.running = True
        try:
            with jax.profiler.StepTraceAnnotation(self._name, step_num=number):
                yield
        except BaseException:
            self.close()
            raise
        if self._taken == self._settings.start + self._settings.steps - 1:
            self.close()

    def close(self) -> None:
        """End a trace that is still running, as where a stage is shorter than it."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
