"""Add the pages of the site that are made from other files, and make links to files outside docs/ work there.

mkdocs.yml names this file in `hooks`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import notebooks
import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site too.
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
EXAMPLE = re.compile(r"\]\(\.\./examples/(\w+)\.py\)")
FILE_NAME = re.compile(r"\[(?:docs/)?([\w-]+\.md)\]\(")  # a link that shows the name of a page's file
CELL = re.compile(r"<td((?: style=\"[^\"]*\")?)>(.*?)</td>", re.DOTALL)
SHORT = 24  # characters of a cell that is not broken into lines


def on_files(files: Files, config: Any) -> Files:
    pages: dict[str, str | bytes] = {page: from_root(name) for name, page in OUTSIDE.items()}
    pages["examples.md"] = examples()
    pages["commands.md"] = reference.commands()
    pages |= reference.api_pages()
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        pages |= notebooks.pages(path)
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to examples and to the files of the root at their pages, and show titles in place of file names."""
    titles = dict(titles_of(config.nav))
    markdown = FILE_NAME.sub(lambda match: f"[{titles.get(match[1], match[1])}](", markdown)
    markdown = EXAMPLE.sub(lambda match: f"](examples.md#{match[1].replace('_', '-')})", markdown)
    for name, uri in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name}", f"]({uri}")
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Mark the short cells of tables: site.css keeps names and numbers in one line."""

    def marked(match: re.Match[str]) -> str:
        short = len(re.sub(r"<[^>]+>", "", match[2])) <= SHORT
        return f"<td{match[1]}{' class=short' if short else ''}>{match[2]}</td>"

    return CELL.sub(marked, html)


def titles_of(navigation: Any) -> Iterator[tuple[str, str]]:
    """Yield (page, title) of the navigation."""
    for entry in navigation:
        for title, content in entry.items():
            if isinstance(content, str):
                yield content, title
            else:
                yield from titles_of(content)


def from_root(name: str) -> str:
    """Return a file of the root, with its links as seen from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    for other, uri in OUTSIDE.items():
        text = text.replace(f"]({other}", f"]({uri}")
    return text


def examples() -> str:
    parts = ["# Examples", "Complete programs. Each runs on a CPU in a checkout."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        body = "".join(source.splitlines(keepends=True)[tree.body[0].end_lineno :]).strip()
        parts += [f"## {path.stem.replace('_', ' ').capitalize()} {{#{path.stem.replace('_', '-')}}}"]
        parts += [f"`examples/{path.name}`", reference.prose(ast.get_docstring(tree) or ""), f"```python\n{body}\n```"]
    return "\n\n".join(parts) + "\n"
