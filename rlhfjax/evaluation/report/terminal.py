"""The end of a run on the terminal: the summary and a few responses before and after."""

from rich.table import Table
from rich.text import Text

from rlhfjax.evaluation.report.display import number, one_line
from rlhfjax.evaluation.report.run_data import ReportData
from rlhfjax.evaluation.report.summary import summary_rows
from rlhfjax.evaluation.report.time import goodput_line
from rlhfjax.evaluation.results import Evaluation, Response


def summary_table(run: ReportData) -> Table:
    """Stage, time and key figure of each stage of the run."""
    table = Table(title=Text(f"{one_line(run.name)}: the recipe, stage by stage"), title_justify="left")
    table.add_column("stage", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("key figure", overflow="fold")
    for row in summary_rows(run):
        table.add_row(Text(one_line(row.stage)), Text(one_line(row.time)), Text(one_line(row.figure)))
    if told := goodput_line(run.time):
        table.caption, table.caption_justify = Text(told), "left"
    return table


def samples_table(evaluation: Evaluation, count: int = 3, limit: int = 300) -> Table:
    """The first `count` prompts with a response of each policy and every judge's score, as text that cannot act."""
    samples = evaluation.samples[:count]
    policies = list(dict.fromkeys(name for sample in samples for name in sample.responses))
    table = Table(title="the same prompts, before and after", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1, overflow="fold")
    for policy in policies:
        table.add_column(Text(one_line(policy)), ratio=2, overflow="fold")
    for sample in samples:
        cells = [_cell(sample.responses.get(policy), limit) for policy in policies]
        table.add_row(Text(one_line(sample.prompt, limit)), *cells)
    return table


def _cell(response: Response | None, limit: int) -> Text:
    if response is None:
        return Text("–")
    scores = ", ".join(f"{one_line(judge)} {number(score)}" for judge, score in response.scores.items())
    text = Text(one_line(response.text, limit) or "(empty)")
    return text.append(f"\n{scores}", style="dim") if scores else text
