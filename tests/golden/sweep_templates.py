"""Every chat template of a folder against transformers: what is trained must be what the template writes.

Run where transformers and this package are installed, from the root of the repository:

    python tests/golden/sweep_templates.py FOLDER [--show NAME]

Each conversation is written by `apply_chat_template` of transformers and here, with one small tokenizer to which the
special tokens of the template are added. For each template and conversation one of:

    equal     prompt + response are the ids of transformers for the whole, up to the end of the answer
    seam      the text is that of transformers, the prompt has the ids that sampling begins with, and only tokens that
              would reach from the prompt into the answer differ
    refused   here, with a reason, or by the template itself in both
    WRONG     anything else; there must be none, and the exit code says so
"""

import argparse
import collections
import datetime
import json
import re
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.text.chat import encode_all_turns, encode_demonstration, encode_prompt
from rlhfjax.text.chat_writing import ChatSettings
from rlhfjax.text.huggingface_files import files
from rlhfjax.text.huggingface_tokenizer import HuggingFaceTokenizer
from rlhfjax.text.loading import load_tokenizer

_SPECIAL = re.compile(
    r"<[|\uff5c][^<>\n'\"{}]{1,40}[|\uff5c]>|<\|[a-z_]+>|<[a-z_]+\|>|\[\|[^\[\]|]*\|\]|\[/?[A-Z_]{2,20}\]|\[e~\[|"
    r"</?s>|<(?:bos|eos|sep|seed:bos|seed:eos|(?:start|end|beginning)_of_(?:turn|sentence)|SPECIAL_\d+|/assistant)>"
)
_THINK = ("<think>", "</think>")
_ENDS = re.compile(
    r"</s>|<\|(?:im_end|endoftext|end_of_text|eot_id|eot|eom_id|end|return|call|end_of_msg|END_OF_TURN_TOKEN)\|>|"
    r"<end_of_turn>|<end_of_sentence>|<seed:eos>|<turn\|>|<\uff5cend\u2581of\u2581sentence\uff5c>|<SPECIAL_12>|</assistant>|\[\|endofturn\|\]|\[e~\["
)
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"word": "tide"}}}
_ASK, _ANSWER = turn("user", "What is 2 + 2?"), turn("assistant", "It is four.")
CONVERSATIONS = {
    "one exchange": {"messages": [_ASK, _ANSWER]},
    "system": {"messages": [turn("system", "Be brief."), _ASK, _ANSWER]},
    "two exchanges": {"messages": [_ASK, _ANSWER, turn("user", "And 3 + 3?"), turn("assistant", "Six.")]},
    "white space": {"messages": [turn("user", "  Why?\n"), turn("assistant", "\n So.\n\n")]},
    "thought apart": {"messages": [_ASK, {**_ANSWER, "reasoning_content": "Two and two."}]},
    "thought inside": {"messages": [_ASK, turn("assistant", "<think>\nTwo and two.\n</think>\n\nIt is four.")]},
    "tools": {"messages": [_ASK, turn("assistant", "", tool_calls=[_CALL])], "tools": [_TOOL]},
    "tool answered": {
        "messages": [
            _ASK,
            turn("assistant", "", tool_calls=[_CALL]),
            turn("tool", "high", name="look_up", tool_call_id="abcdefghi"),
            _ANSWER,
        ],
        "tools": [_TOOL],
    },
}


def tokenizers_for(template: str, base: HuggingFaceTokenizer, folder: str):
    """Ours and that of transformers, which know the special tokens of a template."""
    described = json.loads(json.dumps(base.description))
    added = described["tokenizer"]["added_tokens"]
    known = {token["content"]: token["id"] for token in added}
    wanted = dict.fromkeys(["<s>", "</s>", *_SPECIAL.findall(template), *_THINK])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for content in wanted:
        if content not in known:
            known[content] = base.vocab_size + len(known) - len(base.description["tokenizer"]["added_tokens"])
            added.append({"id": known[content], "content": content, "special": content not in _THINK, **flags})
    described["named"] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None, "pad_token": None}
    described["eos_ids"] = sorted({known[content] for content in wanted if _ENDS.fullmatch(content)})
    described["chat_template"] = template
    described["adds_bos"] = False
    for name, text in files(described).items():
        (Path(folder) / name).write_text(text)
    ours = HuggingFaceTokenizer(described).with_chat(ChatSettings(date=datetime.datetime.now().date()))
    return ours, AutoTokenizer.from_pretrained(folder)


