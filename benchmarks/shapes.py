"""Shapes of published models on pods of published sizes, and the programs that are compiled for them."""

from dataclasses import asdict, dataclass
from typing import Any

LLAMA = {"family": "llama", "context": 8192, "architecture": {"tied": False}}
MODELS: dict[str, dict[str, Any]] = {
    "llama3_8b": LLAMA | {"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "mlp_width": 14336},
    "llama3_70b": LLAMA | {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28672},
    "qwen3_30b_a3b": {
        "family": "qwen3_moe",
        "layers": 48,
        "width": 2048,
        "heads": 32,
        "kv_heads": 4,
        "mlp_width": 768,
        "context": 8192,
        "architecture": {"head_dim": 128, "experts": {"count": 128, "per_token": 8}},
    },
}
WORDS = {"llama3_8b": 128256, "llama3_70b": 128256, "qwen3_30b_a3b": 151936}


@dataclass(frozen=True)
class Case:
    """A program of a stage on a mesh of chips."""

    name: str
    model: str
    stage: str
    program: str
    topology: str
    mesh: dict[str, int]
    batch: int
    length: int = 4096  # of rows; of prompts and of responses where the stage samples
    slices: int = 1
    remat: str = "full"
    precision: str = "full"  # of sampling
    offload: str = "none"
    layers: int | None = None  # of the model's, where fewer say it as well
    text: str | None = None  # a file for the compiled text

    def described(self) -> dict[str, Any]:
        return asdict(self)


V5P, V5P512 = "v5p:4x4x4", "v5p:8x8x8"
EIGHT, SEVENTY = {"fsdp": 16, "tensor": 4}, {"fsdp": 64, "tensor": 8}
SLICES, EXPERTS = {"slices": 2, "data": 2, "fsdp": 16, "tensor": 8}, {"fsdp": 16, "expert": 4}
CASES = (
    Case("sft/8b", "llama3_8b", "sft", "step", V5P, EIGHT, 128),
    Case("sft/8b/halves", "llama3_8b", "sft", "step", V5P, EIGHT, 128, remat="halves"),
    Case("sft/8b/fsdp", "llama3_8b", "sft", "step", V5P, {"fsdp": 64}, 128),
    Case("sft/70b", "llama3_70b", "sft", "step", V5P512, SEVENTY, 256),
    Case("sft/70b/halves", "llama3_70b", "sft", "step", V5P512, SEVENTY, 256, remat="halves"),
    *(
        Case(f"ppo/8b/{program}", "llama3_8b", "ppo", program, V5P, EIGHT, 512, 1024)
        for program in ("reshard", "rollout", "score", "update")
    ),
    Case("ppo/8b/rollout/int8", "llama3_8b", "ppo", "rollout", V5P, EIGHT, 512, 1024, precision="int8_weights"),
    Case("ppo/70b/rollout", "llama3_70b", "ppo", "rollout", V5P512, SEVENTY, 512, 1024),
    Case("ppo/70b/update", "llama3_70b", "ppo", "update", V5P512, SEVENTY, 512, 1024),
    Case("sft/70b/slices", "llama3_70b", "sft", "step", "v5p:4x4x8", SLICES, 256, slices=2),
    Case("sft/8b/v5e", "llama3_8b", "sft", "step", "v5e:8x8", EIGHT, 128),
    Case("sft/8b/v5e/offload", "llama3_8b", "sft", "step", "v5e:8x8", EIGHT, 128, offload="all"),
    *(
        Case(f"ppo/8b/{program}/v5e{end}", "llama3_8b", "ppo", program, "v5e:8x8", EIGHT, 512, 1024, offload=offload)
        for program in ("score", "update")
        for end, offload in (("", "none"), ("/offload", "all"))
    ),
    Case("sft/8b/v6e", "llama3_8b", "sft", "step", "v6e:8x8", EIGHT, 128),
    Case("sft/8b/tpu7x", "llama3_8b", "sft", "step", "tpu7x:4x4x4", {"fsdp": 32, "tensor": 4}, 128),
    Case("sft/8b/128k", "llama3_8b", "sft", "step", V5P, {"fsdp": 8, "sequence": 8}, 8, 131072),
    Case("sft/30b_a3b", "qwen3_30b_a3b", "sft", "step", V5P, EXPERTS, 128),
    *(
        Case(f"ppo/30b_a3b/{program}", "qwen3_30b_a3b", "ppo", program, V5P, EXPERTS, 512, 1024)
        for program in ("rollout", "update")
    ),
)


def _peer(model: str, pod: str, rows: float, **axes: int) -> dict[str, Any]:
    sizes = {f"ici_{axis}_parallelism": size for axis, size in axes.items()}
    return {"model_name": model, "compile_topology": pod, "per_device_batch_size": rows} | sizes


# MaxText's words for the same step; its pods are named by cores, of which a chip of v5p has two.
PEER = {
    "sft/8b": _peer("llama3-8b", "v5p-128", 2, fsdp=16, tensor=4),
    "sft/8b/fsdp": _peer("llama3-8b", "v5p-128", 2, fsdp=64),
    "sft/70b": _peer("llama3-70b", "v5p-1024", 0.5, fsdp=64, tensor=8),
}


def layers_of(case: dict[str, Any]) -> int:
    """Of the model as it is compiled."""
    return case["layers"] or MODELS[case["model"]]["layers"]


def run_of(case: dict[str, Any]) -> Any:
    """The recipe that has this program, without data."""
    from rlhfjax.config import schema

    data = [{"source": "unused.jsonl"}]
    shape, length = MODELS[case["model"]], case["length"]
    optimizer = {"lr": 1e-5, "clip_norm": 1.0}
    shape = shape | {"remat": case["remat"], "context": max(shape["context"], length), "layers": layers_of(case)}
    batch, fixed = {"size": case["batch"], "length": length}, {"data": data, "steps": 10, "optimizer": optimizer}
    stages: dict[str, Any] = {"sft": fixed | {"batch": batch}}
    if case["stage"] != "sft":
        comparisons = {"size": 64, "length": 2 * length, "candidates": 4}
        stages["reward"] = fixed | {"batch": comparisons, "normalize": {"on": "none"}}
        stages["ppo"] = fixed | {
            "batch": {"size": case["batch"], "prompt_length": length},
            "sampling": {"max_new_tokens": length, "precision": case["precision"]},
            "ptx": {"data": data, "coef": 1.0, "length": 2 * length},
        }
    words = {"kind": "bpe", "vocab_size": WORDS[case["model"]], "data": data}
    given = {
        "name": "compiled",
        "mesh": case["mesh"] | {"offload": case["offload"]},
        "model": shape,
        "tokenizer": words,
        "stages": stages,
    }
    return schema.Run.model_validate(given)
