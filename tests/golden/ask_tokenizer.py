"""What AutoTokenizer of plain transformers makes of texts, as JSON. Run with transformers 4 or 5, without rlhfjax.

python tests/golden/ask_tokenizer.py QUESTION.json

The question is a list of {"directory", "lines", "marked", "chats", "file"}; `file` names a GGUF in the directory. The
answer is a list of the same length, on the last line that is printed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, GenerationConfig


def answer(directory: str, lines: list[str], marked: list[str], chats: list[Any], file: str | None = None) -> dict:
    """Ids and texts of lines, ids of lines that spell special tokens, of conversations, and which ids end a text."""
    tokenizer = AutoTokenizer.from_pretrained(directory, **({"gguf_file": file} if file else {}))
    plain = {"add_special_tokens": False}
    ids = [tokenizer.encode(line, **plain) for line in lines]
    generation = Path(directory) / "generation_config.json"
    return {
        "version": transformers.__version__,
        "lines": ids,
        "decoded": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
        "beginning": tokenizer.encode("a"),
        "marked": [tokenizer.encode(line, **plain, split_special_tokens=True) for line in marked],
        "chats": [
            tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in chat],
                add_generation_prompt=True,
                return_dict=False,
            )
            for chat in chats
        ],
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "ends": GenerationConfig.from_pretrained(directory).eos_token_id if generation.is_file() else None,
    }


if __name__ == "__main__":
    questions = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([answer(**question) for question in questions]))
