"""What an export of a large model takes: memory beyond the interpreter's, and seconds for each gigabyte.

    JAX_PLATFORMS=cpu python -m benchmarks export [--layers N] [--dtype TYPE] [--folder FOLDER] [--json FILE]

The checkpoint has the shapes of Llama 3 70B in float32, 3.4 GB a layer, in chunks as a run saves them. Nearly all its
numbers are 0, and chunks that are alike are one file, so that it fits anywhere; all of it is decoded, cast, hashed,
written, read back and computed with. Files of weights are read by the library safetensors once they are written, and
give the disk their zeros back (`fallocate --dig-holes`). The checkpoint has no digests of arrays to be compared with,
which would be 1.4 s more for each of its gigabytes.

Then `rlhfjax verify-export` and the export's own `verify.py` read it, as it is and with five damages at once: a bit, a
shard that is gone, another template, two entries of the index that changed places, another tokenizer. In between
`rlhfjax import` makes a checkpoint of it, in float32.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from rlhfjax.files import write_json
from rlhfjax.integrity import write_manifest
from rlhfjax.leaves import MOST
from rlhfjax.models import DecoderConfig, LanguageModel, decoder_config
from rlhfjax.plain_json import plain
from rlhfjax.text.tokenizer import Tokenizer
from rlhfjax.training.checkpoint import meta_of
from rlhfjax.training.digests import leaf_name

SHAPE: dict[str, Any] = {"vocab_size": 128_256, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 28_672}


def config_of(layers: int) -> DecoderConfig:
    return decoder_config("llama", layers=layers, context=8192, tied=False, rope_theta=5e5, **SHAPE)


def make_checkpoint(step_dir: Path, layers: int) -> None:
    """A step as `Checkpoints` writes one, without a training state."""
    model = LanguageModel(config_of(layers))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = leaf_name(path)
        _make_array(step_dir / "policy" / name.replace("/", "."), leaf.shape, name)
    (step_dir / "meta").mkdir()
    meta = meta_of("policy", model, Tokenizer.train(["a good movie, a bad one"], 300))
    write_json(step_dir / "meta" / "metadata", plain(meta | {"step": int(step_dir.name)}))
    write_manifest(step_dir)


def _make_array(folder: Path, shape: tuple[int, ...], name: str) -> None:
    """Norms are 1; of a matrix the first chunk of each layer has a few numbers, and the others are one file."""
    chunk = list(shape)
    chunk[0] = 1 if name.startswith("blocks/") else shape[0]
    while math.prod(chunk) * 4 > MOST:
        largest = max(range(len(chunk)), key=lambda axis: chunk[axis])
        chunk[largest] = next(size for size in range(chunk[largest] // 2, 0, -1) if shape[largest] % size == 0)
    metadata = {"shape": shape, "chunks": chunk, "dtype": "<f4", "fill_value": None, "dimension_separator": "."}
    metadata |= {"compressor": {"id": "zstd", "level": 1}}
    store = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}, "metadata": metadata}
    array = ts.open(store, create=True, open=True).result()
    grid = [size // part for size, part in zip(shape, chunk, strict=True)]
    zeros: Path | None = None
    for index in np.ndindex(*grid):
        file = folder / ".".join(map(str, index))
        special = not any(index[1:]) or "norm" in name
        if not special and zeros:
            os.link(zeros, file)
            continue
        block = np.full(chunk, float("norm" in name), np.float32)
        if special and "norm" not in name:
            block.reshape(-1)[:64] = np.arange(1, 65) / 2**12 * (1 + index[0] % 16 / 16)  # which bfloat16 has exactly
        place = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, chunk, strict=True))
        array[place].write(block).result()
        zeros = zeros if special else file


def digging(folder: Path, read: list[str]) -> threading.Event:
    """Read every finished file of weights, and free its zeros, until the event is set."""
    ended = threading.Event()

    def dig() -> None:
        while not ended.wait(0.5):
            for file in sorted(folder.glob(".*.part/*.safetensors"))[:-1]:  # the last is being written
                _read(file, read)

    threading.Thread(target=dig, daemon=True).start()
    return ended


def _read(file: Path, read: list[str]) -> None:
    """Once, with the library safetensors."""
    from safetensors import safe_open

    if file.name not in read:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dictionary
                opened.get_slice(name)[:1]
        subprocess.run(["fallocate", "--dig-holes", file], check=False)
        read.append(file.name)


def measure(step_dir: Path, target: Path, dtype: str) -> dict[str, Any]:
    """Export once, in this process."""
    import rlhfjax.interop.exporting  # noqa: F401  what modules take is not counted
    from rlhfjax.models.layerwise import Layerwise
    from rlhfjax.transfer import export_checkpoint

    _warm(step_dir.parent)
    read: list[str] = []
    base, began, spent = largest(), time.monotonic(), time.process_time()
    computing: list[float] = []
    layer = Layerwise.layer

    def timed(*given: Any) -> Any:
        start = time.monotonic()
        computing.append(0.0)
        made = jax.block_until_ready(layer(*given))
        computing[-1] = time.monotonic() - start
        return made

    setattr(Layerwise, "layer", timed)  # noqa: B010  which its type does not allow
    ended = digging(target.parent, read)
    parity = export_checkpoint(str(step_dir), target, item=None, dtype=dtype, shard_size=5 * 10**9, force=False)
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - spent
    ended.set()
    for file in sorted(target.glob("*.safetensors")):
        _read(file, read)
    tensors = [entry["shape"] for entry in parity["tensors"].values()]
    size = {"float32": 4}.get(dtype, 2)
    sizes = [size * math.prod(shape) for shape in tensors]
    return {
        "gigabytes": sum(sizes) / 1e9,
        "files": len(parity["headers"]),
        "largest_tensor_gb": max(sizes) / 1e9,
        "peak_gb": (largest() - base) / 1e9,
        "peak_of_largest": (largest() - base) / max(sizes),
        "interpreter_gb": base / 1e9,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_per_gb": seconds / (sum(sizes) / 1e9),
        "cpu_seconds_per_gb": cpu_seconds / (sum(sizes) / 1e9),
        "seconds_in_layers": sum(computing),
        "files_read_by_safetensors": len(read),
        "load_average": os.getloadavg()[0],
    }


def _warm(folder: Path) -> None:
    """An export of a tiny model, so that what libraries take is not counted."""
    from rlhfjax.interop.exporting import export_model

    model = LanguageModel(decoder_config("llama", vocab_size=64, layers=1, width=16, heads=2, context=16))
    export_model(folder / "warm", "policy", model, jax.jit(model.init)(jax.random.key(0)), None)


def largest() -> int:
    """Bytes of the process at its largest (Linux counts kibibytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def damage(model: Path) -> list[str]:
    """Damage an export in five ways; what each has to be called."""
    shards = sorted(model.glob("*.safetensors"))
    with shards[0].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    shards[-1].unlink()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    placed, names = index["weight_map"], ("model.embed_tokens.weight", "lm_head.weight")
    placed[names[0]], placed[names[1]] = placed[names[1]], placed[names[0]]
    write_json(model / "model.safetensors.index.json", index)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    write_json(model / "tokenizer.json", tokenizer)
    swapped = [f"index.json: expected tensor {name} in" for name in names]
    told = [f"{shards[0].name}: tensor ", f"{shards[-1].name}: is missing", "chat_template.jinja: differs", *swapped]
    return [*told, "tokenizer.json: differs"]


def verify(model: Path, gigabytes: float) -> dict[str, dict[str, Any]]:
    """What both checks and an import take, and whether each check names all damages."""
    checks = {
        "verify-export": [sys.executable, "-m", "rlhfjax.cli", "verify-export", str(model)],
        "verify.py": [sys.executable, "-I", "-S", str(model / "verify.py")],
    }
    told = {name: _run(words)[0] for name, words in checks.items()}
    target = model.with_name("imported")
    told["import"], _ = _run([sys.executable, "-m", "rlhfjax.cli", "import", str(model), str(target)])
    shutil.rmtree(target, ignore_errors=True)
    for each in told.values():
        each |= {f"{name}_per_gb": each[name] / gigabytes for name in ("seconds", "cpu_seconds")}
    expected = damage(model)
    for name, words in checks.items():
        damaged, said = _run(words)
        told[name] |= {"code_damaged": damaged["code"], "not_named": [each for each in expected if each not in said]}
    return told


# A process begins with the peak of the one that started it, so a small one comes between.
_BETWEEN = """import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stderr=subprocess.STDOUT)
_, status, used = os.wait4(process.pid, 0)
print(f"\\n{used.ru_maxrss} {used.ru_utime + used.ru_stime}")
sys.exit(os.waitstatus_to_exitcode(status))"""


def _run(words: list[str]) -> tuple[dict[str, Any], str]:
    """A command's exit code, seconds, seconds of a CPU and memory at its largest; and what it said."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _BETWEEN, *words], stdout=subprocess.PIPE, text=True, check=False)
    peak, cpu = done.stdout.split()[-2:]
    told = {"code": done.returncode, "peak_mb": int(peak) * 1024 / 1e6}
    return told | {"seconds": time.monotonic() - began, "cpu_seconds": float(cpu)}, done.stdout


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks export")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path, help="where there is room for some files of weights")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder and given.folder.absolute()) as name:
        folder = Path(name)
        make_checkpoint(folder / "checkpoints" / "0", given.layers)
        result = {"layers": given.layers, "dtype": given.dtype}
        result |= measure(folder / "checkpoints" / "0", folder / "made" / "model", given.dtype)
        print(json.dumps(result, indent=1), file=sys.stderr, flush=True)
        result |= {"verified": verify(folder / "made" / "model", result["gigabytes"])}
    if given.json:
        write_json(given.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
