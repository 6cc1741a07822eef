"""The documentation as a site. `nox -s site` lays the pages out and builds it with Sphinx, MyST and furo.

The pages are the Markdown files that GitHub shows. This file adds the reference: the commands from their parser, the
Python interface from its docstrings.
"""

import argparse
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

import mimogrid
from mimogrid.shell.cli.arguments import parser


project = "mimogrid"
author = "the authors of mimogrid"
version = release = mimogrid.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
include_patterns = ["*.md", "docs/*.md", "docs/decisions/*.md", "docs/site/*.md", "benchmarks/*/README.md"]
html_theme = "furo"
html_title = f"mimogrid {version}"
html_copy_source = html_show_sourcelink = False
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "separated"


class Commands(Directive):
    """``{commands}``: the help of every command, a section each."""

    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        return [self._section(name, command) for name, command in _commands(parser(), ())]

    def _section(self, name: str, command: argparse.ArgumentParser) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id(name)])
        section += nodes.title(text=f"mimogrid {name}")
        section += nodes.literal_block(text=command.format_help(), language="text")
        self.state.document.note_explicit_target(section)
        return section


def _commands(
    of: argparse.ArgumentParser, path: tuple[str, ...]
) -> list[tuple[str, argparse.ArgumentParser]]:
    """Return every command below a parser, with the words that call it."""
    found = []
    for action in of._actions:  # argparse has no other way to them
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                deeper = _commands(below, (*path, word))
                found += deeper or [(" ".join((*path, word)), below)]
    return found


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("commands", Commands)
