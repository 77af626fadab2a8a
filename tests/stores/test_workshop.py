"""A run in a store, killed at every single operation: no torn step counts, and no row or file is mixed."""

import hashlib
import itertools
import json
import os

import pytest

from rlhfjax.integrity import check, write_manifest
from rlhfjax.stores import layout
from rlhfjax.stores.lease import Lease
from rlhfjax.stores.workshop import Workshop
from stores.stand_ins import Killed, MemoryStore


def step_of(folder, number, text):
    """A step as runs leave it: a large file, a small one, its meta, and the manifest."""
    step = folder / "sft" / "checkpoints" / str(number)
    (step / "policy" / "d").mkdir(parents=True)
    (step / "meta").mkdir()
    (step / "policy" / "d" / f"{text}{number}").write_bytes(text.encode() * 20_000)
    (step / "policy" / "_METADATA").write_text(text)
    (step / "meta" / "metadata").write_text(json.dumps({"format": 2, "step": number, "text": text}))
    for item in ("policy", "meta"):
        write_manifest(step / item)
    write_manifest(step)
    return step


def opened(objects, root, operations=None):
    store = MemoryStore(objects, operations)
    shop = Workshop(store, root, Lease(store))
    shop.begin()
    return shop


def killed(shop):
    """What a process leaves whose lock nobody gave back: the lock names a process that is no more."""
    shop._lease._ended.set()
    shop._lease._renewing.join()
    shop.store.objects[f".lock/{shop._lease.number:08d}"] = json.dumps(shop._lease._me | {"pid": 2**22 + 1}).encode()


def listed_in(objects, below):
    """What a manifest lists, and the manifests that it lists."""
    listed = json.loads(objects[f"{below}MANIFEST.sha256.json"])["files"]
    for name in [name for name in listed if name.endswith("/MANIFEST.sha256.json")]:
        folder = name.removesuffix("MANIFEST.sha256.json")
        listed |= {f"{folder}{inner}": entry for inner, entry in listed_in(objects, f"{below}{folder}").items()}
    return listed


def require_whole(objects):
    """Every step that counts is whole, looked at object by object; their numbers."""
    found = []
    for step, held in layout.Contents.of({key: len(data) for key, data in objects.items()}).whole().items():
        listed = listed_in(objects, f"{step}/")
        assert listed.keys() == held.keys() - {"MANIFEST.sha256.json"}
        for name, entry in listed.items():
            assert hashlib.sha256(objects[f"{step}/{name}"]).hexdigest() == entry["sha256"], f"{step}/{name}"
        found.append(int(step.rpartition("/")[2]))
    return sorted(found)


def work(shop, text):
    """A stage in miniature: rows and a step, twice, the first goes, then the mark. As the loop and the runner do it."""
    stage = shop.root / "sft"
    for number in (1, 2):
        stage.mkdir(exist_ok=True)
        for file in (stage / "metrics.jsonl", shop.root / "time.jsonl"):
            with file.open("a") as rows:
                rows.write(json.dumps({"step": number, "text": text}) + "\n")
        if not (stage / "checkpoints" / str(number)).exists():
            shop.publish_step(step_of(shop.root, number, text))
    gone = stage / "checkpoints" / "1"
    shop.remove(gone)
    os.rename(gone, gone.with_name("1.removed"))
    shop.send(stage)
    (stage / "complete.json").write_text(json.dumps({"stage": "sft", "step": 2}))
    shop.finish(stage)
    shop.close()


def steps_here(root):
    return sorted(int(path.name) for path in (root / "sft" / "checkpoints").glob("*") if path.name.isdigit())


