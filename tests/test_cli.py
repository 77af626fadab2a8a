"""Every verb: what it calls, what it prints, its exit codes, and its help. What trains or generates is replaced."""

import contextlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import rlhfjax
from rlhfjax.cli import app
from rlhfjax.cli.launching import _SEVERAL, one_of_several
from rlhfjax.config import load_config, resolved_yaml
from rlhfjax.errors import ConfigError, DataError, IntegrityError, Stopped
from rlhfjax.host.goodput import Account
from rlhfjax.integrity import Checked
from rlhfjax.training.metrics_catalogue import METRICS

PYTHON = [sys.executable, "-m", "rlhfjax.cli"]


class Completion(NamedTuple):
    text: str
    tokens: list
    log_probs: list
    finish_reason: str


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """Replaces everything that trains, generates or downloads; holds what it was called with."""
    made = []

    def module(name, **functions):
        fake = types.ModuleType(f"rlhfjax.{name}")
        for key, function in functions.items():
            setattr(fake, key, function)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        parent = fake.__name__.rpartition(".")[0]
        if parent in sys.modules:
            monkeypatch.setattr(sys.modules[parent], name.split(".")[-1], fake, raising=False)

    def record(name, result=None):
        def function(*args, **kwargs):
            made.append((name, args, kwargs))
            return result(*args, **kwargs) if callable(result) else result

        return function

    class Model:
        generate = staticmethod(
            record(
                "generate",
                lambda prompts, n, **_: [[Completion(f"a{i}", [], [], "eos") for i in range(n)]] * len(prompts),
            )
        )
        score = staticmethod(record("score", lambda prompts, responses: [0.25] * len(responses)))
        tokenizer = None

    rows = ["tokens \x1b[31mred\x1b[0m", "mask"]
    transfer = types.SimpleNamespace(
        import_model=record("import_model"),
        export_checkpoint=record("export_checkpoint", {"max_abs_logit_difference": 0.25}),
        export_gguf=record("export_gguf", {"max_abs_logit_difference": 0.25}),
        parse_size=len,
    )
    made_here = {"run_recipe": record("run_recipe"), "inspect_batch": record("inspect_batch", rows)}
    module("runs", **made_here)
    module("transfer", **vars(transfer))
    run = types.SimpleNamespace(reliability=types.SimpleNamespace(determinism="fast"))
    again = {"finished": lambda run_dir: (run, []), "require_new": lambda target: None}
    module("runs.reproduce", reproduce=record("reproduce"), **again)
    module("runs.layouts", launched_here=lambda run_dir, attempts: None)
    module("host.compile_cache", use_compile_cache=lambda *_, **__: False)
    module("host.memory", collect_seldom=lambda **_: False, keep_freed_memory_of=lambda *_, **__: False)
    plan = {"name": "quickstart", "topology": "cpu:2", "devices": 2, "hosts": 1, "chip": {"memory": 2**30}, "steps": {}}
    plan |= {"fits": True, "warnings": [], "reasons": [], "remedies": []}
    monkeypatch.setattr("rlhfjax.planning.answer.asked", record("asked", "QUESTION"))
    monkeypatch.setattr("rlhfjax.planning.answer.kept", record("kept", plan))
    module("data.sets.benchmark", prepare=record("prepare", lambda kind, where, cache, say: [Path(where) / kind.name]))
    for name in ("movies", "chitchat", "reversal", "arithmetic"):
        module(f"data.sets.{name}", **{name.title(): types.SimpleNamespace(name=name)})
    module(
        "data.preparing",
        prepare_files=record("prepare_files", "made/it"),
        what_was_made=lambda *_: ["9 in \x1b[1mtrain"],
    )

    module("data.tokens.plan", Rows=record("Rows", "ROWS"), kind_of=lambda *_: "document")
    prepared = {"prepare_tokens": record("prepare_tokens", "made/rows"), "what_was_made": lambda *_: ["9 rows"]}
    module("data.tokens.preparing", **prepared)
    monkeypatch.setattr("rlhfjax.cli.tokenising._tokenizer", lambda options: "TOKENIZER")
    monkeypatch.setattr("rlhfjax.cli.datasets.show_rows", lambda *_: False)

    class Records(list):
        kind, notes = "prompt", ["train: a.json: layout \x1b[1malpaca"]

    records = Records({"prompt": f"p{i}", "text": "\x1b]0;title\x07x"} for i in range(9))
    module("data.datasets", open_source=record("open_source", records), default_data_dir=lambda: "DEFAULT")
    module("api.dialogue", Dialogue=record("dialogue", types.SimpleNamespace(system=None)))
    hall, server = types.SimpleNamespace(), types.SimpleNamespace(run=record("serve"))
    running = {
        "named": dict.fromkeys,
        "access_of": lambda *_: None,
        "listen": lambda *_: types.SimpleNamespace(getsockname=lambda: ("", 0)),
    }
    running |= {"opened": lambda *_: contextlib.nullcontext(hall), "server_of": lambda *_: server}
    module("serving.running", **running)
    module("serving.limits", Limits=record("Limits"))
    module("serving.replacing", Replacing=lambda *_: types.SimpleNamespace(start=lambda every: None))
    rehearsed = {"well": True, "faults": []}
    played = {"Wanted": record("Wanted"), "family_of": lambda run: "llama", "table": lambda result: ""}
    module("rehearsal.playing", rehearse=record("rehearse", rehearsed), **played)
    module("runs.doctor", examine=record("examine", 0))
    module("host.environment", environment_report=record("environment_report", "python  3"))
    monkeypatch.setattr(rlhfjax, "load", record("load", Model()), raising=False)
    monkeypatch.setattr("rlhfjax.cli.launching.supervise", record("supervise", 0))
    monkeypatch.setattr("rlhfjax.cli.reproducing.supervise", record("supervise", 0))
    monkeypatch.setattr("rlhfjax.cli.checking._directories", lambda *_: iter([Path("somewhere")]))
    monkeypatch.setattr("rlhfjax.cli.checking.check", record("check", Checked(2, 3, ())))
    monkeypatch.setattr("rlhfjax.interop.verify_export.check", record("check_export", ([], "9 tensors")))
    return made


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="rlhfjax")


