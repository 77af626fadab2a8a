"""Several processes as one run: how they start, agree before step 0, take turns, notice a preemption, and end.

In a process by itself nothing here does anything. Only process 0 writes what a run leaves behind; checkpoints are
written by all of them together.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

from rlhfjax.errors import ConfigError, DataError, IntegrityError, RewardError, RlhfjaxError, Stopped
from rlhfjax.host import cpus, marks
from rlhfjax.host.rendezvous import Place, meet

VARIABLES = ("RLHFJAX_COORDINATOR", "RLHFJAX_NUM_PROCESSES", "RLHFJAX_PROCESS_ID")
FOREVER_MS = 30 * 24 * 3600 * 1000  # a wait ends earlier when the process that is waited for dies
_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, RewardError, IntegrityError, Stopped, RlhfjaxError)}
_ABORTED = 134  # what a process ends with that jax aborts because another one died
_SIGNS_OF_LOSS = ("Gloo ", "NCCL", "coordination service", "Connection reset by peer")
VERDICT = "rlhfjax/verdict"  # what the lookout says of a hang, in the store that all share
_JAX_LATER = 2.0  # seconds after the heartbeat until which the lookout has the first word


def place_of(
    coordinator: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> Place | None:
    """This process among others, by flags or else by variables; None where neither says anything.

    Raises ConfigError when a part is missing or makes no sense.
    """
    flags = (coordinator, count, index)
    names: tuple = ("--coordinator", "--num-processes", "--process-id")
    given = [None if flag is None else str(flag) for flag in flags]
    if all(value is None for value in given):
        names, given = VARIABLES, [environment.get(name) for name in VARIABLES]
    if all(value is None for value in given):
        return None
    for name, value in zip(names, given, strict=True):
        if value is None:
            raise ConfigError(f"{name}: expected it together with {' and '.join(n for n in names if n != name)}")
    address, numbers = str(given[0]), [str(value) for value in given[1:]]
    if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"{names[0]}: expected HOST:PORT, got {address!r}")
    for name, number in zip(names[1:], numbers, strict=True):
        if not number.isdigit():
            raise ConfigError(f"{name}: expected a whole number, got {number!r}")
    bind = environment.get("JAX_COORDINATOR_BIND_ADDRESS", address)
    place = Place(address, int(numbers[0]), int(numbers[1]), bind)
    if not place.index < place.count:
        raise ConfigError(f"{names[2]}: expected a number below {place.count} ({names[1]}), got {place.index}")
    return place


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether jax finds the other processes by itself: inside `srun` or `mpirun`, an indexed Kubernetes job, a TPU pod.

    Only variables are looked at. Asking jax would ask the network for the metadata of a machine in a cloud.
    """
    several = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}
    if any(name in environment and environment.get(size, "1") != "1" for name, size in several.items()):
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", environment.get("TPU_PROCESS_ADDRESSES", ""))
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment or indexed


