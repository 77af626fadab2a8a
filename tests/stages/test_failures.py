"""What is wrong with a run is said in one message with its exit code, before anything is trained or compiled."""

import json

import jax
import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from stages.conftest import rows_of
from stages.tiny_recipe import STAGES, write_jsonl


@pytest.fixture
def compiled():
    """Everything that is compiled while the test runs."""
    events = []

    def listen(event, seconds, **_):
        events.append(event) if event.endswith("backend_compile_duration") else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(config, tmp_path, compiled):
    """Runs the recipe with overrides, which must fail; the message."""

    def failing(code, *overrides, path=config, verb="run"):
        words = [verb, str(path), *overrides, *(["--run-dir", str(tmp_path / "run")] if verb == "run" else [])]
        result = CliRunner().invoke(app, words, prog_name="rlhfjax")
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        said, error, message = result.stderr.partition("error: ")
        assert error
        assert "error: " not in message
        assert 1 <= len(message.splitlines()) <= 2
        started = [line for line in said.splitlines() if line.endswith(": started")]
        assert started in ([], ["tokenizer: started"])
        assert compiled == []
        assert not any((tmp_path / "run" / stage).exists() for stage in STAGES[1:])
        if (tmp_path / "run" / "manifest.jsonl").exists():
            [line] = rows_of(tmp_path / "run" / "manifest.jsonl")
            assert (line["status"], line["exit_code"]) == ("failed", code)
            assert line["error"].partition(": ")[2] == message.rstrip()[:500]
        return message

    return failing


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.ppo.clip=0.2x", 'override stages.ppo.loss.clip: expected a number > 0, got "0.2x"'),
        (
            "stages.ppo.clpi=0.2",
            "stages.ppo.clpi: unknown key; did you mean stages.ppo.loss.clip or stages.ppo.value.clip?",
        ),
        ("stages.ppo.steps=two", 'stages.ppo.steps: expected a whole number >= 1, got "two"'),
        ("stages.ppo.steps=1.5", "stages.ppo.steps: expected a whole number >= 1, got 1.5"),
        ("stages.ppo.batch.minibatch=6", "batch.minibatch 6 must divide batch.size 16 (remainder 4)"),
        ("stages.pretrain.batch.size=12", "stages.pretrain.batch.size 12 must be a multiple of mesh.data x mesh.fsdp"),
        ("mesh.data=3", "fsdp 1 x sequence 1 x tensor 1 x expert 1 = 3, expected the number of devices, 8"),
        ("stages.sft.batch.length=99", "stages.sft.batch.length 99 is more than model.context 32"),
        ("stages.reward=null", "stages.ppo needs a reward model"),
        ("tokenizer.vocab_size=9000", "expected a vocab_size of at most "),
        ('stages.ppo.sampling.stop="the film"', "sampling.stop: expected text of one token, got 'the film'"),
        ('stages.evaluate.sampling.stop="very good"', "sampling.stop: expected text of one token, got 'very good'"),
    ],
)
def test_settings(refused, override, expected):
    more = ["stages.evaluate.comparisons=[]"] if override == "stages.reward=null" else []
    assert expected in refused(2, override, *more)


def test_a_warm_up_that_outlasts_the_epochs(refused):
    # 40 demonstrations packed into rows of 24 are few batches of 16. Fails where it is asked with `steps` alone: seen
    epochs = ["stages.sft.steps=null", "stages.sft.epochs=1"]
    message = refused(2, *epochs, "stages.sft.optimizer.warmup_steps=40")
    assert "stages.sft.optimizer.warmup_steps 40 is more than its " in message
    assert "updates; give fewer, or more epochs" in message


