"""One tiny policy and one tiny reward model behind a real server, on a port of its own, in a thread."""

import contextlib
import threading
import time

import httpx
import jax
import openai
import pytest
from tiny import params_of, scalar_params_of, tiny

from rlhfjax.api import Model
from rlhfjax.serving.limits import Limits
from rlhfjax.serving.running import listen, opened, server_of
from rlhfjax.serving.shield import Access
from rlhfjax.text.tokenizer import Tokenizer

NETWORK = tiny("llama-gqa", vocab_size=300, context=256, layers=1)
LIMITS = Limits(slots=4, queue=40, body_bytes=20_000, body_seconds=0.5, seconds=120)
OPEN = Access()
COMPILED = []  # programs that were compiled, one entry each
PATIENCE = 60  # seconds; what does not come then never comes


def _note(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_note)


@pytest.fixture(scope="session")
def policy():
    tokenizer = Tokenizer.train(["the movie was good", "a bad film, and a long one"] * 20, 300)
    return Model("policy", NETWORK, params_of(NETWORK, seed=1, std=0.2), tokenizer)


@pytest.fixture(scope="session")
def reward(policy):
    return Model("reward", NETWORK, scalar_params_of(NETWORK, seed=2), policy.tokenizer)


def alone(policy, prompt, most, n=1, **how):
    """(text, finish reason, tokens, log-probabilities) of what the model itself writes, by one program for all."""
    [made] = policy.generate([prompt], max_new_tokens=64, n=4, **how)
    for one in made[:n]:
        tokens, text = one.tokens[:most], policy.tokenizer.decode(one.tokens[:most])
        yield text, "length" if len(tokens) < len(one.tokens) else one.finish_reason, tokens, one.log_probs[:most]


@contextlib.contextmanager
def served(models, limits=LIMITS, access=OPEN, moderator=None):
    """The address of a server of these models, and its hall."""
    with opened(models, limits, lambda text: None, moderator) as hall:
        taken = listen("127.0.0.1", 0)
        server = server_of(hall, access)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            wait_for(lambda: server.started, "the server to listen")
            yield f"http://127.0.0.1:{taken.getsockname()[1]}", hall
        finally:
            server.should_exit = True
            thread.join()
            taken.close()


def wait_for(holds, what):
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def server(policy, reward):
    with served({"tiny": policy, "judge": reward}) as made:
        yield made


@pytest.fixture(scope="session")
def url(server):
    return server[0]


@pytest.fixture(scope="session")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def web(url):
    with httpx.Client(base_url=url, timeout=PATIENCE) as made:
        yield made
