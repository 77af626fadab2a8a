"""Directories that mean harm, or are broken: refused with a cause, in little memory, and nothing else is opened."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from interop.published import golden, publish, save, shard, tensors_of
from rlhfjax.cli import app

INDEX = "model.safetensors.index.json"
_opened: list[str] | None = None


def _hook(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_hook)  # hooks cannot be taken away again


@pytest.fixture
def opened():
    """The real paths of the files that are opened during a test."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes):
    return lambda directory, canary: edit(directory / "config.json", **changes)


def without_setting(directory, canary):
    described = json.loads((directory / "config.json").read_text())
    del described["n_embd"]
    (directory / "config.json").write_text(json.dumps(described))


def tensors(change):
    def damage(directory, canary):
        made = tensors_of(golden("gpt2")[1])
        change(made)
        save(directory / "model.safetensors", made)

    return damage


def header(text):
    return lambda directory, canary: (directory / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text
    )


def claims_a_terabyte(directory, canary):
    (directory / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def huge(name, size):
    def damage(directory, canary):
        with (directory / name).open("wb") as file:
            file.truncate(size)

    return damage


def pickled(name):
    class Harm:
        def __reduce__(self):
            return os.system, ("touch harm",)

    def damage(directory, canary):
        (directory / "model.safetensors").unlink()
        (directory / name).write_bytes(pickle.dumps(Harm()))

    return damage


def index_to(target):
    def damage(directory, canary):
        shard(directory)
        index = json.loads((directory / INDEX).read_text())
        first = min(index["weight_map"])
        index["weight_map"][first] = target.replace("CANARY", str(canary))
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def lost_shard(directory, canary):
    shard(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()


def not_in_its_shard(directory, canary):
    shard(directory)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["extra"] = "model-00001-of-00003.safetensors"
    (directory / INDEX).write_text(json.dumps(index))


def linked(name):
    def damage(directory, canary):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(canary)

    return damage


def replaced(name, text):
    return lambda directory, canary: (directory / name).write_text(text)


WEIGHT = "transformer.h.0.mlp.c_fc.weight"
CASES = {
    "code of its own": (config(auto_map={"AutoModel": "harm.Model"}), 2, "auto_map"),
    "unknown architecture": (config(architectures=["HarmForCausalLM"]), 2, "HarmForCausalLM"),
    "architectures no list": (config(architectures={"a": 1}), 2, "architectures"),
    "unknown setting": (config(harm_scale=3.0), 2, "harm_scale"),
    "missing setting": (without_setting, 2, "n_embd"),
    "negative size": (config(n_layer=-1), 2, "n_layer"),
    "size a text": (config(n_embd="32"), 2, "n_embd"),
    "more layers than files": (config(n_layer=10_000), 4, r"h\.2\.\S+'?, which no file has"),
    "billions of layers": (config(n_layer=2**31 - 1), 2, "n_layer from 1 to 10,000"),
    "wider than the files": (config(n_embd=2**20), 4, "as config.json says"),
    "no config": (lambda directory, canary: (directory / "config.json").unlink(), 2, "config.json, which is not there"),
    "config no JSON": (replaced("config.json", "{"), 4, "expected JSON"),
    "config nested": (replaced("config.json", "[" * 500_000), 4, "expected JSON"),
    "config a list": (replaced("config.json", "[]"), 4, "expected a JSON object"),
    "config of a gigabyte": (huge("config.json", 1 << 30), 4, "expected at most 1,048,576 bytes, got 1,073,741,824"),
    "header of a terabyte": (claims_a_terabyte, 4, "a header of 1,099,511,627,776 bytes"),
    "header no JSON": (header(b"harm" * 4), 4, "a header that is no JSON"),
    "empty weights": (huge("model.safetensors", 0), 4, "whole safetensors file"),
    "zeros of a gigabyte": (huge("model.safetensors", 1 << 30), 4, "whole safetensors file"),
    "missing tensor": (tensors(lambda made: made.pop(WEIGHT)), 4, f"{WEIGHT}', which no file has"),
    "extra tensor": (tensors(lambda made: made.update(harm=np.ones(1))), 4, "got 'harm' as well"),
    "wrong shape": (tensors(lambda made: made.update({WEIGHT: np.ones((1, 1), np.float32)})), 4, r"got \[1, 1\]"),
    "transposed": (tensors(lambda made: made.update({WEIGHT: made[WEIGHT].T.copy()})), 4, r"of shape \[32, 48\]"),
    "integers": (tensors(lambda made: made.update({WEIGHT: made[WEIGHT].astype(np.int32)})), 2, "got I32; convert"),
    "not a number": (tensors(lambda made: made[WEIGHT].fill(np.nan)), 4, f"{WEIGHT}' with numbers that are infinite"),
    "pytorch_model.bin": (pickled("pytorch_model.bin"), 2, "pytorch_model.bin: expected .* convert it to safetensors"),
    "model.pt": (pickled("model.pt"), 2, "model.pt: .* pickle"),
    "model.pkl": (pickled("model.pkl"), 2, "model.pkl: .* pickle"),
    "no weights": (lambda directory, canary: (directory / "model.safetensors").unlink(), 2, "got neither"),
    "index upwards": (index_to("../secret/canary.safetensors"), 4, "beside it, got '../secret"),
    "index absolute": (index_to("CANARY"), 4, "expected names of safetensors files beside it"),
    "index to a pickle": (index_to("pytorch_model.bin"), 4, "got 'pytorch_model.bin'"),
    "index with a null": (index_to("a\0.safetensors"), 4, "expected names of safetensors files"),
    "index with a long name": (index_to("a" * 5000 + ".safetensors"), 4, "expected names of safetensors files"),
    "lost shard": (lost_shard, 4, "the shard model-00002-of-00003.safetensors, which is not there"),
    "not in its shard": (not_in_its_shard, 4, "got 'extra' in the index alone"),
    "weights a link": (linked("model.safetensors"), 4, "a link out of it"),
    "tokenizer a link": (linked("tokenizer.json"), 4, "a link out of it"),
    "template a link": (linked("chat_template.jinja"), 4, "a link out of it"),
    "tokenizer no JSON": (replaced("tokenizer.json", "harm"), 4, "tokenizer.json: expected JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_its_cause(tmp_path, monkeypatch, opened, case):
    damage, code, cause = CASES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    canary = tmp_path / "secret" / "canary.safetensors"
    save(canary, {"secret": np.ones(3, np.float32)})
    before = canary.read_bytes()
    damage(publish(tmp_path / "published", "gpt2"), canary)
    opened.clear()
    result = CliRunner().invoke(app, ["import", "published", "made"])
    assert str(canary) not in opened
    assert not [path for path in opened if path.endswith((".bin", ".pt", ".pkl"))]
    assert result.exit_code == code, result.output
    assert result.output.startswith("error: ")
    assert len(result.output) < 700
    assert re.search(cause, result.output), result.output
    assert canary.read_bytes() == before
    assert sorted(os.listdir()) == ["published", "secret"]  # nothing half-written, and no harm done


def test_the_audit_sees_what_is_opened(tmp_path, opened):
    # otherwise no case above could fail for a canary that was read
    save(tmp_path / "file", {})
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "link").read_bytes()
    assert str(tmp_path / "file") in opened


DRIVER = """
import resource, sys
from typer.testing import CliRunner
from rlhfjax.cli import app
import rlhfjax.transfer, rlhfjax.interop.gguf, rlhfjax.interop.known
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    assert CliRunner().invoke(app, ["import", name, "made"]).exit_code == 4
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)
"""


def test_sizes_that_are_claimed_are_not_allocated(tmp_path):
    # in a process of its own, whose largest memory says something
    names = ("config of a gigabyte", "header of a terabyte", "zeros of a gigabyte", "more layers than files")
    for name in names:
        CASES[name][0](publish(tmp_path / name, "gpt2"), None)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *names],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64  # MB
