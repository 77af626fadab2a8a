"""Runs the stages of a configuration in order, and knows what is already done.

A stage is done when its `complete.json` is there; it is written last and in one piece. Everything else in a stage
directory belongs to a stage that may be continued.
"""

import datetime
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhfjax import stores
from rlhfjax.config import Run
from rlhfjax.config.recipe import FACTS, TOKENIZER, stages_of
from rlhfjax.errors import ConfigError
from rlhfjax.files import saved_or_stopped, write_json
from rlhfjax.host import marks, stopping, time_ledger
from rlhfjax.host.determinism import use_determinism
from rlhfjax.runs.agreement import facts_of
from rlhfjax.runs.directory import COMPLETE, require_own, settle
from rlhfjax.runs.lock import run_lock
from rlhfjax.runs.manifest import Manifest, now, other_layout
from rlhfjax.runs.output import lasting_output

console = Console(stderr=True, highlight=False)


def report(text: str) -> None:
    """One line of progress; of several processes the first says it."""
    if _speaks():
        _anyone(text)


def _anyone(text: str) -> None:
    console.print(stores.named(text), markup=False, soft_wrap=True)


def run_recipe(
    run: Run,
    run_dir: Path,
    only: str | None = None,
    start_from: str | None = None,
    sources: Mapping[str, str] | None = None,
    date: datetime.date | None = None,
    plan: Any = None,
) -> None:
    """Run what is not done yet of the recipe; `only` one stage, or again from `start_from` on.

    `sources` says where keys of the configuration were set, for the manifest; `date` is what chat templates write,
    where it is not the run's own; `plan` is a `Contract` that the run is held to. Raises ConfigError when the run
    directory was made with another configuration, is in use or somebody else's, or for a stage that the recipe lacks.
    """
    stages = stages_of(run)
    for name in (only, start_from):
        if name is not None and name not in stages:
            raise ConfigError(f"stage: expected one of {', '.join(stages)} (the stages of this recipe), got {name!r}")
    with ExitStack() as held:
        lost = held.enter_context(lasting_output())
        use_determinism(run.reliability.determinism)
        if several := _processes():
            stopping.pass_on()
            several.agree(facts_of(run, run_dir, only, start_from))
        given, run_dir = run_dir, stores.place_of(run_dir)
        if stores.is_url(given):
            _by_first(lambda: held.enter_context(stores.working(given, report)), "store")
            _share(given)
        _by_first(lambda: require_own(run_dir), "own")
        _by_first(lambda: held.enter_context(run_lock(run_dir, report)), "lock")
        _by_first(lambda: settle(run, run_dir, start_from, stages), "settle")
        manifest = Manifest(run, run_dir, sources, _speaks(), lost, date)
        redone = stages[stages.index(start_from) :] if start_from else []
        _run_open_stages(run, run_dir, [only] if only else stages, manifest, redone, plan)


def _run_open_stages(
    run: Run, run_dir: Path, wanted: list[str], manifest: Manifest, redone: list[str], plan: Any
) -> None:
    """Run those of the stages that are not done yet; nothing is imported or started where all are."""
    stages = stages_of(run)
    open_stages = [stage for stage in wanted if not is_complete(run_dir, stage)]
    if not open_stages:
        report(f"nothing to do: {run_dir} has finished {', '.join(wanted)}")
        _point_to_report(run_dir)
        return
    for stage in stages[: stages.index(open_stages[0])]:
        if not is_complete(run_dir, stage):
            raise ConfigError(f"stage {open_stages[0]} needs {stage}, which is not done in {run_dir}; run it first")

    def leave(code: int) -> None:
        time_ledger.end(code)
        manifest.leave(code)

    with time_ledger.kept(run_dir, _speaks(), redone), manifest:
        from rlhfjax.host import lookout  # which imports jax

        stopping.before_exit(leave)
        with lookout.kept(run.reliability.heartbeat, _anyone, manifest.hung):
            _run_stages(run, run_dir, open_stages, manifest, plan)
    if any(FACTS[stage].measures for stage in open_stages) and _speaks():
        _print_results(run_dir)
    _point_to_report(run_dir)