def error(*args, code=2):
    result = call(*args)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def verbs():
    def walk(command, names):
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*names, name])
        if not hasattr(command, "commands"):
            yield names, command

    return list(walk(typer.main.get_command(app), []))


def examples():
    for names, command in verbs():
        lines = [line.strip() for line in inspect.cleandoc(command.help).splitlines()]
        for line in lines:
            if line.startswith("rlhfjax "):
                yield pytest.param(names, line, id=line)


def test_the_verbs_are_these():
    assert {" ".join(names) for names, _ in verbs()} == {
        "run", "ls", "cp", "show", "validate", "schema", "generate", "import", "export", "env", "metrics", "score",
        "data prepare", "data inspect", "launch local", "launch render", "verify", "verify-export", "reproduce",
        "goodput", "doctor", "plan", "chat", "serve", "rehearse", "moderate",
    }  # fmt: skip


@pytest.mark.parametrize("names", [names for names, _ in verbs()], ids=" ".join)
def test_every_help_shows_an_example(names):
    result = call(*names, "--help")
    assert result.exit_code == 0
    assert f"\n    rlhfjax {' '.join(names)}" in result.stdout


@pytest.mark.parametrize(("names", "line"), list(examples()))
def test_every_example_runs(names, line, calls, monkeypatch, tmp_path):
    monkeypatch.setattr("rlhfjax.cli.asking._encoded", lambda model, record, where: ([1], [[2]]))
    monkeypatch.setattr("rlhfjax.host.goodput.account_of", lambda run_dir: Account())
    monkeypatch.chdir(tmp_path)  # where `plan --json` writes
    words = shlex.split(line.split(" > ")[0])[1:]
    assert words[: len(names)] == names
    result = call(*words)
    assert result.exit_code == 0, result.output


