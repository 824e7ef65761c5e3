"""Sphinx's settings for the documentation site, which `make docs` builds in docs/_build.

The source folder is the repository: pages may link to each other wherever they are.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import megatron_dlm  # noqa: E402

project = "megatron-dlm"
author = "the megatron-dlm contributors"
version = release = megatron_dlm.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docker/README.md",
    "examples/README.md",
    "benchmarks/README.md",
    "benchmarks/results/**/report.md",
    "benchmarks/results/study/details.md",
]
exclude_patterns = [".*", "runs", "docs/_build"]
html_theme = "furo"
html_title = f"megatron-dlm {release}"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
