"""What the documents show is what happens: commands parse and run, code runs, names and figures are the code's."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from rlhfjax import errors
from rlhfjax.cli import app
from rlhfjax.config import load_config, resolved
from rlhfjax.config.reading import read_yaml
from rlhfjax.config.rewards import KINDS as KINDS_OF_REWARDS
from rlhfjax.data.records import KINDS, parse_record

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
README = ROOT / "README.md"
BUGS, CONFIGURATION, DATA, PYTHON = (
    ROOT / "docs" / f"{name}.md" for name in ("bugs", "configuration", "data", "python")
)
CHEAP = {"ls", "show", "validate", "schema", "metrics", "env", "cp"}


class Block(NamedTuple):
    language: str
    text: str
    before: str  # the document up to the block


def blocks(path, *languages):
    text = path.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[2], m[3], text[: m.start()]) for m in found if m[2] in languages]


def commands(path, program="rlhfjax"):
    """The words of each command of a program in the shell blocks; a redirection is left out."""
    lines = itertools.chain.from_iterable(block.text.splitlines() for block in blocks(path, "sh", "console"))
    words = (shlex.split(line.split(" > ")[0], comments=True) for line in lines)
    return [line for line in words if line and Path(line[0]).name == program]


def all_commands(program="rlhfjax"):
    return [pytest.param(words, id=" ".join(words)) for path in DOCUMENTS for words in commands(path, program)]


def verb_of(words):
    command, names = typer.main.get_command(app), []
    for word in words[1:]:
        if not hasattr(command, "commands"):
            break
        assert word in command.commands, f"no verb {' '.join([*names, word])}"
        names.append(word)
        command = command.commands[word]
    return command, names


@pytest.mark.parametrize("words", all_commands())
def test_commands_are_ones_the_command_line_takes(words):
    command, names = verb_of(words)
    command.make_context(" ".join(names), words[1 + len(names) :])  # parses options and arguments, runs nothing
    assert CliRunner().invoke(app, [*names, "--help"]).exit_code == 0


@pytest.fixture
def with_configuration(tmp_path, monkeypatch):
    """A directory of its own with the configuration that the documents call my_run.yaml."""
    monkeypatch.chdir(tmp_path)
    [block] = blocks(DATA, "yaml")
    (tmp_path / "my_run.yaml").write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("words", [each for each in all_commands() if each.values[0][1] in CHEAP])
def test_cheap_commands_run(words, with_configuration):
    if words[1] == "cp":
        (with_configuration / "my_run.yaml").unlink()
    elif words[1:4] == ["validate", "my_run.yaml", "mesh.fsdp=2"]:  # said of the copy of quickstart
        (with_configuration / "my_run.yaml").unlink()
        CliRunner().invoke(app, ["cp", "quickstart", "my_run.yaml"])
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("words", [each for each in all_commands() if each.values[0][1] == "run"])
def test_runs_name_stages_and_keys_that_are_there(words, with_configuration, monkeypatch):
    started = []
    monkeypatch.setattr("rlhfjax.runs.run_recipe", lambda *arguments: started.append(arguments))
    result = CliRunner().invoke(app, words[1:])
    assert (result.exit_code, len(started)) == (0, 1), result.output


@pytest.mark.parametrize("words", [each for each in all_commands() if each.values[0][1] in ("import", "export")])
def test_models_are_taken_in_and_given_out_as_shown(words, monkeypatch):
    from rlhfjax import transfer

    called = []
    monkeypatch.setattr(transfer, "import_model", lambda *given, **options: called.append(given))
    for name in ("export_checkpoint", "export_gguf"):
        said = {"max_abs_logit_difference": 0.0}
        monkeypatch.setattr(transfer, name, lambda *given, said=said, **options: called.append(given) or said)
    result = CliRunner().invoke(app, words[1:])
    assert (result.exit_code, called) == (0, [(words[2], Path(words[3]))]), result.output


def test_make_targets_and_extras_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in DOCUMENTS:
        for words in commands(path, "make"):
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {word[2:-1] for words in commands(README, "pip") for word in words if word.startswith(".[")}
    assert named
    assert named <= extras.keys()


# Own data, from start to end -----------------------------------------------------------------------------------------


def write_example_data(folder):
    """Eight files about animals; every validation prompt is absent from training."""
    animals = ["cat", "dog", "horse", "bird", "fish", "fox", "bear", "mouse"]
    acts = ["sleeps", "runs", "eats", "sings", "swims", "jumps", "hides", "looks"]
    places = ["house", "garden", "river", "forest", "kitchen", "tree", "road", "field"]
    folder.mkdir()
    scenes = list(itertools.product(animals, acts, places))
    for suffix, chosen in (("", [s for s in scenes if s[0] != "fox"][::7]), ("_validation", scenes[320:384:4])):
        rows = {
            "pretraining": [{"text": f"The {a} {b} in the {c}. Then the {a} leaves the {c}."} for a, b, c in chosen],
            "demonstrations": [
                {"prompt": f"What does the {a} do?", "completion": f" The {a} {b} in the {c}."} for a, b, c in chosen
            ],
            "comparisons": [
                {
                    "prompt": f"What does the {a} do?",
                    "responses": [f" The {a} {b} in the {c}.", f" The {a} {b}.", " No."],
                    "ranks": [1, 2, 2],
                }
                for a, b, c in chosen
            ],
            "prompts": [{"prompt": f"What does the {a} do in the {c}?"} for a, _, c in chosen],
        }
        for name, records in rows.items():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")


DRIVER = """
import json, sys
from rlhfjax.cli import app
for words in json.loads(sys.argv[1]):
    print("\\n$", *words, flush=True)
    try:
        app(words[1:])
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit code {end.code}")
exec(compile(sys.argv[2], "documents", "exec"))
print("shapes", logits.shape, scores.shape)
"""


@pytest.mark.slow
def test_own_data_from_start_to_end(with_configuration, pytestconfig):
    """All commands of docs/data.md in their order, then the Python of README and docs/python.md on what they made."""
    write_example_data(with_configuration / "data")
    (with_configuration / "runs").mkdir()
    (with_configuration / "runs" / "quickstart").symlink_to("my_run")
    shown = [words for words in commands(DATA) if words[1:] != ["data", "prepare", "movies"]]
    assert shown[:5] == commands(README)[-5:]
    python = [*blocks(README, "python"), *blocks(PYTHON, "python")]
    loading = "".join(block.text for block in python if "rlhfjax.load" in block.text)
    assert loading.count("import rlhfjax") == 2
    cache = {"JAX_COMPILATION_CACHE_DIR": str(pytestconfig.cache.mkdir("jax"))}
    private = {"RLHFJAX_DATA_DIR": str(with_configuration / "prepared"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(shown), loading],
        env=os.environ | cache | private,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 2" in done.stdout  # data inspect shows candidates with their ranks
    assert "score read at </s>" in done.stdout
    assert re.search(r"shapes \(1, \d+, 384\) \(2,\)", done.stdout)
    assert {"config.yaml", "manifest.jsonl", "report.html"} <= {
        path.name for path in (with_configuration / "runs" / "my_run").iterdir()
    }


def test_records_shown_are_of_the_kind_they_are_shown_for():
    seen = set()
    for block in blocks(DATA, "json"):
        kind = re.findall(r"^\*\*(\w+)\*\*:", block.before, re.MULTILINE)[-1]
        parse_record(kind, json.loads(block.text), "docs/data.md")
        seen.add(kind)
    assert seen == set(KINDS)


# Code, names, links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_compiles_and_equations_run(path):
    for block in blocks(path, "python"):
        code = compile(block.text, path.name, "exec")
        if "rlhfjax.load" not in block.text and "import openai" not in block.text:  # see tests/serving/test_document.py
            exec(code, {})


def test_ppo_in_twenty_lines_learns_what_people_like():
    """Each of the four places takes the liked token nearly always; with the KL penalty the other way it would not."""
    [block] = [block for block in blocks(README, "python") if "rlhfjax.load" not in block.text]
    assert len([line for line in block.text.splitlines() if line]) <= 20
    found = {}
    exec(compile(block.text, "README.md", "exec"), found)
    assert float(found["jax"].nn.softmax(found["policy"])[:, 3].min()) > 0.9


@pytest.mark.parametrize(("path", "most"), [(README, 220), (ROOT / "ARCHITECTURE.md", 80)], ids=["README", "design"])
def test_a_page_stays_a_page(path, most):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_the_picture_of_the_report_is_a_small_png():
    picture = (ROOT / "docs" / "images" / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) < 200_000


def test_the_configuration_shown_is_that_of_quickstart():
    def differences(shown, real, name):
        if isinstance(shown, dict) and isinstance(real, dict):
            for key, value in shown.items():
                yield from differences(value, real.get(key, "absent"), f"{name}.{key}")
        elif isinstance(shown, list) and isinstance(real, list) and len(shown) == len(real):
            for i, (one, other) in enumerate(zip(shown, real, strict=True)):
                yield from differences(one, other, f"{name}.{i}")
        elif shown != real:
            yield f"{name}: the document has {shown}, the file {real}"

    [block] = blocks(CONFIGURATION, "yaml")
    assert list(differences(read_yaml(block.text)[0], resolved(load_config("quickstart")), "quickstart")) == []


def test_the_online_stage_shown_loads_in_the_place_of_ppo(tmp_path):
    [block] = blocks(ROOT / "docs" / "online.md", "yaml")
    stage = block.text.removeprefix("stages:\n")
    quickstart = (ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8")
    text, count = re.subn(r"^  ppo:\n.*?(?=^  evaluate:)", lambda _: stage, quickstart, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    shown = [next(iter(term)) for term in read_yaml(block.text)[0]["stages"]["grpo"]["rewards"]]
    assert (count, shown) == (1, [term.kind for term in load_config(str(tmp_path / "own.yaml")).stages.grpo.rewards])


def test_the_rewards_shown_are_all_there_are():
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+): ", text, re.MULTILINE)) == KINDS_OF_REWARDS.keys()


def heading_anchors(path):
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_are_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.is_file(), target
        assert not anchor or anchor in heading_anchors(there), target
    named = re.findall(r"(?<![\w./-])([\w/-]+\.(?:py|md|toml|lock|svg|cfg))\b", text)
    named += re.findall(r"`((?:rlhfjax|tests|configs|docs)/[\w./-]+)`", text)
    for name in {name for name in named if "NAME" not in name} - {
        "my_rewards.py",
        "FILE.py",
        "verify.py",
    }:  # not of this checkout
        assert any((base / name).exists() for base in (ROOT, ROOT / "rlhfjax", path.parent)), name


def test_the_floors_are_those_that_the_import_contract_holds():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    floor_of = {name: i for i, layer in enumerate(layers) for name in re.split(r"[:|]", layer.replace(" ", ""))}
    [block] = blocks(ROOT / "ARCHITECTURE.md", "text")
    rows = [re.findall(r"\w+", line.split("   ")[0])[1:] for line in block.text.splitlines()]
    shown = [floor_of[name] for row in rows for name in row]
    assert shown == sorted(shown)
    assert set(floor_of) == {name for row in rows for name in row}


def test_exit_codes_are_those_of_the_errors():
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", CONFIGURATION.read_text(encoding="utf-8"), re.MULTILINE))
    classes = (errors.ConfigError, errors.DataError, errors.IntegrityError, errors.Stopped)
    assert set(rows) == {"0", "1", "130", *(str(error.exit_code) for error in classes)}


def test_results_shown_are_those_committed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import collect
    from benchmarks.blocks import with_block

    results, remedy = collect.read_results(collect.RESULTS), "python -m benchmarks.collect --readme"
    for path, block in ((collect.DOCUMENT, collect.tables(results)), (README, collect.summary(results))):
        text = path.read_text(encoding="utf-8")
        assert text == with_block(text, "results", block), remedy


def test_each_bug_is_held_out_by_a_test_that_is_there():
    """Each row of docs/bugs.md names tests as `tests/FILE.py::NAME`, and each of them is defined in that file."""
    rows = [line for line in BUGS.read_text(encoding="utf-8").splitlines() if re.match(r"\| [\w.-]+/[\w.-]+#\d+", line)]
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, name)


def test_the_picture_is_plain_svg():
    root = ET.parse(ROOT / "docs" / "recipe.svg").getroot()
    text = (ROOT / "docs" / "recipe.svg").read_text(encoding="utf-8")
    assert {child.tag.split("}")[1] for child in root.iter()}.isdisjoint({"script", "image", "foreignObject", "use"})
    assert re.findall(r"https?://[^\"']+", text) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_of_somebodys_machine_and_nothing_unfinished(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.~])/(?:work|tmp|home|root|Users|mnt)\b", text) == []
    assert re.findall(r"\b(?:TODO|FIXME|XXX|TBD)\b", text) == []
    known = {"semver.org", "docs.astral.sh", "api.openai.com", "127.0.0.1:8000"}
    assert set(re.findall(r"https?://([^/)\s]+)", text)) <= known
