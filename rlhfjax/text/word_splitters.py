"""Word splitters: the cuts of a BPE over bytes before pairs are joined, by the names that GGUF files have for them.

A name (tokenizer.ggml.pre) stands for what the published tokenizer.json of its models says: a row of cuts, each by a
regular expression made on what the ones before have left, or by a part that the library `tokenizers` has. The names are
those of llama.cpp (src/llama-vocab.cpp); where it writes an expression otherwise because its own engine knows less, the
published one is here.
"""

from typing import Any, NamedTuple

Cut = str | dict[str, Any]


class Splitter(NamedTuple):
    """Cuts, and what else a name stands for."""

    cuts: tuple[Cut, ...]
    whole_words: bool = False  # a word that is in the vocabulary is taken whole, whatever pairs would make of it
    begins: bool = False  # with BOS, where the file does not say
    normalizer: dict[str, Any] | None = None


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
_GPT2 = BYTES | {"use_regex": True}  # the same cuts as this:
_GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = {"type": "Digits", "individual_digits": True}
_NFC = {"type": "NFC"}


def pre_tokenizer(splitter: Splitter) -> dict[str, Any]:
    """The part of tokenizer.json that makes these cuts."""
    steps = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        if isinstance(cut, str)
        else cut
        for cut in splitter.cuts
    ]
    if steps[-1] != _GPT2:
        steps.append(BYTES)
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACE = r"\s+(?!\S)|\s+"
_LINES = r"|\s*[\r\n]+|" + _SPACE
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_PUNCTUATED = _ASCII_SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"


def _words(digits: str, letters: str = r"\p{L}+") -> str:
    """Contractions, words with a sign before them, digits, signs, line ends, and white space up to the next word."""
    return rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}{_SIGNS}{_LINES}"


def _cased(digits: str, short: str = _SHORT + "?", but: str = "", ends: str = r"[\r\n/]*") -> str:
    """Words that end where small letters go over into capitals, contractions with them."""
    upper, lower, before = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]", r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{upper}*{lower}+{short}|{before}{upper}+{lower}*{short}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{ends}{_LINES}"


def _letters(ranges: str) -> str:
    return "".join("-".join(chr(int(end, 16)) for end in each.split("-")) for each in ranges.split())


# Letters with a case, as of the Unicode that DeepSeek's first tokenizers were made with.
_WITH_CASE = _letters(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_SIGNS_OF_DEEPSEEK = _letters("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_EAST_ASIAN = _letters("4E00-9FA5 800-4E00 AC00-D7FF")
_WITHOUT_SPACES = _letters(  # scripts that Trinity (afmoe) cuts off from all others
    "4E00-9FFF 3400-4DBF 8C48-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF E40-E7F E80-EFF 1780-17FF 1000-109F "
    "AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)
_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # digits in threes, counted from the right
_SIGNS_OF_FALCON = r"[\p{P}\$\+<=>\^~\|`]+"
_HALVED = "|".join(rf"\s{{{1 << power}}}(?!\S)" for power in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"

_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_FAMILIES: dict[str, Splitter] = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
    "modern-bert exaone4 jais trillion granite-docling": Splitter((_GPT2,)),
    "mpt olmo": Splitter((_GPT2,), normalizer=_NFC),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": Splitter((_DIGITS, _GPT2)),
    "command-r": Splitter((_DIGITS, _GPT2), normalizer=_NFC),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": Splitter(
        (_words(_THREE),), whole_words=True, begins=True
    ),
    "dbrx smaug-bpe chatglm-bpe": Splitter((_words(_THREE),)),
    "glm4 glm5": Splitter((_words(_THREE),), whole_words=True),
    "minicpm5": Splitter((_THREE, _words(r"\p{N}+")), whole_words=True),
    "jais-2": Splitter((_words(_THREE).removesuffix(_SPACE) + _HALVED,)),
    "qwen2": Splitter((_words(_ONE),), normalizer=_NFC),
    "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": Splitter((_words(_ONE),)),
    "qwen35": Splitter((_words(_ONE, r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),)),
    "ufakzeka": Splitter((_words(_ONE).removeprefix(_SHORT + "|"),)),
    "laguna": Splitter((r"[^\n]+|[\n]+", _words(_ONE))),
    "seed-coder": Splitter((_words(_ONE).replace(_SIGNS, r"| ?[^\s\p{L}\p{N}\r\n]+"),)),
    "bailingmoe bailingmoe2 llada-moe": Splitter(
        (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|" + _SPACE,)
    ),
    "exaone-moe": Splitter(
        (
            _SHORT
            + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|"
            + _SPACE,
        )
    ),
    "tekken": Splitter((_cased(_ONE, short=""),), whole_words=True, begins=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Splitter((_cased(_THREE),)),
    "granite-embed-multi-97m": Splitter((_cased(_THREE),), whole_words=True),
    "tiny_aya cohere2moe": Splitter((r"\d{1,3}(?=(?:\d{3})*\b)", _cased(_THREE))),
    "kimi-k2": Splitter((r"[\p{Han}]+|" + _cased(_THREE, but=r"&&[^\p{Han}]", ends=r"[\r\n]*"),)),
    "youtu": Splitter((_YOUTU, _cased(_ONE)), whole_words=True),
    "deepseek-llm": Splitter(
        (
            "[\r\n]",
            rf"\s?[{_WITH_CASE}]+",
            rf"\s?[{_SIGNS_OF_DEEPSEEK}]+",
            r"\s+$",
            f"[{_EAST_ASIAN}]+",
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Splitter(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_EAST_ASIAN}]+", r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Splitter((_THREE, _CJK, _PUNCTUATED + r"[\r\n]*" + _LINES)),
    "spark2_5": Splitter((_THREE, _CJK, _PUNCTUATED + r"|[\r\n]|" + _SPACE, r"\p{N}")),
    "afmoe": Splitter((_THREES, f"[{_WITHOUT_SPACES}]+", _PUNCTUATED + r"[\r\n]*" + _LINES)),
    "superbpe": Splitter((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "bloom poro-chat gpt3-finnish": Splitter((_BLOOM,)),
    "viking": Splitter((_BLOOM, r"\p{N}")),
    "falcon": Splitter((_SIGNS_OF_FALCON, _GPT2_WORDS, "[0-9][0-9][0-9]")),
    "default": Splitter((_SIGNS_OF_FALCON.replace("`", ""), _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "chameleon": Splitter(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        begins=True,
    ),
}
SPLITTERS = {name: splitter for names, splitter in _FAMILIES.items() for name in names.split()}
# Files that were written before they named their splitter, of architectures whose published models all have the same.
OF_ARCHITECTURE = {"gpt2": "gpt-2", "gptneox": "mpt", "mpt": "mpt", "falcon": "falcon"}
