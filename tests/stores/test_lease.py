"""One launch a run, in a store too: of many that try one gets the lock, and only a holder without a sign loses it."""

import json
import threading
import time

import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.stores.lease import Lease
from stores.stand_ins import MemoryStore


def elsewhere(objects):
    """The holder of the lock becomes a process of another machine."""
    key = max(key for key in objects if not key.endswith(".alive"))
    objects[key] = json.dumps(json.loads(objects[key]) | {"machine": "another", "host": "far"}).encode()
    return key


def test_a_second_launch_is_refused_at_once_and_told_who_has_it():
    objects = {}
    lease = Lease(MemoryStore(objects))
    began = json.loads(objects[".lock/00000001"])
    with pytest.raises(ConfigError, match=f"s3://bucket/run is in use by process {began['pid']} on") as caught:
        Lease(MemoryStore(objects))
    assert caught.value.exit_code == 2
    lease.release()
    Lease(MemoryStore(objects)).release()


def test_a_holder_elsewhere_that_renews_keeps_it():
    objects = {}
    lease = Lease(MemoryStore(objects), seconds=1.0)
    elsewhere(objects)
    with pytest.raises(ConfigError, match="on far"):
        Lease(MemoryStore(objects), seconds=1.0)
    lease.require()
    lease.release()


def test_a_holder_elsewhere_without_a_sign_loses_it_after_a_whole_lease_and_may_not_write():
    objects, said = {}, []
    first = Lease(MemoryStore(objects), seconds=1.0)
    first._ended.set()  # as a machine that stands still
    first._renewing.join()
    elsewhere(objects)
    before = time.monotonic()
    second = Lease(MemoryStore(objects), said.append, seconds=1.0)
    assert time.monotonic() - before >= 1.0  # a lower bound: nobody is driven out early, on however slow a machine
    assert "waiting for up to 1 s" in said[0]
    assert (second.before, second.number) == (1, 2)
    with pytest.raises(ConfigError, match="another one has taken it"):
        first.require()
    second.require()
    second.release()


def test_a_process_of_this_machine_that_died_is_not_waited_for():
    objects, said = {}, []
    first = Lease(MemoryStore(objects))
    first._ended.set()
    first._renewing.join()
    objects[".lock/00000001"] = json.dumps(first._me | {"pid": 2**22 + 1}).encode()  # beyond the largest
    second = Lease(MemoryStore(objects), said.append)
    assert (second.before, said) == (1, [])
    second.release()


def test_of_twenty_that_try_at_once_one_has_it():
    for released in (False, True):
        objects, got, refused = {}, [], []
        if released:
            Lease(MemoryStore(objects)).release()

        def attempt(objects=objects, got=got, refused=refused):
            try:
                got.append(Lease(MemoryStore(objects)))
            except ConfigError:
                refused.append(True)

        threads = [threading.Thread(target=attempt) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(got), len(refused)) == (1, 19)
        got[0].require()
        got[0].release()


def test_a_number_that_others_have_gone_past_is_given_up():
    """Whoever was slow creates an old number that has been deleted by then; the highest alone counts."""

    class Slow(MemoryStore):
        def create(self, key, data):
            if key == ".lock/00000001":
                self.objects.update({".lock/00000005": json.dumps({"released": True}).encode()})
            return super().create(key, data)

    objects = {}
    lease = Lease(Slow(objects))
    assert lease.number == 6
    assert sorted(objects) == [".lock/00000006"]
    lease.release()
