"""Brings what the pages show of benchmarks/ into the site: plots, and pages of text."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?!-).*$(?!\n\| -)", re.MULTILINE)  # of a table, but for its head
CELL = re.compile(r"(?<=\| )[^|`]{1,40}(?= \|)")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*")
OUTSIDE = re.compile(r"\]\(((?:\.\./)*)\.\./(benchmarks/[^)#]+)")  # from docs/ or below it


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file of benchmarks/ that a page links."""
    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({found[2] for text in pages for found in OUTSIDE.finditer(text)}):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead there: in the site benchmarks/ lies in docs/. Keep short cells on one line."""
    markdown = OUTSIDE.sub(r"](\1\2", markdown).replace("](../docs/", "](../")
    return ROW.sub(lambda row: CELL.sub(r'<span class="short">\g<0></span>', row[0]), markdown)


def on_post_page(output: str, **_: object) -> str:
    """Refuse a page that would ask the network for anything when it is opened."""
    if found := FETCHED.search(output):
        raise PluginError(f"the page fetches {found[0]}")
    return output
