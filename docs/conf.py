"""Sphinx settings: the pages of this folder, and the API reference from docstrings. ``make docs`` builds them."""

from __future__ import annotations

from torchtrainer.version import __version__

project = "torchtrainer"
copyright = "the torchtrainer authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "alabaster"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_use_ivar = True
default_role = "code"  # docstrings name code as `name`
