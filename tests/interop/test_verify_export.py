"""A damaged export is refused, and what is wrong with it named, by the command line and by the file that is in it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file
from tiny import params_of
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.interop.exporting import export_model
from rlhfjax.models import LanguageModel, decoder_config
from rlhfjax.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Several files of weights, with a tokenizer that has a chat template."""
    sizes = {"vocab_size": 300, "layers": 2, "width": 32, "heads": 4, "context": 32}
    model, tokenizer = (
        LanguageModel(decoder_config("llama", **sizes)),
        Tokenizer.train(["a good movie, a bad one"], 300),
    )
    target = tmp_path_factory.mktemp("exports") / "made"
    export_model(target, "policy", model, params_of(model), tokenizer, shard_size=60_000)
    return target


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def verified(directory):
    """Exit codes and words of both; the file in the directory runs without a single installed package."""
    ours = CliRunner().invoke(app, ["verify-export", str(directory)])
    script = [sys.executable, "-I", "-S", "-W", "error", str(directory / "verify.py")]
    theirs = subprocess.run(script, capture_output=True, text=True, check=False)
    return (ours.exit_code, ours.output), (theirs.returncode, theirs.stdout + theirs.stderr)


def shards(directory):
    return sorted(directory.glob("*.safetensors"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit(path, change):
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def swap_entries(index):
    placed = index["weight_map"]
    first, second = "model.embed_tokens.weight", "model.norm.weight"
    placed[first], placed[second] = placed[second], placed[first]


def swap_tensors(directory):
    """Two tensors of one shape change places, in a file that is as good as before."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    [path] = {path for path in shards(directory) if names[0] in load_file(path)}
    held = load_file(path)
    held[names[0]], held[names[1]] = held[names[1]], held[names[0]]
    save_file(held, path, metadata={"format": "pt"})


def other_tokenizer(directory):
    edit(directory / "tokenizer.json", lambda held: held["model"]["merges"].pop())


DAMAGES = {
    "a bit of a tensor": (lambda d: flip(shards(d)[0], -1), "00001-of-00003.safetensors: tensor model."),
    "a bit of a header": (lambda d: flip(shards(d)[1], 30), "model-00002-of-00003.safetensors: its header differs"),
    "a shard": (lambda d: shards(d)[2].unlink(), "model-00003-of-00003.safetensors: is missing"),
    "half a shard": (lambda d: shards(d)[2].write_bytes(shards(d)[2].read_bytes()[:-9]), "tensor model.norm.weight"),
    "tensors": (swap_tensors, "tensor model.layers.1.mlp.up_proj.weight"),
    "the template": (lambda d: (d / "chat_template.jinja").write_text("{{ x }}"), "chat_template.jinja: differs"),
    "the index": (lambda d: edit(d / INDEX, swap_entries), f"{INDEX}: expected tensor model.embed_tokens.weight in"),
    "the tokenizer": (other_tokenizer, "tokenizer.json: differs"),
    "where a text ends": (
        lambda d: edit(d / "generation_config.json", lambda held: held.update(eos_token_id=7)),
        "generation_config.json: differs",
    ),
    "the configuration": (
        lambda d: edit(d / "config.json", lambda held: held.update(rms_norm_eps=1.0)),
        "config.json: differs",
    ),
    "a file more": (lambda d: (d / "added_tokens.json").write_text("{}"), "added_tokens.json: does not belong there"),
    "the certificate": (
        lambda d: edit(d / "parity.json", lambda held: held.update(max_abs_logit_difference=0.5)),
        "parity.json: was changed",
    ),
}


def test_what_was_exported_is_found_whole_and_cards_are_free(copy):
    (copy / "README.md").write_text("a card of somebody else")
    (copy / "LICENSE").write_text("do as you like")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    for code, said in verified(copy):
        assert code == 0, said
        assert "20 tensors" in said
        assert "all as exported; SHA-256 of the certificate: " in said


@pytest.mark.parametrize("what", DAMAGES)
def test_both_name_what_differs(copy, what):
    damage, named = DAMAGES[what]
    damage(copy)
    for code, said in verified(copy):
        assert code == 4, said
        assert named in said
        assert "Traceback" not in said


def test_a_directory_that_is_no_export_is_a_mistake(copy):
    (copy / "parity.json").unlink()
    for code, said in verified(copy):
        assert code == 2
        assert "parity.json" in said


def test_the_certificate_is_of_bytes_as_another_library_reads_them(exported):
    import hashlib

    held = json.loads((exported / "parity.json").read_text())
    found = {name: array for path in shards(exported) for name, array in load_file(path).items()}
    assert found.keys() == held["tensors"].keys()
    for name, array in found.items():
        assert hashlib.sha256(array.tobytes()).hexdigest() == held["tensors"][name]["sha256"]
    assert jax.tree.leaves(held["headers"]) != []
