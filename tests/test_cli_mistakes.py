"""Whatever is typed after a verb: a documented exit code, one or two lines, and no traceback."""

import json

import jax.numpy as jnp
import pytest
from stages.tiny_recipe import write_files, write_recipe
from tiny import params_of, tiny
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import Checkpoints, meta_of

DOCUMENTED = {0, 2, 3, 4, 42}
NETWORK = tiny("llama-gqa", vocab_size=300, context=40)
HUGE = "99999999999999999999"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, a recipe with its files, and what people give by mistake: nothing, a text, bytes, a folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    made = Checkpoints(folder / "sft" / "checkpoints", keep=1)
    tokenizer = Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, 300)
    made.save(2, {"policy": params_of(NETWORK, std=0.2)}, (jnp.int32(2),), meta_of("policy", NETWORK, tokenizer))
    made.close()
    (folder / "sft" / "complete.json").write_text(json.dumps({"step": 2}))
    write_recipe(write_files(folder) / "tiny.yaml", folder)
    (folder / "empty").mkdir()
    (folder / "no bytes").write_bytes(b"")
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "text.yaml").write_text("Grüße\n", encoding="utf-8")
    (folder / "list.json").write_text("[1, 2]\n", encoding="utf-8")
    (folder / "ü🙂.jsonl").write_text('{"text": "ü🙂"}\n', encoding="utf-8")
    return folder


