"""The chat page's files, what they may load, and votes over HTTP."""

import json

import httpx
import openai
import pytest

from rlhfjax.serving.feedback import COMPARISONS, THUMBS, Feedback
from rlhfjax.serving.shield import Access
from serving.conftest import served

USER = [{"role": "user", "content": "the film"}]
COMPARED = {"messages": USER, "responses": ["good", "bad"], "ranks": [2, 1], "models": ["a", "b"]}
RATED = {"messages": USER, "completion": "good", "label": False, "models": ["a"]}


@pytest.fixture(scope="module")
def place(policy, tmp_path_factory):
    """The address of a server that keeps votes and asks for a token, and where it keeps them."""
    folder = tmp_path_factory.mktemp("votes")
    with served({"policy": policy}, access=Access(token="a" * 16)) as (address, hall):
        hall.feedback = Feedback(folder)
        yield address, folder


def post(address, **vote):
    headers = {"Authorization": f"Bearer {'a' * 16}"}
    return httpx.post(f"{address}/v1/feedback", json={"id": "vote-0001", "consent": True} | vote, headers=headers)


def test_the_page_is_of_this_server_alone_and_needs_no_token(place):
    address, _ = place
    page = httpx.get(f"{address}/")
    assert page.status_code == 200
    assert (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
        in page.headers["content-security-policy"]
    )
    assert "http" not in page.text.replace("http-equiv", "")
    for name, kind in (("chat.js", "text/javascript"), ("server.js", "text/javascript"), ("tree.js", "text/javascript"),
                       ("chat.css", "text/css")):  # fmt: skip
        part = httpx.get(f"{address}/page/{name}")
        assert part.headers["content-type"].startswith(kind)
        assert "innerHTML" not in part.text
    for name in ("index.html", "..%2fapp.py", "%2e%2e%2fapp.py", "x", "../app.py"):
        assert httpx.get(f"{address}/page/{name}").status_code in (401, 404)
    assert httpx.get(f"{address}/v1/chat/settings").status_code == 401


def test_votes_are_records_once(place):
    address, folder = place
    assert post(address, **COMPARED).json() == {"kept": True, "new": True}
    assert post(address, **COMPARED).json() == {"kept": True, "new": False}
    assert post(address, id="vote-0002", **RATED).json()["new"]
    [compared] = map(json.loads, (folder / COMPARISONS).read_text().splitlines())
    assert {name: compared[name] for name in COMPARED} == COMPARED
    assert "I agree" in compared["consent"]
    [rated] = map(json.loads, (folder / THUMBS).read_text().splitlines())
    assert {name: rated[name] for name in RATED} == RATED


@pytest.mark.parametrize(
    "wrong",
    [COMPARED | {"consent": False}, COMPARED | {"ranks": [2, 2]}, COMPARED | {"label": True}, RATED | {"label": None},
     COMPARED | {"id": "../x"}, COMPARED | {"responses": ["one"]}, RATED | {"sender": "1.2.3.4"}, {"messages": USER}],
)  # fmt: skip
def test_what_is_no_vote_is_refused(place, wrong):
    address, folder = place
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    answer = post(address, **wrong)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_old_exchanges_are_left_out_where_that_is_asked_for(place):
    address, _ = place
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="a" * 16)
    long = [{"role": "user", "content": "a long one " * 8}, {"role": "assistant", "content": "good"}] * 20
    asked = {"model": "policy", "messages": [*long, *USER], "max_tokens": 4, "seed": 1}
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**asked)
    made = client.chat.completions.create(**asked, extra_body={"drop_oldest": True})
    kept = [*long[made.dropped :], *USER]
    assert 0 < made.dropped < len(long)
    assert made.dropped % 2 == 0
    again = client.chat.completions.create(**(asked | {"messages": kept}))
    assert again.choices[0].message.content == made.choices[0].message.content
