"""The page about the server, run against one."""

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import httpx
import openai
import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")


@pytest.fixture
def asked(server, monkeypatch):
    """The address of a server where the model has the name that it has in the document."""
    url, hall = server
    monkeypatch.setitem(hall.models, "quickstart", hall.models["tiny"])
    return url


def test_its_python_runs(asked, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    made = []
    real = openai.OpenAI
    monkeypatch.setattr(openai, "OpenAI", lambda **how: made.append(real(**how)) or made[-1])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace("http://127.0.0.1:8000", asked), "serve.md", "exec"), {})
    made[0].close()
    assert printed.getvalue().strip()


def test_its_requests_are_answered_and_all_its_paths_are_there(asked):
    lines = re.findall(r"^curl .*?[^\\]$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(lines) == 2
    for words in (shlex.split(line.replace("\\\n", " ")) for line in lines):
        url = words[1].replace("http://127.0.0.1:8000", asked)
        given = dict(zip(words[2::2], words[3::2], strict=True))
        header = dict([given["-H"].split(": ")]) if given else {}
        answer = httpx.post(url, content=given["-d"], headers=header) if given else httpx.get(url)
        assert answer.status_code == 200, answer.text
    known = httpx.get(f"{asked}/openapi.json").json()["paths"]
    named = set(re.findall(r"^\| `(/[\w/]+)`", PAGE, re.MULTILINE)) | {"/readyz"}
    assert named - {"/openapi.json"} <= set(known)
    assert json.dumps(known)
