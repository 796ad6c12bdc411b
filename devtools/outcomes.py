"""What the steps of `dev.py test` resulted in; it needs nothing but Python, since dev.py sets up everything else."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

say = functools.partial(print, flush=True)


@dataclass
class Outcome:
    """The result of one step of `test`; `tests` holds the seconds and the name of each test."""

    step: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""
    tests: tuple[tuple[float, str], ...] = ()


def read_report(step: str, report: Path) -> Outcome:
    """The outcome of a step, from pytest's JUnit report."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed, skipped = (sum(any(child.tag in tags for child in case) for case in cases) for tags in (("failure", "error"), ("skipped",)))
    tests = ((float(case.get("time", 0)), f"{step}: {case.get('classname')}::{case.get('name')}") for case in cases)
    return Outcome(step, len(cases) - failed - skipped, failed, skipped, tests=tuple(tests))


def print_summary(outcomes: list[Outcome]) -> None:
    """The slowest tests and one table; the last line contains the sums alone."""
    slowest = sorted((test for outcome in outcomes for test in outcome.tests), reverse=True)[:10]
    say("\nslowest tests", *(f"{seconds:>8.1f} s  {name}" for seconds, name in slowest), sep="\n")
    say(f"\n{'step':<18}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for outcome in outcomes:
        say(f"{outcome.step:<18}{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.seconds:>9.1f}  {outcome.note}".rstrip())
    passed, failed, skipped = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("passed", "failed", "skipped"))
    say(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
