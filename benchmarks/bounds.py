"""What a program on a mesh has to send, reckoned from shapes alone: the floor beside which compiled bytes are read.

Weights that lie split over `fsdp` are gathered for each pass through the layers, and their gradients scattered again;
`tensor` gathers the inputs of a layer's two blocks and scatters their outputs. Bytes are what a device sends in rings,
(n - 1) / n of what is gathered or scattered over n devices, in bfloat16. What goes between slices is no ring's
(`shard_bytes`), and of meshes that split tokens (`sequence`) or experts nothing is said.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from benchmarks.shapes import MODELS, WORDS, layers_of, run_of

WIDTH = 2  # bytes of a bfloat16
# Gathers and scatters of a layer's activations: its two blocks read them whole and leave them split. What remat lacks
# is found again, but for the sum that nothing reads; backward, gradients take the same ways.
FORWARD, BACKWARD = 4, 4
AGAIN = {"full": 3, "halves": 2}


@dataclass(frozen=True)
class Pass:
    """A batch on its way through a model: `tokens` of a device, of which `read` have logits, in so many parts."""

    tokens: int
    read: int
    parts: int = 1
    trained: bool = True


def passes(case: dict[str, Any]) -> list[Pass]:
    """The passes of one run of a program; empty where it has none through whole layers."""
    run, rows = run_of(case), _rows(case["mesh"])
    if case["stage"] == "sft":
        tokens = case["batch"] * case["length"] // rows
        return [Pass(tokens, tokens)]
    c = run.stages.ppo
    tokens, steps = case["batch"] * 2 * case["length"] // rows, c.batch.epochs
    parts = _parts(case, c)
    if case["program"] == "score":  # policy, reference, value, reward
        return [Pass(tokens, read, parts, trained=False) for read in (tokens // 2, tokens // 2, 0, 0)]
    pretraining = int(c.ptx.ratio * case["batch"] * c.ptx.length // rows)
    step = [Pass(tokens, tokens // 2, parts), Pass(tokens, 0, parts), Pass(pretraining, pretraining)]
    return step * steps if case["program"] == "update" else []


def must_send(case: dict[str, Any]) -> dict[str, float] | None:
    """Bytes of a device `inside` the loops over layers and `outside` of them; None for meshes of other axes."""
    mesh = _axes(case)
    through = passes(case)
    if not through or mesh["sequence"] > 1 or mesh["expert"] > 1:
        return None
    sums = [(_inside(case, mesh, one), _outside(case, mesh, one)) for one in through]
    return {"inside": sum(inside for inside, _ in sums), "outside": sum(outside for _, outside in sums)}


def must_compute(case: dict[str, Any]) -> float | None:
    """FLOPs of the products with weights on one device, of an SFT step and of a rollout: attention is not among them.

    What remat computes again is: every product of a layer but `down`, and with `halves` but `out`. A sampler finds
    logits for what it draws alone.
    """
    model, words = MODELS[case["model"]], WORDS[case["model"]] * MODELS[case["model"]]["width"]
    layers, devices = layers_of(case) * layer_weights(model), math.prod(_axes(case).values())
    tokens = case["batch"] * case["length"]
    if case["stage"] == "sft":
        down, out = (model["width"] * model[name] for name in ("mlp_width", "width"))
        last = down * _experts(model) + (out if case["remat"] == "halves" else 0)
        return 2.0 * tokens * (4 * layers - layers_of(case) * last + 3 * words) / devices
    return 2.0 * tokens * (2 * layers + words) / devices if case["program"] == "rollout" else None


def layer_weights(model: dict[str, Any]) -> int:
    """Numbers in the matrices of a layer that a token meets."""
    width, heads, kv_heads = model["width"], model["heads"], model["kv_heads"]
    head = model["architecture"].get("head_dim", width // heads)
    router = width * model["architecture"].get("experts", {}).get("count", 0)
    return width * head * (2 * heads + 2 * kv_heads) + 3 * width * model["mlp_width"] * _experts(model) + router


def _experts(model: dict[str, Any]) -> int:
    return model["architecture"].get("experts", {}).get("per_token", 1)


def shard_bytes(case: dict[str, Any]) -> float:
    """The matrices that lie on one device, in bfloat16: of gradients, what slices have to say to each other."""
    model, mesh = MODELS[case["model"]], _axes(case)
    tables = 2 * WORDS[case["model"]] * model["width"]
    return (layers_of(case) * layer_weights(model) + tables) * WIDTH / (mesh["fsdp"] * mesh["tensor"])


def _inside(case: dict[str, Any], mesh: dict[str, int], one: Pass) -> float:
    model, tensor = MODELS[case["model"]], mesh["tensor"]
    weights = WIDTH * layer_weights(model) / tensor * _ring(mesh["fsdp"]) * one.parts
    unit = WIDTH * one.tokens * model["width"] * _ring(tensor)
    if not one.trained:
        return layers_of(case) * (weights + FORWARD * unit)
    # Gathered forward and backward, and their gradients scattered.
    return layers_of(case) * (3 * weights + (FORWARD + AGAIN[case["remat"]] + BACKWARD) * unit)


def _outside(case: dict[str, Any], mesh: dict[str, int], one: Pass) -> float:
    """Tokens are looked up where the table lies; the hidden states meet each part of the words."""
    width, tensor, fsdp = MODELS[case["model"]]["width"], mesh["tensor"], mesh["fsdp"]
    looked_up = WIDTH * one.tokens * width * (_ring(fsdp) + _ring(tensor))
    states = WIDTH * one.read * width * _ring(tensor)
    table = WIDTH * WORDS[case["model"]] * width / tensor * _ring(fsdp) * (one.parts if one.read else 0)
    if not one.trained:
        return looked_up + states + table
    # The gradient of the table is scattered, and that of the states summed over the parts of the words.
    return 2 * looked_up + 3 * states + 2 * table


def _parts(case: dict[str, Any], c: Any) -> int:
    from rlhfjax.stages.packed_rows import rows_at_a_time
    from rlhfjax.target import building_for, target_of

    mesh: Any = SimpleNamespace(shape=_axes(case))
    chips = [SimpleNamespace(platform="tpu")] * math.prod(mesh.shape.values())
    with building_for(target_of(chips)):
        return -(-case["batch"] // rows_at_a_time(c, mesh))


def _axes(case: dict[str, Any]) -> dict[str, int]:
    axes = {axis: size for axis, size in case["mesh"].items() if axis != "slices"}
    return {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1} | axes


def _rows(mesh: dict[str, int]) -> int:
    return math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))


def _ring(devices: int) -> float:
    return (devices - 1) / devices
