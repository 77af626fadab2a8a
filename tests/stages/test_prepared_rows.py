"""Rows of tokens in the place of sources: every stage opens them, and needs none of the files they were made of."""

import datetime
import json

import pytest

from rlhfjax.config import load_config
from rlhfjax.data.sources import fingerprint_of
from rlhfjax.data.tokens.folder import read_index
from rlhfjax.data.tokens.plan import Rows
from rlhfjax.data.tokens.preparing import prepare_tokens
from rlhfjax.errors import DataError
from rlhfjax.runs.checks import check_data, entries, make_jobs, origins
from rlhfjax.runs.kept_rows import keep_rows
from rlhfjax.stages.batches import open_batches
from rlhfjax.stages.tokenizer import tokenizer as tokenizer_stage
from rlhfjax.text.tokenizer import Tokenizer
from stages.tiny_recipe import recipe, write_files

ROWS = {
    "documents": {"at_32": Rows("document", 32, packed=True), "at_16": Rows("document", 16, packed=True)},
    "demonstrations": {"rows": Rows("demonstration", 24, packed=True, overlong="drop")},
    "comparisons": {"rows": Rows("comparison", 24, overlong="drop")},
    "prompts": {"rows": Rows("prompt", 10, overlong="drop")},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The tiny recipe over rows of tokens, all else being gone; a run directory with the tokenizer; the folders."""
    folder = tmp_path_factory.mktemp("prepared")
    write_files(folder)
    texts = [json.loads(line)["text"] for line in (folder / "documents.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.train(texts, 320)
    tokenizer.save(folder / "run" / "tokenizer")
    made = {}
    for name, wanted in ROWS.items():
        for how, rows in wanted.items():
            source, to = str(folder / f"{name}.jsonl"), folder / f"{name}_{how}"
            made[name, how] = prepare_tokens(source, rows, tokenizer, folder / "prepared", to=to, step=900)
        (folder / f"{name}.jsonl").unlink()
    text = json.dumps(recipe(folder)).replace(".jsonl", "_rows").replace("documents_rows", "documents_at_32")
    described = json.loads(text)
    described["tokenizer"] = {"path": str(folder / "run" / "tokenizer")}
    described["stages"]["ppo"]["ptx"]["data"] = [{"source": str(made["documents", "at_16"])}]
    (folder / "rows.yaml").write_text(json.dumps(described))
    return folder, load_config(str(folder / "rows.yaml")), made


def jobs_of(prepared, *stages):
    folder, run, _ = prepared
    return make_jobs(run, folder / "run", list(stages), lambda text: None, datetime.date(2026, 1, 31))


def test_every_stage_opens_rows(prepared):
    # fails where a stage reads the files, which are not there: seen
    jobs = jobs_of(prepared, "pretrain", "sft", "reward", "ppo", "evaluate")
    check_data(jobs)
    counts = {key: read_index(folder)["counts"]["rows"] for key, folder in prepared[2].items()}
    opened = {job.stage: open_batches(job) for job in jobs}
    assert opened["pretrain"]["train"].rows == counts["documents", "at_32"]
    assert opened["sft"]["train"].rows == counts["demonstrations", "rows"]
    assert opened["reward"]["train"].rows == counts["comparisons", "rows"]
    assert opened["ppo"]["train"].rows == opened["evaluate"]["train"].rows == counts["prompts", "rows"]
    assert opened["ppo"]["ptx"][0].tokens.shape == (32, 16)
    assert all(len(each["train"].records(0)) == 16 for each in (opened["ppo"], opened["evaluate"]))


def test_a_run_notes_what_its_rows_are(prepared, tmp_path):
    folder, run, made = prepared
    data = origins(jobs_of(prepared, "pretrain"))["data"]
    assert data == {f"{rows}@train": fingerprint_of(str(rows), "train", folder) for rows in made.values()}
    assert len(set(data.values())) == len(made)
    keep_rows(tmp_path, entries(run), folder, data, lambda text: None)


def test_no_tokenizer_is_trained_on_tokens(prepared):
    _, run, made = prepared
    [job] = jobs_of(prepared, "pretrain")
    rows = [{"source": str(made["documents", "at_32"])}]
    own = run.tokenizer.model_validate({"vocab_size": 320, "data": rows})
    object.__setattr__(job, "run", run.model_copy(update={"tokenizer": own}))
    with pytest.raises(DataError, match=r"expected texts to train a tokenizer on, got tokens .*documents\.jsonl"):
        tokenizer_stage(job)
