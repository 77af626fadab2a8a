"""One date for all attempts of a run, and the variables of each stage."""

import datetime

import pytest
from pydantic import ValidationError

from rlhfjax.config import load_config
from rlhfjax.config.sections import Tokenizer
from rlhfjax.stages import chat_settings
from rlhfjax.stages.chat_settings import date_of, facts_of_chat, settings_of

DAY = datetime.date(2026, 1, 31)


def run_with(*overrides):
    return load_config("quickstart", overrides)


def test_the_date_is_that_of_the_first_start(monkeypatch):
    monkeypatch.setattr(chat_settings, "today", lambda: DAY)
    run = run_with()
    assert date_of(run, []) == DAY
    first = {"started": "2025-12-30T23:59:59+00:00", "chat": {"date": "2025-12-31"}}
    assert date_of(run, [first, {"chat": {"date": "2026-01-01"}}]) == datetime.date(2025, 12, 31)
    assert date_of(run, [{"started": "2025-12-30T23:59:59+00:00"}]) == datetime.date(2025, 12, 30)  # of older versions
    assert date_of(run_with("tokenizer.date=2031-02-03"), [first]) == datetime.date(2031, 2, 3)
    with pytest.raises(ValidationError, match="expected a date such as 2026-01-31, got 'today'"):
        Tokenizer(date="today")


def test_a_stage_goes_before_the_run_and_the_run_before_its_checkpoint():
    run = run_with(
        "tokenizer.chat_template_kwargs.enable_thinking=false",
        "tokenizer.chat_template_kwargs.style=short",
        "stages.ppo.batch.chat_template_kwargs.style=long",
    )
    given = {"style": "old", "other": 1}
    assert settings_of(run, "sft", DAY, given).kwargs == {"enable_thinking": False, "style": "short", "other": 1}
    assert settings_of(run, "ppo", DAY, given).kwargs == {"enable_thinking": False, "style": "long", "other": 1}
    assert settings_of(run, "tokenizer", DAY, {}).date == DAY
    facts = facts_of_chat(run, DAY)
    assert facts["date"] == "2026-01-31"
    assert facts["ppo"] == {"enable_thinking": False, "style": "long"}
    assert list(facts) == ["date", *(name for name, section in run.stages if section is not None)]


def test_clocks_are_read_for_what_is_told_and_not_for_what_is_computed():
    # fails if a template, or anything that makes data, asks for the time: seen
    from pathlib import Path

    import rlhfjax

    root = Path(rlhfjax.__file__).parent
    asking = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(
            name in path.read_text()
            for name in (".now(", ".today(", "time.time(", "time.time_ns(", "localtime", "strftime(")
        )
    }
    told = {"stages/chat_settings.py", "stages/evaluate.py", "runs/manifest.py", "runs/lock.py", "stores/lease.py"}
    told |= {f"host/{name}.py" for name in ("time_ledger", "examination")}
    told |= {"faults.py", "moderation/audit.py", "rehearsal/stand_in.py"}
    assert asking <= told | {"text/templates.py", "training/sinks.py"}
