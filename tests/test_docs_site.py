"""The generated pages of the documentation's site, and the check of a built one. `make docs` builds it."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

import cliperase_fast as cf
from cliperase_fast import functional
from cliperase_fast.cli.parser import make_parser

sys.path.append(str(Path(__file__).parents[1] / "docs" / "site"))

import check
import notebooks
import reference

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def api():
    return reference.api_pages()


def test_every_public_name_is_in_the_reference(api):
    documented = set(re.findall(r"^## `[\w.]+?\.(\w+)` \{#", "\n".join(api.values()), re.MULTILINE))
    assert {*cf.__all__, *functional.__all__} - documented == {"__version__", "export", "functional"}


def test_every_setting_is_in_the_reference_with_its_default(api):
    for field in dataclasses.fields(cf.UnlearnConfig):
        (row,) = re.findall(rf"^\| `{field.name}` \| (.*?) \|", api["api/unlearning.md"], re.MULTILINE)
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        assert row == f"`{default!r}`".replace("`''`", "none")


def test_every_page_of_the_reference_is_in_the_navigation(api):
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page for page in api if f": {page}\n" not in navigation] == []


def test_every_command_has_its_help_on_a_page():
    page = reference.commands()
    (subparsers,) = (action for action in make_parser()._actions if action.dest == "command")
    assert re.findall(r"^## ([\w-]+)$", page, re.MULTILINE) == list(subparsers.choices)
    assert "--forget SELECTOR" in page and "\x1b" not in page


@pytest.mark.parametrize(
    ("doc", "markdown"),
    [
        ("Go on.\nMore of it.", "Go on. More of it."),
        ("a, b: two\n    numbers.", "<dl><dt><code>a</code>, <code>b</code></dt><dd>two numbers.</dd></dl>"),
        ("lambda_*: x < 1", "<dl><dt><code>lambda_*</code></dt><dd>x &lt; 1</dd></dl>"),
        ("Formula:\n\n    S = <a_b, c>\n\n    T", "Formula:\n\n```text\nS = <a_b, c>\n\nT\n```"),
        ("mean_m <I_f[m]> `a_b`", r"mean\_m \<I\_f\[m\]\> `a_b`"),
        ("see docs/zero.md.", "see [zero.md](../zero.md)."),
        ("x: " + "ab " * 40 + "\nand on.", "<dl><dt><code>x</code></dt><dd>" + "ab " * 40 + "and on.</dd></dl>"),
        ("x: given\nReturns y.", "<dl><dt><code>x</code></dt><dd>given</dd></dl>\n\nReturns y."),
    ],
)
def test_a_docstring_becomes_paragraphs_lists_of_arguments_and_code(doc, markdown):
    assert reference.prose(doc) == markdown


def test_a_notebook_becomes_a_page_with_its_outputs(tmp_path):
    picture = b"\x89PNG..."
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {
            "output_type": "display_data",
            "data": {"image/png": base64.b64encode(picture).decode(), "text/plain": ["<F>"]},
        },
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": outputs},
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    files = notebooks.pages(tmp_path / "x.ipynb")
    page = files.pop("notebooks/x.md")
    assert files == {"notebooks/x-1.png": picture}
    assert page.startswith("# Title\n\nText.\n\nThis page shows [the notebook](x.ipynb)")
    code, text, value = "```python\nprint(1)\n```", "```text\none\ntwo\n```", "```text\n3\n```"
    assert page.endswith("\n\n".join([code, text, "![output of the cell above](x-1.png)", value]) + "\n")


def test_notebooks_are_small():
    assert NOTEBOOKS and all(path.stat().st_size < 200_000 for path in NOTEBOOKS)


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_and_the_digit_is_forgotten(path, model_cache, monkeypatch, tmp_path):
    import matplotlib

    monkeypatch.setenv("CLIPERASE_CACHE", str(model_cache))
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    namespace = {"__name__": "notebook"}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec", dont_inherit=True), namespace)
    result = namespace["result"]
    assert result.before["forget"]["zero_shot_top1"] > 0.9 and result.after["forget"]["zero_shot_top1"] < 0.1
    assert result.after["retain"]["zero_shot_top1"] > result.before["retain"]["zero_shot_top1"] - 0.03


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        (
            "a.html",
            '<a href="https://arxiv.org/abs/1">paper</a><img src="x.png"><link rel="canonical" href="https://me">',
            0,
        ),
        ("a.html", '<script src="https://cdn.example/x.js"></script>', 1),
        ("a.html", '<img src="//cdn.example/x.png"><img srcset="https://b.example/y.png 2x">', 2),
        ("a.html", '<link rel="stylesheet" href="https://fonts.example/f.css">', 1),
        ("a.html", '<p style="background: url(https://c.example/p.png)">', 1),
        ("a.css", "@import 'https://fonts.example/f.css'; a { background: url(b.png) }", 1),
    ],
)
def test_a_site_that_loads_from_another_host_is_refused(name, text, found, tmp_path, monkeypatch, capsys):
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / name).write_text(text)
    assert len(check.outside(tmp_path)) == found
    monkeypatch.setattr(sys, "argv", ["check.py", str(tmp_path)])
    assert check.main() == int(found > 0)
    assert "other hosts" in capsys.readouterr().out
