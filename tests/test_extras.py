"""Optional libraries that are missing or of another version."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cliperase_fast import extras
from cliperase_fast.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_a_missing_library_is_an_input_error_that_names_the_extra(extra, monkeypatch):
    library = extras.EXTRAS[extra].partition(".")[0]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=re.escape(f"this needs {library}")) as caught:
        extras.import_extra(extra, "this")
    assert f"pip install '.[{extra}]'" in str(caught.value)
    with pytest.raises(SystemExit, match=re.escape(f"pip install '.[{extra}]'")) as ended:
        extras.exit_without(extra)
    assert "\n" not in str(ended.value.code)


def test_every_hint_in_code_docs_and_examples_names_an_extra_that_exists():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert set(extras.EXTRAS) <= known
    for folder in ("cliperase_fast", "docs", "examples"):
        for path in (ROOT / folder).rglob("*.*"):
            if path.suffix in (".py", ".md"):
                text = path.read_text()
                assert not re.search(r"pip install ['\"]?cliperase", text), f"{path} names a package of no index"
                for named in re.findall(r"pip install '\.\[([a-z,-]+)\]'", text):
                    assert set(named.split(",")) <= known, path


def test_the_losses_need_no_optional_library():
    code = "import sys\n" + "".join(
        f"sys.modules[{name.partition('.')[0]!r}] = None\n" for name in extras.EXTRAS.values()
    )
    code += "import cliperase_fast as cf, torch\nassert cf.functional.clip_loss(torch.eye(2), torch.eye(2), 1.0) > 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("version", "fits"),
    [("2.4", True), ("2.10.1", True), ("2.4.0+cu124", True), ("2.5.0.dev1", True), ("2.3.9", False), ("3.0.0", False),
     ("3.0.0rc1", False), ("2.4rc1", False)],
)  # fmt: skip
def test_versions_compare_as_in_a_requirement(version, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    if fits:
        extras.require_version("thing", ">=2.4,<3.0")
        return
    with pytest.raises(InputError, match=re.escape(f'thing {version} is not supported: pip install "thing>=2.4,<3.0"')):
        extras.require_version("thing", ">=2.4,<3.0")


def test_a_package_that_is_not_installed_names_its_requirement_or_extra():
    with pytest.raises(InputError, match=r'not installed: pip install "no-such-package>=1,<2"'):
        extras.require_version("no-such-package", ">=1,<2")
    with pytest.raises(InputError, match=re.escape(extras.install_hint("lora"))):
        extras.require_version("no-such-package", ">=1,<2", extra="lora")
