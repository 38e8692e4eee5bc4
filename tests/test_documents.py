"""README and docs/ say what is there: size, links, code, messages, environment variables; and the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastllm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
# A block of code, what the comment before it asks for, and the message that it ends with.
EXAMPLE = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```python\n(?P<code>.*?)^```\n(?:```text\n(?P<error>\w+Error: .*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
WITH_CODE = [page for page in PAGES if page.name != "README.md" and "```python" in page.read_text()]
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


def examples(page: Path) -> list[re.Match]:
    found = list(EXAMPLE.finditer(page.read_text()))
    assert len(found) == page.read_text().count("```python")
    return found


@pytest.fixture
def as_it_was():
    backend, threads = fastllm.backends.get_backend(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    fastllm.set_backend(backend)
    assert torch.get_num_threads() == threads


@pytest.fixture
def group_of_one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, as_it_was, request):
    """The blocks of a page run one after the other; one with a message after it ends with this error."""
    names = {"__name__": "__main__"}
    if "init_process_group" in page.read_text():  # which its code takes for done
        request.getfixturevalue("group_of_one_process")
    for example in examples(page):
        line = page.read_text().count("\n", 0, example.start("code"))
        code = compile("\n" * line + example["code"], page, "exec")  # a traceback shows the line of the page
        mark = example["mark"] or ""
        if mark.startswith("compiled only: "):
            continue
        if mark.startswith("needs ") and importlib.util.find_spec(mark.removeprefix("needs ")) is None:
            continue
        if example["error"] is None:
            exec(code, names)
            continue
        with pytest.raises(Exception) as raised:
            exec(code, names)
        said = f"{type(raised.value).__name__}: {raised.value}"
        assert said.split() == example["error"].split()


def test_the_warning_of_the_page_of_errors():
    with pytest.warns(UserWarning) as warned:
        fastllm.functional.mse_loss(torch.zeros(3, 5), torch.zeros(5))
    page = (ROOT / "docs" / "errors.md").read_text()
    assert " ".join(str(warned[0].message).split()) in " ".join(page.split())


def test_the_code_of_readme_computes_gradients():
    (example,) = examples(ROOT / "README.md")
    names = {}
    exec(example["code"], names)
    assert names["loss"].isfinite() and all(names[n].grad.isfinite().all() for n in ("table", "head", "w", "b"))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_parser", "furo")),
    reason="the packages of docs/requirements.txt are not installed",
)
def test_the_site_builds_without_a_warning(tmp_path):
    options = ["-W", "--keep-going", "-E", "-q", "-c", "docs", "-d", tmp_path / "doctrees", ".", tmp_path / "site"]
    command = [sys.executable, "-m", "sphinx", *options]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "site" / "docs" / "api" / "functional.html").read_text()
    for name in fastllm.functional.__all__:
        assert f'id="fastllm.functional.{name}"' in page
    assert "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html" in page


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