@contextmanager
def started(
    place: Place | None,
    *,
    heartbeat: int,
    timeout: float,
    say: Callable[[str], None],
    failed: Callable[[BaseException], int],
) -> Iterator[None]:
    """The run inside is one of several processes, where `place` or the cluster says so.

    A process that is silent for `heartbeat` seconds is taken for dead by the lookout, and later by jax: then the others
    end with 134 (SIGABRT), as does one whose collectives fail because another is gone. What only this process failed
    with is given to `failed`, which says it and gives the exit code, and ends the process at once: the others are
    waiting for it. Raises ConfigError or Stopped when not all of them come within `timeout` seconds.
    """
    cluster = place is None and in_cluster(os.environ)
    cpus.prepare(cluster or (place is not None and place.count > 1), say)
    if not cluster and (place is None or place.count == 1):
        yield
        return
    if proxies := [name for name in os.environ if "_proxy" in name.lower() and name.lower() != "no_proxy"]:
        say(f"{', '.join(sorted(proxies))}: set; if processes do not find each other, unset it")
    if place:
        meet(place, timeout)
    settings: dict[str, Any] = {"heartbeat_timeout_seconds": jax_heartbeat(heartbeat)}
    settings |= {"initialization_timeout": int(timeout)}
    if place:
        settings |= {"coordinator_address": place.coordinator, "coordinator_bind_address": place.bind}
        settings |= {"num_processes": place.count, "process_id": place.index}
        settings |= {"cluster_detection_method": "deactivate"}
    jax.config.update("jax_check_proxy_envs", False)  # said above
    jax.distributed.initialize(**settings, shutdown_timeout_seconds=max(2 * heartbeat, 30))
    try:
        yield
    except BaseException as error:
        lost = lost_another(error)
        if lost or not _everywhere(error):
            if lost and hung():  # who left did so because of a hang that is said already
                os._exit(Stopped.exit_code)
            if lost:
                say(f"process {jax.process_index()}: another process is gone, see its log: {lost}")
            code = _ABORTED if lost else failed(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        jax.distributed.shutdown()
        if jax.process_index() and isinstance(error, RlhfjaxError):  # process 0 says it
            raise SystemExit(error.exit_code) from None
        raise
    jax.distributed.shutdown()


def jax_heartbeat(heartbeat: int) -> int:
    """Seconds of silence after which jax ends the processes, with a stack of its own and no word of why.

    Its processes tell that they live once in half of this, so it may come to that after half of it. Until then the
    lookout has said who is silent.
    """
    return int(2 * (heartbeat + _JAX_LATER))


def hung() -> bool:
    """Whether the lookout has said that the run hangs."""
    try:
        return bool(shared_store().key_value_dir_get(VERDICT))
    except jax.errors.JaxRuntimeError:
        return False  # process 0 is gone, and with it what was said


def lost_another(error: BaseException | None) -> str | None:
    """What a collective said when it failed because another process died, if that is where an error comes from."""
    while error is not None:
        text = str(error)
        if any(sign in text for sign in _SIGNS_OF_LOSS):
            return text.splitlines()[0][:200]
        error = error.__cause__ or error.__context__
    return None


def _everywhere(error: BaseException) -> bool:
    return getattr(error, "everywhere", isinstance(error, Stopped))


def count() -> int:
    """How many processes there are."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is process 0, which writes logs, metrics and reports."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


_polls = 0


def preempted() -> bool:
    """Whether all processes are to save and stop here: one of them was sent SIGTERM, and all have come this far.

    A collective decision: every process asks at the same places, and gets the same answer. False in a process by
    itself, where SIGTERM is not jax's.
    """
    global _polls
    if count() == 1:
        return False
    _polls += 1
    return multihost_utils.reached_preemption_sync_point(_polls)


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if count() > 1:
        with marks.inside(marks.PROCESSES, name):
            shared_store().wait_at_barrier(turn_of(name), FOREVER_MS)
        marks.met()


def by_first(what: Callable[[], Any], name: str) -> str:
    """Process 0 does it, and the others wait; all get its text, if it gives one. Its expected errors all raise."""
    if count() == 1:
        return what() or ""
    key = turn_of(name)
    if not is_first():
        told = awaited(key, name)
        marks.met()
        raise_verdict("" if told.startswith("+") else told)
        return told[1:]
    try:
        said = what() or ""
    except RlhfjaxError as error:
        shared_store().key_value_set(key, json.dumps([type(error).__name__, str(error)]))
        raise raised_by_all(error) from None
    shared_store().key_value_set(key, f"+{said}")
    marks.met()
    return said


def agree(facts: Mapping[str, str], error: type[RlhfjaxError] = ConfigError) -> None:
    """Raise `error` in every process where they do not all have the same facts; it names one and who has it otherwise.

    Returns when all processes have asked.
    """
    if count() == 1:
        return
    key, own = turn_of("agree"), dict(facts)
    shared_store().key_value_set(f"{key}/{jax.process_index()}", json.dumps(own))
    if not is_first():
        verdict = awaited(f"{key}/verdict", "agreement")
        marks.met()
        raise_verdict(verdict)
        return
    others = {index: json.loads(awaited(f"{key}/{index}", "agreement")) for index in range(1, jax.process_count())}
    message = difference({0: own} | others)
    verdict = json.dumps([error.__name__, message]) if message else ""
    shared_store().key_value_set(f"{key}/verdict", verdict)
    marks.met()
    raise_verdict(verdict)


def difference(facts: Mapping[int, Mapping[str, str]]) -> str | None:
    """The first fact that processes have otherwise than process 0, and which of them; None where all agree."""
    ours = facts[0]
    keys = dict.fromkeys([*ours, *(key for told in facts.values() for key in told)])
    for key in keys:
        others = [index for index, told in facts.items() if told.get(key) != ours.get(key)]
        if others:
            shown = ", ".join(map(str, others[:8])) + (" …" if len(others) > 8 else "")
            theirs = facts[others[0]].get(key, "nothing")
            return (
                f"processes do not agree on {key}: expected {ours.get(key, 'nothing')}, as process 0 has it, got "
                f"{theirs} in process {shown}. All need the same configuration, installation and data"
            )
    return None


def fetch(tree: Any) -> Any:
    """A tree of arrays as numpy arrays in every process, wherever their rows are; all processes ask for it."""
    if count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda x: _whole(x), tree)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return jax.device_get(x)
    with marks.inside(marks.PROGRAM, "allgather"):
        return multihost_utils.process_allgather(x, tiled=True)


def shared_store() -> Any:
    """The store that all processes read and write, which jax keeps at process 0."""
    # What Orbax does, too: jax has no public name for the store that its processes share.
    from jax._src import distributed

    return distributed.global_state.client


def awaited(key: str, name: str) -> str:
    """What another process writes there, however late; `name` says what for."""
    with marks.inside(marks.PROCESSES, name):
        return shared_store().blocking_key_value_get(key, FOREVER_MS)


_turns = 0


def turn_of(name: str) -> str:
    """A name that is used once; processes take turns in the same order."""
    global _turns
    _turns += 1
    return f"rlhfjax/{_turns}/{name}"


def raise_verdict(verdict: str) -> None:
    """Raise the error, if there is one, that a text of its kind and its message says."""
    if verdict:
        kind, message = json.loads(verdict)
        raise raised_by_all(_ERRORS[kind](message))


def raised_by_all(error: RlhfjaxError) -> RlhfjaxError:
    """An error that every process raises: each of them may end as it would by itself."""
    error.everywhere = True  # pyright: ignore[reportAttributeAccessIssue]
    return error
