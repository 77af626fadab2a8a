"""metrics.jsonl and samples.jsonl: one row per step, also after an interruption."""

import json
import resource
import stat
import struct

import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from rlhfjax.errors import ConfigError
from rlhfjax.training.metrics import MetricsWriter, ProgressLine, labelled
from rlhfjax.training.sinks import Sink


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def strict_rows(path):
    """Rows as a reader sees them that knows the standard alone."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("tensorboard", [True, False])
def test_one_object_a_step(tmp_path, tensorboard):
    writer = MetricsWriter(tmp_path / "ppo", 0, tensorboard)
    assert writer.write(1, {"lr": 0.5, "objective/kl": jnp.float32(0.25)}) == {"lr": 0.5, "objective/kl": 0.25}
    writer.write(2, {"lr": jnp.int32(3)})
    writer.write_samples(2, [{"prompt": "é", "score": 1.5}, {"prompt": "b", "score": -1.0}])
    writer.close()
    assert rows(tmp_path / "ppo" / "metrics.jsonl") == [
        {"step": 1, "lr": 0.5, "objective/kl": 0.25},
        {"step": 2, "lr": 3.0},
    ]
    samples = tmp_path / "ppo" / "samples.jsonl"
    assert [row["prompt"] for row in rows(samples)] == ["é", "b"]
    assert "é" in samples.read_text(encoding="utf-8")
    assert (tmp_path / "ppo" / "tensorboard").exists() == tensorboard


def test_a_row_is_there_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(1, {"lr": 0.5})
    assert len(rows(tmp_path / "metrics.jsonl")) == 1
    writer.close()


def test_what_was_written_after_the_checkpoint_is_dropped(tmp_path):
    # meant to catch steps that appear twice after a restart, and a torn line that stays
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        writer.write(step, {"lr": step})
        writer.write_samples(step, [{"score": step}])
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "l')
    again = MetricsWriter(tmp_path, 3, tensorboard=False)
    assert again.latest == {"lr": 3}  # of the rows before, as if it had never stopped
    again.write(4, {"lr": -4})
    assert again.latest == {"lr": -4}
    again.close()
    assert [(row["step"], row["lr"]) for row in rows(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, -4)]
    assert [row["score"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_a_text_with_other_line_ends_stays_one_row(tmp_path):
    # fails when lines are cut with splitlines: seen (the row was dropped on resuming)
    text = "a\u2028b\u0085c\x0bd"
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write_samples(1, [{"response": text}])
    writer.close()
    MetricsWriter(tmp_path, 1, tensorboard=False, report=lambda _: None).close()
    [row] = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").split("\n") if line]
    assert row["response"] == text


def test_a_number_that_is_not_finite_is_a_word_in_json(tmp_path):
    # fails with what Python writes by itself, which jq, JavaScript and databases refuse: seen
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    writer.write(1, {"grad/norm": jnp.float32(jnp.nan), "loss/total": -jnp.inf, "lr": 0.5})
    writer.write_samples(1, [{"score": float("inf"), "prompt": "Infinity"}])
    writer.close()
    [row] = strict_rows(tmp_path / "metrics.jsonl")
    assert row == {"step": 1, "grad/norm": "NaN", "loss/total": "-Infinity", "lr": 0.5}
    assert strict_rows(tmp_path / "samples.jsonl") == [{"step": 1, "score": "Infinity", "prompt": "Infinity"}]


def test_words_are_numbers_again_in_a_run_that_continues(tmp_path):
    # and rows of older versions become JSON
    old = '{"step": 1, "loss/total": NaN, "lr": 0.5}\n{"step": 2, "loss/total": "-Infinity"}\n'
    (tmp_path / "metrics.jsonl").write_text(old, encoding="utf-8")
    writer = MetricsWriter(tmp_path, 2, tensorboard=False)
    writer.close()
    assert writer.latest == {"loss/total": -jnp.inf, "lr": 0.5}
    wanted = [{"step": 1, "loss/total": "NaN", "lr": 0.5}, {"step": 2, "loss/total": "-Infinity"}]
    assert strict_rows(tmp_path / "metrics.jsonl") == wanted


def test_steps_that_an_earlier_run_did_not_write_are_said(tmp_path):
    writer = MetricsWriter(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 5):
        writer.write(step, {"lr": step})
    writer.close()
    said = []
    MetricsWriter(tmp_path, 5, tensorboard=False, report=said.append).close()
    assert said == [f"{tmp_path / 'metrics.jsonl'} lacks 2 steps of the 5 before, the first is 3"]


# A disk that is full -------------------------------------------------------------------------------------------------


@pytest.fixture
def largest():
    """Sets the size that no file may grow beyond, as a full disk would; None takes the limit away."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[1] if size is None else size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensorboard", [True, False])
