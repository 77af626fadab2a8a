"""The encoder–decoder through the whole recipe: it learns to reverse strings, is scored, trained by PPO, measured."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import rlhfjax
from rlhfjax.cli import app
from rlhfjax.config import check, load_config
from rlhfjax.errors import ConfigError
from rlhfjax.models import EncoderDecoder
from stages.conftest import rows_of
from stages.tiny_recipe import write_jsonl


def spaced(letters) -> str:
    return "".join(f" {letter}" for letter in letters)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Strings of one to four of four letters; every fifth is held out."""
    files = tmp_path_factory.mktemp("reversal")
    texts = [letters for length in (1, 2, 3, 4) for letters in itertools.product("abcd", repeat=length)]
    random.Random(0).shuffle(texts)
    held_out, trained = texts[::5], [text for i, text in enumerate(texts) if i % 5]

    def pair(text) -> dict:
        return {"prompt": spaced(text), "completion": spaced(text[::-1])}

    write_jsonl(files / "text.jsonl", ({"text": spaced(text)} for text in texts))
    write_jsonl(files / "trained.jsonl", map(pair, trained))
    write_jsonl(files / "held_out.jsonl", map(pair, held_out))
    write_jsonl(files / "prompts.jsonl", ({"prompt": spaced(text)} for text in texts))
    # Reversed is better than copied; a row with one more letter has another length.
    write_jsonl(
        files / "comparisons.jsonl",
        (
            {"prompt": spaced(text), "responses": [spaced(text[::-1]), spaced(text), spaced("a")], "ranks": [1, 2, 2]}
            for text in texts
            if len(text) > 1 and text != text[::-1]
        ),
    )

    def data(name: str) -> list[dict]:
        return [{"source": str(files / f"{name}.jsonl")}]

    rollouts = {"size": 17, "prompt_length": 6}
    few = {"steps": 2, "optimizer": {"lr": 1e-4}}
    settings = {
        "name": "reversal",
        "data_dir": str(files / "prepared"),
        "model": {"family": "transformer_2017", "layers": 1, "width": 32, "heads": 2, "mlp_width": 64, "context": 24},
        "tokenizer": {"vocab_size": 272, "data": data("text")},
        "stages": {
            "sft": {
                "data": data("trained"),
                "validation": data("held_out"),
                "steps": 600,
                "batch": {"size": 32, "length": 22},
                "optimizer": {"lr": 0.5, "schedule": "noam", "warmup_steps": 100, "b2": 0.98, "eps": 1e-9},
                "loss": {"label_smoothing": 0.1},
                "validate_every": 600,
            },
            "reward": {
                "data": data("comparisons"),
                "batch": {"size": 8, "length": 12, "candidates": 3},
                "normalize": {"data": data("trained"), "count": 32},
            } | few,
            "ppo": {
                "data": data("prompts"),
                "batch": {"size": 8, "minibatch": 4, "epochs": 1, "prompt_length": 6},
                "sampling": {"max_new_tokens": 6},
            } | few,
            "evaluate": {
                "data": data("prompts"),
                "samples": 68,
                "batch": rollouts,
                "sampling": {"max_new_tokens": 6},
                "comparisons": data("comparisons"),
                "exact_match": {"data": data("held_out")},
            },
        },
        "checkpoints": {"every": 600},
    }  # fmt: skip
    path = files / "reversal.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_dir(recipe, command, tmp_path_factory):
    """A run that has only begun to learn."""
    directory = tmp_path_factory.mktemp("runs") / "reversal"
    few = "stages.sft.steps=20", "stages.sft.validate_every=20", "stages.sft.optimizer.warmup_steps=10"
    code, _, err = command("run", recipe, *few, "--run-dir", directory)
    assert code == 0, err
    return directory


@pytest.fixture(scope="module")
def policy(run_dir):
    return rlhfjax.load(run_dir / "sft")


@pytest.mark.slow
def test_it_reverses_strings_that_it_never_saw(recipe, command, tmp_path):
    code, _, err = command("run", recipe, "--run-dir", tmp_path / "run")
    assert code == 0, err
    sft = tmp_path / "run" / "sft"
    found = json.loads((tmp_path / "run" / "evaluate" / "evaluation.json").read_text("utf-8"))["exact_match"]
    [share] = found["sft"].values()
    assert share >= 0.9
    rows = rows_of(sft / "metrics.jsonl")
    assert rows[-1]["loss/validation"] < 0.3 < 2.0 < rows[0]["loss/train"]
    policy = rlhfjax.load(sft)
    [best] = policy.beam_search([" a b c"], max_new_tokens=6)
    assert (best.text, best.finish_reason) == (" c b a", "stop")
    [[greedy]] = policy.generate([" a b c"], max_new_tokens=6, temperature=0)
    assert greedy.tokens == best.tokens
    np.testing.assert_allclose(greedy.log_probs, best.log_probs, atol=1e-4)
    assert policy.beam_search([" a b"], beams=400, max_new_tokens=4)[0].text == " b a"  # more than there are tokens
    code, out, err = invoked("generate", sft, "--prompt", " a d", "--max-new-tokens", 6, "--beams", 3)
    assert (code, out) == (0, " d a\n"), err


