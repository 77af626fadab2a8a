"""A whole recipe in an object store: killed twenty times, mostly in the middle of an upload, and cut off five times.

Every fourth launch begins on a machine that has nothing. After each kill the bucket is read by another library, object
by object: a step that counts is whole. In the end every bit is that of a run on a local disk.
"""

import collections
import hashlib
import json
import random
import socket

import pytest
from stores.stand_ins import BUCKET, Network, connection, s3_server, variables

from stages.conftest import rows_of
from stages.test_killed_anywhere import require_same_bits
from stages.tiny_recipe import STAGES

pytestmark = pytest.mark.faults
boto3 = pytest.importorskip("boto3")
pytest.importorskip("moto")
pytest.importorskip("s3fs")
KILLS, LOSSES = 20, 5


def objects_of(port):
    """All objects of the bucket, by key."""
    client = boto3.client("s3", **connection(port))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]
    return {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def require_whole(objects):
    """Each step with a manifest has what that says, byte for byte; how many there are."""
    steps = collections.defaultdict(dict)
    for key, data in objects.items():
        if "/checkpoints/" in key:
            stage, _, rest = key.partition("/checkpoints/")
            number, _, name = rest.partition("/")
            steps[stage, number][name] = data
    whole = {step: held for step, held in steps.items() if "MANIFEST.sha256.json" in held}
    for step, held in whole.items():
        listed = json.loads(held["MANIFEST.sha256.json"])["files"]
        for name in [name for name in listed if name.endswith("/MANIFEST.sha256.json")]:
            inner = json.loads(held[name])["files"]
            listed |= {f"{name.removesuffix('MANIFEST.sha256.json')}{file}": entry for file, entry in inner.items()}
        del held["MANIFEST.sha256.json"]
        assert {name: hashlib.sha256(data).hexdigest() for name, data in held.items()} == {
            name: entry["sha256"] for name, entry in listed.items()
        }, step
    return len(whole)


def downloaded(objects, folder):
    for key, data in objects.items():
        path = folder / key.removeprefix("run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_twenty_kills_and_five_lost_connections(start, finished, config, tmp_path):
    draw, killed, seen, said = random.Random(16), 0, 0, []
    with s3_server(tmp_path / "moto.log") as server:
        network = Network(server)
        while True:
            scratch = tmp_path / f"machine{killed // 4}"
            process = start(
                "run", config, "--run-dir", f"s3://{BUCKET}/run", variables=variables(network.port, scratch)
            )
            if killed < KILLS:
                network.at, network.then = network.changes + draw.randint(20, 120), process.kill
            else:
                lose_now_and_then(network, draw)
            _, err = process.communicate()
            said.append(err)
            if process.returncode != -9:
                break
            killed += 1
            seen = max(seen, require_whole(objects_of(server)))
        assert process.returncode == 0, err
        assert (killed, network.lost) == (KILLS, LOSSES)
        assert seen > 5  # of two stages at least
        network.close()
        process = start("verify", f"s3://{BUCKET}/run", variables=variables(server, tmp_path / "reader"))
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        run_dir = downloaded(objects_of(server), tmp_path / "run")
    assert [text for text in said if "set aside" in text or "Traceback" in text] == []
    require_same_bits(run_dir, finished)
    assert [path.name for path in run_dir.rglob("*") if ".part" in path.name or path.name == "DAMAGED"] == []
    assert all((run_dir / stage / "complete.json").exists() for stage in STAGES)
    attempts = rows_of(run_dir / "manifest.jsonl")
    assert attempts[-1]["status"] == "finished"


def lose_now_and_then(network, draw):
    """Five times, after so many changes each, everything that is under way is cut off."""

    def lose():
        network.lose(seconds=draw.uniform(0.2, 2.0))
        if network.lost < LOSSES:
            network.at = network.changes + draw.randint(3, 20)

    network.at, network.then = network.changes + draw.randint(3, 20), lose


def test_processes_that_do_not_see_one_directory_are_told_which_variable_to_set(start, config, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        to = ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--num-processes", 2, "--process-id")
    with s3_server(tmp_path / "moto.log") as server:
        processes = [
            start(
                *("run", config, "--run-dir", f"s3://{BUCKET}/run", *to, index),
                variables=variables(server, tmp_path / f"machine{index}"),
            )
            for index in range(2)
        ]
        said = [process.communicate()[1] for process in processes]
        left = objects_of(server)
    assert [process.returncode for process in processes] == [2, 2], said
    [line] = [line for line in said[0].splitlines() if "error:" in line]
    expected = (
        "error: processes do not agree on RLHFJAX_SCRATCH, a directory that all hosts of this run must see: expected "
        f"what lock 1 of s3://{BUCKET}/run fetched, as process 0 has it, got nothing of this run in process 1."
    )
    assert line.startswith(expected)
    assert [key for key in left if not key.startswith("run/.lock/")] == []
