"""A model that is replaced on the disk while one of its answers is being written."""

import json
import shutil
import threading

import httpx
import jax.numpy as jnp
import pytest
from tiny import params_of, tiny

import rlhfjax
from rlhfjax.serving.limits import Limits
from rlhfjax.serving.replacing import Replacing
from rlhfjax.training.checkpoint import Checkpoints, meta_of

from .conftest import COMPILED, NETWORK, served, wait_for

ASKED = {"model": "tiny", "prompt": "a bad film", "max_tokens": 60, "seed": 4, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def steps(tmp_path_factory, policy):
    """Three checkpoints: of two models of one shape, and of one of another shape."""
    folder = tmp_path_factory.mktemp("steps") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=9)
    for step, network in ((1, NETWORK), (2, NETWORK), (3, tiny("llama-gqa", vocab_size=300, context=256, layers=2))):
        meta = meta_of("policy", network, policy.tokenizer, averaged=False, stage="sft")
        checkpoints.save(step, {"policy": params_of(network, seed=step, std=0.2)}, (jnp.int32(0),), meta)
    checkpoints.close()
    return folder


def test_a_stream_goes_on_with_the_model_that_began_it(steps, tmp_path):
    there, said = tmp_path / "sft" / "checkpoints", []
    there.mkdir(parents=True)
    shutil.copytree(steps / "1", there / "1")
    with (
        served({"tiny": rlhfjax.load(there.parent)}, Limits(slots=2)) as (url, hall),
        httpx.Client(base_url=url) as web,
    ):
        replacing = Replacing(hall, {"tiny": str(there.parent)}, rlhfjax.load, said.append)
        replacing.look()
        assert (said, hall.models["tiny"].model.step_dir.name) == ([], "1")
        first = web.post("/v1/completions", json=ASKED).json()
        gate = threading.Event()
        try:
            with web.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as answer:
                wait_for(lambda: hall.models["tiny"].batch.jobs, "the stream to begin")
                hall.worker.call(gate.wait)  # nothing more is written until the model was replaced
                shutil.copytree(steps / "2", there / "2")
                before = len(COMPILED)
                replacing.look()
                assert len(COMPILED) == before  # of one shape: nothing is compiled
                gate.set()
                lines = [line for line in answer.iter_lines() if line.startswith("data: {")]
        finally:
            gate.set()
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == first["choices"][0]["text"]
        second = web.post("/v1/completions", json=ASKED).json()
        assert second["choices"][0]["text"] != first["choices"][0]["text"]
        assert second["system_fingerprint"] != first["system_fingerprint"]
        assert "2" in said[0]

        shutil.copytree(steps / "3", there / "3")
        replacing.look()
        assert hall.models["tiny"].model.config.layers == 2
        third = web.post("/v1/completions", json=ASKED).json()
        assert third["choices"][0]["text"] not in (first["choices"][0]["text"], second["choices"][0]["text"])

        shutil.copytree(steps / "2", there / "4")
        damaged = max(
            (there / "4" / "policy").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
        )
        damaged.write_bytes(b"x" * damaged.stat().st_size)
        replacing.look()
        replacing.look()
        assert [text.startswith("tiny: goes on as it was") for text in said] == [False, False, True]
        assert web.post("/v1/completions", json=ASKED).json()["choices"] == third["choices"]
