"""Turn a notebook into a page: its text, its code, and the outputs that are saved in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any


def pages(path: Path) -> dict[str, str | bytes]:
    """Return {file of the site: content}: the page, and its pictures."""
    files: dict[str, str | bytes] = {}
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            parts.append(_shown(output, f"{path.stem}-{len(files) + 1}.png", files))
    title, *rest = parts
    note = f"This page shows [the notebook]({path.name}) as it was last run. Download it to run it yourself."
    files[f"notebooks/{path.stem}.md"] = "\n\n".join([title, note, *rest]) + "\n"
    return files


def _shown(output: dict[str, Any], picture: str, files: dict[str, str | bytes]) -> str:
    """Return an output in Markdown; a picture is added to the files."""
    if "text" in output:
        return _text("".join(output["text"]))
    data = output["data"]
    if "image/png" not in data:
        return _text("".join(data["text/plain"]))
    files[f"notebooks/{picture}"] = base64.b64decode("".join(data["image/png"]))
    return f"![output of the cell above]({picture})"


def _text(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"
