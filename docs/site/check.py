"""Check that a built site loads nothing from another host: `python docs/site/check.py build/site`.

Links that a reader may follow, to papers, are left alone.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

URL = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class Loads(HTMLParser):
    """Collect the addresses that a browser fetches by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        addresses = [values.get(name, "") for name in ("src", "poster", "data")]
        addresses += [part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()]
        if tag == "link" and values.get("rel") != "canonical":
            addresses.append(values.get("href", ""))
        self.found += [address for address in addresses if URL.match(address)]
        self.found += STYLE.findall(values.get("style", ""))


def outside(folder: Path) -> list[str]:
    """Return "file: address" for each address of another host that a page or a style sheet loads."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".html", ".css"):
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".html":
            page = Loads()
            page.feed(text)
            addresses = page.found
        else:
            addresses = STYLE.findall(text)
        found += [f"{path.relative_to(folder)}: {address}" for address in addresses]
    return found


def main() -> int:
    (folder,) = map(Path, sys.argv[1:])
    pages = len(list(folder.rglob("*.html")))
    if not pages:
        sys.exit(f"{folder} has no pages: build the site first (make docs)")
    found = outside(folder)
    for line in found:
        print(line)
    print(f"{pages} pages load {f'{len(found)} files of other hosts' if found else 'nothing from other hosts'}.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
