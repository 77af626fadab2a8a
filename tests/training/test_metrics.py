"""metrics.jsonl and samples.jsonl: one row a step, also after an interruption."""

import json
import stat

import jax.numpy as jnp
import pytest

from rlhfjax.training.metrics import MetricsWriter, ProgressLine


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


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
    again.write(4, {"lr": -4})
    again.close()
    assert [(row["step"], row["lr"]) for row in rows(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 2), (3, 3), (4, -4)]
    assert [row["score"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 3]


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
