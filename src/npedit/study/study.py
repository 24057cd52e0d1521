"""A study: many short runs, all scored in the same way, and claims about them tested against confidence intervals.

A study's file names a recipe, variants of it (changes to its keys, or another recipe), seeds, and tables of variants
with the claims that the tables should show. Each variant is trained once for each seed, in an ordinary run directory,
and scored on the toy benchmark's held-out scenes (`jobs.py`). A finished run is not trained again, so a study that was
stopped resumes. Critics of other quality than the embedded one are trained first, into `critics/`. `claims.py` tests
the claims and `page.py` writes the page.

A job that fails does not stop the others: it is told at the end. The study's folder is held while its results are
written.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from npedit.errors import UserError, did_you_mean, explain_write_errors
from npedit.study.file import Study, quick_study
from npedit.study.jobs import Failure, Job, StudyWork, hold_when_free
from npedit.study.page import pool_seeds, write_results
from npedit.study.search import STAGES, check_searches, expand_search, require_budget
from npedit.study.worker import Task
from npedit.study.workers import WorkerPool

ReportProgress = Callable[[str], None]


def run_study(
    study: Study,
    folder: Path,
    find: Callable[[str], Path],
    report_progress: ReportProgress,
    quick: bool = False,
    only: Collection[str] = (),
    workers: int = 1,
) -> Path:
    """Train and score the runs that are missing, then write `results.md` and its plots into `folder`; returns the path
    of `results.md`.

    `quick` uses one seed, a 25th of the updates and a tenth of the items, in separate runs. A quick study shows that
    every part works; it is too short to decide a claim. With `only`, just these variants and searches are trained (and
    the variants that these start from), so several processes can fill one folder; the page shows all runs that are
    finished by then. With several `workers`, that many runs are trained side by side, each in a process with one
    thread; `find` is then that of the package.

    Raises:
        UserError: a variant's recipe is wrong (all are read before the first is trained); some runs failed (the page
            shows the others).
        SystemExit: a stop signal came; everything is saved (`training/signals.py`).
    """
    study = quick_study(study) if quick else study
    _check_only(study, only)
    session = _Session(folder, find, report_progress, quick, only, workers)
    work = StudyWork(study, folder, find, quick)
    check_searches(work, find)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    session.do_missing_jobs(work, [name for name in only if name in study.variants])
    for name in study.search:
        for stage in STAGES:
            expanded = expand_search(work, name, stage, find, [failure.name for failure in session.failures])
            work = work if expanded == work.study else StudyWork(expanded, folder, find, quick)
            if not only or name in only:
                session.do_search_jobs(work, name)
    scores = {name: pool_seeds(found) for name, found in work.all_scores().items()}
    with hold_when_free(folder, "study: write results"):
        page = write_results(work.study, folder, scores)
    session.raise_failures(page)
    return page


def _check_only(study: Study, only: Collection[str]) -> None:
    """Refuse names that are no trained variant and no search."""
    known = [name for name, variant in study.variants.items() if not variant.of] + list(study.search)
    for name in only:
        if name not in known:
            raise UserError(
                f"expected variants that are trained; got {name!r}.{did_you_mean(name, known)} "
                f"It has: {', '.join(known)}"
            )


@dataclass
class _Session:
    """One call of `run_study`: how jobs are done, and which failed."""

    folder: Path
    find: Callable[[str], Path]
    report_progress: ReportProgress
    quick: bool
    only: Collection[str]
    workers: int
    failures: list[Failure] = field(default_factory=list)

    def do_missing_jobs(self, work: StudyWork, variants: Collection[str]) -> None:
        """Do the jobs of these variants (all, if none is named and `only` is empty) that are not done."""
        if not variants and self.only:
            return
        failed = {f.name for f in self.failures}
        jobs = [job for job in work.missing_jobs(variants) if job.name not in failed]
        if self.workers > 1 and jobs:
            pool = WorkerPool(self.folder, self.workers, lambda job: self._task(work, job).to_json())
            self.failures += pool.run(jobs)
        else:
            self._do_here(work, jobs)

    def do_search_jobs(self, work: StudyWork, name: str) -> None:
        """Do the jobs of a search that are not done."""
        if missing := require_budget(work, name):
            failed = {f.name for f in self.failures}
            self.failures += [Failure(name, missing)] if name not in failed else []
            return
        if rows := [row for row in work.study.variants if row.startswith(f"{name}.")]:
            self.do_missing_jobs(work, rows)

    def _do_here(self, work: StudyWork, jobs: list[Job]) -> None:
        """Do jobs one after the other in this process."""
        failed: set[str] = set()
        for i, job in enumerate(jobs):
            if lost := [need for need in job.needs if need in failed]:
                self.failures.append(Failure(job.name, f"needs {', '.join(lost)}, which failed"))
                failed.add(job.name)
                continue
            if work.is_done(job):  # by another process in the meantime
                continue
            self.report_progress(f"{i + 1} of {len(jobs)}: {job.describe()}")
            try:
                work.execute(job)
            except UserError as error:
                self.report_progress(f"{job.name} failed: {error}")
                self.failures.append(Failure(job.name, str(error)))
                failed.add(job.name)

    def _task(self, work: StudyWork, job: Job) -> Task:
        return Task(work.study.model_dump(mode="json"), str(self.folder), self.quick, job.name, sys.argv)

    def raise_failures(self, page: Path) -> None:
        """Raise a `UserError` that names the jobs that failed, if any did."""
        if self.failures:
            lines = [f"  {f.name}: {f.reason}" for f in self.failures]
            raise UserError(
                f"expected that all runs of the study finish; got {len(lines)} that did not:\n"
                + "\n".join(lines)
                + f"\n{page} shows the others; correct the cause and run the same command again"
            )
