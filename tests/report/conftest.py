import pytest

from cliperase_fast.report import audit_html, html
from cliperase_fast.report.drawing import LIGHT
from cliperase_fast.report.rendering import Picture


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are empty pictures: drawing takes long."""

    def picture(content, draw, alt, caption):
        return None if draw(content, LIGHT) is None else Picture("", "", 1, 1, alt, caption)

    for page in (audit_html, html):
        monkeypatch.setattr(page, "picture", picture)