def test_version():
    assert call("--version").stdout == "rlhfjax 0.1.0\n"


def test_run_hands_over(calls, tmp_path):
    assert call("run", "quickstart", "stages.ppo.steps=3", "--run-dir", "x", "--only", "sft", "seed=4").exit_code == 0
    [(name, (run, run_dir, only, start_from, sources), _)] = calls
    assert (name, str(run_dir), only, start_from) == ("run_recipe", "x", "sft", None)
    assert (run.stages.ppo.steps, run.seed) == (3, 4)
    assert sources["seed"] == "override seed=4"


def test_run_has_a_directory_by_default(calls):
    assert call("run", "quickstart", "name=other", "--from", "reward").exit_code == 0
    assert str(calls[0][1][1]) == os.path.join("runs", "other")
    assert calls[0][1][2:4] == (None, "reward")


def test_launch_hands_over_what_follows(calls, tmp_path):
    words = ["run", "quickstart", "seed=4", "--run-dir", str(tmp_path)]
    assert call("launch", "local", "-n", 3, "--devices-per-process", 2, "--grace", 5, "--", *words).exit_code == 0
    [(name, (arguments, count, devices, restarts, grace, _), _)] = calls
    assert (name, arguments, count, devices, grace) == ("supervise", words, 3, 2, 5.0)
    assert (restarts.preempted, restarts.failed, restarts.run_dir) == (100, 3, tmp_path)


def test_run_refuses_before_anything_starts(calls):
    assert "expected a stage of quickstart: tokenizer, pretrain, sft" in error("run", "quickstart", "--only", "rm")
    assert "--from ppo: expected a stage" in error("run", "quickstart", "stages.ppo=null", "--from", "ppo")
    assert "give one of them" in error("run", "quickstart", "--only", "sft", "--from", "sft")
    assert "did you mean quickstart?" in error("run", "quickstrat")
    assert "override 'steps': expected dotted.key=value, such as " in error("run", "quickstart", "steps")
    assert "stages.ppo.stpes: unknown key; did you mean stages.ppo.steps?" in error(
        "run", "quickstart", "stages.ppo.stpes=1"
    )
    assert calls == []


@pytest.mark.parametrize(
    ("exception", "code"),
    [(ConfigError("bad"), 2), (DataError("bad"), 3), (IntegrityError("bad"), 4), (Stopped("bad"), 42)],
)
def test_expected_errors_have_their_codes(exception, code, calls, monkeypatch):
    def fail(*_):
        raise exception

    monkeypatch.setattr(sys.modules["rlhfjax.runs"], "run_recipe", fail)
    result = call("run", "quickstart")
    assert (result.exit_code, result.stderr, result.stdout) == (code, "error: bad\n", "")


def test_errors_cannot_steer_the_terminal(calls, monkeypatch):
    def fail(*_):
        raise DataError("row \x1b]0;owned\x07 \x1b[2Jx")

    monkeypatch.setattr(sys.modules["rlhfjax.runs"], "run_recipe", fail)
    assert call("run", "quickstart").stderr == "error: row  x\n"


def test_a_bug_keeps_its_traceback_and_exits_with_1(calls, monkeypatch):
    monkeypatch.setattr(sys.modules["rlhfjax.runs"], "run_recipe", lambda *_: 1 / 0)
    result = call("run", "quickstart")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_is_neat(calls, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["rlhfjax.runs"], "run_recipe", interrupt)
    result = call("run", "quickstart")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rn"], "No such command 'rn'. Did you mean 'run'?\nsee: rlhfjax --help"),
        (["run"], "Missing argument 'CONFIG'\nsee: rlhfjax run --help"),
        (["run", "quickstart", "--onyl", "sft"], "No such option: --onyl"),
        (["generate", "x", "--prompt", "a", "--n", "0"], "Invalid value for '--n'"),
        (["generate", "x", "--prompt", "a", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["validate", "quickstart", "--devices", "0"], "Invalid value for '--devices'"),
        (["ls", "more"], "unexpected extra argument"),
        (["data", "prepare"], "Missing argument 'NAME|SOURCE'\nsee: rlhfjax data prepare --help"),
        (["--nope"], "No such option: --nope"),
    ],
)
def test_usage_errors_are_two_lines(arguments, expected):
    text = error(*arguments)
    assert expected in text
    assert len(text.splitlines()) == 2


