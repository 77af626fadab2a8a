"""Votes on the disk: each that was acknowledged is there once, whatever killed the server; a recipe reads them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfjax.data.datasets import open_source
from rlhfjax.errors import ConfigError
from rlhfjax.serving.feedback import COMPARISONS, THUMBS, Feedback

ASKED = [{"role": "user", "content": "Why is the sea salty?"}]
COMPARISON = {"messages": ASKED, "responses": ["Rivers.", "Fish."], "ranks": [1, 2], "models": ["a", "b"]}
THUMB = {"messages": ASKED, "completion": "Rivers.", "label": True, "models": ["a"]}

WRITER = """
import sys
from rlhfjax.serving.feedback import Feedback
votes = Feedback(__import__("pathlib").Path(sys.argv[1]))
for count in range(10_000):
    votes.keep("thumbs.jsonl", f"{sys.argv[2]}-{count}", {"text": "x" * 5000})
    print(f"{sys.argv[2]}-{count}", flush=True)
"""


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("after", [1, 7, 30])
def test_each_acknowledged_vote_is_there_once_after_a_kill(tmp_path, after):
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(after)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root},
    ) as writer:  # fmt: skip
        acknowledged = [writer.stdout.readline().strip() for _ in range(after)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.read().split()
    votes = Feedback(tmp_path)
    kept = ids(tmp_path / THUMBS)
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) in (len(acknowledged), len(acknowledged) + 1)  # one that was written and not yet told
    assert not votes.keep(THUMBS, acknowledged[-1], THUMB)
    assert votes.keep(THUMBS, "another-1", THUMB)
    assert ids(tmp_path / THUMBS) == [*kept, "another-1"]


def test_half_a_line_goes(tmp_path):
    Feedback(tmp_path).keep(COMPARISONS, "vote-0001", COMPARISON)
    whole = (tmp_path / COMPARISONS).read_bytes()
    (tmp_path / COMPARISONS).write_bytes(whole + whole[: len(whole) // 2])
    Feedback(tmp_path)
    assert (tmp_path / COMPARISONS).read_bytes() == whole
    assert (tmp_path / COMPARISONS).stat().st_mode & 0o777 == 0o600


def test_a_recipe_reads_what_is_kept(tmp_path):
    votes = Feedback(tmp_path)
    votes.keep(COMPARISONS, "vote-0001", COMPARISON)
    votes.keep(THUMBS, "vote-0002", THUMB)
    [compared] = open_source(str(tmp_path / COMPARISONS), "train", tmp_path, kind="comparison")
    assert (compared["messages"], compared["responses"], compared["ranks"]) == (ASKED, ["Rivers.", "Fish."], [1, 2])
    [rated] = open_source(str(tmp_path / THUMBS), "train", tmp_path, kind="unpaired")
    assert (rated["messages"], rated["completion"], rated["label"]) == (ASKED, "Rivers.", True)


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch):
    votes = Feedback(tmp_path)
    votes.keep(THUMBS, "vote-0001", THUMB)
    before = (tmp_path / THUMBS).read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        votes.keep(THUMBS, "vote-0002", THUMB)
    monkeypatch.undo()
    assert (tmp_path / THUMBS).read_bytes() == before
    assert votes.keep(THUMBS, "vote-0002", THUMB)


def test_what_is_no_directory_for_votes_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="expected a directory for votes"):
        Feedback(tmp_path / "file")
    (tmp_path / THUMBS).write_text("no record\n")
    with pytest.raises(ConfigError, match="a line that is no record"):
        Feedback(tmp_path)
