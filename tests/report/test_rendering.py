"""The templates: what another page can build on, and what goes wrong."""

from __future__ import annotations

import base64
import errno
import os

import jinja2
import pytest
from report_sample import EVIL, sample_run

from cliperase_fast.report import plots, rendering
from cliperase_fast.report.drawing import DARK, png
from cliperase_fast.report.rendering import Row, Table, picture, render, write_page

PAGE = """\
{% extends "base.html" %}
{% import "parts.html" as parts %}
{% block kind %}Another report{% endblock %}
{% block header %}{{ parts.verdict("bad", "Failure", text) }}{% endblock %}
{% block tables %}{{ parts.table(table) }}{% endblock %}
{% block warnings %}{{ parts.warning_box("Mind", [text]) }}{% endblock %}
{% block figures %}{{ parts.figure(figure) }}{% endblock %}
"""


@pytest.fixture
def other_pages(monkeypatch):
    """Lets a template extend the package's."""
    environment = rendering.environment()
    loaders = [jinja2.DictLoader({"other.html": PAGE}), environment.loader]
    other = environment.overlay(loader=jinja2.ChoiceLoader(loaders))
    monkeypatch.setattr(rendering, "environment", lambda: other)


def test_another_page_extends_the_base_and_escapes_what_it_is_given(other_pages):
    table = Table(("", "value"), [Row((EVIL, "1"), "forget"), Row(("b", EVIL))])
    figure = picture(sample_run(), plots.draw_similarities, EVIL, EVIL)
    text = render("other.html", title=EVIL, text=EVIL, table=table, figure=figure)
    assert "<script" not in text
    assert '<p class="kind">Another report</p><h1>&lt;script&gt;' in text
    assert '<td class="n">1</td>' in text and '<tr class="forget">' in text
    assert '<section><h2>Mind</h2><div class="warning"><p>&lt;script&gt;' in text
    assert text.count("data:image/png;base64,") == 2


def test_a_variable_that_a_template_misses_is_an_error(other_pages):
    with pytest.raises(jinja2.UndefinedError, match="text"):
        render("other.html", title="t")


def test_a_figure_without_data_is_left_out():
    assert picture(sample_run(metrics=[]), plots.draw_losses, "", "") is None


def test_the_dark_picture_is_that_of_the_figure_with_a_layout_of_its_own():
    run = sample_run()
    found = picture(run, plots.draw_losses, "", "")
    alone = png(plots.draw_losses(run, DARK))
    assert base64.b64decode(found.dark.partition(",")[2]) == alone


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("it is 'שבע': 2.8 points", "it is &#39;<bdi>שבע</bdi>&#39;: 2.8 points"),
        ("שבע ספרות, سبعة", "<bdi>שבע ספרות</bdi>, <bdi>سبعة</bdi>"),
        ("<b> & plain", "&lt;b&gt; &amp; plain"),
        ("", ""),
        (17, "17"),
    ],
)
def test_words_from_right_to_left_leave_the_text_around_them_in_order(text, shown):
    found = rendering.environment().from_string("{{ text | isolated }}").render(text=text)
    assert found == shown


def test_isolating_a_long_text_takes_no_time():
    text = "א " * 50000
    assert rendering.environment().from_string("{{ text | isolated }}").render(text=text).count("<bdi>") == 1


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    page = write_page("one", tmp_path / "new" / "page.html")

    def full(handle, chunk):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_page("two", page)
    assert page.read_text() == "one" and list(page.parent.iterdir()) == [page]
