"""Reading the two archives in place, whatever else is in them."""

import tarfile
import zipfile

import pytest

from rlhfjax.data.sets import movie_archives
from rlhfjax.data.sets.movie_archives import clean, read_conversations, read_snippets
from rlhfjax.errors import DataError

from ..conftest import ratings_rows, snippet_texts


def test_snippets_and_ratings_in_file_order(archives, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = read_snippets(archives[0])
    assert [snippet.number for snippet in snippets] == list(range(1, len(snippets) + 1))
    assert [list(snippet.ratings) for snippet in snippets] == ratings_rows().tolist()
    assert snippets[0].text == snippet_texts()[0]  # and not a byte-order mark before it
    assert snippets[7].text == "Lovely & Amazing is bleakly amusing about how we go about our lives."
    assert list(tmp_path.parent.glob("**/outside")) == []


def test_turns_are_merged_by_sender_and_blank_messages_dropped(archives):
    merged = read_conversations(archives[1])[-1]
    assert merged.turns == ("one two three", "four", "five")
    assert merged.senders == ("a1", "b1")


def test_clean():
    assert clean("  a\u00a0b\t\r\nc &quot;d&quot; ") == 'a b c "d"'


def test_other_archives_are_one_clear_error(archives, tmp_path, monkeypatch):
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no archive")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"), tarfile.open(tmp_path / "empty.tar.gz", "w:gz"):
        pass
    for read, path in [
        (read_snippets, garbage),
        (read_snippets, tmp_path / "empty.tar.gz"),
        (read_snippets, tmp_path / "none"),
        (read_conversations, garbage),
        (read_conversations, tmp_path / "empty.whl"),
        (read_conversations, tmp_path / "none"),
    ]:
        with pytest.raises(DataError, match="to fetch it again"):
            read(path)
    monkeypatch.setattr(movie_archives, "_MAX_MEMBER_BYTES", 100)
    for read, path in [(read_snippets, archives[0]), (read_conversations, archives[1])]:
        with pytest.raises(DataError, match="at most 100"):
            read(path)
