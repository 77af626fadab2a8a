"""One function under several targets on one machine: other programs, none mixed up, and what was before comes back."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import params_of, random_tokens, tiny

import rlhfjax
from rlhfjax.algorithms.likelihood import chunk_tokens
from rlhfjax.models import compute_dtype
from rlhfjax.models.attention import attend, takes_prefixes
from rlhfjax.models.kernels import cudnn_takes
from rlhfjax.sharding import make_mesh
from rlhfjax.target import SIZES, building_for, current, machine, target_of

CHIP = SimpleNamespace(platform="tpu")
HOPPER = SimpleNamespace(platform="cuda", compute_capability="9.0")
INSTINCT = SimpleNamespace(platform="rocm", compute_capability="gfx942")


def test_a_cpu_has_sixteen_rows_a_device_and_a_block_a_core():
    cores = len(os.sched_getaffinity(0))
    one, four = (target_of(make_mesh(devices=jax.devices()[:count])) for count in (1, 4))
    assert (one.platform, one.slots, one.blocks, one.capability) == ("cpu", 16, min(cores, 16), None)
    assert (four.slots, four.blocks) == (64, max(1, min(cores // 4, 16)))
    assert (one.part_tokens, one.most_parts, one.chunk_bytes, one.unrolled_layers) == (512, 0, 8 * 2**20, 8)


@pytest.mark.parametrize(
    ("device", "platform", "capability"), [(CHIP, "tpu", None), (HOPPER, "gpu", 9.0), (INSTINCT, "gpu", None)]
)
def test_devices_that_are_not_here_are_a_target(device, platform, capability):
    target = target_of([device] * 8)
    assert (target.platform, target.capability) == (platform, capability)
    assert (target.slots, target.blocks) == (256 * 8, 1)
    assert (target.part_tokens, target.most_parts, target.chunk_bytes, target.unrolled_layers) == (8192, 4, 2**28, 0)


def test_sizes_that_are_given_stand_in_the_place_of_the_machines():
    target = target_of(sizes={"slots": 3, "blocks": None, "unrolled_layers": 0})
    assert target == replace(machine(), slots=3, unrolled_layers=0)
    with pytest.raises(ValueError, match=r"expected sizes among slots, .*, got rows"):
        target_of(sizes={"rows": 3})


def test_facts_are_plain_and_name_every_size():
    facts = target_of([HOPPER]).facts()
    assert set(facts) == {"platform", "capability", *SIZES}
    assert {type(facts[name]) for name in SIZES} == {int}


def test_outside_of_a_build_it_is_the_machines_own():
    own, other = machine(), target_of([CHIP])
    assert current() == own == target_of()
    with building_for(other):
        assert current() == other
        with building_for(own):
            assert current() == own
        assert current() == other
    with pytest.raises(ZeroDivisionError), building_for(other):
        raise ZeroDivisionError
    assert current() == own


def test_another_thread_builds_for_the_machine_until_it_is_given_a_target():
    def given(target):
        with building_for(target):
            return current()

    with ThreadPoolExecutor(1) as pool, building_for(target_of([CHIP])):
        assert pool.submit(current).result() == machine()
        assert pool.submit(given, current()).result() == current()


# fails with a list of the process in the place of jax's context: seen
def test_programs_of_several_targets_are_kept_apart():
    traced = []

    @jax.jit
    def inner(x):
        traced.append(current().blocks)
        return x * current().blocks

    outer = jax.jit(lambda x: inner(x) + 1)
    x, two, three = jnp.float32(10), *(replace(machine(), blocks=count) for count in (12, 13))

    def called(target):
        with building_for(target):
            return float(outer(x))

    assert [called(two), called(three), called(two)] == [121, 131, 121]
    assert traced == [12, 13]
    assert float(outer(x)) == called(machine()) == 10 * machine().blocks + 1
    assert traced == [12, 13, machine().blocks]  # inside and outside it is one program


# One function, and what is made of it --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_attention_is_another_program_on_another_platform():
    # fails when a program of the platform before it is found again, or the backend of this process decides: seen
    query, segments = jnp.zeros((2, 128, 4, 64), jnp.bfloat16), jnp.ones((2, 128), jnp.int32)
    program = jax.jit(lambda query, segments: attend(query, query, query, segments, True))

    def kernels():
        lowered = program.trace(query, segments).lower(lowering_platforms=(current().platform,))
        return lowered.as_text().count("tpu_custom_call")

    assert kernels() == 0
    with building_for(target_of([CHIP])):
        assert kernels() == 1
        assert not takes_prefixes("auto", None, 2**15 + 1)
    assert kernels() == 0
    assert takes_prefixes("auto", None, 2**15 + 1)


@pytest.mark.parametrize(
    ("target", "dtype", "size", "softcap", "takes"),
    [
        (target_of([HOPPER]), "bfloat16", 256, None, True),
        (replace(target_of([HOPPER]), capability=8.0), "bfloat16", 256, None, False),
        (replace(target_of([HOPPER]), capability=8.0), "bfloat16", 128, None, True),
        (target_of([HOPPER]), "float32", 64, None, False),
        (target_of([HOPPER]), "bfloat16", 64, 30.0, False),
        (target_of([INSTINCT]), "bfloat16", 64, None, False),
        (target_of([CHIP]), "bfloat16", 64, None, False),
    ],
)
def test_cudnn_is_asked_of_the_gpu_that_is_built_for(target, dtype, size, softcap, takes):
    query = jnp.zeros((1, 8, 1, size), dtype)
    with building_for(target):
        assert cudnn_takes(query, query, softcap) == takes


def test_layers_are_written_out_where_the_target_says_and_angles_settled_on_cpus(model):
    params, tokens = params_of(model), random_tokens(2, 8)
    program = jax.jit(lambda params, tokens: model.logits(params, tokens, jnp.ones(tokens.shape, bool)))

    def made(target):
        with building_for(target):
            text = str(program.trace(params, tokens).jaxpr)
        return "unroll=2" in text, text.count("dot_general")

    written_out, products = made(machine())
    assert written_out
    assert made(replace(machine(), unrolled_layers=1))[0] is False
    rolled, fewer = made(replace(target_of([HOPPER]), capability=None))  # attention by its equation
    assert (rolled, fewer) == (False, products - 2)  # sines and cosines
    assert made(machine()) == (True, products)


def test_a_sampler_has_as_many_blocks_as_its_target_and_other_numbers_only_by_rounding(model):
    params, tokens = params_of(model), random_tokens(2, 8)
    arrange = jax.jit(model.arrange, static_argnums=1)
    prefill = jax.jit(lambda params: model.prefill(model.arrange(params), tokens, jnp.ones(tokens.shape, bool), 4)[0])

    def made(target, rows=None):
        with building_for(target):
            layer = arrange(params, rows).layers[0]["out"]
            return {name: len(layer[name]) for name in ("kernel", "rows") if name in layer}, prefill(params)

    three, gpu = replace(machine(), blocks=3), replace(target_of([HOPPER]), capability=None)
    assert made(three)[0] == {"kernel": 3}
    assert made(three, rows=1)[0] == {"rows": 3}
    assert made(gpu)[0] == made(gpu, rows=1)[0] == {"kernel": 1}
    np.testing.assert_allclose(made(three)[1], made(gpu)[1], rtol=1e-5, atol=1e-5)
    with building_for(target_of([CHIP])):
        assert model.arrange(params).stacked  # a TPU's layers are scanned


def test_logits_types_and_slots_follow_the_target():
    chip = target_of([CHIP] * 2)
    assert (chunk_tokens(1024), compute_dtype(), compute_dtype("float16")) == (2048, "float32", "float16")
    with building_for(chip):
        assert (chunk_tokens(1024), compute_dtype(), compute_dtype("float16")) == (65536, "bfloat16", "float16")
        assert chunk_tokens(10**9) == 96  # at least
    with building_for(replace(chip, chunk_bytes=2**20)):
        assert chunk_tokens(1024) == 256


DESCRIBING = {
    "runs/layouts.py",
    "target.py",
    "host/environment.py",
    "runs/manifest.py",
    "host/determinism.py",
}


def test_nothing_else_asks_which_backend_jax_has():
    package = Path(rlhfjax.__file__).parent
    asking = {str(path.relative_to(package)) for path in package.rglob("*.py") if "default_backend" in path.read_text()}
    assert asking <= DESCRIBING
