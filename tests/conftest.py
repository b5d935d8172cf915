"""What every test shares: one torch thread, and a guard against skips that hide a missing install step."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Many tiny tensors on many threads are slower than on one, and the order of a sum depends on their number.
torch.set_num_threads(1)

LEGITIMATE_SKIPS = ("needs a CUDA device", "needs a user without root's rights", "needs a POSIX system")
"""How the reason of a skip begins when it speaks of the machine; any other means that something is not installed."""

FORBIDDEN = os.environ.get("VIDGEN_FORBID_SKIPS") == "1"
"""As in CI: a skip for any other reason fails the run."""

_unexpected: set[str] = set()


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ")
    if not reason.startswith(LEGITIMATE_SKIPS):
        _unexpected.add(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """pytest-xdist: a worker does not report the modules it skipped while collecting, so it sends them at the end."""
    _unexpected.update(getattr(node, "workeroutput", {}).get("unexpected_skips", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["unexpected_skips"] = sorted(_unexpected)
    elif FORBIDDEN and _unexpected and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FORBIDDEN and _unexpected:
        terminalreporter.section("skips that are not allowed here (VIDGEN_FORBID_SKIPS=1)", red=True)
        for line in sorted(_unexpected):
            terminalreporter.write_line(line)
