"""The report of a run: its page, its pictures, and the summary in a terminal."""
