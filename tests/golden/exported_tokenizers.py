"""Tokenizers as an export writes them, and the question what transformers makes of them (ask_tokenizer.py)."""

import hashlib
import json
from pathlib import Path
from typing import Any

from rlhfjax.interop.exporting import generation_settings
from rlhfjax.interop.gguf_tokenizer import tokenizer_of_metadata
from rlhfjax.text.loading import AnyTokenizer, load_tokenizer, to_huggingface
from tests.text.mixed_lines import mixed_lines

HERE = Path(__file__).parent / "tokenizers"
SOURCES = {"own": "own/own", "sentence_piece": "sentence_piece", "byte_level": "byte_level", "gguf": "byte_level"}
MODEL_TYPES = {"own": "llama", "sentence_piece": "mistral", "byte_level": "gpt2", "gguf": "gpt2"}
MARKED = ["</s>", "a</s> b", " <s>x<|im_end|>\n", "<|assistant|> hi</s><pad>", "<|im_start|>user\nq<|im_end|>"]
CHATS = [
    [["user", "What is the capital of France?"]],
    [["user", " q \n"], ["assistant", " \u6c34 \U0001f642"], ["user", "x  y"]],
]


def tokenizer_of(name: str) -> AnyTokenizer:
    folder = HERE / SOURCES[name]
    return gpt2_of_gguf(folder) if name == "gguf" else load_tokenizer(folder)


def gpt2_of_gguf(folder: Path) -> AnyTokenizer:
    """The vocabulary of a folder as the metadata of a GGUF file has it, its words cut as GPT-2 cuts them."""
    made, config = (json.loads((folder / f"tokenizer{what}.json").read_text()) for what in ("", "_config"))
    special = {token["content"]: token["special"] for token in made["added_tokens"]}
    ids = made["model"]["vocab"] | {token["content"]: token["id"] for token in made["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [{None: 1, True: 3, False: 4}[special.get(token)] for token in tokens],
        "merges": [" ".join(pair) for pair in made["model"]["merges"]],
        "eos_token_id": ids[config["eos_token"]],
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    tokenizer, note = tokenizer_of_metadata(named | {"tokenizer.chat_template": config["chat_template"]})
    assert tokenizer is not None, note
    return tokenizer


def exported_files(name: str) -> dict[str, str]:
    """The files of a tokenizer, generation_config.json, and what of config.json AutoTokenizer asks for."""
    tokenizer = tokenizer_of(name)
    return to_huggingface(tokenizer) | {
        "generation_config.json": json.dumps(generation_settings(tokenizer)),
        "config.json": json.dumps({"model_type": MODEL_TYPES[name]}),
    }


def question(name: str, directory: Path) -> dict[str, Any]:
    """Writes the files; what ask_tokenizer.py is to be asked."""
    directory.mkdir(parents=True)
    for file, text in exported_files(name).items():
        (directory / file).write_text(text, encoding="utf-8")
    return {"directory": str(directory), "lines": mixed_lines(), "marked": MARKED, "chats": CHATS}


def digest(value: Any) -> str:
    """Twelve letters that stand for ids, or for files."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def shortened(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer with a digest for the ids of each line."""
    return answer | {"lines": [digest(ids) for ids in answer["lines"]], "decoded": answer["decoded"] == mixed_lines()}
