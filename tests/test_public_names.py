"""Tests of `dir()` and tab completion: they list every public name, including those imported on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cliperase_fast as cf


@pytest.mark.parametrize("module", [cf, cf.functional, cf.export])
def test_dir_lists_the_public_names_and_nothing_else(module):
    names = dir(module)
    assert names == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in names)
    assert not {"Any", "annotations", "importlib", "torch"} & set(names)


def test_dir_names_what_is_imported_on_first_use():
    code = (
        "import sys, cliperase_fast as cf; names = dir(cf); "
        "assert {'audit', 'Audit', 'unlearn', 'evaluate', 'UnlearnResult', 'export', 'patch_open_clip'} <= set(names); "
        "sys.exit('open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'forget'"):
        _ = cf.forget
