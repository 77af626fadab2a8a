"""JSONL → TFDS → records gives back what was written, once, in order, or nothing at all."""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhfjax.data import preparing, writing
from rlhfjax.data.datasets import fingerprint, open_source
from rlhfjax.data.preparing import prepare_files
from rlhfjax.data.reading import DataFile
from rlhfjax.errors import ConfigError, DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "datasets"
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
EXTRA = st.fixed_dictionaries({}, optional={"note": ANY_TEXT, "nested": st.lists(st.floats(-1, 1) | st.none())})
CALL = st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT})})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": ANY_TEXT},
    optional={
        "name": TEXT,
        "tool_call_id": TEXT,
        "reasoning_content": TEXT,
        "of_a_template": st.integers(1, 9),
        "weight": st.integers(0, 1),
        "tool_calls": st.lists(CALL, min_size=1, max_size=2),
    },
)
PROMPT = st.fixed_dictionaries({"prompt": TEXT}) | st.builds(
    lambda history, last: {"messages": [*history, {"role": "user", "content": last}]},
    st.lists(MESSAGE, max_size=3),
    TEXT,
)
SETTINGS = st.fixed_dictionaries(
    {}, optional={"tools": st.lists(CALL, min_size=1, max_size=2), "chat_template_kwargs": st.just({"thinking": False})}
)
UNPAIRED = st.builds(
    lambda prompt, settings, answer, label, extra: {
        **prompt,
        **settings,
        "completion": answer,
        "label": label,
        **extra,
    },
    PROMPT,
    SETTINGS,
    TEXT,
    st.booleans(),
    EXTRA,
)
COMPARISON = st.builds(
    lambda prompt, ranked, ids, extra: {
        **prompt,
        "responses": [text for text, _ in ranked],
        "ranks": [rank for _, rank in ranked],
        **ids,
        **extra,
    },
    PROMPT,
    st.lists(st.tuples(TEXT, st.integers(1, 9)), min_size=2, max_size=9),
    st.fixed_dictionaries({}, optional={"labeler_id": TEXT, "prompt_id": TEXT}),
    EXTRA,
)
RATING = st.fixed_dictionaries(
    {
        "output_id": TEXT,
        "labeler_id": TEXT,
        "likert": st.integers(1, 7),
        "flags": st.dictionaries(ANY_TEXT, st.booleans()),
    }
)


def write(path: Path, objects) -> Path:
    path.write_text("".join(json.dumps(obj, ensure_ascii=False) + "\n" for obj in objects), encoding="utf-8")
    return path


def flat(record: dict) -> dict:
    return {**{name: value for name, value in record.items() if name != "extra"}, **record.get("extra", {})}


def seen(data_dir: Path) -> list[str]:
    """All that a reader of the data directory could take for a dataset, or half of one."""
    return sorted(path.name for path in data_dir.iterdir() if path.name != ".lock")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    documents=st.lists(st.builds(lambda t, e: {"text": t, **e}, TEXT, EXTRA), min_size=1, max_size=4),
    comparisons=st.lists(COMPARISON, min_size=1, max_size=4),
    unpaired=st.lists(UNPAIRED, min_size=1, max_size=4),
    ratings=st.lists(RATING, min_size=1, max_size=3),
)
def test_round_trip(**given):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for name, objects in given.items():
            kind = {"documents": "document", "comparisons": "comparison", "ratings": "rating"}.get(name, name)
            source = str(write(folder / f"{kind}.jsonl", objects))
            records = open_source(source, "train", folder / "data", kind)
            assert [flat(record) for record in records] == objects


def test_a_dataset_whose_messages_have_role_and_content_alone_is_still_read():
    records = open_source("comparisons", "train", GOLDEN / "version_1", "comparison")
    assert list(records) == [
        {
            "messages": [{"role": "user", "content": "How warm is it?"}],
            "responses": ["21.", "Warm.", ""],
            "ranks": [1, 2, 2],
            "labeler_id": "anna",
            "extra": {"source": "by hand"},
        }
    ]


def test_unpaired_records_are_read_as_demonstrations_where_their_label_is_true(tmp_path):
    rows = [
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "p", "completion": "good", "label": True, "labeler_id": "a", "source": "x"},
        {"messages": [{"role": "user", "content": "p"}], "completion": "fine", "label": True},
    ]
    prepare_files({"train": write(tmp_path / "k.jsonl", rows)}, "unpaired", "kto", tmp_path / "data")
    good = open_source("kto", "train", tmp_path / "data", "demonstration")
    assert [record.get("completion") for record in good] == ["good", None]
    assert good[-1] == {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "fine"}]}
    assert good.notes == ["1 of 3 answers left out: their label is false"]
    assert len(open_source("kto", "train", tmp_path / "data", "unpaired")) == 3
    with pytest.raises(IndexError):
        good[2]


def test_demonstrations_of_both_forms_in_one_file(tmp_path):
    turns = [{"role": "user", "content": "Wie geht's? 🙂"}, {"role": "assistant", "content": "日本語\r\n\t"}]
    objects = [{"prompt": "p", "completion": " c"}, {"messages": turns, "prompt_id": "9"}]
    folder = prepare_files({"train": write(tmp_path / "d.jsonl", objects)}, "demonstration", "mine", tmp_path / "data")
    assert folder == tmp_path / "data" / "mine" / "1.0.0"
    records = open_source("mine", "train", tmp_path / "data", "demonstration")
    assert list(records) == objects
    assert records.__getitems__(range(1, -2, -1)) == [objects[1], objects[0], objects[1]]