def test_no_arguments_show_the_help():
    result = call()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_ls_and_cp(tmp_path):
    lines = call("ls").stdout.splitlines()
    assert any(line.startswith("quickstart ") and len(line.split()) > 1 for line in lines)
    assert call("cp", "quickstart", "mine.yaml").exit_code == 0
    copied = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert copied.startswith("# ")  # comments and all
    assert load_config("mine.yaml") == load_config("quickstart")
    (tmp_path / "mine.yaml").write_text("mine", encoding="utf-8")
    assert "mine.yaml: exists already; choose another path, or --force" in error("cp", "quickstart", "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "mine"
    assert call("cp", "quickstart", "mine.yaml", "--force").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == copied
    assert call("cp", "quickstart", ".").exit_code == 0
    assert (tmp_path / "quickstart.yaml").exists()
    assert "cannot be written: No such file or directory" in error("cp", "quickstart", "no/where.yaml")


def test_show_prints_what_loads_equal(tmp_path):
    shown = call("show", "quickstart", "stages.ppo.kl.coef=0.5").stdout
    assert shown == resolved_yaml(load_config("quickstart", ["stages.ppo.kl.coef=0.5"]))
    (tmp_path / "again.yaml").write_text(shown, encoding="utf-8")
    assert call("show", "again.yaml").stdout == shown


def test_validate_says_so_and_shows_the_arithmetic():
    result = call("validate", "quickstart", "mesh.fsdp=2", "--devices", "4")
    assert result.stdout.startswith("quickstart is valid\n")
    assert "data 2 x fsdp 2 x sequence 1 x tensor 1 x expert 1 = 4 devices" in result.stdout
    ppo = load_config("quickstart").stages.ppo
    assert f"{ppo.steps * ppo.batch.size:,} episodes" in result.stdout
    assert "= 3 must divide the number of devices, 4" in error("validate", "quickstart", "mesh.fsdp=3", "--devices", 4)
    assert "stages.sft.batch.length 9999 is more than model.context" in error(
        "validate", "quickstart", "stages.sft.batch.length=9999"
    )


def test_schema_is_json():
    assert json.loads(call("schema").stdout)["properties"]["seed"]["type"] == "integer"


def test_metrics_lists_every_metric():
    lines = call("metrics").stdout.splitlines()
    assert lines[0].split() == ["name", "unit", "mask", "reduction", "weights", "meaning"]
    assert [line.split()[0] for line in lines[1:]] == list(METRICS)


def test_generate_passes_everything_on(calls):
    result = call(
        "generate", "CKPT", "--prompt", "hi", "--max-new-tokens", 5, "--temperature", 0.5, "--top-k", 3, "--top-p", 0.9,
        "--seed", 7, "--n", 2, "--stop", ".", "--stop", "\n",
    )  # fmt: skip
    assert result.stdout == "[1] a0\n[2] a1\n"
    assert calls == [
        ("load", ("CKPT",), {}),
        ("generate", (["hi"],),
         {"max_new_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop": [".", "\n"], "seed": 7, "n": 2}),
    ]  # fmt: skip


def test_generate_defaults_are_those_of_the_python_interface(calls):
    assert call("generate", "CKPT", "--prompt", "hi").stdout == "a0\n"
    assert calls[1][2] == {"max_new_tokens": 64, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "n": 1}


def test_generate_takes_messages_and_a_file(calls):
    said = ("--message", "system=Be brief.", "--message", "2+2=?", "--template", "enable_thinking=false")
    call("generate", "CKPT", *said, "--date", "2031-01-02")
    assert calls[0] == ("load", ("CKPT",), {"date": "2031-01-02", "chat_template_kwargs": {"enable_thinking": False}})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2=?"}]
    assert calls[1][1] == ([messages],)
    calls.clear()
    lines = call("generate", "CKPT", "--prompts", "my_prompts@test", "--n", 2).stdout.splitlines()
    assert calls[1] == ("open_source", ("my_prompts", "test", "DEFAULT"), {"kind": "prompt"})
    assert [json.loads(line)["prompt"] for line in lines] == [f"p{i}" for i in range(9)]
    assert json.loads(lines[0])["responses"] == ["a0", "a1"]
    assert json.loads(lines[0])["finish_reasons"] == ["eos", "eos"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", "x"], "expected one of --prompt TEXT, --message TEXT and --prompts FILE, got none"),
        (["generate", "x", "--prompt", "a", "--message", "b"], "got two of them"),
        (["generate", "x", "--prompt", "a", "--prompts", "b"], "--prompts: expected it without --prompt"),
        (["score", "x"], "score: expected --records FILE, or --response with --prompt or --message"),
        (["score", "x", "--records", "f", "--kind", "document"], "--kind: expected comparison, demonstration"),
    ],
)
def test_what_is_asked_is_said_in_one_way(arguments, expected, calls):
    assert expected in error(*arguments)
    assert not calls


