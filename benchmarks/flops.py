"""The arithmetic behind every share of a peak, in one place: what a step has to compute, however it is computed.

Only matrix products count, two operations a multiply-add. One token forward through the decoder costs

    2 · N + 2 · L · H · D · c          N = L · (d·H·D + 2·d·K·D + H·D·d + 3·d·F),  c = tokens it attends to

with L layers, width d, H heads and K key-value heads of D = d/H, feed-forward width F; each attended token costs 2·H·D
for its score and 2·H·D for its value, so a causal sequence of T tokens costs 2 · N · T + 2 · L · H · D · T² (half of
the full square, T(T+1)/2 ≈ T²/2 pairs). Logits of one token cost 2 · d · V. A backward pass costs twice its forward
pass. Padding, recomputation and logits that a loss does not need are not counted: who computes them has a lower share.

Worked for sft/A (8 × 256 tokens): N = 4 · (4·256² + 3·256·688) = 3,162,112; logits 256 · 4096 = 1,048,576;
2 · 4,210,688 · 2048 · 3 = 51.7 GFLOP, and attention 2 · 4 · 256 · 256² · 8 · 3 = 3.2 GFLOP: 55.0 GFLOP a step.
"""

from typing import Any

Shape = dict[str, int]


def decoder_parameters(shape: Shape) -> int:
    """N: the weights of the layers' matrices."""
    d, size = shape["width"], shape["width"] // shape["heads"]
    attention = 2 * d * shape["heads"] * size + 2 * d * shape["kv_heads"] * size
    return shape["layers"] * (attention + 3 * d * shape["mlp_width"])


def parameters(shape: Shape) -> int:
    """N and the embedding, which is also the unembedding; norms are left out."""
    return decoder_parameters(shape) + shape["width"] * shape["vocab_size"]


def forward(shape: Shape, lengths: list[int], logits: int) -> float:
    """Operations of one forward pass over causal sequences of these lengths, with logits at `logits` tokens."""
    pairs = sum(length * length for length in lengths)
    layers = 2 * decoder_parameters(shape) * sum(lengths) + 2 * shape["layers"] * shape["width"] * pairs
    return float(layers + 2 * shape["width"] * shape["vocab_size"] * logits)


def step_flops(work: dict[str, Any], lengths: list[int] | None = None) -> float:
    """Operations of one step of a described workload; `lengths` are the responses' where they differ by step."""
    shape, rows = work["shape"], work["rows"]
    responses = lengths or [work["response"]] * rows
    whole = [work["prompt"] + length for length in responses]
    answered = sum(responses)
    if work["task"] == "sft":
        tokens = [work["length"]] * rows
        return 3 * forward(shape, tokens, sum(tokens))
    if work["task"] == "reward":
        return 3 * forward(shape, [work["length"]] * rows, 0)
    if work["task"] == "dpo":  # policy forward and backward, reference forward; logits of the completions
        sides = forward(shape, [work["length"]] * rows, rows * (work["length"] - work["prompt"]))
        return 4 * sides
    if work["task"].startswith(("generation", "decode")):
        return forward(shape, whole, answered)
    if work["task"] == "grpo":  # each prompt is read once; then reference forward, policy forward and backward
        return forward(shape, whole, answered) + 4 * forward(shape, whole, answered)
    if work["task"].startswith("ppo"):
        policy, scalar = forward(shape, whole, answered), forward(shape, whole, 0)
        shared = work["task"] == "ppo_shared_trunk"
        # Reference and, where they are computed anew, old log-probabilities; values and rewards.
        scored = (1 + work.get("recomputes", True)) * policy + (1 if shared else 2) * scalar
        update = 3 * (policy if shared else policy + scalar)
        return policy + scored + work["epochs"] * update
    raise ValueError(f"no arithmetic for {work['task']!r}")


def decode_bytes(work: dict[str, Any]) -> float:
    """Bytes that generation has to read: all weights once a decoded token of the longest row of each full batch.

    Keys and values are added for every row: 2 · L · K · D elements per token that is attended to.
    """
    shape, size = work["shape"], 2 if work["dtype"] == "bfloat16" else 4
    responses = work["lengths"] or [work["response"]] * work["rows"]
    steps = max(max(responses), -(-sum(responses) // max(work["slots"], 1)))
    kept = 2 * shape["layers"] * shape["kv_heads"] * (shape["width"] // shape["heads"])
    attended = sum(work["prompt"] * length + length * (length + 1) // 2 for length in responses)
    return float(size * (parameters(shape) * steps + kept * attended))
