"""Files and overrides to a `Run`; what is said when they are wrong; and back to text."""

import json

import pytest
from pydantic import BaseModel

from rlhfjax.config import config_hash, json_schema, key_sources, load_config, resolved_yaml, shipped
from rlhfjax.config.rewards import Term
from rlhfjax.config.schema import Data, Run
from rlhfjax.errors import ConfigError

SMALL = """\
name: small
model: {layers: 1, width: 8, heads: 2, context: 16}
tokenizer:
  data: [{source: a.jsonl}]
stages:
  pretrain:
    data: [{source: a.jsonl}, {source: b.jsonl}]
    steps: 2
    batch: {size: 4, length: 16}
    optimizer: {lr: 1e-3}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def message(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def rewritten(path, old, new):
    assert SMALL.count(old) == 1
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    return path


def test_values_of_a_file(small):
    run = load_config(small)
    assert (run.name, run.seed, run.stages.sft) == ("small", 0, None)
    assert run.stages.pretrain.optimizer.lr == 0.001
    assert [entry.source for entry in run.stages.pretrain.data] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda run: run.seed == 7),
        ("stages.pretrain.optimizer.lr=5e-4", lambda run: run.stages.pretrain.optimizer.lr == 0.0005),
        ("stages.pretrain.data.0.weight=2", lambda run: run.stages.pretrain.data[0].weight == 2),
        ("stages.pretrain.data.1.weight=2", lambda run: run.stages.pretrain.data[1].weight == 2),
        ("stages.pretrain.data=[{source: c}]", lambda run: [d.source for d in run.stages.pretrain.data] == ["c"]),
        ("mesh.fsdp=2", lambda run: run.mesh.fsdp == 2),  # a section that the file leaves out
        ("stages.pretrain.batch.micro=null", lambda run: run.stages.pretrain.batch.micro is None),
        ("stages.pretrain={data: [{source: c}], epochs: 1, batch: {size: 1, length: 2}, optimizer: {lr: 1}}",
         lambda run: run.stages.pretrain.epochs == 1 and run.stages.pretrain.steps is None),
        ("description=a=b", lambda run: run.description == "a=b"),
        ("description='no'", lambda run: run.description == "no"),
        ('description=""', lambda run: run.description == ""),
    ],
)  # fmt: skip
def test_overrides(small, override, read):
    assert read(load_config(small, [override]))


OLD = (
    f"{SMALL}  sft: {{data: [{{source: b}}], steps: 1, batch: {{size: 4, length: 8}}, optimizer: {{lr: 1}}}}\n"
    + """\
  ppo:
    data: [{source: c}]
    steps: 1
    batch: {size: 4, prompt_length: 8}
    sampling: {max_new_tokens: 8}
    optimizer: {lr: 1}
    clip: 0.1
    entropy_coef: 0.01