def test_score_takes_responses_and_a_file(calls, monkeypatch):
    asked = ("score", "CKPT", "--message", "Why?", "--response", "So.", "--response", "No.")
    assert call(*asked).stdout == "0.25\n0.25\n"
    assert calls[1] == ("score", ([[{"role": "user", "content": "Why?"}]] * 2, ["So.", "No."]), {})
    calls.clear()
    monkeypatch.setattr(
        "rlhfjax.text.chat.encode_responses", lambda tokenizer, record, texts: ([1], [[2]] * len(texts))
    )
    records = [{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}, {"prompt": "q", "completion": "c"}]
    records += [{"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]}]
    monkeypatch.setattr("rlhfjax.cli.asking.records_of", lambda source, kind: records)
    lines = [json.loads(line) for line in call("score", "CKPT", "--records", "f.jsonl").stdout.splitlines()]
    assert lines == [{**record, "scores": [0.25] * n} for record, n in zip(records, (2, 1, 1), strict=True)]
    assert calls[1] == ("score", ([[1]] * 4, [[2]] * 4), {})


def test_models_are_taken_in_and_given_out(calls):
    assert call("import", "SRC", "DST", "--dtype", "bfloat16", "--force").exit_code == 0
    name, given, options = calls.pop()
    assert (name, given) == ("import_model", ("SRC", Path("DST")))
    assert (options["dtype"], options["force"]) == ("bfloat16", True)
    result = call("export", "CKPT", "DST", "--item", "value", "--dtype", "float16", "--shard-size", "12345", "--force")
    assert "read back, it differs by at most 0.25" in result.stderr
    chosen = {"item": "value", "dtype": "float16", "shard_size": 5, "force": True}
    assert calls.pop() == ("export_checkpoint", ("CKPT", Path("DST")), chosen)
    call("export", "CKPT", "DST")
    assert calls[0][2] == {"item": None, "dtype": "float32", "shard_size": len("5GB"), "force": False}


def test_reproduce_hands_over(calls):
    assert call("reproduce", "runs/a", "--run-dir", "b", "--only-check").exit_code == 0
    assert calls.pop() == ("reproduce", (Path("runs/a"), Path("b"), True), {})
    call("reproduce", "runs/a/")
    assert calls.pop() == ("reproduce", (Path("runs/a"), Path("runs/a-reproduced"), False), {})


def test_reproduce_starts_as_many_processes_as_there_were(calls, monkeypatch):
    layout = types.SimpleNamespace(processes=2, devices=4)
    monkeypatch.setattr("rlhfjax.runs.layouts.launched_here", lambda run_dir, attempts: layout)
    assert call("reproduce", "runs/a", "--only-check").exit_code == 0
    [(name, (words, count, devices, restarts, *_), _)] = calls
    assert (name, count, devices) == ("supervise", 2, 4)
    assert words == ["reproduce", "runs/a", "--run-dir", "runs/a-reproduced", "--only-check"]
    assert (restarts.preempted, restarts.failed) == (0, 0)


def test_data_prepare(calls, tmp_path):
    result = call("data", "prepare", "movies", "--data-dir", "d", "--cache-dir", "c")
    assert result.stdout == os.path.join("d", "movies") + "\n"
    assert (calls[0][1][0].name, *map(str, calls[0][1][1:3])) == ("movies", "d", "c")
    assert call("data", "prepare", "chitchat").stdout == os.path.join("DEFAULT", "chitchat") + "\n"


def test_data_prepare_takes_files_of_several_splits(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.jsonl", "c", "d.csv", "f/train.txt", "f/val.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    given = ["--split", "train=a=b.jsonl", "--split", "test=c", "--split", "train=d.csv", "--split", "f"]
    result = call("data", "prepare", "mine", "--kind", "prompt", *given, "--map", "prompt=a=b", "--sample-by", "line")
    assert result.stdout == "made/it\n"
    assert result.stderr == "9 in train\n"
    (paths, kind, name, where), keywords = calls[0][1:]
    assert {split: [str(path) for path in held] for split, held in paths.items()} == {
        "train": ["a=b.jsonl", "d.csv", "f/train.txt"],
        "test": ["c"],
        "validation": ["f/val.txt"],
    }
    assert (kind, name, where) == ("prompt", "mine", "DEFAULT")
    assert (keywords["reading"].map, keywords["reading"].sample_by) == ((("prompt", "a=b"),), "line")
    assert "gives a=b.jsonl twice" in error("data", "prepare", "m", "--kind", "prompt", *given[:2], *given[:2])


def test_data_prepare_makes_rows_of_tokens(calls):
    result = call("data", "prepare", "mine@test", "--tokenizer", "runs/x", "--length", 8, "--to", "d", "--processes", 3)
    assert (result.stdout, result.stderr) == ("made/rows\n", "9 rows\n")
    (_, made, chosen), (name, given, how) = calls
    assert (made, chosen) == (("document", 8), {"packed": False})
    assert (name, given) == ("prepare_tokens", ("mine", "ROWS", "TOKENIZER", "DEFAULT"))
    assert (how["split"], how["to"], how["processes"]) == ("test", Path("d"), 3)
    calls.clear()
    both = "expected either --pack LENGTH or --length LENGTH"
    assert both in error("data", "prepare", "a.jsonl", "--tokenizer", "t")
    assert both in error("data", "prepare", "a.jsonl", "--tokenizer", "t", "--pack", 4, "--length", 4)
    assert "--pack: expected --tokenizer DIR with it" in error("data", "prepare", "a.jsonl", "--pack", 4)
    assert "expected SOURCE or SOURCE@SPLIT alone" in error(
        "data", "prepare", "a", "--tokenizer", "t", "--pack", 4, "--split", "train=a.jsonl"
    )
    assert calls == []


def test_data_prepare_says_what_is_missing(calls):
    assert "expected movies, chitchat, reversal or arithmetic, or --kind KIND with --split" in error(
        "data", "prepare", "mine"
    )
    assert "expected --dialogue-filters with it" in error("data", "prepare", "mine", "--blocklist", "words.txt")
    assert "--dialogue-filters: expected --kind demonstration, got prompt" in error(
        "data", "prepare", "mine", "--kind", "prompt", "--dialogue-filters"
    )
    assert "--split SPLIT=FILE is missing" in error("data", "prepare", "mine", "--kind", "prompt")
    assert "--kind (document, " in error("data", "prepare", "mine", "--split", "train=a")
    assert "--split a.jsonl is not SPLIT=FILE, such as train=chats.jsonl, and no folder" in error(
        "data", "prepare", "m", "--kind", "x", "--split", "a.jsonl"
    )
    for wrong in (["--map", "prompt"], ["--map", "prompt=a", "--map", "prompt=b"], ["--layout", "alpacca"]):
        assert error("data", "prepare", "m", "--kind", "prompt", "--split", "t=a", *wrong)
    assert calls == []


def test_data_inspect(calls):
    result = call("data", "inspect", "quickstart", "reward", "seed=3", "--index", 2, "--run-dir", "r")
    assert result.stdout == "tokens red\nmask\n"
    run, stage, run_dir, index = calls[0][1]
    assert (run.seed, stage, str(run_dir), index) == (3, "reward", "r", 2)
    assert "STAGE rm: expected a stage of quickstart" in error("data", "inspect", "quickstart", "rm")
    shown = call("data", "inspect", "movies/chat@validation", "--index", 7).stdout
    assert calls[1][1][:4] == ("movies/chat", "validation", "DEFAULT", None)
    assert "movies/chat@validation: 9 records, prompt" in shown
    assert "[7]" in shown
    assert "[8]" in shown
    assert '"p7"' in shown
    assert "\x1b" not in shown


# In a process of its own ---------------------------------------------------------------------------------------------


def process(*args, **kwargs):
    return subprocess.run([*PYTHON, *args], capture_output=True, text=True, check=False, **kwargs)


def test_a_process_exits_with_the_code():
    done = process("validate", "quickstart", "stages.ppo.clip=0.2x")
    assert done.returncode == 2
    assert done.stderr == 'error: override stages.ppo.loss.clip: expected a number > 0, got "0.2x"\n'
    assert done.stdout == ""


def test_a_process_shows_a_bug_with_its_traceback():
    program = (
        "import sys, rlhfjax.cli as c, rlhfjax.config as f; f.shipped = lambda: 1 / 0; sys.argv = ['x', 'ls']; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_closed_pipe_is_quiet():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run([*PYTHON, "schema"], stdout=output, stderr=subprocess.PIPE, check=False)
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


def test_jax_is_not_imported():
    commands = ["--help", "run --help", "show quickstart", "validate quickstart", "ls", "schema", "metrics"]
    program = (
        "import sys; from rlhfjax.cli import app\n"
        "for words in sys.argv[1:]:\n"
        "    try: app(words.split())\n"
        "    except SystemExit as end: assert not end.code, (words, end.code)\n"
        "    assert not {'jax', 'flax', 'numpy'} & set(sys.modules), words"
    )
    done = subprocess.run([sys.executable, "-c", program, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_env_lists_versions_and_no_other_variable():
    secrets = {"MY_TOKEN": "hunter2", "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = process("env", env=os.environ | secrets)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert rows["rlhfjax"].strip() == "0.1.0"
    assert {"python", "platform", "jax", "jaxlib", "numpy"} <= set(rows)
    assert rows["XLA_FLAGS"].strip() == secrets["XLA_FLAGS"]
    assert rows["devices"].strip() == "2 x cpu (cpu)"
    assert "hunter2" not in done.stdout


def test_flags_or_variables_tell_that_a_run_has_several_processes(monkeypatch):
    for name in _SEVERAL:
        monkeypatch.delenv(name, raising=False)
    assert not one_of_several(None, None, None)
    assert one_of_several("localhost:1234", None, None)
    assert one_of_several(None, None, 0)  # the first of them, whose number counts as none where it is asked for truth
    monkeypatch.setenv("RLHFJAX_DEVICES_PER_PROCESS", "2")
    assert one_of_several(None, None, None)