def test_how_many_it_reverses_is_in_evaluation_and_report(run_dir):
    found = json.loads((run_dir / "evaluate" / "evaluation.json").read_text("utf-8"))["exact_match"]
    assert set(found) == {"sft", "ppo"}
    assert "Exact match" in (run_dir / "report.html").read_text("utf-8")


def test_every_stage_measured_what_it_does(run_dir):
    rows = {stage: rows_of(run_dir / stage / "metrics.jsonl") for stage in ("sft", "reward", "ppo")}
    assert rows["sft"][-1]["loss/validation"] < rows["sft"][0]["loss/train"]
    assert 0 < rows["reward"][-1]["train/rm/loss"] < 2
    assert rows["ppo"][0]["policy/first_minibatch_ratio_err"] < 1e-5
    assert rows["ppo"][0]["rollout_vs_train/logp_absdiff_max"] < 1e-4
    assert rows["ppo"][0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows["ppo"][1]["objective/kl_k3"] > 0


def test_the_python_interface_takes_it(policy, run_dir):
    assert isinstance(policy.network, EncoderDecoder)
    assert policy.config.start_id == policy.tokenizer.bos_id
    [[greedy]] = policy.generate([" a b c"], max_new_tokens=6, temperature=0)
    assert len(greedy.tokens) == len(greedy.log_probs) <= 6
    scores = rlhfjax.load(run_dir / "reward").score([" a b", " a b"], [" b a", " a"])
    assert scores.shape == (2,)
    assert scores[0] != scores[1]
    with pytest.raises(ConfigError, match="expected a decoder"):
        policy.logits([[1, 2]])


def test_beam_search_says_what_it_expects(policy):
    assert policy.beam_search([]) == []
    with pytest.raises(ConfigError, match="beams >= 1"):
        policy.beam_search([" a"], beams=0)
    with pytest.raises(ConfigError, match="a tokenizer, which says what token ends"):
        replace(policy, tokenizer=None).beam_search([[1, 2]])
    assert len(policy.beam_search([" a b"], beams=400, max_new_tokens=4)) == 1  # more than there are tokens
    with pytest.raises(ConfigError, match="at most 24 tokens"):
        policy.beam_search([" a"], max_new_tokens=64)


def invoked(*words):
    """The command line in this process: (exit code, stdout, stderr)."""
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="rlhfjax")
    return result.exit_code, result.stdout, result.stderr


def test_the_command_line_searches(run_dir):
    sft = run_dir / "sft"
    words = ("generate", sft, "--prompt", " a d", "--max-new-tokens", 6)
    code, out, err = invoked(*words, "--beams", 3, "--length-penalty", 0.8)
    assert (code, out[-1]) == (0, "\n"), err
    assert "a search draws nothing" in invoked(*words, "--beams", 3, "--n", 2)[2]
    assert "expected --beams with it" in invoked(*words, "--length-penalty", 1)[2]


DOCUMENTS, ADAM = [{"source": "a.jsonl"}], {"lr": 1}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"stages.pretrain": {"data": DOCUMENTS, "steps": 1, "batch": {"size": 1, "length": 8}, "optimizer": ADAM}},
         "stages.pretrain reads documents"),
        ({"stages.sft.pretraining": {"data": DOCUMENTS}}, "stages.sft.pretraining reads documents"),
        ({"stages.sft.loss.train_on": "all"}, "an encoder–decoder writes one response"),
        ({"stages.ppo.ptx": {"coef": 1, "length": 8, "data": DOCUMENTS}}, "stages.ppo.ptx reads documents"),
        ({"stages.evaluate.losses": DOCUMENTS}, "stages.evaluate.losses reads documents"),
    ],
)  # fmt: skip
def test_what_needs_documents_is_refused(recipe, override, words):
    [(key, value)] = override.items()
    with pytest.raises(ConfigError, match=words):
        check(load_config(recipe, [f"{key}={json.dumps(value)}"]), 1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.kv_heads=1", "remove kv_heads and architecture"),
        ("model.architecture.norm=rms", "remove kv_heads and architecture"),
        ("stages.sft.optimizer.warmup_steps=0", "give warmup_steps above 0"),
        ("stages.sft.optimizer.final=0.2", "remove final and warmup_from"),
    ],
)
def test_settings_that_it_does_not_have_are_refused(recipe, override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(recipe, [override])


def test_a_recipe_from_its_checkpoint_is_refused_documents_too(recipe, run_dir, command, tmp_path):
    changes = [f"model={json.dumps({'checkpoint': str(run_dir / 'sft')})}", "tokenizer={}", "stages.reward=null"]
    changes += ["stages.sft=null", "stages.ppo=null", "stages.evaluate.comparisons=[]"]
    losses = f"stages.evaluate.losses={json.dumps([{'source': str(recipe.parent / 'text.jsonl')}])}"
    code, _, err = command("run", recipe, *changes, losses, "--run-dir", tmp_path / "run")
    assert code == 2
    assert "stages.evaluate.losses reads documents" in err
