"""Reads the report's pages in tests."""

from __future__ import annotations

import html.parser


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and the text, of a page whose tags must be properly nested."""

    VOID = frozenset({"meta", "img", "source", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


KNOWN = {
    *["lang", "charset", "content", "http-equiv", "name", "class", "style", "scope", "tabindex", "media"],
    *["srcset", "src", "width", "height", "alt"],
}  # attributes that pages have
