"""A small pair of archives with the layout of the public ones, so that the movies benchmark is built offline."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

BATCHES, LAST_BATCH, COLUMNS = 180, 15, 7
CONSTANT, CONTRARY = (0, 1), (0, 2)  # (batch, column) of labelers that training must not see


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def snippet_texts() -> list[str]:
    """Texts of 1 to 20 words; two repeat an earlier one, one has entities and runs of spaces."""
    rng = np.random.default_rng(1)
    count = (BATCHES - 1) * 30 + LAST_BATCH
    texts = [" ".join(f"w{number}x{word}" for word in range(rng.integers(1, 21))) for number in range(1, count + 1)]
    texts[200], texts[900] = texts[100].upper(), texts[100]
    texts[7] = "Lovely &amp; Amazing   is  bleakly amusing about  how we go about our lives."
    return texts


def other_truth(source: str) -> str:
    """Texts that are no film reviews; the first repeats a review that is one."""
    texts = [snippet_texts()[50], *(f"{source} text {number}" for number in range(1, 30))]
    return "\r\n".join(f"1_{i}\t0.0\t{text}" for i, text in enumerate(texts, 1)) + "\r\n"


def other_ratings() -> str:
    """Row i is rated i - 15 over the scale's width, listed in another order than the texts."""
    return "\r\n".join(f"1_{i}\t0.0\t0.0\t{[(i - 15) // 4] * 4}" for i in range(30, 0, -1)) + "\r\n"


def ratings_rows() -> np.ndarray:
    """Ratings in −4..4: a text's own value plus each labeler's noise."""
    rng = np.random.default_rng(2)
    count = (BATCHES - 1) * 30 + LAST_BATCH
    rows = np.clip(np.round(rng.normal(0, 2, (count, 1)) + rng.normal(0, 0.8, (count, COLUMNS))), -4, 4).astype(int)
    rows[:30, CONSTANT[1]] = 2
    rows[:30, CONTRARY[1]] = -rows[:30, 0]
    return rows


def conversations() -> dict:
    """Pairs of senders who mostly talk to one partner, each also once to a hub; plus ones that must be dropped."""

    def talk(texts, senders):
        return {"messages": [[{"text": t, "sender": senders[i % 2], "timestamp": ""}] for i, t in enumerate(texts)]}

    chats = {}
    for pair in range(30):
        a, b = f"a{pair}", f"b{pair}"
        for turn in range(3):
            chats[f"{pair}-{turn}"] = talk([f"{pair} {turn} line {i}" for i in range(5)], (a, b))
        chats[f"{pair}-hub"] = talk([f"{pair} hub {i}" for i in range(5)], (a, "hub"))
    chats["short"] = talk(["hello", "bye", "short"], ("a0", "b0"))
    chats["mail"] = talk(["hi", "write to me@example.org", "ok", "contact"], ("a0", "b0"))
    chats["merged"] = talk(["one", "two", "three", "four", "five"], ("a1", "b1"))
    chats["merged"]["messages"][1][0]["sender"] = "a1"
    chats["merged"]["messages"].append([{"text": "  ", "sender": "a1", "timestamp": ""}])
    return chats


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """(ratings sdist, chat wheel) as files."""
    folder = tmp_path_factory.mktemp("archives")
    texts, rows = snippet_texts(), ratings_rows()
    truth = "\r\n".join(f"{i}\t{rows[i - 1].mean()}\t{text}" for i, text in enumerate(texts, 1))
    rated = "\r\n".join(f"{i}\t{r.mean()}\t{r.std()}\t{r.tolist()}" for i, r in enumerate(rows, 1)) + "\r\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        _add(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", b"\xef\xbb\xbf" + truth.encode())
        _add(archive, "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt", rated.encode())
        for source in ("amazonReviewSnippets", "tweets"):
            _add(archive, f"hutto_ICWSM_2014/{source}_GroundTruth.txt", other_truth(source).encode())
            _add(archive, f"hutto_ICWSM_2014/{source}_anonDataRatings.txt", other_ratings().encode())
    sdist, wheel = folder / "vaderSentiment-3.3.2.tar.gz", folder / "chitchat_dataset-0.9.0-py3-none-any.whl"
    with tarfile.open(sdist, "w:gz") as archive:
        _add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
        _add(archive, "../../outside", b"never extracted")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chitchat_dataset/dataset.json", json.dumps(conversations()))
    return sdist, wheel
