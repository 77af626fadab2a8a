"""A run of two processes is done again in two processes; what has changed since is named, and nothing is run."""

import json
import shutil

import pytest
from stages.conftest import rows_of
from stages.tiny_recipe import recipe, write_files, write_jsonl

from runs.test_templates import GIVEN, TEMPLATE

REWARD = "def letters(examples):\n    return [len(example.response) / 10 for example in examples]\n"
PATIENCE = "reliability.heartbeat=60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All that a recipe of SFT and GRPO is made of: data, a tokenizer with a date in its template, a reward."""
    folder = tmp_path_factory.mktemp("reproduced")
    write_files(folder)
    asked = ({"messages": [{"role": "user", "content": f"film {i}"}]} for i in range(20))
    write_jsonl(folder / "asked.jsonl", asked)
    shutil.copytree(GIVEN, folder / "tokenizer")
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    tree = recipe(folder)
    sft, ppo = tree["stages"]["sft"], tree["stages"]["ppo"]
    sft["batch"] |= {"length": 128}
    grpo = {key: ppo[key] for key in ("steps", "sampling", "optimizer")} | {"missing_eos": {"mode": "keep"}}
    grpo |= {"data": [{"source": str(folder / "asked.jsonl")}], "batch": ppo["batch"] | {"prompt_length": 100}}
    grpo |= {"groups": {"size": 4}, "rewards": [{"function": f"{folder}/mine.py:letters"}]}
    tree |= {"tokenizer": {"path": str(folder / "tokenizer")}, "stages": {"sft": sft, "grpo": grpo}}
    tree["model"] |= {"context": 128}
    (folder / "own.yaml").write_text(json.dumps(tree), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def two(folder, command):
    """The run in two processes with a device each: its directory, and the files it was made of."""
    words = ["--", "run", folder / "own.yaml", PATIENCE, "--run-dir", folder / "run"]
    code, _, err = command("launch", "local", "-n", 2, "--devices-per-process", 1, *words)
    assert code == 0, err
    return folder / "run"


@pytest.mark.faults
def test_two_processes_again(two, command):
    code, _, err = command("reproduce", two)
    assert code == 0, err
    again = two.with_name("run-reproduced")
    assert f"{two} ran in 2 processes with 1 x cpu each: started here" in err
    assert f"[p0] {again}: tokenizer, sft, grpo are equal to those of {two}, step by step and to the last bit" in err
    [line] = rows_of(again / "manifest.jsonl")
    assert (line["process"], len(line["devices"])) == ([0, 2], 2)
    assert (again / "grpo" / "ledger.jsonl").read_bytes() == (two / "grpo" / "ledger.jsonl").read_bytes()
    code, _, err = command("reproduce", two)
    assert (code, "expected a new directory to reproduce in" in err) == (2, True)


@pytest.mark.faults
@pytest.mark.parametrize("what", ["reward", "row", "date"])
def test_one_thing_that_changed_is_refused_by_name(two, folder, command, what):
    path = {"reward": "mine.py", "row": "asked.jsonl", "date": "tokenizer/chat_template.jinja"}[what]
    old = (folder / path).read_text(encoding="utf-8")
    [row] = rows_of(two / "grpo" / "ledger.jsonl")[1]["rows"][:1]
    new = {
        "reward": old.replace("/ 10", "/ 11"),
        "row": old.replace(f'"film {row}"', f'"folm {row}"'),
        "date": old.replace("26 Jul", "27 Jul"),
    }[what]
    expected = {
        "reward": f"rewards of grpo: {folder}/mine.py: expected SHA-256 ",
        "row": f": row {row} ({folder}/asked.jsonl:{row + 1}) is another; grpo read it first at step 1",
        "date": "chat template of tokenizer.path: line 1: expected \"{%- set date = '26 Jul 2024' %}\", got ",
    }[what]
    assert new != old
    (folder / path).write_text(new, encoding="utf-8")
    try:
        target = folder / "refused"
        code, _, err = command("reproduce", two, "--run-dir", target)
    finally:
        (folder / path).write_text(old, encoding="utf-8")
    assert code == 4, err
    assert f"{two} cannot be reproduced here: {2 if what == 'date' else 1} difference" in err
    assert expected in err
    assert not target.exists()


@pytest.mark.faults
def test_it_says_which_layout_it_needs(two, command, tmp_path):
    """Of a run on accelerators that are not here."""
    shutil.copytree(two, tmp_path / "run")
    lines = rows_of(tmp_path / "run" / "manifest.jsonl")
    lines[-1] |= {"backend": "gpu", "devices": ["NVIDIA H200"] * 8}
    (tmp_path / "run" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = command("reproduce", tmp_path / "run", "--only-check")
    assert code == 4, err
    assert "cannot be reproduced here: it ran in 2 processes with 4 x NVIDIA H200 each, and this machine has " in err
    assert f"start `rlhfjax reproduce {tmp_path / 'run'}` in as many processes" in err
