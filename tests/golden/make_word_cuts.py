"""Makes tests/golden/tokenizers/word_cuts.json: where the expressions of llama.cpp cut lines, by the package `regex`.

Run where `regex` is installed, from the root of the repository; the path is that of llama.cpp's src/llama-vocab.cpp:

    python tests/golden/make_word_cuts.py PATH

Where that file keeps the published expression in a comment, because its own engine knows less, the published one is
taken. Two cuts that it computes in C++ are written out here.
"""

import ast
import json
import re
import sys
from pathlib import Path

import regex

from tests.golden.word_lines import LINES

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
KIMI = (
    r"[\p{Han}]+|"
    r"[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]*[[\p{Ll}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]+[[\p{Ll}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WRITTEN_OUT = {r"\p{Han}+": KIMI, r"\p{AFMoE_digits}": r"\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))|\p{N}{3}|\p{N}+"}
NOT_BYTES = ("GEMMA4", "SARVAM_MOE", "WHITESPACE")


def expressions(source: str) -> dict[str, list[str]]:
    """The expressions of each kind."""
    body = source[source.index("struct llm_tokenizer_bpe : llm_tokenizer") : source.index("bool byte_encode = true;")]
    found: dict[str, list[str]] = {}
    for block in body.split("break;"):
        kinds = re.findall(r"case LLAMA_VOCAB_PRE_TYPE_(\w+):", block) or (["DEFAULT"] if "default:" in block else [])
        lines = [line.strip() for line in block.split("\n")]
        plain = [text for line in lines if (text := literal(line, ""))]
        published = [text for line in lines if (text := literal(line, r"//\s*"))]
        # A published expression stands for the adapted one; MiniCPM 5's stands beside another.
        texts = plain[: len(plain) - len(published)] + published if kinds != ["MINICPM5"] else plain
        if kinds == ["TINY_AYA"]:
            texts = [plain[0], re.findall(r'tokenizer.json: "(\[.*)"$', block, flags=re.M)[-1].replace("\\\\", "\\")]
        for kind in kinds:
            found[kind] = texts
    # Its expression is the same in an engine that knows the classes of letters.
    return found | {"GRANITE_EMB_MULTI": found["GPT4O"]}


def literal(line: str, before: str) -> str | None:
    """The text that a line of C++ begins with, after what is `before` it."""
    found = re.match(before + r'"((?:[^"\\]|\\.)*)"', line)
    return found and ast.literal_eval(f'"{found[1]}"')


def names(source: str) -> dict[str, str]:
    """The kind of each name."""
    body = source[source.index('tokenizer_pre == "default"') : source.index("unknown pre-tokenizer type")]
    kinds, waiting = {}, []
    for line in body.split("\n"):
        waiting += re.findall(r'tokenizer_pre == "([^"]+)"', line)
        if kind := re.search(r"pre_type = LLAMA_VOCAB_PRE_TYPE_(\w+);", line):
            kinds |= dict.fromkeys(waiting, kind[1])
            waiting = []
    return kinds


def cut(text: str, expression: str) -> list[str]:
    """Every match by itself, and what is left between."""
    flags = regex.VERSION1 if expression == KIMI else regex.VERSION0
    made, end = [], 0
    for match in regex.finditer(expression, text, flags=flags):
        made += [text[end : match.start()], match[0]]
        end = match.end()
    return [part for part in [*made, text[end:]] if part]


def main() -> None:
    source = Path(sys.argv[1]).read_text(encoding="utf-8")
    of_kind, made = expressions(source), {}
    for name, kind in names(source).items():
        if kind in NOT_BYTES:
            continue
        lengths = []
        for line in LINES:
            parts = [line]
            for expression in of_kind[kind]:
                parts = [piece for part in parts for piece in cut(part, WRITTEN_OUT.get(expression, expression))]
            lengths.append([len(part) for part in parts])
        made.setdefault(json.dumps(lengths, separators=(",", ":")), []).append(name)
    cuts = {" ".join(sorted(names)): json.loads(lengths) for lengths, names in made.items()}
    path = Path(__file__).parent / "tokenizers" / "word_cuts.json"
    path.write_text(json.dumps(cuts, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