def test_splits_are_kept_apart_and_files_are_private(tmp_path):
    paths = {split: write(tmp_path / f"{split}.jsonl", [{"text": split}]) for split in ("train", "validation")}
    folder = prepare_files(paths, "document", "two", tmp_path / "data")
    assert [open_source("two", split, tmp_path / "data")[0]["text"] for split in paths] == ["train", "validation"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_prepared_once_and_a_changed_file_is_another_dataset(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [{"text": "one"}])
    first = fingerprint(str(source), "train", tmp_path / "data", "document")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "write_builder", None)  # would fail if anything were written again
        assert open_source(str(source), "train", tmp_path / "data", "document")[0] == {"text": "one"}
    write(source, [{"text": "two"}])
    assert open_source(str(source), "train", tmp_path / "data", "document")[0] == {"text": "two"}
    assert fingerprint(str(source), "train", tmp_path / "data", "document") != first
    assert len(seen(tmp_path / "data")) == 2


def test_a_name_is_not_reused_for_other_files_or_another_kind(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "one", "prompt": "p"}])
    for _ in range(2):
        prepare_files({"train": source}, "document", "mine", tmp_path / "data")
    with pytest.raises(DataError, match="choose another name"):
        prepare_files({"train": source}, "prompt", "mine", tmp_path / "data")
    write(source, [{"text": "two"}])
    with pytest.raises(DataError, match="choose another name"):
        prepare_files({"train": source}, "document", "mine", tmp_path / "data")
    assert open_source("mine", "train", tmp_path / "data")[0]["text"] == "one"


@pytest.mark.parametrize(("name", "split"), [("Mine", "train"), ("../up", "train"), ("a", "all"), ("a", "x[:1]")])
def test_names_that_cannot_be_datasets(tmp_path, name, split):
    with pytest.raises(ConfigError, match="lower-case"):
        prepare_files({split: write(tmp_path / "a.jsonl", [{"text": "a"}])}, "document", name, tmp_path / "data")
    with pytest.raises(ConfigError, match="at least one split"):
        prepare_files({}, "document", "mine", tmp_path / "data")


def test_a_wrong_line_leaves_nothing_behind(tmp_path):
    good = write(tmp_path / "good.jsonl", [{"text": "a"}])
    bad = write(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": 1}])
    with pytest.raises(DataError, match=r"bad\.jsonl:2: text: expected a string"):
        prepare_files({"train": good, "validation": bad}, "document", "mine", tmp_path / "data")
    assert seen(tmp_path / "data") == []
    with pytest.raises(DataError, match=r"none\.jsonl: expected a readable"):
        open_source(str(tmp_path / "none.jsonl"), "train", tmp_path / "data", "document")


def test_any_exception_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupted(file, tally):
        yield {"text": "a"}
        raise KeyboardInterrupt

    monkeypatch.setattr(DataFile, "records", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_files({"train": write(tmp_path / "a.jsonl", [{"text": "a"}])}, "document", "mine", tmp_path / "data")
    assert seen(tmp_path / "data") == []


KILLED = """
import os, signal, sys
from rlhfjax.data import writing, preparing
def publish(stage, data_dir, datasets):  # everything is written, nothing is in place
    os.kill(os.getpid(), signal.SIGKILL)
preparing.publish = publish
preparing.prepare_files({"train": sys.argv[1]}, "document", "mine", sys.argv[2])
"""


def test_after_kill_9_nothing_looks_prepared_and_the_next_run_cleans_up(tmp_path):
    source, data_dir = write(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "data"
    done = subprocess.run([sys.executable, "-c", KILLED, source, data_dir], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert any(files for _, _, files in os.walk(next(data_dir.glob(".incomplete-*"))))
    with pytest.raises(DataError, match="nothing prepared there"):
        open_source("mine", "train", data_dir)
    prepare_files({"train": source}, "document", "mine", data_dir)
    assert seen(data_dir) == ["mine"]
    assert list(open_source("mine", "train", data_dir)) == [{"text": "a"}]


def test_one_writer_at_a_time(tmp_path):
    with writing.staging(tmp_path), (tmp_path / ".lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_another_process_prepared_while_this_one_waited_is_kept(tmp_path, monkeypatch):
    source, staging = write(tmp_path / "a.jsonl", [{"text": "a"}]), preparing.staging

    def late(data_dir):
        monkeypatch.setattr(preparing, "staging", staging)
        prepare_files({"train": source}, "document", "mine", data_dir)
        return staging(data_dir)

    monkeypatch.setattr(preparing, "staging", late)
    folder = prepare_files({"train": source}, "document", "mine", tmp_path / "data")
    assert list(open_source("mine", "train", tmp_path / "data")) == [{"text": "a"}]
    assert folder.is_dir()


QUIET = """
import sys
from rlhfjax.data.datasets import open_source
assert open_source(sys.argv[1], "train", sys.argv[2], "document")[0] == {"text": "a"}
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")])
"""


def test_no_tensorflow_no_output_and_two_writers_at_once(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "a"}])
    command = [sys.executable, "-W", "error", "-c", QUIET, str(source), str(tmp_path / "data")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.communicate() == ("[]\n", "")
        assert process.returncode == 0
    assert len(seen(tmp_path / "data")) == 1
