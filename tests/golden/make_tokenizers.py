"""Makes tests/golden/tokenizers: small tokenizers, and the ids that transformers gives with them.

Run where transformers and this package are installed, from the root of the repository; the path is that of
SmolLM2-135M-Instruct.Q4_1.gguf:

    python tests/golden/make_tokenizers.py PATH
"""

import json
import shutil
import sys
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhfjax.text.loading import to_huggingface
from rlhfjax.text.tokenizer import Tokenizer
from tests.text.conftest import CORPUS

HERE = Path(__file__).parent / "tokenizers"
LINES = [
    "The capital of France is Paris.",
    "",
    " ",
    "  two  spaces   and four    end  ",
    " begins with a space",
    "\n",
    "\n\n\nthree lines\r\nand a carriage return\r",
    "\t\ttabs\t and spaces \t ",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 0x1F); }',
    "SELECT * FROM t WHERE a >= 3 AND b != 'it''s';",
    "https://example.com/a?b=c&d=%20#e",
    "1234567890 12 3.14 1,000,000 2024-02-29",
    "room 7 and  8 and   9",
    "don't we'll they're I'VE it'S",
    "Ein Tag am Meer: schöne Wellen, großer Spaß!",
    "naïve café déjà vu",
    "nai\u0308ve cafe\u0301",
    "Привет, мир",
    "日本語のテキスト、水と火。",
    "한국어 문장",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "🙂 🙃 👩‍👩‍👧 🇫🇷 👍🏽",
    "a\u200bb\ufeffc\u00a0d\u2003e\u2028f",
    "ﬁ ① ｆｕｌｌ ½",
    "\u2581 \u2581\u2581a\u2581b",
    "\x00\x01\x1b[31m\x7f",
    "\U0010ffff \U0001f9ff \ufffd",
    "<0x0A> <0x41>",
    "x" * 70,
    "ab" * 40,
    " " * 33,
    "- one\n- two\n  - three\n\n1. four\n",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "$\\int_0^1 x^2 dx = \\frac{1}{3}$",
    "WHAT IS THE CAPITAL?!?! ... --- ===",
    "the question, the answer, the labeler; the assistant",
    "\u0130stanbul \u1e9e \u01c5",
    "e\u0301\u0323\u0302",
    "C:\\Users\\me\\file.txt",
    "\"quoted\" 'single' «guillemets» „low“",
    "a.b.c_d-e/f:g;h",
    "١٢٣ ੧੨੩ Ⅷ ²",
    "end with newline\n",
    "end with space ",
    "\n leading newline and space",
    "x=1;y=2\n\n\n\nz=3",
    "tab\there",
    "mixed 中文 and English and 123 и русский",
]
MARKED = [
    "<|im_end|>",
    "a <|im_start|>user\nhi<|im_end|>\n b",
    "<|endoftext|> <s> </s> <unk>",
    "<|im_end|><|im_end|>x",
    "<|im_<|im_end|>end|>",
    "[INST] <<SYS>> [/INST]",
    "<|assistant|></s><|system|>",
]
CHATS = [
    [["user", "What is the capital of France?"]],
    [["system", "Answer briefly."], ["user", "hi"]],
    [["user", "  spaces around  "], ["assistant", "\nanswer\n"], ["user", "12  34\n"]],
    [["system", ""], ["user", "水 🙂 é"], ["assistant", "It lies on the Seine."], ["user", "and 🇫🇷?"]],
    [
        ["user", "code:\n```\ndef f():\n\treturn 1\n```"],
        ["assistant", "ok"],
        ["user", " "],
        ["assistant", "x"],
        ["user", "y"],
    ],
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 2 and Gemma write: BOS, contents trimmed, an end only after answers.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{%- else %}{{ '[INST] ' + (m['content'] | trim) + ' [/INST]' }}{% endif %}{% endfor %}"
)


def byte_level(directory: Path) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([*CORPUS, *LINES], trainer)
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False, special=False)])
    made.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "GPT2TokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))


def sentence_piece(directory: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *(line for line in LINES if "\x00" not in line)]),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=620,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mark>"],
        character_coverage=0.99,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "legacy": False,
        **named,
        "chat_template": INST,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))


def own(directory: Path) -> None:
    trained = Tokenizer.train(CORPUS, 400)
    trained.save(directory / "own")
    for name, text in to_huggingface(trained).items():
        (directory / name).write_text(text)


def expected(tokenizer) -> dict:
    plain = {"add_special_tokens": False}
    return {
        "lines": {line: tokenizer.encode(line, **plain) for line in LINES},
        "decoded": {line: tokenizer.decode(tokenizer.encode(line, **plain)) for line in LINES},
        "beginning": tokenizer.encode("a"),
        "marked": {line: tokenizer.encode(line, **plain, split_special_tokens=True) for line in MARKED},
        "chats": [
            [chat, tokenizer.apply_chat_template(_messages(chat), add_generation_prompt=True, return_dict=False)]
            for chat in CHATS
            if tokenizer.chat_template
        ],
    }


def as_sentence_piece(made: dict, model: Path) -> dict:
    """Lines as SentencePiece has them: transformers 5 takes the first space of a text. U+2581 is a space to both."""
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = [line for line in LINES if "\u2581" not in line]
    return made | {"lines": {line: own.encode(line) for line in lines}, "decoded": {line: line for line in lines}}


def _messages(chat: list[list[str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for make in (byte_level, sentence_piece, own):
        directory = HERE / make.__name__
        directory.mkdir(parents=True)
        make(directory)
        ids = expected(AutoTokenizer.from_pretrained(directory))
        if (directory / "tokenizer.model").is_file():
            ids = as_sentence_piece(ids, directory / "tokenizer.model")
        (directory / "expected.json").write_text(json.dumps(ids, ensure_ascii=True, separators=(",", ":")))
    for name in to_huggingface(Tokenizer.load(HERE / "own" / "own")):
        (HERE / "own" / name).unlink()
    smollm2 = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    # transformers leaves out this model's splitting of digits, which its published tokenizer.json has (and llama.cpp).
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    (HERE / "smollm2.json").write_text(json.dumps(expected(tokenizer), ensure_ascii=True, separators=(",", ":")))


if __name__ == "__main__":
    main()