"""
)


def test_a_key_in_its_old_place_is_read_in_the_new_one(small):
    small.write_text(OLD, encoding="utf-8")
    loss = load_config(small).stages.ppo.loss
    assert (loss.clip, loss.entropy_coef) == (0.1, 0.01)
    assert load_config(small, ["stages.ppo.clip=0.3"]).stages.ppo.loss.clip == 0.3
    whole = "{data: [{source: c}], steps: 1, batch: {size: 4, prompt_length: 8}, sampling: {max_new_tokens: 8}, "
    assert load_config(small, [f"stages.ppo={whole}optimizer: {{lr: 1}}, clip: 0.4}}"]).stages.ppo.loss.clip == 0.4
    found = key_sources(small, ["stages.ppo.clip=0.3"])
    line = OLD.splitlines().index("    entropy_coef: 0.01") + 1
    assert found["stages.ppo.loss.entropy_coef"] == f"{small}:{line}"
    assert found["stages.ppo.loss.clip"] == "override stages.ppo.clip=0.3"


def test_what_is_wrong_in_an_old_place_is_said_with_the_new_one(small):
    small.write_text(OLD.replace("clip: 0.1", "clip: -1.0"), encoding="utf-8")
    line = OLD.splitlines().index("    clip: 0.1") + 1
    assert message(small) == f"{small}:{line}: stages.ppo.loss.clip: expected a number > 0, got -1.0"
    small.write_text(OLD.replace("clip: 0.1", "clip: 0.1\n    loss: {clip: 0.2}"), encoding="utf-8")
    assert "stages.ppo.clip is stages.ppo.loss.clip now, and both are given; remove stages.ppo.clip" in message(small)


def test_later_overrides_win_and_the_file_stays(small):
    assert load_config(small, ["seed=1", "seed=2"]).seed == 2
    assert load_config(small).seed == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.pretrain.optimizer.lr=0.2x",
         'override stages.pretrain.optimizer.lr: expected a number > 0, got "0.2x"'),
        ("stages.pretrain.optimizer.lr=-1", "override stages.pretrain.optimizer.lr: expected a number > 0, got -1"),
        ("stages.pretrain.optimizer.lr=1e999", "override stages.pretrain.optimizer.lr: expected a number > 0, got inf"),
        ("stages.pretrain.dropout=1.5", "override stages.pretrain.dropout: expected a number >= 0 and < 1, got 1.5"),
        ("stages.pretrain.steps=2.5", "override stages.pretrain.steps: expected a whole number >= 1 or null, got 2.5"),
        ("stages.pretrain.steps='2'", 'override stages.pretrain.steps: expected a whole number >= 1 or null, got "2"'),
        ("model.layers=true", "override model.layers: expected a whole number >= 1, got true"),
        ("model.family=gpt3", 'override model.family: expected one of gpt1, gpt2, '),
        ("logging.tensorboard=yes", 'override logging.tensorboard: expected true or false, got "yes"'),
        ("name=5", "override name: expected text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 5"),
        ("name=../up", "override name: expected text that matches"),
        ("stages.pretrain.data=movies",
         'override stages.pretrain.data: expected a list of at least 1, each a section (source, split, weight, layout, '
         'map, sample_by), got "movies"'),
        ("stages.pretrain.data=[]", "got a list of 0"),
        ("stages.pretrain=3", "override stages.pretrain: expected a section (data, validation, "),
        ("stages.pretrain.optimizer.lt=1",
         "override stages.pretrain.optimizer.lt: unknown key; nearest is stages.pretrain.optimizer.lr, known here "),
        ("stages.pretrain.optimizer.warmup_step=1", "did you mean stages.pretrain.optimizer.warmup_steps?"),
        ("stages.pretrain.lr=1",
         "override stages.pretrain.lr: unknown key; did you mean stages.pretrain.optimizer.lr?"),
        ("stage.pretrain.steps=1", "override stage: unknown key; did you mean stages?"),
        ("tokenizer.qqq=1", "known here are path, vocab_size, kind, data, documents"),
        ("stages.pretrain.data.2.weight=1",
         "override stages.pretrain.data.2.weight: expected a position of stages.pretrain.data from 0 to 1, got 2"),
        ("stages.pretrain.data.first=1", "expected a position of stages.pretrain.data from 0 to 1, got first"),
        ("stages.pretrain.data.0.layout=alpacca", "expected a layout such as alpaca"),
        ("stages.pretrain.data.0.map={body: text}", "expected a field of ours"),
        ("stages.pretrain.data.0.sample_by=word", "expected one of paragraph, line, document"),
        ("stages.pretrain.data.0.weight=0", "override stages.pretrain.data.0.weight: expected a number > 0, got 0"),
        ("model.layers.deep=1", "override model.layers.deep: model.layers is 1, which has no deep inside"),
        ("foo", "override 'foo': expected dotted.key=value, such as stages.ppo.steps=200"),
        ("=1", "override '=1': expected dotted.key=value"),
        ("a..b=1", "override 'a..b=1': expected dotted.key=value"),
        ("seed=[1", "override seed: not valid YAML"),
        ("seed={a: 1, a: 2}", "override seed: key a is given twice"),
        ("stages.sft={}", "override stages.sft.data: missing; expected a list of at least 1"),
    ],
)  # fmt: skip
def test_wrong_overrides(small, override, expected):
    assert expected in message(small, override)


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("steps: 2", "steps: two", 8, 'stages.pretrain.steps: expected a whole number >= 1 or null, got "two"'),
        ("steps: 2", "stpes: 2", 8, "stages.pretrain.stpes: unknown key; did you mean stages.pretrain.steps?"),
        ("steps: 2", "epochs: 0", 8, "stages.pretrain.epochs: expected a number > 0 or null, got 0"),
        ("optimizer: {lr: 1e-3}", "optimizer: {}", 10, "stages.pretrain.optimizer.lr: missing; expected a number > 0"),
        ("heads: 2", "heads: 3", 2, "model: width 8 must be a multiple of heads 3"),
        ("size: 4", "size: 4, micro: 3", 9, "batch.micro 3 must divide batch.size 4 (remainder 1)"),
        ("    steps: 2\n", "", 6, "stages.pretrain: give exactly one of steps and epochs"),
        ("steps: 2", "steps: 2\n    steps: 3", 9, "key stages.pretrain.steps is given twice, first on line 8"),
        ("steps: 2", "steps: *two", 8, "anchors and aliases"),
        ("model:", "model: [", 3, "not valid YAML"),
    ],
)
def test_wrong_files_name_their_line(small, old, new, line, expected):
    rewritten(small, old, new)
    text = message(small)
    assert text.startswith(f"{small}:{line}: ")
    assert expected in text
    assert "\n" not in text


def test_every_problem_is_listed_up_to_ten(small):
    text = rewritten(small, "steps: 2", "steps: 0\n    dropout: 9\n    colour: red") and message(small, "seed=-1")
    lines = text.splitlines()
    assert lines[0] == f"{small}: 4 problems"
    assert len(lines) == 5
    assert any(line.startswith("  override seed: ") for line in lines)
    assert any(f"{small}:10: stages.pretrain.colour: unknown key" in line for line in lines)
    many = "".join(f"bad{number}: 1\n" for number in range(13))
    small.write_text(SMALL + many, encoding="utf-8")
    lines = message(small).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "… and 3 more"


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "x.yaml"
    for text, got in (("", "an empty file"), ("- 1\n", "a list of 1"), ("5", "5")):
        path.write_text(text, encoding="utf-8")
        assert message(path).endswith(f"got {got}")
    path.write_bytes(b"name: caf\xe9")
    assert "expected UTF-8 text, got byte 0xe9" in message(path)
    assert "expected a configuration file, got a directory" in message(tmp_path)


def test_names_of_shipped_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").name == "quickstart"
    assert "no such file" in message("quikstart")
    assert "did you mean quickstart?" in message("quikstart")
    assert "did you mean quickstart?" in message("configs/quickstart.yml")
    assert "shipped are arithmetic, instructgpt_175b, " in message("zzzz")
    (tmp_path / "quickstart").mkdir()  # a directory of that name does not hide the shipped one
    assert load_config("quickstart").name == "quickstart"


@pytest.mark.parametrize("name", [*shipped(), "small", "checkpoint"])
def test_what_show_prints_loads_equal(name, small, tmp_path):
    settings = "{checkpoint: a, dtype: bfloat16, lora: {rank: 2}}"
    changes = [f"model={settings}", "tokenizer={}"] if name == "checkpoint" else []
    run = load_config(small if name in ("small", "checkpoint") else name, changes)
    path = tmp_path / "again.yaml"
    path.write_text(resolved_yaml(run), encoding="utf-8")
    again = load_config(path)
    assert again == run
    assert config_hash(again) == config_hash(run)
    assert resolved_yaml(again) == resolved_yaml(run)


def test_awkward_text_survives_the_round_trip(small, tmp_path):
    for text in ("1e-3", "on", "null", "#x", "a: b", "zwölf\n", " ", "[", "2024-01-01", "~"):
        run = load_config(small, [f"description={json.dumps(text)}"])
        assert run.description == text
        path = tmp_path / "again.yaml"
        path.write_text(resolved_yaml(run), encoding="utf-8")
        assert load_config(path) == run


def test_resolved_text_is_complete(small):
    text = resolved_yaml(load_config(small))
    assert "lam:" not in text  # no ppo stage
    assert "warmup_from: 0.0" in text
    assert "keep: 2" in text


def test_hash_is_of_values_not_of_text(small):
    first = config_hash(load_config(small))
    assert len(first) == 64
    small.write_text("# a comment\n" + SMALL.replace("1e-3", "0.001"), encoding="utf-8")
    assert config_hash(load_config(small)) == first
    assert config_hash(load_config(small, ["seed=1"])) != first
    assert config_hash(load_config(small, ["stages.pretrain.data.1.weight=2"])) != first


def test_where_each_key_was_set(small):
    found = key_sources(small, ["seed=4", "stages.pretrain.data=[{source: c.jsonl}]", "model.width=16"])
    assert found == {
        "name": f"{small}:1",
        "model.layers": f"{small}:2",
        "model.heads": f"{small}:2",
        "model.context": f"{small}:2",
        "tokenizer.data.0.source": f"{small}:4",
        "stages.pretrain.steps": f"{small}:8",
        "stages.pretrain.batch.size": f"{small}:9",
        "stages.pretrain.batch.length": f"{small}:9",
        "stages.pretrain.optimizer.lr": f"{small}:10",
        "seed": "override seed=4",
        "stages.pretrain.data": "override stages.pretrain.data=[{source: c.jsonl}]",
        "model.width": "override model.width=16",
    }


def test_json_schema_describes_the_file():
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Run.model_fields)
    assert schema["$defs"]["Optimizer"]["properties"]["lr"]["exclusiveMinimum"] == 0
    json.dumps(schema, allow_nan=False)


def sections(model: type[BaseModel], depth: int = 0):
    """Every section with its depth below the file; a dataset is a value, like the text that names it.

    A reward is one of a list, and no deeper than the list itself.
    """
    yield model, depth
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            if inner is not Data:
                yield from sections(inner, depth + (not issubclass(inner, Term)))


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def test_sections_are_shallow_small_strict_and_frozen():
    found = list(sections(Run))
    assert len(found) > 20
    for model, depth in found:
        assert depth <= 3, model
        assert len(model.model_fields) <= 12, model
        assert model.model_config["extra"] == "forbid", model
        assert model.model_config["frozen"], model
        assert model.model_config["strict"], model
        assert model.__doc__, model