def test_rows_that_do_not_fit_are_written_when_there_is_room(tmp_path, largest, tensorboard):
    # fails when a part of a row stays (a torn line), and when the waiting rows are dropped: both seen
    said = []
    writer = MetricsWriter(tmp_path, 0, tensorboard, report=said.append)
    writer.write(1, {"lr": 0.5})
    largest((tmp_path / "metrics.jsonl").stat().st_size + 5)
    for step in (2, 3):
        assert writer.write(step, {"lr": 0.5}) == {"lr": 0.5}
        writer.write_samples(step, [{"prompt": "long" * 40}])
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
    assert writer.gaps() == {"rows_not_written": {"metrics.jsonl": 2, "samples.jsonl": 2}}
    largest(None)
    writer.write(4, {"lr": 0.5})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert writer.gaps() == {}
    writer.close()
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [2, 3]
    about = [text.removeprefix(str(tmp_path)) for text in said if "metrics.jsonl" in text]
    assert about == [
        "/metrics.jsonl cannot be written: File too large; its rows are kept and tried again",
        "/metrics.jsonl can be written again; no row is missing",
    ]
    if tensorboard:
        assert [event.step for event in events(tmp_path)[2:]] == [1, 2, 3, 4]


def test_what_is_never_written_is_counted_at_the_end(tmp_path, largest):
    said = []
    sink = Sink(tmp_path / "rows", said.append)
    largest(10)
    for _ in range(3):
        sink.append(b"a row of 20 letters\n")
    sink.close()
    assert said[1:] == [f"{tmp_path / 'rows'}: the last 3 rows could not be written and are lost"]
    assert (tmp_path / "rows").read_bytes() == b""


def test_files_that_cannot_be_written_to_begin_with_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        MetricsWriter(tmp_path, 0, tensorboard=False)


# TensorBoard ---------------------------------------------------------------------------------------------------------


def crc32c(data):
    """CRC-32C bit by bit (Castagnoli polynomial, reflected), masked as event files want it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder):
    """The events of all files in DIRECTORY/tensorboard, their checksums compared."""
    found = []
    for path in sorted((folder / "tensorboard").glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,), start = struct.unpack("<Q", data[:8]), 12
            assert struct.unpack("<I", data[8:12]) == (crc32c(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (crc32c(data[start : start + length]),)
            found.append(Event.FromString(data[start : start + length]))
            data = data[16 + length :]
    return found


def test_event_files_hold_a_step_as_soon_as_it_is_written(tmp_path):
    # with tensorboardX's own writer a killed process lost up to two minutes of them
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"lr": 0.5, "objective/kl": 0.25})
    [version, begin, event] = events(tmp_path)
    assert (version.file_version, begin.session_log.status, begin.step) == ("brain.Event:2", 1, 1)
    assert {value.tag: value.simple_value for value in event.summary.value} == {"lr": 0.5, "objective/kl": 0.25}
    assert event.step == 1
    writer.close()


def test_a_run_that_continues_hides_what_comes_after_its_checkpoint_and_nothing_before(tmp_path):
    # TensorBoard drops events of earlier files from the step of a START on; fails when that is the saved step: seen
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"lr": step})
    writer.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    path.rename(path.with_name("events.out.tfevents.0"))  # sorts before the next one
    again = MetricsWriter(tmp_path, 2)
    again.write(3, {"lr": 30})
    again.close()
    [start] = [event.step for event in events(tmp_path)[5:] if event.session_log.status]
    before = [event.step for event in events(tmp_path)[2:5]]
    assert [step for step in before if step < start] == [1, 2]


def test_prompts_are_private(tmp_path):
    MetricsWriter(tmp_path, 0, tensorboard=False).close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys):
    line = ProgressLine("ppo", 0, 2)
    line.show(1, {"kl": 0.1})
    line.show(2, {"kl": 0.123456})
    line.close()
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1
    assert "step 2/2" in shown[0]
    assert "kl 0.123" in shown[0]


def test_two_metrics_with_one_last_name_are_told_apart():
    # fails where the accuracy of an old validation hides that of the step: seen
    row = {"train/rm/loss": 0.6, "train/rm/accuracy": 0.75, "eval/rm/accuracy": 0.87, "perf/mfu": 0.4, "lr": 1e-3}
    names = ("train/rm/loss", "train/rm/accuracy", "eval/rm/accuracy", "perf/mfu")
    first = {"loss": 0.6, "train/rm/accuracy": 0.75, "mfu": 0.4}
    assert labelled(row, names) == first | {"eval/rm/accuracy": 0.87}
    assert labelled({name: value for name, value in row.items() if not name.startswith("eval")}, names) == first
