"""Make Triton's interpreter patch the language once a launch, not again for each call of a device function."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton import language as tl
    from triton.runtime import interpreter

    def _patches_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Wrap `interpreter._patch_lang`, whose search for functions to patch takes half the time of a launch."""

        def patch_once(fn: Any) -> Any:
            seen = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
            if seen and not any(tl.core.is_builtin(module.load) for module in seen):
                return interpreter._LangPatchScope()  # nothing to restore
            return patch(fn)

        return patch_once

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):  # names of Triton 3.8
        interpreter._patch_lang = _patches_once(interpreter._patch_lang)