def _processes() -> Any:
    """The module that several processes meet in; None in a run by itself, which need not import jax for that."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return None
    from rlhfjax.host import processes

    return processes


def _speaks() -> bool:
    several = _processes()
    return several is None or several.is_first()


def _by_first(what: Callable[[], None], name: str) -> None:
    several = _processes()
    several.by_first(what, name) if several else what()


def _share(run_dir: Path) -> None:
    """All processes of a run in an object store work in the directory that the first has filled."""
    several = _processes()
    if several:
        several.agree({"RLHFJAX_SCRATCH, a directory that all hosts of this run must see": stores.state_of(run_dir)})
        if not several.is_first():
            stores.sharing(run_dir)


def is_complete(run_dir: Path, stage: str) -> bool:
    """Whether a stage has finished."""
    return (run_dir / stage / COMPLETE).exists()


def _run_stages(run: Run, run_dir: Path, stages: list[str], manifest: Manifest, plan: Any) -> None:
    began = time.monotonic()
    # jax and the models are imported here, so that a finished run answers at once.
    from rlhfjax.host.compile_cache import use_compile_cache
    from rlhfjax.host.memory import run_in_caller
    from rlhfjax.runs.checks import agree_on_data, agree_on_tokenizer, check_data, entries, execute, make_jobs, origins
    from rlhfjax.runs.kept_rows import keep_rows
    from rlhfjax.runs.parents import parents, tokenizer_facts
    from rlhfjax.runs.sizes import agree_on_sizes, next_target
    from rlhfjax.runs.sources import refuse_other_inputs
    from rlhfjax.stages.contract import under
    from rlhfjax.target import building_for

    use_compile_cache(report, planned=Path(plan.directory) if plan else None)
    run_in_caller()
    _by_first(lambda: None, "manifest")  # the first process has written it
    jobs = make_jobs(run, run_dir, stages, report, manifest.date)
    begins = origins(jobs)
    agree_on_data(begins)
    target = next_target(jobs[0], manifest.before)
    agree_on_sizes(target)
    refuse_other_inputs(run, run_dir, stages[0], manifest.before, begins)
    manifest.note(**begins, target=target.facts())
    _by_first(lambda: keep_rows(run_dir, entries(run), jobs[0].data_dir, begins["data"], report), "rows")
    if change := other_layout(manifest.before, manifest.line):
        report(f"{jobs[0].stage}: continues {change}; from here on results match within rounding, not bitwise")
    for job in jobs:
        job.shared.update(began=began, note=manifest.note)
        if job is next((j for j in jobs if j.stage != TOKENIZER), None):
            agree_on_tokenizer(job)
            manifest.note(**tokenizer_facts(job.tokenizer))
            check_data(jobs)
        report(f"{job.stage}: started")
        manifest.began(job.stage, parents(run, run_dir, job.stage))
        job.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        marks.stage(job.stage, marks.WORKING if job.stage == TOKENIZER else marks.STARTING)
        with building_for(target), under(plan):
            facts = execute(job)
        if plan:
            manifest.note(plan=plan.facts())
        seconds = round(time.monotonic() - began, 1)
        done = {"stage": job.stage, "seconds": seconds, "finished": now()}
        _by_first(partial(_mark, job.dir, done | facts), job.stage)
        stops = (
            f"; asked to, it would have stopped within {facts['timing/stop_s']:.1f} s"
            if "timing/stop_s" in facts
            else ""
        )
        report(f"{job.stage}: done in {seconds:.0f} s{stops}")
        if "timing/first_step_s" in facts:
            manifest.note(
                first_step_s={**manifest.line.get("first_step_s", {}), job.stage: facts["timing/first_step_s"]}
            )
        if guarded := {name: facts[name] for name in ("skipped_updates", "divergences", "rollbacks") if name in facts}:
            manifest.note(guards={**manifest.line.get("guards", {}), job.stage: guarded})
        began = time.monotonic()


def _mark(stage_dir: Path, facts: Mapping[str, Any]) -> None:
    with saved_or_stopped(stage_dir):
        stores.send(stage_dir)
        write_json(stage_dir / COMPLETE, facts)
        stores.finish(stage_dir)


def _print_results(run_dir: Path) -> None:
    """The summary table and three samples before and after."""
    from rlhfjax.evaluation.report.page import write_report
    from rlhfjax.evaluation.report.run_data import read_run
    from rlhfjax.evaluation.report.terminal import samples_table, summary_table

    run = read_run(run_dir)
    write_report(run_dir / "report.html", run)  # once more, now that the manifest has the end of this attempt
    out = Console(highlight=False)
    out.print(summary_table(run))
    if run.evaluation:
        out.print(samples_table(run.evaluation))


def _point_to_report(run_dir: Path) -> None:
    if (run_dir / "report.html").exists():
        report(f"report: {run_dir / 'report.html'}")
