"""Programs that one run makes and later runs of the same process call again, so that nothing is traced anew.

What is frozen is bound to a program as its first argument: each run binds its own.
"""

from functools import partial

from rlhfjax.stages.compilation import Ahead
from rlhfjax.training.online import OnlineSteps


def parts_of(steps):
    return {name: step for name, step in vars(steps).items() if callable(step)}


def unbound(program):
    return program.func if isinstance(program, partial) else program


def keeping(made: dict):
    """`Ahead` as it is, which also notes in `made` what it was given, by stage."""

    class Keeping(Ahead):
        def program(self, function, *arguments):
            made[self._stage] = unbound(function)
            return super().program(function, *arguments)

        def online(self, steps, *arguments):
            made[self._stage] = {name: unbound(step) for name, step in parts_of(steps).items()}
            return super().online(steps, *arguments)

    return Keeping


def once(made: dict):
    """In the place of `Ahead`: what is in `made` for a stage serves it; what is not is put there by the first run."""

    class Once:
        def __init__(self, stage, *_):
            self._stage, self.facts = stage, {"compiled": 0.0}

        def program(self, function, *_):
            return bound(made.setdefault(self._stage, unbound(function)), function)

        def online(self, steps, *_):
            own = parts_of(steps)
            kept = made.setdefault(self._stage, {name: unbound(step) for name, step in own.items()})
            return OnlineSteps(**vars(steps) | {name: bound(kept[name], step) for name, step in own.items()})

        def afterwards(self, *_):
            pass

    return Once


def bound(kept, program):
    """The program that is kept, with what is bound to another one."""
    return partial(kept, *program.args) if isinstance(program, partial) else kept
