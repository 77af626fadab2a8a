"""Processes that are looked at together before a run: what each found comes to process 0, which compares and says it.

They meet as those of a run do, at the same address, without jax. Who does not come is named.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhfjax.errors import ConfigError, Stopped
from rlhfjax.host import rendezvous
from rlhfjax.host.rendezvous import Place

_GREETING = "rlhfjax doctor"
_LONGEST = 1 << 18  # bytes of what a process found


@dataclass(frozen=True)
class Told:
    """What a process found and what all must have alike; its clock less that of process 0, in seconds."""

    findings: list[dict[str, Any]]
    facts: Mapping[str, str]
    skew: float = 0.0


def in_cluster() -> Place | None:
    """The place that jax would find for this process; None where it finds none."""
    # jax has no public name for what it finds out.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 60)
    address, count, index = found[:3]
    if address is None or count is None or index is None:
        return None
    return Place(address, count, index, os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address))


class Meeting:
    """The processes at one table; process 0 has what each told, the others hear what comes of it.

    Raises ConfigError where the port is taken or numbers do not fit, Stopped for who does not come in time.
    """

    def __init__(self, place: Place, own: Told, seconds: float):
        self.place, self._joined = place, {}
        self.told: dict[int, Told] = {0: own}
        self._hosts: dict[int, str] = {0: own.facts.get("host", "")}
        self._seconds, self._until = seconds, time.monotonic() + seconds
        if place.index:
            self._door = self._join(own)
        else:
            self._gather()

    def _join(self, own: Told) -> Any:
        hello = {"greeting": _GREETING, "count": self.place.count, "index": self.place.index}
        told = hello | {"findings": own.findings, "facts": dict(own.facts)}
        while True:
            door = rendezvous.knock(self.place, self._until, told)
            if door is not None:
                return door
            if time.monotonic() >= self._until:
                raise Stopped(
                    f"process {self.place.index}: expected process 0 at {self.place.coordinator} within "
                    f"{self._seconds:.0f} s, got no answer; see its log, and that this host reaches that address"
                )
            time.sleep(0.1)

    def _gather(self) -> None:
        for guest, told in rendezvous.guests(self.place, self._until, _GREETING, _LONGEST):
            index = told["index"]
            problem = rendezvous.problem_of(self.place, told, set(self._joined))
            if problem:
                self._joined[-1] = guest
                self.end({"problem": problem})
                raise ConfigError(problem)
            self._joined[index] = guest
            self._hosts[index] = str(told.get("facts", {}).get("host", ""))
            self.told[index] = Told(told.get("findings", []), told.get("facts", {}))
            if len(self._joined) == self.place.count - 1:
                break
        if len(self.told) < self.place.count:
            missing = [index for index in range(self.place.count) if index not in self.told]
            line = self._missing(missing)
            self.end({"stopped": line})
            raise Stopped(line)
        for index, guest in self._joined.items():
            self.told[index] = self._with_skew(guest, self.told[index])

    def _missing(self, missing: list[int]) -> str:
        shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
        came = ", ".join(f"{index} on {host}" for index, host in sorted(self._hosts.items())[:8])
        return (
            f"{self.place.coordinator}: expected {self.place.count} processes within {self._seconds:.0f} s, got "
            f"{len(self.told)}, without process {shown} (came: {came}); see the logs of their hosts"
        )

    def _with_skew(self, guest: Any, told: Told) -> Told:
        """Its clock is asked for, and compared with ours in the middle of the question."""
        began = time.time()
        rendezvous.send(guest, {"ask": "time"})
        answer = rendezvous.receive(guest, _LONGEST) or {}
        middle = (began + time.time()) / 2
        return Told(told.findings, told.facts, float(answer.get("time", middle)) - middle)

    def end(self, verdict: Mapping[str, Any]) -> None:
        """Process 0 tells the others what came of it."""
        for guest in self._joined.values():
            rendezvous.send(guest, dict(verdict))
            guest.close()

    def heard(self) -> int:
        """The exit code that process 0 tells this one. Raises what it raised."""
        with self._door as door:
            while True:
                door.settimeout(max(self._until - time.monotonic(), 0.0) + 60)
                answer = rendezvous.receive(door, _LONGEST)
                if answer is None:
                    raise Stopped(f"process {self.place.index}: process 0 ended before it said anything; see its log")
                if "ask" in answer:
                    rendezvous.send(door, {"time": time.time()})
                elif "code" in answer:
                    return int(answer["code"])
                elif "problem" in answer:
                    raise ConfigError(str(answer["problem"]))
                else:
                    raise Stopped(str(answer.get("stopped")))
