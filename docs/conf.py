"""Sphinx's configuration: ``make docs`` builds the site in build/site, without a network.

The source folder is the repository's root, so that links between docs/, README.md and the tables of the results are the
same on the site as in the repository.
"""

import sys
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fastllm._version import __version__  # noqa: E402

project = "fastllm"
author = "the fastllm contributors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/results/*/*.md"]
exclude_patterns = [".*", "build", "dist", "csrc", "fastllm", "tests"]
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3  # links to headings, as on the repository's pages

html_theme = "furo"
html_title = f"fastllm {release}"
html_copy_source = html_show_sourcelink = False

autodoc_typehints = "none"  # the docstrings say types, and shapes
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False

# Pages of PyTorch's documentation that hold more than one name.
SHARED = {"torch.Tensor": "tensors", "torch.dtype": "tensor_attributes", "torch.device": "tensor_attributes"}


def link_to_pytorch(app, env, node, content):
    """A name of PyTorch leads to PyTorch's documentation. Its inventory would need a network to be read."""
    name = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not name.startswith("torch."):
        return None
    page = f"{SHARED[name]}.html#{name}" if name in SHARED else f"generated/{name}.html"
    return nodes.reference("", "", content, internal=False, refuri=f"https://docs.pytorch.org/docs/stable/{page}")


def add_a_title(app, docname, source):
    """The tables of results begin with their machine, for they are shown below a title elsewhere."""
    if docname.startswith("benchmarks/results/") and not source[0].startswith("# "):
        source[0] = f"# Results: {docname.split('/')[2]}\n\n{source[0]}"


def formula(as_block: bool):
    """Formulas as MathML, which browsers show by themselves: MathJax would be fetched when a page is read."""

    def visit(translator, node):
        from docutils.utils.math.latex2mathml import tex2mathml

        text = tex2mathml(node.astext(), as_block=as_block)
        translator.body.append(f"<p>{text}</p>" if as_block else text)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=formula(False), block_renderers=formula(True))
    app.connect("source-read", add_a_title)
    app.connect("missing-reference", link_to_pytorch)
