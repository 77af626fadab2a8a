"""The batch behind the server: who waits, who leaves, and that nothing is compiled for anybody."""

import asyncio
import json
import random
from dataclasses import replace

import httpx
import jax
import numpy as np
import pytest

from rlhfjax.errors import DataError
from rlhfjax.generation import Engine, SamplingParams
from rlhfjax.serving.jobs import Job
from rlhfjax.serving.models import serve_model
from rlhfjax.serving.worker import Full, Worker

from .conftest import COMPILED, LIMITS, PATIENCE, alone, wait_for

ENDLESS = SamplingParams(200, -1, 0)


def job(policy, told, seed=0, sampling=ENDLESS, **how):
    ids = policy.tokenizer.encode("the movie")
    return Job([1, *ids], sampling, policy.tokenizer, told.append, seed=seed, **how)


def text_of(told):
    return "".join(delta.text for delta in told)


@pytest.fixture
def worker():
    made = Worker(queue=2)
    yield made
    made.close()


def test_a_worker_writes_what_the_model_writes_and_bounds_who_waits(policy, worker):
    batch = serve_model("tiny", policy, replace(LIMITS, slots=1)).batch
    told = [[] for _ in range(4)]
    short = SamplingParams(12, policy.tokenizer.eos_id, 0)
    worker.submit(batch, [job(policy, told[place], 7, short, uid=place) for place in range(3)])
    with pytest.raises(Full):
        worker.submit(batch, [job(policy, told[3])])
    worker.start()
    wait_for(lambda: all(one and one[-1].finish_reason for one in told[:3]), "three responses")
    expected = list(alone(policy, "the movie", 12, n=3, seed=7))
    assert [text_of(one) for one in told[:3]] == [text for text, *_ in expected]
    assert [one[-1].drawn for one in told[:3]] == [len(tokens) for _, _, tokens, _ in expected]
    assert worker.waiting == 0
    assert worker.call(lambda: 6 * 7).result(PATIENCE) == 42
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0).result(PATIENCE)


def test_an_id_that_the_tokenizer_does_not_know_ends_one_response_and_no_other(policy, web, monkeypatch):
    real = policy.tokenizer.decode

    def decode(ids):  # as if the vocabulary of the model had more ids than that of the tokenizer
        ids = list(ids)
        if 77 in ids:
            raise DataError("got 77")
        return real(ids)

    monkeypatch.setattr(policy.tokenizer, "decode", decode)
    how = {"model": "tiny", "prompt": [1, 9], "max_tokens": 3, "seed": 1}
    refused = web.post("/v1/completions", json=how | {"logit_bias": {"77": 100}})
    assert (refused.status_code, refused.json()["error"]["type"]) == (500, "server_error")
    assert "77" in refused.json()["error"]["message"]
    assert web.post("/v1/completions", json=how | {"logit_bias": {"77": -100}}).status_code == 200
    assert web.get("/healthz").status_code == 200


def test_all_who_wait_hear_of_a_device_that_fails(policy, worker, monkeypatch):
    batch = serve_model("tiny", policy, LIMITS).batch
    told = [[] for _ in range(3)]
    monkeypatch.setattr(Engine, "step", lambda engine: 1 / 0)
    worker.queue = 3
    worker.submit(batch, [job(policy, one) for one in told])
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # its traceback is not of this test
    worker.start()
    wait_for(lambda: not worker.alive, "the end of the thread")
    assert [one[-1].finish_reason for one in told] == ["error"] * 3
    with pytest.raises(RuntimeError, match="gone"):
        worker.submit(batch, [job(policy, [])])
    with pytest.raises(RuntimeError, match="gone"):
        worker.call(lambda: 1)


async def stream(client, seed, leave_after=None):
    """The text of one stream, all of it or until so many events came and the client leaves."""
    body = {"model": "tiny", "prompt": "a bad film", "max_tokens": 60, "seed": seed, "stream": True}
    pieces = []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
                if len(pieces) == leave_after:
                    return None
    return "".join(pieces)


def test_clients_that_leave_free_their_slots_and_the_others_read_what_they_would_alone(policy, server):
    url, hall = server
    engine = hall.models["tiny"].batch.engine

    async def all_of_them():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            return await asyncio.gather(*(stream(client, seed, 3 if seed % 2 else None) for seed in range(20)))

    texts = asyncio.run(all_of_them())
    wait_for(lambda: engine.free == LIMITS.slots and not engine.busy, "all slots to be free")
    for seed in range(0, 20, 2):
        [(text, *_)] = alone(policy, "a bad film", 60, seed=seed)
        assert texts[seed] == text
    assert texts[1::2].count(None) > 5  # some responses are shorter than their clients' patience
    assert hall.worker.waiting == 0


def test_two_hundred_requests_with_settings_of_any_kind_compile_nothing(server):
    url, _ = server
    rng = random.Random(0)

    def request():
        prompt = [rng.randrange(300) for _ in range(rng.randrange(1, 200))]
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": rng.randrange(1, 5),
            "temperature": rng.choice([0, rng.uniform(0.1, 2)]),
            "top_p": rng.choice([1, rng.uniform(0, 1)]),
            "top_k": rng.choice([0, rng.randrange(1, 300)]),
            "seed": rng.randrange(2**32),
            "n": rng.randrange(1, 3),
            "stop": rng.choice([None, "a", ["b", "cd"]]),
            "logprobs": rng.choice([None, 0, 5]),
            "logit_bias": {str(rng.randrange(300)): rng.uniform(-9, 9) for _ in range(rng.choice([0, 3]))},
            "echo": rng.random() < 0.2,
        }
        if rng.random() < 0.1:
            return "/v1/embeddings", {"model": "tiny", "input": prompt}
        if rng.random() < 0.1:
            return "/v1/score", {"model": "judge", "prompt": prompt, "responses": [[1, 2], [3]]}
        return "/v1/completions", body

    async def ask(client, path, body):
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text

    async def all_of_them():
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
            for _ in range(10):
                await asyncio.gather(*(ask(client, *request()) for _ in range(20)))

    before = len(COMPILED)
    asyncio.run(all_of_them())
    assert len(COMPILED) == before
    jax.jit(lambda x: x + np.float32(before + 0.5)).lower(np.float32(1)).compile()
    assert len(COMPILED) > before  # what counts does count
