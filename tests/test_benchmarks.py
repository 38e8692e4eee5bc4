"""README's table is the one that the committed results give."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    yield readme
    for name in ("readme", "run", "cases"):
        sys.modules.pop(name, None)


def test_readme_shows_the_committed_results(readme):
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "results.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert readme.with_table(text, report) == text
    assert len(report["cases"]) == len(sys.modules["cases"].CASES["cpu"])
    assert not any("failed" in case for case in report["cases"])
