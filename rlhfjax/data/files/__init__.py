"""Files as people have them, as decoded objects one at a time, each with the place that it was read from.

JSON (an array, one object, objects one after the other), JSON lines, CSV, TSV, plain text and Parquet; all but Parquet
also as .gz or .zst. The first bytes decide what a file is; where they leave a choice, its suffix does.
"""

from rlhfjax.data.files.formats import SUFFIXES, FileFormat, format_of, read_objects, rows_between, rows_of
from rlhfjax.data.files.shards import Shards, find_files, is_data_path

__all__ = [
    "SUFFIXES",
    "FileFormat",
    "Shards",
    "find_files",
    "format_of",
    "is_data_path",
    "read_objects",
    "rows_between",
    "rows_of",
]