GIVEN = [
    "",
    "nothing",
    "empty",
    "no bytes",
    "bytes",
    "text.yaml",
    "list.json",
    "ü🙂.jsonl",
    "~nobody-at-all/x",
    "a\udcffb",
]
ONE_ARGUMENT = ["run", "validate", "show", "verify", "reproduce", "data inspect", "data prepare"]
LINES = [
    *([*verb.split(), given] for verb in ONE_ARGUMENT for given in GIVEN),
    *(["generate", given, "--prompt", "the"] for given in GIVEN),
    *(["export", given, "out"] for given in GIVEN),
    *(["import", given, "out"] for given in GIVEN),
    *(["cp", given, "copy.yaml"] for given in GIVEN),
    *(["data", "prepare", "o", "--kind", "prompt", "--split", f"train={given}", "--data-dir", "d"] for given in GIVEN),
    *(["data", "inspect", given, "--kind", "document", "--data-dir", "d"] for given in GIVEN),
    ["cp", "quickstart", "nothing/there/copy.yaml"],
    ["cp", "quickstart", "no bytes"],
    ["verify", "sft", "nothing"],
    ["reproduce", "sft", "--run-dir", "no bytes", "--only-check"],
    ["run", "tiny.yaml", "--only", "ü"],
    ["run", "tiny.yaml", "--from", ""],
    ["run", "tiny.yaml", "--run-dir", ""],
    ["run", "tiny.yaml", "--run-dir", "bytes"],
    ["run", "tiny.yaml", "--run-dir", "bytes/below"],
    ["run", "tiny.yaml", "--coordinator", "ü:x", "--num-processes", "2", "--process-id", "0"],
    ["run", "tiny.yaml", "--process-id", "5", "--num-processes", "2", "--coordinator", "127.0.0.1:1"],
    *(["validate", "tiny.yaml", override] for override in
      ("=", "seed", "seed=", f"seed={HUGE}", "seed=-1", "seed=1e400", "stages.ppo=3", "stages.9.x=1", "mesh.data=0",
       f"mesh.fsdp={HUGE}", "name=ü", "model.layers=true", "stages.sft.data=[]", "stages.sft.data.0.source=3",
       "stages.ppo.sampling.temperature=.nan", "a.b.c.d.e=1", "model={checkpoint: nothing}", "x\udcff=1",
       f"model.layers={HUGE}", "stages.ppo.kl.horizon=1e-300", "stages.ppo.batch.size=1")),
    ["validate", "tiny.yaml", "--devices", HUGE],
    ["data", "inspect", "tiny.yaml", "sft", "--run-dir", "nothing"],
    ["data", "inspect", "tiny.yaml", "ü"],
    ["data", "inspect", "tiny.yaml", "sft", "--data-dir", "d"],
    ["data", "inspect", "documents.jsonl@train[9999999:]", "--kind", "document", "--data-dir", "d"],
    ["data", "inspect", "documents.jsonl@train[:x]", "--kind", "document", "--data-dir", "d"],
    ["data", "inspect", "documents.jsonl@ü", "--kind", "document", "--data-dir", "d"],
    ["data", "inspect", "documents.jsonl", "--kind", "ü", "--data-dir", "d"],
    ["data", "inspect", "documents.jsonl", "--kind", "document", "--data-dir", "bytes"],
    ["data", "inspect", "documents.jsonl", "--kind", "document", "--data-dir", "d", "--index", HUGE],
    ["data", "prepare", "../out", "--kind", "document", "--split", "train=documents.jsonl", "--data-dir", "d"],
    ["data", "prepare", "own", "--kind", "document", "--split", "ü", "--data-dir", "d"],
    ["data", "prepare", "own", "--kind", "document", "--split", "a/b=documents.jsonl", "--data-dir", "d"],
    ["data", "prepare", "own", "--kind", "document", "--split", "train=documents.jsonl", "--data-dir", "bytes"],
    *(["generate", "sft", "--prompt", "the", *more.split()] for more in
      (f"--seed {HUGE}", "--seed 4294967296", "--seed -1", "--seed x", f"--n {HUGE}", f"--max-new-tokens {HUGE}",
       "--temperature nan", "--temperature inf", "--temperature 1e-50 --max-new-tokens 2", "--top-p 0", "--top-p nan",
       f"--top-k {HUGE} --max-new-tokens 2", "--min-p nan", f"--speculate {HUGE}", f"--beams {HUGE}",
       "--beams 2 --length-penalty nan", "--beams 2 --length-penalty 1e300 --max-new-tokens 2")),
    ["generate", "sft", "--prompt", "", "--max-new-tokens", "2"],
    ["generate", "sft", "--prompt", "a\udcffb", "--max-new-tokens", "2"],
    ["generate", "sft", "--prompt", "the " * 99],
    ["export", "sft", ""],
    ["import", "empty", ""],
    ["verify", "nothing", "--data-dir", ""],
    ["export", "sft", "bytes"],
    ["export", "sft", "bytes/below"],
    ["export", "sft", "bytes/below.gguf"],
    ["export", "sft", "out.gguf", "--quantize", "ü"],
    ["export", "sft", "out.gguf", "--dtype", "bfloat16"],
    ["export", "sft", "out.gguf", "--adapters"],
    ["export", "sft", "out", "--quantize", "q8_0"],
    ["export", "sft", "out", "--item", "ü"],
    ["export", "sft", "out", "--dtype", "ü"],
    *(["export", "sft", "out", "--shard-size", size] for size in ("", "0", "-1GB", "5XB", "nan", "1e400GB")),
    ["export", "sft", "out", "--adapters"],
    ["export", "sft", "out", "--adapters", "--dtype", "bfloat16"],
    ["import", "empty", "out", "--dtype", "ü"],
    ["import", "empty", "bytes"],
    ["launch", "local", "-n", "0", "--", "env"],
    ["launch", "local", "-n", "x", "--", "env"],
    [], ["ü"], ["data"], ["data", "ü"], ["launch"], ["run"], ["generate", "sft"], ["ls", "x"], ["--ü"],
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line).encode("ascii", "backslashreplace").decode())
def test_a_mistake_ends_in_a_line(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    made = CliRunner().invoke(app, line)
    said = made.output
    assert made.exit_code in DOCUMENTED, (said, made.exception)
    assert "Traceback" not in said
    assert made.exit_code == 0 or "error: " in said or "Usage: " in said