def verdict(ours, theirs, record) -> tuple[str, str]:
    def write(messages, add_generation_prompt):
        settings = {"tools": record.get("tools"), "add_generation_prompt": add_generation_prompt}
        return theirs.apply_chat_template(messages, return_dict=False, **settings)

    messages = record["messages"]
    try:
        whole, asked = write(messages, False), write(messages[:-1], True)
    except Exception as error:
        whole = asked = None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    try:
        prompt, response = encode_demonstration(ours, record)
    except (DataError, ConfigError) as error:
        return "refused", "by the template" if whole is None else re.sub(r"messages\[\d+\]", "messages[i]", str(error))
    if whole is None or asked is None:
        return "WRONG", f"transformers refuses it: {reason}"
    if prompt != asked or encode_prompt(ours, {**record, "messages": messages[:-1]}) != asked:
        return "WRONG", f"prompt {theirs.decode(prompt)!r}, transformers {theirs.decode(asked)!r}"
    made = prompt + response
    if whole[: len(made)] == made:
        rest = whole[len(made) :]
        return ("equal", "") if not theirs.decode(rest, skip_special_tokens=True).strip() else ("WRONG", "cut")
    text, all_text = theirs.decode(made), theirs.decode(whole)
    if all_text.startswith(text):
        return "seam", ""
    if response[-1] == ours.eos_id and ours.eos_id not in whole[len(asked) :]:
        without = theirs.decode(made[:-1])
        if all_text.rstrip() == without.rstrip():
            return ("equal", "EOS added") if whole[: len(made) - 1] == made[:-1] else ("seam", "EOS added")
    return "WRONG", f"{text!r}, transformers {all_text!r}"


def all_turns(ours, theirs, record) -> tuple[str, str]:
    try:
        tokens, _ = encode_all_turns(ours, record)
    except (DataError, ConfigError) as error:
        return "refused", re.sub(r"messages\[\d+\]", "messages[i]", str(error))
    whole = theirs.apply_chat_template(record["messages"], return_dict=False, tools=record.get("tools"))
    if whole[: len(tokens)] == tokens:
        return "equal", ""
    text, all_text = theirs.decode(tokens), theirs.decode(whole)
    if all_text.startswith((text, theirs.decode(tokens[:-1]))):
        return "seam", ""
    return "WRONG", f"{text!r}, transformers {all_text!r}"


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--show", default="", help="print every verdict that this stands in, with its template")
    given = arguments.parse_args()
    base = load_tokenizer(Path(__file__).parent / "tokenizers" / "byte_level")
    counts = {name: collections.Counter() for name in [*CONVERSATIONS, "all turns"]}
    reasons, wrong, templates = collections.Counter(), 0, sorted(given.folder.glob("*.jinja"))
    for path in templates:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = tokenizers_for(path.read_text(), base, folder)
            found = {name: verdict(ours, theirs, record) for name, record in CONVERSATIONS.items()}
            found["all turns"] = all_turns(ours, theirs, CONVERSATIONS["two exchanges"])
        for name, (kind, why) in found.items():
            counts[name][kind] += 1
            reasons[f"{kind}: {why}"[:150]] += kind == "refused"
            wrong += kind == "WRONG"
            line = f"{path.name} | {name} | {kind} | {why[:900]}"
            if kind == "WRONG" or (given.show and given.show in line):
                print(line)
    print(f"{len(templates)} templates")
    for name, count in counts.items():
        print(f"{name:<16}", *(f"{kind} {count[kind]:>4} " for kind in ("equal", "seam", "refused", "WRONG")))
    for reason, count in reasons.most_common(30):
        if count:
            print(f"{count:>5} {reason}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
