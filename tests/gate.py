"""The gate of `make test` (a pytest plugin): every line and branch of the package is covered by in-process tests.

It holds whenever nothing was skipped: what needs a missing server can be skipped on a laptop, and then says so. With
CI=true a skip is a failure. A run that passes the gate or fails only by coverage also renews the README's badge.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

BADGE = Path(__file__).parent.parent / "docs" / "coverage.svg"
_VERDICT = pytest.StashKey[str]()
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="114" height="20" role="img" aria-label="coverage: {text}">
  <clipPath id="round"><rect width="114" height="20" rx="3"/></clipPath>
  <g clip-path="url(#round)"><path fill="#555" d="M0 0h64v20H0z"/><path fill="{colour}" d="M64 0h50v20H64z"/></g>
  <g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
    <text x="32" y="14">coverage</text><text x="89" y="14">{text}</text>
  </g>
</svg>
"""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Outermost, so that pytest-cov has added everything up when the tests are done."""
    result = yield
    plugins = session.config.pluginmanager
    # None when coverage is not measured, which is no way to pass.
    percent: float | None = getattr(plugins.get_plugin("_cov"), "cov_total", None)
    skipped = getattr(plugins.get_plugin("terminalreporter"), "stats", {}).get("skipped", [])
    verdict, passed = _judge(percent, len(skipped))
    if percent is not None and not skipped and not session.testsfailed:
        BADGE.write_text(badge(percent), encoding="utf-8")
    session.testsfailed += not passed
    session.config.stash[_VERDICT] = verdict
    return result


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if verdict := config.stash.get(_VERDICT, None):
        terminalreporter.write_sep("=", "gate")
        terminalreporter.write_line(verdict)


def badge(percent: float) -> str:
    """An SVG; rounded down, so that 100 % means all."""
    colour = "#2c8a3e" if percent == 100 else "#b58900" if percent >= 90 else "#c0392b"
    return _SVG.format(text=f"{int(percent)} %", colour=colour)


def _judge(percent: float | None, skipped: int) -> tuple[str, bool]:
    if skipped and os.environ.get("CI") == "true":
        return f"failed: {skipped} skipped (see below), and with CI=true nothing may be", False
    if skipped:
        return f"not applied: {skipped} skipped (see below), so coverage cannot be complete", True
    if percent is None:
        return "failed: coverage was not measured", False
    if percent < 100:
        return f"failed: {percent:.2f} % of lines and branches are covered, all must be", False
    return "passed: all lines and branches are covered", True
