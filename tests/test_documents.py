"""README and docs/ say what is there: size, links, code, environment variables."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
READ = re.compile(r"""(?:\benviron(?:\.get\(|\.pop\(|\.setdefault\(|\[)|\bgetenv\()\s*["']([A-Z][A-Z0-9_]*)["']""")
ACCESS = re.compile(r"\benviron\b|\bgetenv\b|\bget_env\b")


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 6000 and len(text.splitlines()) <= 100


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if not link.startswith(("http", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists() and target.is_relative_to(ROOT), link
            assert not anchor or anchor in anchors(target), link


def test_the_code_of_readme_runs():
    blocks = [code for language, code in CODE.findall((ROOT / "README.md").read_text()) if language == "python"]
    assert len(blocks) == 1
    names = {}
    exec(blocks[0], names)
    assert names["loss"].isfinite() and all(names[n].grad.isfinite().all() for n in ("table", "head", "w", "b"))


def sources() -> list[Path]:
    native = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    return [ROOT / "setup.py", *(ROOT / "fastllm").rglob("*.py"), *native]


def test_every_environment_variable_is_documented():
    read = set()
    for path in sources():
        text = path.read_text()
        found = READ.findall(text)
        # Another way to read the environment would escape the comparison.
        assert len(found) == len(ACCESS.findall(text)), f"{path.relative_to(ROOT)} reads a variable in another way"
        read |= set(found)
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted(read)


def test_commits_are_checked_by_the_versions_of_the_requirements():
    hook = (ROOT / ".pre-commit-config.yaml").read_text()
    listed = re.search(r"additional_dependencies: \[(.*)\]", hook)[1].split(", ")
    assert len(listed) == 2 and set(listed) <= set((ROOT / "requirements.txt").read_text().splitlines())
