import logging
import re
import runpy
import sys
from pathlib import Path

import pytest

from cliperase_fast import extras

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
WITH_EXTRA = {
    path: extra for path in EXAMPLES for extra in re.findall(r'exit_without\("([a-z-]+)"\)', path.read_text())
}


def run(path, cache, monkeypatch, capsys):
    """What an example prints, in lines."""
    monkeypatch.setenv("CLIPERASE_CACHE", str(cache))
    monkeypatch.setattr(logging.root, "handlers", [])  # open_clip's trainer sets its own, on the captured streams
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.strip().splitlines()


def share(text):
    return float(text.replace("−", "-").strip(" %")) / 100


def has_forgotten(lines):
    """The table of `result.summary()`, or accuracies before and after, of which the first are of the forget pairs."""
    table = [re.findall(r"[−\d.]+%", line) for line in lines if line.startswith("Zero-shot accuracy ")]
    before_after = [re.findall(r"'(?:forget|retain)': '([\d.]+%)'", line) for line in lines]
    if table:
        forget_before, forget_after, retain_before, retain_after = map(share, table[-1])
    else:
        (forget_before, retain_before), *_, (forget_after, retain_after) = (
            [share(text) for text in found] for found in before_after if found
        )
    return forget_before > 0.6 and forget_after < forget_before / 3 and retain_after > retain_before - 0.1


def has_a_lower_loss(lines):
    before, after = map(float, re.search(r": ([\d.]+) before, ([\d.]+) after", lines[-1]).groups())
    return after < 0.75 * before


def pushes_pairs_apart(lines):
    before, after = map(float, re.search(r"fell from ([\d.]+) to ([-\d.]+)\.$", lines[-1]).groups())
    return before > 0.99 and after < 0.2


ENDS = {"losses_in_a_loop": pushes_pairs_apart, "transformers_trainer": has_a_lower_loss}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_what_it_does_and_reaches_it(path, quick_model_cache, monkeypatch, capsys):
    lines = run(path, quick_model_cache, monkeypatch, capsys)
    assert ENDS.get(path.stem, has_forgotten)(lines), "\n".join(lines)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_names_the_extra_it_needs_at_its_top(path):
    needs = re.search(r"Needs: (no extra|pip install '\.\[([a-z-]+)\]')", path.read_text().split('"""')[1])
    assert needs is not None
    assert needs.group(2) == WITH_EXTRA.get(path)


@pytest.mark.parametrize("path", WITH_EXTRA, ids=lambda path: path.stem)
def test_without_its_library_an_example_ends_in_one_line_with_the_remedy(path, monkeypatch):
    extra = WITH_EXTRA[path]
    monkeypatch.setitem(sys.modules, extras.EXTRAS[extra].partition(".")[0], None)
    with pytest.raises(SystemExit, match=re.escape(f"pip install '.[{extra}]'")) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert "\n" not in ended.value.code


def test_there_are_examples():
    assert len(EXAMPLES) >= 3 and len(WITH_EXTRA) >= 3
