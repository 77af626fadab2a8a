"""Whether the files of an exported model are those that were exported: python verify.py [DIRECTORY]

parity.json, the certificate beside them, has the SHA-256 of every tensor, of every header of a file of weights, and of
config.json, index, tokenizer, chat template and generation config. All of them are computed anew here, and whatever
differs is named. Nothing but Python (3.8 or newer) is needed, and nothing of a file is run or believed.

Exit code 0: all as exported. 4: something differs. 2: no export there. The certificate is not signed: compare its own
SHA-256, which is printed, with the one that whoever exported the model tells you.
"""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

CERTIFICATE, INDEX = "parity.json", "model.safetensors.index.json"
# What may be changed or added: cards, licences, what git and hubs keep, and rlhfjax's own list of files.
FREE = ("README", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY", ".git", ".cache", "MANIFEST.sha256.json", CERTIFICATE)
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_BLOCK = 1 << 22


def check(directory):
    """What differs, one line each, and a line that says what was compared. Raises OSError where there is no export."""
    with open(os.path.join(directory, CERTIFICATE), "rb") as file:
        text = file.read()
    try:
        held = json.loads(text, object_pairs_hook=_each_once)
        own = held.pop("certificate", None)
        files, tensors, headers = dict(held["sha256"]), dict(held.get("tensors", {})), dict(held.get("headers", {}))
        whole = own is None or own == digest_of(held)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{CERTIFICATE}: is no certificate ({error})"], ""
    bad = [] if whole else [f"{CERTIFICATE}: was changed after it was written"]
    there = sorted(_names(directory))
    bad += [f"{name}: does not belong there" for name in there if name not in files and not _free(name)]
    bad += [f"{name}: is missing" for name in sorted(files) if name not in there]
    bad += _misplaced(directory, tensors) if INDEX in files and INDEX in there else []
    jobs = []
    for name in sorted(set(files) & set(there)):
        if name in headers:
            inside = {key: entry for key, entry in tensors.items() if entry["file"] == name}
            jobs.append((_check_weights, directory, name, headers[name], inside))
        else:
            jobs.append((_check_file, directory, name, files[name]))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda job: job[0](*job[1:]), jobs))
    bad += [line for lines, _ in found for line in lines]
    said = f"{len(jobs)} files with {len(tensors)} tensors, {sum(size for _, size in found):,} bytes"
    return bad, f"{said}: all as exported; SHA-256 of the certificate: {hashlib.sha256(text).hexdigest()}"


def digest_of(held):
    """What a certificate says of the rest of itself."""
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def sha256(path):
    """Of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _names(directory):
    """Files by their paths in it."""
    for folder, folders, files in os.walk(directory):
        inner = os.path.relpath(folder, directory)
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            yield name if inner == "." else inner.replace(os.sep, "/") + "/" + name


def _free(name):
    return name.startswith(FREE)


def _check_file(directory, name, wanted):
    path = os.path.join(directory, name)
    try:
        same, size = sha256(path) == wanted, os.path.getsize(path)
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror}"], 0
    return ([] if same else [f"{name}: differs from what was exported"]), size


def _check_weights(directory, name, header_digest, tensors):
    """A file of weights: its header, then each of its tensors where the header says that it is."""
    path = os.path.join(directory, name)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(100_000_000, size - 8):
                return [f"{name}: has a header that is broken"], size
            text = file.read(length)
            bad = [] if hashlib.sha256(text).hexdigest() == header_digest else [f"{name}: its header differs"]
            try:
                header = json.loads(text, object_pairs_hook=_each_once)
                header.pop("__metadata__", None)
                spans = sorted((entry["data_offsets"], key, entry) for key, entry in header.items())
                sizes = [_SIZES[entry["dtype"]] * _product(entry["shape"]) for _, _, entry in spans]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                return [*bad, f"{name}: has a header that is broken ({error})"], size
            bad += [f"{name}: tensor {key} is missing" for key in sorted(set(tensors) - set(header))]
            end = 0
            for (offsets, key, entry), octets in zip(spans, sizes):  # noqa: B905  older Pythons have no strict
                bad += _differences(file, name, key, entry, octets, offsets, end, tensors.get(key), 8 + length)
                end += octets
            if 8 + length + end != size:
                bad.append(f"{name}: expected {8 + length + end:,} bytes, got {size:,}")
            return bad, size
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror}"], 0


def _differences(file, name, key, entry, octets, offsets, end, wanted, base):
    """What is wrong with one tensor, which has to begin where the one before it ends."""
    if wanted is None:
        return [f"{name}: tensor {key} does not belong there"]
    if (entry["dtype"], entry["shape"]) != (wanted["dtype"], wanted["shape"]) or offsets != [end, end + octets]:
        return [f"{name}: tensor {key} has another type, shape or place"]
    file.seek(base + end)
    digest = hashlib.sha256()
    while octets:
        block = file.read(min(_BLOCK, octets))
        if not block:
            break
        digest.update(block)
        octets -= len(block)
    return [] if digest.hexdigest() == wanted["sha256"] else [f"{name}: tensor {key} differs"]


def _misplaced(directory, tensors):
    """Entries of the index that name another file than the one that the tensor was written to."""
    try:
        with open(os.path.join(directory, INDEX), "rb") as file:
            placed = json.loads(file.read(), object_pairs_hook=_each_once)["weight_map"]
        odd = [key for key in sorted(set(placed) | set(tensors)) if placed.get(key) != tensors.get(key, {}).get("file")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{INDEX}: cannot be read: {error}"]
    right = {key: tensors.get(key, {}).get("file") for key in odd}
    return [f"{INDEX}: expected tensor {key} in {right[key]}, got {placed.get(key)}" for key in odd]


def _product(shape):
    made = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError("a size that is none")
        made *= size
    return made


def _each_once(pairs):
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name that is there twice")
    return made


def main(arguments):
    """The exit code, after everything was said."""
    directory = arguments[0] if arguments else os.path.dirname(os.path.abspath(__file__))
    try:
        bad, said = check(directory)
    except OSError as error:
        print(f"{directory}: expected an exported model with {CERTIFICATE}, got {error.strerror}")
        return 2
    for line in bad:
        print(ascii(line)[1:-1])
    print(f"{directory}: {len(bad)} differences, named above" if bad else f"{directory}: {said}")
    return 4 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
