"""Every program of attention against loops over tokens in float64, value and gradient."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.layout import laid_out_by
from rlhfjax.models import attention, kernels, splash
from rlhfjax.models.attention import Scoring, attend
from rlhfjax.sharding import make_mesh
from rlhfjax.sharding.activations import layout_of

# Runs of segments by row: packed documents with padding after them, or before; 0 is padding.
PACKED = [(1, 70), (2, 1), (3, 60), (0, 69)], [(1, 3), (2, 130), (3, 67)]
ONE = [(1, 200)], [(1, 170), (0, 30)]
LEFT = [(0, 30), (1, 170)], [(0, 199), (1, 1)]
SHORT = [(1, 1), (2, 6)], [(0, 2), (1, 5)]
# Two groups in a row: a prompt and what goes on from it; the second prompt is empty, and so is a response of the first.
FORKED = [(1, 60), (2, 3), (3, 70), (5, 1), (7, 9), (8, 40), (0, 17)], [(1, 1), (2, 99), (3, 100)]
FROM = {2: 1, 3: 1, 4: 1, 5: 1, 7: 6, 8: 6}
CASES = {
    "causal": (ONE, 2, {}),
    "packed": (PACKED, 2, {}),
    "left padding": (LEFT, 2, {}),
    "window": (PACKED, 2, {"window": 9}),
    "window wider than a block": (ONE, 2, {"window": 100}),
    "window of all": (PACKED, 2, {"window": 200}),
    "soft cap": (PACKED, 2, {"softcap": 2.0}),
    "window, soft cap, scale": (ONE, 2, {"window": 64, "softcap": 3.0, "scale": 0.4}),
    "a key head for each query": (PACKED, 4, {}),
    "one key head": (LEFT, 1, {}),
    "short": (SHORT, 2, {}),
}
IN_PROGRAMS = tuple(CASES)
CASES |= {
    "shared prompts": (FORKED, 2, {}),
    "shared prompts, soft cap": (FORKED, 2, {"softcap": 2.0}),
    "four rows: packed": ((*PACKED, *LEFT), 2, {}),
    "four rows: traced window": ((*PACKED, *LEFT), 2, {"window": 9}),
    "four rows: soft cap": ((*PACKED, *LEFT), 2, {"softcap": 2.0}),
    "four rows: shared prompts": ((*FORKED, *FORKED), 2, {}),
}
HEADS, SIZE = 4, 16
ON_GPU = jax.default_backend() == "gpu"
NEEDS_GPU = pytest.mark.skipif(not ON_GPU, reason="cuDNN needs a GPU of NVIDIA's; RLHFJAX_TEST_PLATFORM=cuda takes one")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", jax.default_backend() != "tpu")


def arrays(runs, key_heads, dtype=jnp.float32):
    """Queries, keys, values, the gradient of the output, and segments."""
    rng, length = np.random.default_rng(0), sum(count for _, count in runs[0])
    made = [rng.normal(size=(len(runs), length, heads, SIZE)) for heads in (HEADS, key_heads, key_heads, HEADS)]
    segments = np.asarray([[name for name, count in row for _ in range(count)] for row in runs], np.int32)
    return [np.asarray(jnp.asarray(x, dtype), np.float64) for x in made], segments


def by_loops(query, key, value, grad, segments, window=None, scale=None, softcap=None, prefixes=None):
    """Output and gradients, one query at a time; a token sees a neighbour when all between are of its segment, and
    every token of the segment that it goes on from.
    """
    scale, group = scale or SIZE**-0.5, HEADS // key.shape[2]
    out, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
    for b, t, h in np.ndindex(query.shape[:3]):
        k, first = h // group, t
        while first > 0 and segments[b, first - 1] == segments[b, t] and (window is None or t - first + 1 < window):
            first -= 1
        seen = list(range(first, t + 1))
        if prefixes is not None and prefixes[b, t] != segments[b, t]:
            seen += np.flatnonzero(segments[b] == prefixes[b, t]).tolist()
        raw = scale * key[b, seen, k] @ query[b, t, h]
        scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
        p = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        out[b, t, h] = p @ value[b, seen, k]
        d_p = value[b, seen, k] @ grad[b, t, h]
        d_raw = p * (d_p - p @ d_p) * (1.0 if softcap is None else 1 - np.tanh(raw / softcap) ** 2)
        d_value[b, seen, k] += np.outer(p, grad[b, t, h])
        d_query[b, t, h] = scale * d_raw @ key[b, seen, k]
        d_key[b, seen, k] += scale * np.outer(d_raw, query[b, t, h])
    return out, d_query, d_key, d_value


def computed(program, tensors, segments, local=True, dtype=jnp.float32, prefixes=None, **how):
    how = {"implementation": program, "prefixes": prefixes, "scoring": Scoring(**how)}

    @jax.jit
    def value_and_gradients(segments, local, query, key, value, grad):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, segments, local, **how), query, key, value)
        return out, *back(grad)

    return value_and_gradients(jnp.asarray(segments), local, *(jnp.asarray(x, dtype) for x in tensors))


@cache
def looped(case):
    """What goes into every program, and what the loops make of it, once for all programs."""
    runs, key_heads, how = CASES[case]
    tensors, segments = arrays(runs, key_heads)
    how = how | ({"prefixes": prompts_of(segments)} if runs[0] is FORKED[0] else {})
    return tensors, segments, how, by_loops(*tensors, segments, **how)


def prompts_of(segments):
    """The segments that those of `FORKED` go on from."""
    return np.vectorize(lambda name: FROM.get(name, name))(segments).astype(np.int32)


# fails with a window one token too wide, a block that begins one too late, and segments that are not compared: seen
@pytest.mark.parametrize("case", IN_PROGRAMS)
@pytest.mark.parametrize("program", ["xla", "blocked", "splash"])
def test_every_program_equals_the_loops(program, case):
    tensors, segments, how, expected = looped(case)
    for got, wanted in zip(computed(program, tensors, segments, **how), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


# fails when a response sees the others of its prompt, or not its prompt, and when a prompt sees responses: seen
@pytest.mark.parametrize("case", ["shared prompts", "shared prompts, soft cap"])
@pytest.mark.parametrize("program", ["xla", "blocked", "splash"])
def test_responses_see_the_prompt_that_they_share_and_not_each_other(program, case):
    tensors, segments, how, expected = looped(case)
    for got, wanted in zip(computed(program, tensors, segments, **how), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@NEEDS_GPU
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_responses_see_the_prompt_that_they_share_in_half_precision(softcap):
    tensors, segments = arrays(FORKED, 2, jnp.bfloat16)
    how = {"prefixes": prompts_of(segments), "softcap": softcap}
    got = computed("cudnn", tensors, segments, dtype=jnp.bfloat16, **how)
    for mine, wanted in zip(got, by_loops(*tensors, segments, **how), strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float64), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(("program", "length", "window"), [("splash", 2**15 + 1, None), ("blocked", 7, 3)])
def test_what_takes_no_shared_prompts_says_so(program, length, window):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, SIZE), jnp.float32) for heads in (HEADS, 2, 2)]
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    asked = partial(attend, local=True, scoring=Scoring(window), implementation=program)
    with pytest.raises(ValueError, match="prefixes"):
        jax.eval_shape(lambda *arrays: asked(*arrays, prefixes=arrays[-1]), *shapes, segments)


@NEEDS_GPU
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", IN_PROGRAMS)
def test_cudnn_equals_the_loops_in_half_precision(case, dtype):
    runs, key_heads, how = CASES[case]
    tensors, segments = arrays(runs, key_heads, dtype)
    query, key = (jnp.asarray(x, dtype) for x in tensors[:2])
    assert kernels.cudnn_takes(query, key, how.get("softcap")) == ("softcap" not in how)
    for got, wanted in zip(
        computed("cudnn", tensors, segments, dtype=dtype, **how), by_loops(*tensors, segments, **how), strict=True
    ):
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("program", ["xla", "blocked", "splash"])
def test_layers_of_a_scan_choose_their_window_by_a_traced_bool(program):
    how = {"scoring": Scoring(window=9), "implementation": program}
    run = jax.jit(lambda flag, segments, *qkv: attend(*qkv, segments, flag, **how))
    for local, case in ((True, "window"), (False, "packed")):
        tensors, segments, _, (wanted, *_) = looped(case)
        got = run(jnp.asarray(local), jnp.asarray(segments), *(jnp.asarray(x, jnp.float32) for x in tensors[:3]))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


def test_blocks_never_hold_the_scores_of_all_pairs():
    tensors, segments = arrays(([(1, 512)],), 2)

    def shapes(program):
        query, key, value, _ = (jnp.asarray(x, jnp.float32) for x in tensors)
        loss = lambda *qkv: attend(*qkv, jnp.asarray(segments), True, implementation=program).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, value).as_text()

    assert "512x512xf32" in shapes("xla")
    assert "512x512xf32" not in shapes("blocked")


def test_what_runs_is_decided_from_static_facts():
    tensors, segments = arrays(SHORT, 2)
    wanted = by_loops(*tensors, segments)[0]
    if not ON_GPU:  # what cuDNN does not take goes to the reference
        assert not kernels.cudnn_takes(
            jnp.zeros((1, 8, 4, 64), jnp.bfloat16), jnp.zeros((1, 8, 4, 64), jnp.bfloat16), None
        )
    for program in ("cudnn", "auto"):
        np.testing.assert_allclose(computed(program, tensors, segments)[0], wanted, rtol=1e-4, atol=2e-5)
    with pytest.raises(ValueError, match="'flash'"):
        computed("flash", tensors, segments)


MESHES = {
    "rows and heads": {"data": 4, "tensor": 2},
    "whole rows": {"data": 8},  # of which there are 4
    "tokens": {"data": 2, "sequence": 2, "tensor": 2},
    "a key head for two": {"data": 2, "sequence": 4},
    "queries of a head for two": {"sequence": 4, "tensor": 2},
    "queries of a head for two, no tensor": {"sequence": 8},
}
ON_DEVICES = [("packed", mesh) for mesh in MESHES] + [
    ("shared prompts", "rows and heads"),
    ("shared prompts", "a key head for two"),
    ("shared prompts", "queries of a head for two"),
    ("traced window", "tokens"),
    ("traced window", "queries of a head for two, no tensor"),
    ("soft cap", "a key head for two"),
]


# Who has which rows, heads and tokens is chosen before the program is: of the slow one, a mesh of each kind.
OF_SPLASH = [
    ("packed", "rows and heads"),
    ("packed", "tokens"),
    ("shared prompts", "a key head for two"),
    ("traced window", "queries of a head for two, no tensor"),
]


# fails with places of other devices, and with key heads that are repeated in turn: seen
@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("program", "kind", "mesh"),
    [("blocked", *case) for case in ON_DEVICES]
    + [pytest.param("splash", *case, marks=[] if case in OF_SPLASH else pytest.mark.slow) for case in ON_DEVICES],
)
def test_devices_compute_their_own_rows_and_heads(program, mesh, kind):
    tensors, segments, how, expected = looped(f"four rows: {kind}")
    with laid_out_by(layout_of(make_mesh(**{"data": 1} | MESHES[mesh]))):
        got = computed(program, tensors, segments, **how)
    for mine, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("packed", "tokens"),
        ("shared prompts", "queries of a head for two"),
        ("traced window", "queries of a head for two"),
    ],
)
def test_what_cudnn_is_asked_on_devices_is_the_same(kind, mesh, monkeypatch):
    # fails with a window one token wider where queries are shared, and without the causal mask there: seen
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: plain(*a, **k | {"implementation": "xla"}))
    monkeypatch.setattr(attention, "cudnn_takes", lambda *_: True)
    tensors, segments, how, expected = looped(f"four rows: {kind}")
    with laid_out_by(layout_of(make_mesh(**{"data": 1} | MESHES[mesh]))):
        got = computed("cudnn", tensors, segments, **how)
    for mine, wanted in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=2e-5)


def test_the_configuration_chooses_the_program_also_of_a_published_model(tmp_path):
    # imported here: a machine with a GPU may have no more than what the tests of kernels need
    from rlhfjax.config import schema
    from rlhfjax.stages.models import new_model
    from rlhfjax.training.checkpoint import load_model, meta_of, save_model

    chosen = {"architecture": {"attention": {"implementation": "xla"}}}
    settings = schema.Model.model_validate({"layers": 1, "width": 16, "context": 8} | chosen)
    model = new_model(settings, 16)
    assert (model.config.attention, new_model(schema.Model(), 16).config.attention) == ("xla", "auto")
    assert schema.Model.model_validate({"checkpoint": "somewhere"} | chosen).attention == "xla"
    # what a checkpoint was trained with is no property of the model
    save_model(tmp_path / "0", "policy", jax.jit(model.init)(jax.random.key(0)), meta_of("policy", model, None))
    for wanted in ("auto", "blocked"):
        assert load_model(tmp_path / "0", attention=wanted)[0].config.attention == wanted
