# ruff: noqa: E501  (lines of a program are as long as they are)
"""Bytes that operations move, and FLOPs of kernels, against what was counted by hand in a text."""

from rlhfjax.planning.hlo import Program

# One layer of two is cut from its stack inside a fusion, one row of a cache is replaced, and rows are multiplied.
TEXT = """HloModule jit_f

%cut (stack: f32[2,8,4], at: s32[]) -> f32[8,4] {
  %stack = f32[2,8,4] parameter(0)
  %at = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %part = f32[1,8,4] dynamic-slice(%stack, %at, %zero.1, %zero.1), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4] bitcast(%part)
}

%product (rows: f32[3,8], weights: f32[2,8,4], at.1: s32[]) -> f32[3,4] {
  %rows = f32[3,8] parameter(0)
  %weights = f32[2,8,4] parameter(1)
  %at.1 = s32[] parameter(2)
  %layer = f32[8,4] fusion(%weights, %at.1), kind=kLoop, calls=%cut
  ROOT %made = f32[3,4] dot(%rows, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%replace (cache: f32[16,4], new: f32[1,4], row: s32[]) -> f32[16,4] {
  %cache = f32[16,4] parameter(0)
  %new = f32[1,4] parameter(1)
  %row = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %put = f32[16,4] dynamic-update-slice(%cache, %new, %row, %zero.2)
}

ENTRY %main (x: f32[3,8], w: f32[2,8,4], c: f32[16,4], n: f32[1,4], i: s32[]) -> (f32[3,4], f32[16,4]) {
  %x = f32[3,8] parameter(0)
  %w = f32[2,8,4] parameter(1)
  %c = f32[16,4] parameter(2)
  %n = f32[1,4]{1,0:T(1,128)S(1)} parameter(3)
  %i = s32[] parameter(4)
  %y = f32[3,4] fusion(%x, %w, %i), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"700"}
  %d = f32[16,4] fusion(%c, %n, %i), kind=kLoop, calls=%replace, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %both = (f32[3,4], f32[16,4]) tuple(%y, %d)
}
"""
KERNELS = """HloModule jit_g

ENTRY %main (q: bf16[2,4,512,128], k: bf16[2,2,512,128], a: bf16[64,32], b: bf16[32,144]) -> f32[64,144] {
  %q = bf16[2,4,512,128] parameter(0)
  %k = bf16[2,2,512,128] parameter(1)
  %a = bf16[64,32] parameter(2)
  %b = bf16[32,144] parameter(3)
  %splash_mha_fwd.1 = bf16[2,4,512,128] custom-call(%a, %a, %q, %k, %k), custom_call_target="tpu_custom_call"
  %splash_mha_dq.1 = bf16[2,4,512,128] custom-call(%a, %a, %q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %g = (f32[64,144], s8[4]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}
"""


def test_a_part_of_an_array_counts_as_that_part():
    top = Program(TEXT).walked()
    product = 4 * (3 * 8 + 8 * 4 + 3 * 4) + 4  # rows, one of two layers, result; the index
    replaced = 4 * 4 + 4  # what is written; the new row is in the core's own memory
    assert top.total("moved") == product + replaced
    assert top.total("flops") == 2 * 3 * 8 * 4
    assert top.total("cycles") == 700  # what says that there is no estimate is none


def test_kernels_are_counted_by_their_shapes():
    top = Program(KERNELS).walked()
    square = 2 * 4 * 512 * 512 * 128  # B N T S H: a causal product is half of 2 B N T S H
    assert top.total("attended_flops") == (2 + 3) * square
    assert top.total("flops") == 2 * 64 * 32 * 144
    assert top.total("kernel_flops") == top.total("attended_flops") + top.total("flops")