def test_a_run_killed_at_any_operation_is_whole_in_the_store_and_elsewhere(tmp_path):
    for count in itertools.count(2):  # the first two take the lock
        objects = {}
        shop = opened(objects, tmp_path / f"{count}", count)
        try:
            work(shop, "a")
            break
        except Killed:
            killed(shop)
        whole = require_whole(objects)
        assert whole in ([], [1], [1, 2], [2])
        if "sft/complete.json" in objects:
            assert 2 in whole
        other = opened(objects, tmp_path / f"{count}-elsewhere")
        assert steps_here(other.root) == whole
        for rows in (other.root / "sft" / "metrics.jsonl", other.root / "time.jsonl"):
            known = [json.loads(line)["step"] for line in rows.read_text().splitlines()] if rows.exists() else []
            assert known == list(range(1, len(known) + 1))
            assert len(known) >= max(whole, default=0)
        for number in whole:
            step = other.root / "sft" / "checkpoints" / str(number)
            other.need(step)
            assert not check(step).differences
        assert not [key for key in objects if ("/1/" in key and 1 not in whole) or ("/2/" in key and 2 not in whole)]
        killed(other)
    assert count > 20
    assert sorted(objects) == sorted(
        ["sft/complete.json", "sft/metrics.jsonl", "time.jsonl", ".lock/00000001"]
        + [f"sft/checkpoints/2/{name}" for name in ("MANIFEST.sha256.json", "meta/metadata", "policy/_METADATA")]
        + [f"sft/checkpoints/2/{item}/MANIFEST.sha256.json" for item in ("meta", "policy")]
        + ["sft/checkpoints/2/policy/d/a2"]
    )
    assert json.loads(objects[".lock/00000001"])["released"]


def test_a_file_of_the_run_grows_over_launches_on_several_machines_whatever_kills_them(tmp_path):
    # one object after a launch that ended, parts beside it while the next one adds to them, and one object again
    for count in itertools.count(2):
        objects, ended = {}, True
        shop = opened(objects, tmp_path / f"{count}-0")
        (shop.root / "time.jsonl").write_text("0\n")
        shop.close()
        assert objects["time.jsonl"] == b"0\n"
        try:
            shop = opened(objects, tmp_path / f"{count}-1", count)
            for i in (1, 2):
                with (shop.root / "time.jsonl").open("a") as rows:
                    rows.write(f"{i}\n")
                shop.send(shop.root)
            shop.close()
        except Killed:
            ended = False
            killed(shop)
        reader = Workshop(MemoryStore(objects), tmp_path / f"{count}-reader")
        reader.begin()
        last = opened(objects, tmp_path / f"{count}-2")
        said = (last.root / "time.jsonl").read_text()
        assert said == (reader.root / "time.jsonl").read_text()
        assert said in ("0\n", "0\n1\n", "0\n1\n2\n")
        last.close()
        assert sorted(key for key in objects if key.startswith("time")) == ["time.jsonl"]
        assert objects["time.jsonl"].decode() == said
        if ended:
            break
    assert said == "0\n1\n2\n"
    assert count > 6


def test_a_step_that_is_replaced_or_deleted_is_whole_or_does_not_count_whenever_that_is_killed(tmp_path):
    for what in ("replace", "delete"):
        for count in itertools.count(0):
            objects = {}
            shop = opened(objects, tmp_path / f"{what}{count}")
            step = step_of(shop.root, 1, "a")
            shop.publish_step(step)
            (step / "policy" / "_METADATA").write_text("b")
            write_manifest(step / "policy")
            write_manifest(step)
            shop.store = MemoryStore(objects, count)
            try:
                shop.publish_step(step) if what == "replace" else shop.remove(step)
                break
            except Killed:
                killed(shop)
                require_whole(objects)
        killed(shop)
        assert require_whole(objects) == ([1] if what == "replace" else [])
        assert count > 3


def test_on_the_same_machine_nothing_is_lost_that_the_store_has_not(tmp_path):
    objects = {}
    shop = opened(objects, tmp_path / "here")
    shop.publish_step(step_of(shop.root, 1, "a"))
    step_of(shop.root, 2, "a")  # whole here, and killed before it was published
    killed(shop)
    again = opened(objects, tmp_path / "here")
    assert steps_here(again.root) == [1, 2]
    assert require_whole(objects) == [1, 2]
    assert again.store.fetched == []  # nothing came over the network that was here
    killed(again)


def test_a_step_whose_arrays_were_never_fetched_is_not_given_back(tmp_path):
    for count in itertools.count(0):
        objects = {}
        shop = opened(objects, tmp_path / "before" / f"{count}")
        for number in (1, 2):
            shop.publish_step(step_of(shop.root, number, "a"))
        killed(shop)
        elsewhere = opened(objects, tmp_path / f"{count}")
        elsewhere.need(elsewhere.root / "sft" / "checkpoints" / "2" / "policy")
        elsewhere.store = MemoryStore(objects, count)
        try:
            elsewhere.remove(elsewhere.root / "sft" / "checkpoints" / "1")
            break
        except Killed:
            killed(elsewhere)
        again = opened(objects, tmp_path / f"{count}")  # the process ended before it deleted the step here, too
        assert require_whole(objects) == steps_here(again.root)
        assert 2 in steps_here(again.root)
        killed(again)
    assert count > 3