def test_a_key_given_twice(refused, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("name: one\nmodel: {layers: 1}\nname: two\n", encoding="utf-8")
    assert refused(2, path=path) == f"{path}:3: key name is given twice, first on line 1\n"


def test_a_checkpoint_with_another_tokenizer(refused, finished):
    model = f"model={json.dumps({'checkpoint': str(finished / 'sft')})}"
    message = refused(2, model, f"tokenizer={json.dumps({'path': str(finished / 'tokenizer')})}")
    assert "a model from a checkpoint brings its own; remove tokenizer.path and tokenizer.data" in message


def test_lengths_beyond_the_context_of_the_checkpoint(refused, finished):
    model = f"model={json.dumps({'checkpoint': str(finished / 'sft')})}"
    message = refused(2, model, "tokenizer={}", "stages.sft.batch.length=40")
    assert "stages.sft.batch.length 40 is more than the context 32 of model.checkpoint" in message


@pytest.mark.parametrize(
    "override", ["model={checkpoint: nowhere/run}", "stages.sft.reward_model=nowhere/run"], ids=["model", "reward"]
)
def test_a_checkpoint_that_is_not_there(refused, override):
    more = ["tokenizer={}"] if override.startswith("model") else ["stages.sft.select_by=reward_score"]
    assert "got nowhere/run, which is not there" in refused(2, override, *more)


def source(path, **more):
    return json.dumps([{"source": str(path), **more}])


def test_a_data_file_that_is_not_there(refused, tmp_path):
    message = refused(3, f"stages.sft.data={source(tmp_path / 'missing.jsonl')}")
    assert f"{tmp_path / 'missing.jsonl'}: expected a readable data file, got No such file or directory" in message


def test_a_split_that_is_not_there(refused, files):
    message = refused(3, f"stages.ppo.data={source(files / 'prompts.jsonl', split='test')}")
    assert "expected a split among train, got 'test'" in message


@pytest.mark.parametrize(
    ("stage", "line", "expected"),
    [
        ("pretrain", '{"text": 3}', ":2: text: expected a string, got a whole number"),
        ("pretrain", '{"text": "cut', ":2: expected JSON, got "),
        ("sft", '{"prompt": "a"}', ":2: completion: expected this field in a demonstration, got the fields prompt"),
        ("reward", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}', ":2: ranks: expected one rank for each"),
        ("ppo", '{"prompt": "  "}', ":2: prompt: expected text, got nothing but white space"),
        ("ppo", '{"messages": [{"role": "user", "content": ""}]}', ":2: messages: expected text in the last user"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(refused, files, tmp_path, stage, line, expected):
    names = {"pretrain": "documents", "sft": "demonstrations", "reward": "comparisons", "ppo": "prompts"}
    first = (files / f"{names[stage]}.jsonl").read_text(encoding="utf-8").splitlines()[0]
    path = tmp_path / "own.jsonl"
    path.write_text(f"{first}\n{line}\n", encoding="utf-8")
    assert f"{path}{expected}" in refused(3, f"stages.{stage}.data={source(path)}")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_what_is_too_long_is_named_by_its_row(refused, files, tmp_path, stage):
    name, long = {
        "sft": ("demonstrations", {"prompt": "a", "completion": " very" * 30}),
        "reward": ("comparisons", {"prompt": "a", "responses": [" b", " very" * 30], "ranks": [1, 2]}),
        "ppo": ("prompts", {"prompt": "very " * 30}),
    }[stage]
    short = {"prompt": "a", "completion": " b", "responses": [" b", " a"], "ranks": [1, 2]}
    kept = {key: short[key] for key in long}
    path = write_jsonl(tmp_path / f"{name}.jsonl", [kept] * 9 + [long] + [kept] * 5)
    more = ["stages.sft.select_by=last", "stages.sft.validation=[]"] if stage == "sft" else []
    message = refused(3, f"stages.{stage}.data={source(path)}", f"stages.{stage}.batch.overlong=error", *more)
    assert f"{path}@train row 9: expected at most {10 if stage == 'ppo' else 24} tokens, got " in message
    assert "(1 rows of 15 are too long)" in message


def test_too_many_candidates(refused):
    message = refused(3, "stages.reward.batch.candidates=3")
    assert "comparisons.jsonl@train row 2: expected at most 3 responses per comparison" in message
    assert "(batch.candidates), got 4" in message


def test_nothing_to_centre_the_scores_on(refused, tmp_path):
    path = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "completion": " very" * 30}])
    message = refused(3, f"stages.reward.normalize.data={source(path)}")
    assert f"{path}@train: expected demonstrations of at most 24 tokens, got none" in message


def test_text_from_a_run_that_is_not_there(tmp_path):
    for place in (tmp_path / "no_run", tmp_path):
        result = CliRunner().invoke(app, ["generate", str(place), "--prompt", "a"])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: checkpoint: ")
        assert str(place) in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_text_that_does_not_fit_the_context(finished):
    result = CliRunner().invoke(app, ["generate", str(finished), "--prompt", "a", "--max-new-tokens", "99"])
    assert result.exit_code == 2
    assert "expected at most 32 tokens (the model's context)" in result.stderr
