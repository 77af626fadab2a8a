"""The worth of a run: judges, agreement with people, intervals, diversity, and the report.

Nothing here knows a model. It works on texts, numbers and the files that a run leaves behind.
"""
