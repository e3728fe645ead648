"""Brings what the pages show of benchmarks/ and examples/ into the site."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (?!-).*$(?!\n\| -)", re.MULTILINE)  # of a table, but for its head
CELL = re.compile(r"(?<=\| )[^|`]{1,40}(?= \|)")
FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*")
OUTSIDE = re.compile(r"\]\(((?:\.\./)*)\.\./((?:benchmarks|examples)/[^)#]+)")  # from docs/
SCRIPT = re.compile(r"(?<=\]\()((?:\S*/)?examples/\w+|\w+)\.py(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the examples, each script as a page, and each file of benchmarks/ that a page links."""
    pages = [file.content_string for file in files.documentation_pages()]
    linked = {found[2] for text in pages for found in OUTSIDE.finditer(text)}
    scripts = sorted((ROOT / "examples").glob("*.py"))
    linked |= {"examples/README.md", "examples/first_look.ipynb"}
    for path in sorted(path for path in linked if not path.endswith(".py")):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for script in scripts:
        text = f"# {script.name}\n\n```python\n{script.read_text(encoding='utf-8')}```\n"
        page = f"examples/{script.stem}.md"
        files.append(
            File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links lead there: in the site both lie in docs/. Keep short cells on one line."""
    markdown = OUTSIDE.sub(r"](\1\2", markdown).replace("](../docs/", "](../")
    markdown = SCRIPT.sub(r"\1.md", markdown)
    return ROW.sub(lambda row: CELL.sub(r'<span class="short">\g<0></span>', row[0]), markdown)


def on_post_page(output: str, **_: object) -> str:
    """Refuse a page that would ask the network for anything when it is opened."""
    if found := FETCHED.search(output):
        raise PluginError(f"the page fetches {found[0]}")
    return output
