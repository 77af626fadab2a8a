"""The walker over compiled programs, against products and bytes that were counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks.compiled import measured
from benchmarks.shapes import CASES
from rlhfjax.planning.hlo import Program
from rlhfjax.sharding import make_mesh

MESH = {"data": 2, "fsdp": 4}
# A product as a TPU writes it: the 3 of the result is an axis of its batch, of which a window finds one place each.
TPU = """HloModule jit_f

%body (state: (s32[], f32[4,1,6])) -> (s32[], f32[4,1,6]) {
  %state = (s32[], f32[4,1,6]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = f32[4,1,6] get-tuple-element(%state), index=1
  %sent = (f32[4,1,6], f32[4,1,6], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %got = f32[4,1,6] collective-permute-done(%sent), metadata={op_name="a
}} line that begins so"}
  ROOT %out = (s32[], f32[4,1,6]) tuple(%next, %got)
}

%condition (state.1: (s32[], f32[4,1,6])) -> pred[] {
  %state.1 = (s32[], f32[4,1,6]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (lhs: f32[4,1,6], rhs: f32[3,6,5]) -> f32[4,3,5] {
  %lhs = f32[4,1,6] parameter(0)
  %rhs = f32[3,6,5] parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4,1,6]) tuple(%zero, %lhs)
  %looped = (s32[], f32[4,1,6]) while(%begin), condition=%condition, body=%body
  %x.1 = f32[4,1,6] get-tuple-element(%looped), index=1
  ROOT %made = f32[4,3,5] convolution(%x.1, %rhs), window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=b0f_0io->b0f
}
"""


def test_windows_that_are_products_and_loops_that_step_by_two():
    top = Program(TPU).walked()
    assert top.total("flops") == 2 * (4 * 3 * 5) * 6
    (loop,) = top.loops
    assert loop.trips == 4
    assert [one.kind for one in loop.collectives] == ["permute"]
    assert top.total_bytes() == 4 * (4 * 6 * 4)


def text_of(function, specs, *shapes):
    mesh = make_mesh(**MESH)
    spread = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(spread).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_products_of_a_loop_count_as_often_as_it_runs():
    def scanned(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, w)[0]

    text = jax.jit(scanned).lower(jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))).compile().as_text()
    top = Program(text).walked()
    assert top.total("flops") == 5 * 2 * 8 * 16 * 16
    assert [(loop.flops, times) for loop, times in top.of_turns(5)] == [(2 * 8 * 16 * 16, 1.0)]


def test_a_loop_that_data_ends_counts_all_parts():
    def some(parts, count):
        def add(i, total):
            part = jax.lax.dynamic_index_in_dim(parts, i, keepdims=False)
            return total + jnp.tanh(part) @ jnp.tanh(part)

        return jax.lax.fori_loop(0, count, add, jnp.zeros((16, 16)))

    text = jax.jit(some).lower(jnp.zeros((7, 16, 16)), jnp.int32(3)).compile().as_text()
    assert Program(text).walked().total("flops") == 7 * 2 * 16**3


# As libtpu writes a sampler's experts, attention through its cache, and a sum over slices that hosts carry.
SAMPLER = """HloModule jit_draw

%again (s: (s32[], s32[], f32[32,4,6])) -> (s32[], s32[], f32[32,4,6]) {
  %s = (s32[], s32[], f32[32,4,6]) parameter(0)
  %x = f32[32,4,6] get-tuple-element(%s), index=2
  %one = f32[1,4,6] dynamic-slice(%x), dynamic_slice_sizes={1,4,6}
  %made = f32[4,4] dot(%one, %one), lhs_contracting_dims={0,2}, rhs_contracting_dims={0,2}
  ROOT %out = (s32[], s32[], f32[32,4,6]) tuple(%s)
}

%over (t: (s32[], s32[], f32[32,4,6])) -> pred[] {
  %t = (s32[], s32[], f32[32,4,6]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: (s32[], s32[], f32[32,4,6]), q: f32[8,3,5], k: f32[8,7,5]) -> f32[8,3,7] {
  %x.1 = (s32[], s32[], f32[32,4,6]) parameter(0)
  %q = f32[8,3,5] parameter(1)
  %k = f32[8,7,5] parameter(2)
  %w = (s32[], s32[], f32[32,4,6]) while(%x.1), condition=%over, body=%again, metadata={op_name="Experts/while"}
  %t.1 = token[] after-all()
  %sent = (f32[8,3], u32[], token[]) send(%q, %t.1), frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %scores = f32[8,3,7] dot(%q, %k), lhs_contracting_dims={2}, metadata={op_name="draw/bhc,bsc->bhs/dot"}
}
"""


def test_another_pass_over_experts_is_none_and_attention_is_apart():
    top = Program(SAMPLER).walked()
    assert top.total("flops") == 2 * 4 * 4 * 6  # the first pass; the arrays have 32 parts
    assert top.total("cached_flops") == 2 * 8 * 3 * 7 * 5
    assert top.total_between() == {"all_reduce": 8 * 3 * 4}
    assert top.total_bytes() == 0


@pytest.mark.parametrize(
    ("collective", "kind", "result", "ring"),
    [
        (partial(jax.lax.psum, axis_name="fsdp"), "all_reduce", 64 * 4, 2 * 3 / 4),
        (partial(jax.lax.all_gather, axis_name="fsdp", tiled=True), "all_gather", 4 * 64 * 4, 3 / 4),
        (partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True), "reduce_scatter", 64 * 4, 3 / 4),
    ],
)
def test_bytes_of_collectives(collective, kind, result, ring):
    (one,) = Program(text_of(collective, (PartitionSpec(),), (64,))).walked().collectives
    assert (one.kind, one.result, one.ring) == (kind, result, ring * result)


@pytest.mark.parametrize(
    ("end", "said"), [("kill -SEGV $$", "the compiler died: SIGSEGV"), ("echo no room >&2; exit 1", "exit 1: no room")]
)
def test_a_compiler_that_dies_is_a_row(tmp_path, end, said):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{end}\n")
    script.chmod(0o700)
    (row,) = measured(CASES[0], "rlhfjax", python=str(script))
    assert (row["workload"], row["metric"], row["value"]) == (CASES[0].name, "failed", said)
