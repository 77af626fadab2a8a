"""Files in the forms that people have them, from the file to a step of training, without a line of conversion."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rlhfjax.cli import app
from rlhfjax.data.reading import Tally, data_file
from stages.conftest import rows_of

ASK, GOOD, BAD = "Where does the river end?", "In the sea, after a long way.", "It ends."
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": ASK}
BEST, WORST = {"role": "assistant", "content": GOOD}, {"role": "assistant", "content": BAD}
CALL = {"id": "c1", "type": "function", "function": {"name": "length_of", "arguments": '{"river": "Ob"}'}}
TOOLS = [{"type": "function", "function": {"name": "length_of", "parameters": {"type": "object"}}}]


def tree(text, role, *replies, rank=None):
    return {"message_id": text[:4], "role": role, "text": text, "lang": "en", "rank": rank, "replies": list(replies)}


OASST = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": tree(ASK, "prompter", tree(GOOD, "assistant", rank=0), tree(BAD, "assistant", rank=1)),
}
LABEL_STUDIO = {
    "id": 1,
    "data": {"prompt": ASK, "answer1": BAD, "answer2": GOOD},
    "annotations": [
        {
            "id": 7,
            "completed_by": 3,
            "was_cancelled": False,
            "result": [
                {
                    "id": "x",
                    "type": "pairwise",
                    "from_name": "pw",
                    "to_name": "answer1,answer2",
                    "value": {"selected": "right"},
                }
            ],
        }
    ],
}
ARGILLA = {
    "id": "r1",
    "fields": {"instruction": ASK, "response-1": BAD, "response-2": GOOD},
    "metadata": {},
    "suggestions": {},
    "responses": {"preference": [{"value": ["response-2", "response-1"], "user_id": "u1"}]},
    "status": "completed",
}
# The kind, the file's name and one row of it.
FORMATS = {
    "plain text JSON lines": ("document", "a.jsonl", {"text": GOOD, "url": "https://example.org"}),
    "IMDB, JSON lines": ("document", "a.jsonl", {"text": GOOD, "label": 1}),
    "IMDB, CSV": ("document", "a.csv", {"text": GOOD, "label": 1}),
    "IMDB, Parquet": ("document", "a.parquet", {"text": GOOD, "label": 1}),
    "a text": ("document", "a.txt", f"{ASK}\n{GOOD}\n\n{BAD}\n"),
    "prompt and completion": ("demonstration", "a.jsonl", {"prompt": ASK, "completion": f" {GOOD}"}),
    "prompt, chosen, rejected": ("comparison", "a.jsonl", {"prompt": ASK, "chosen": GOOD, "rejected": BAD}),
    "prompt and completion messages": ("demonstration", "a.jsonl", {"prompt": [USER], "completion": [BEST]}),
    "messages": ("demonstration", "a.jsonl", {"messages": [SYSTEM, USER, BEST]}),
    "messages with weights and parts": (
        "demonstration",
        "a.jsonl",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": ASK}], "name": "ann"},
                {**WORST, "weight": 0},
                USER,
                {**BEST, "weight": 1},
            ]
        },
    ),
    "messages with tools": (
        "demonstration",
        "a.jsonl",
        {
            "messages": [
                {"role": "developer", "content": "Use tools."},
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "3,650"},
                BEST,
            ],
            "tools": TOOLS,
        },
    ),
    "alpaca": ("demonstration", "a.json", {"instruction": ASK, "input": "The Ob.", "output": GOOD}),
    "dolly": (
        "demonstration",
        "a.jsonl",
        {"instruction": ASK, "context": "The Ob.", "response": GOOD, "category": "open_qa"},
    ),
    "self-instruct seeds": (
        "demonstration",
        "a.jsonl",
        {
            "id": "seed_task_0",
            "name": "river",
            "instruction": ASK,
            "instances": [{"input": "", "output": GOOD}, {"input": "The Ob.", "output": BAD}],
            "is_classification": False,
        },
    ),
    "ShareGPT": (
        "demonstration",
        "a.json",
        {"id": "c", "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]},
    ),
    "question and answer": ("demonstration", "a.jsonl", {"question": ASK, "answer": GOOD}),
    "trees, demonstrations": ("demonstration", "a.jsonl", OASST),
    "trees, rankings": ("comparison", "a.jsonl", OASST),
    "transcripts": (
        "comparison",
        "a.jsonl.gz",
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}", "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"},
    ),
    "preference with a prompt": ("comparison", "a.jsonl", {"prompt": [USER], "chosen": [BEST], "rejected": [WORST]}),
    "preference with the prompt inside": (
        "comparison",
        "a.parquet",
        {"prompt": ASK, "prompt_id": "p", "chosen": [USER, BEST], "rejected": [USER, WORST], "score_chosen": 8.5},
    ),
    "scored completions": (
        "comparison",
        "a.jsonl",
        {
            "source": "x",
            "instruction": ASK,
            "models": ["m1", "m2"],
            "completions": [
                {"model": "m1", "response": GOOD, "overall_score": 8.5, "annotations": {}},
                {"model": "m2", "response": BAD, "overall_score": 3.0, "annotations": {}},
            ],
        },
    ),
    "summaries": (
        "comparison",
        "a.jsonl",
        {
            "info": {"id": "t1", "post": ASK, "title": "A river", "subreddit": "rivers"},
            "split": "train",
            "summaries": [
                {"text": " In the sea.", "policy": "a", "note": None},
                {"text": " No end.", "policy": "b", "note": None},
            ],
            "choice": 0,
            "worker": "w1",
            "batch": "b1",
            "extra": {"confidence": 7},
        },
    ),
    "OpenAI preference": (
        "comparison",
        "a.jsonl",
        {"input": {"messages": [USER]}, "preferred_output": [BEST], "non_preferred_output": [WORST]},
    ),
    "ShareGPT preference": (
        "comparison",
        "a.json",
        {
            "conversations": [{"from": "human", "value": ASK}],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ),
    "two responses with a better one": (
        "comparison",
        "a.jsonl",
        {
            "prompt": ASK,
            "response_0": BAD,
            "response_1": GOOD,
            "is_response_0_safe": True,
            "is_response_1_safe": True,
            "better_response_id": 1,
            "safer_response_id": 1,
        },
    ),
    "unpaired": ("unpaired", "a.jsonl", {"prompt": [USER], "completion": [BEST], "label": True}),
    "Argilla": ("comparison", "a.json", ARGILLA),
    "Label Studio": ("comparison", "a.json", LABEL_STUDIO),
    "rule-based prompts": (
        "prompt",
        "a.parquet",
        {
            "data_source": "rivers",
            "prompt": [USER],
            "ability": "maps",
            "reward_model": {"style": "rule", "ground_truth": "the sea"},
            "extra_info": {"split": "train", "index": 0},
        },
    ),
    "questions in turns": ("prompt", "a.jsonl", {"question_id": 81, "category": "writing", "turns": [ASK, "Which?"]}),
}


def write(path: Path, row, count: int = 4) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text(row * count)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(row))
            table.writeheader()
            table.writerows([row] * count)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([row] * count), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([row] * count, indent=1))
    else:
        text = (json.dumps(row) + "\n") * count
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("real")
    return {name: write(root / name.replace(" ", "_") / file, row) for name, (_, file, row) in FORMATS.items()}


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words], prog_name="rlhfjax")
    assert result.exit_code == code, result.output
    return result


@pytest.mark.parametrize("name", FORMATS)
def test_prepared_and_shown_as_it_is(written, tmp_path, name):
    kind, where = FORMATS[name][0], ("--data-dir", tmp_path)
    made = run("data", "prepare", "mine", "--kind", kind, "--split", f"train={written[name]}", *where)
    assert made.stdout.splitlines()[-1] == str(tmp_path / "mine" / "1.0.0")
    assert f"mine: {kind} records: " in made.stderr
    shown = run("data", "inspect", written[name], "--kind", kind, *where).stdout
    for text in (ASK,) if kind == "prompt" else (GOOD, BAD) if kind == "comparison" else (GOOD,):
        assert text in shown or name == "summaries"  # in whose own words the answers are
    first = shown.index("[0]")
    if kind == "comparison" and name != "summaries":
        assert json.loads(shown[first + 3 : shown.index("[1]")])["ranks"] in ([1, 2], [2, 1])


@pytest.mark.faults
def test_every_format_is_trained_on(written, tmp_path):
    """One step of each stage, whose batch has a row of every file of its kind."""

    def sources(*kinds):
        named = (name for name, (kind, _, _) in FORMATS.items() if kind in kinds)
        # A tokenizer of our own has no way of writing tools: these are for models with a chat template.
        return [{"source": written[name]} for name in named if name != "messages with tools"]

    demonstrations = sources("demonstration", "unpaired")
    adam = {"lr": 1e-3}
    sft = {"size": 16, "length": 512, "pack": False}
    offline = {"steps": 1, "optimizer": adam}
    recipe = {
        "name": "real",
        "data_dir": str(tmp_path / "prepared"),
        "model": {"layers": 1, "width": 16, "heads": 2, "context": 512},
        "tokenizer": {"vocab_size": 340, "data": sources("document")},
        "stages": {
            "pretrain": {"data": sources("document"), "batch": {"size": 8, "length": 64}} | offline,
            "sft": {"data": demonstrations, "batch": sft} | offline,
            "reward": {"data": sources("comparison"), "batch": {"size": 16, "length": 256}}
            | offline
            | {"normalize": {"on": "demonstrations", "data": demonstrations[:1]}},
            "ppo": {
                "data": sources("prompt"),
                "steps": 1,
                "batch": {"size": 8, "epochs": 1, "prompt_length": 64},
                "sampling": {"max_new_tokens": 4},
                "kl": {"coef": 0.1},
                "optimizer": adam,
            },
        },
    }
    (tmp_path / "real.yaml").write_text(json.dumps(recipe))
    done = run("run", tmp_path / "real.yaml", "--run-dir", tmp_path / "run")
    for stage in ("pretrain", "sft", "reward", "ppo"):
        [row] = rows_of(tmp_path / "run" / stage / "metrics.jsonl")
        assert row["step"] == 1
    assert "layout alpaca: " in done.output


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="the public files are not beside the checkout")
@pytest.mark.parametrize(
    ("file", "kind", "count"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", "comparison", 2307),
        (
            "open-assistant/en_100_tree.jsonl",
            "demonstration",
            546,
        ),  # every path to its last answer; 400 of them end there
        ("open-assistant/en_100_tree.jsonl", "comparison", 212),
        ("tiny-shakespeare/input.txt", "document", 7222),
    ],
)
def test_public_files_give_the_records_that_were_counted(file, kind, count):
    tally = Tally()
    assert sum(1 for _ in data_file(DATA / file, kind).records(tally)) == count
    assert not list(tally.unread)