def test_what_another_machine_did_since_counts(tmp_path):
    objects = {}
    here = opened(objects, tmp_path / "here")
    here.publish_step(step_of(here.root, 1, "a"))
    step_of(here.root, 2, "a")
    killed(here)
    there = opened(objects, tmp_path / "there")
    assert steps_here(there.root) == [1]
    there.publish_step(step_of(there.root, 2, "b"))
    there.close()
    again = opened(objects, tmp_path / "here")
    meta = again.root / "sft" / "checkpoints" / "2" / "meta" / "metadata"
    assert json.loads(meta.read_text())["text"] == "b"
    assert not (again.root / "sft" / "checkpoints" / "2" / "policy" / "d" / "a2").exists()
    again.need(meta.parent.parent)
    assert not check(meta.parent.parent).differences
    killed(again)


def test_arrays_are_fetched_when_their_item_is_read_and_not_before(tmp_path):
    # fails when all of a step is fetched: seen
    objects = {}
    shop = opened(objects, tmp_path / "here")
    for number in (1, 2):
        step = step_of(shop.root, number, "a")
        (step / "training" / "d").mkdir(parents=True)
        (step / "training" / "d" / "moments").write_bytes(b"m" * 20_000)
        write_manifest(step / "training")
        write_manifest(step)
        shop.publish_step(step)
    shop.close()
    other = Workshop(MemoryStore(objects), tmp_path / "elsewhere")
    other.begin()
    step = tmp_path / "elsewhere" / "sft" / "checkpoints" / "2"
    assert (step / "training" / "MANIFEST.sha256.json").exists()  # without what it lists
    assert not [key for key in other.store.fetched if "/d/" in key]
    other.need(step / "policy")
    assert [key for key in other.store.fetched if "/d/" in key] == ["sft/checkpoints/2/policy/d/a2"]
    (step / "policy" / "d" / "a2").write_bytes(b"b" * 20_000)
    assert other.mend(step / "policy")
    assert not check(step / "policy").differences
    other.need(step)
    assert not check(step).differences


def test_a_damaged_copy_is_fetched_anew_and_a_damaged_step_does_not_count(tmp_path):
    objects = {}
    shop = opened(objects, tmp_path / "here")
    step = step_of(shop.root, 1, "a")
    shop.publish_step(step)
    (step / "policy" / "d" / "a1").write_bytes(b"b" * 20_000)
    assert check(step).differences
    assert shop.mend(step)
    assert not check(step).differences
    shop.set_damaged(step)
    assert require_whole(objects) == []
    killed(shop)
    other = opened(objects, tmp_path / "elsewhere")
    assert steps_here(other.root) == []
    other.publish_step(step_of(other.root, 1, "c"))  # the step is made again
    assert require_whole(objects) == [1]
    assert not [key for key in objects if key.endswith(("/a1", "DAMAGED"))]
    killed(other)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_rows_that_a_run_took_back_are_gone_and_those_before_are_sent_once(tmp_path, kept, in_place):
    objects = {}
    shop = opened(objects, tmp_path / "here")
    rows = tmp_path / "here" / "sft" / "metrics.jsonl"
    rows.parent.mkdir()
    lines = [f'{{"step": {i}}}\n' for i in range(1, 4)]
    for line in lines:
        with rows.open("a") as file:
            file.write(line)
        shop.send(rows.parent)
    assert sorted(len(data) for key, data in objects.items() if ".parts/" in key) == [len(lines[0])] * 3
    part = rows if in_place else rows.with_suffix(".part")
    part.write_text("".join(lines[:kept]) + '{"step": "anew"}\n')
    part.replace(rows)
    shop.send(rows.parent)
    killed(shop)
    other = opened(objects, tmp_path / "elsewhere")
    assert (other.root / "sft" / "metrics.jsonl").read_text() == "".join(lines[:kept]) + '{"step": "anew"}\n'
    killed(other)


def test_a_stage_that_is_done_again_leaves_nothing_of_before(tmp_path):
    objects = {}
    shop = opened(objects, tmp_path / "here")
    work(shop, "a")
    shop = opened(objects, tmp_path / "here")
    shop.remove(shop.root / "sft")
    assert [key for key in objects if key.startswith("sft")] == []
    killed(shop)
