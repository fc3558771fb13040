"""cliperase_fast: make a CLIP model forget chosen image-text associations (CLIPErase, arXiv 2410.23330), fast.

The public names, and nothing else. Names that need open_clip are imported when first used, so that the losses work
where only torch is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cliperase_fast import functional
from cliperase_fast._version import __version__
from cliperase_fast.config import UnlearnConfig
from cliperase_fast.errors import InputError, UnlearningError
from cliperase_fast.losses import CalibratedLoss, CLIPEraseLoss
from cliperase_fast.ops import backends

if TYPE_CHECKING:
    from cliperase_fast import export
    from cliperase_fast.auditing import Audit, audit
    from cliperase_fast.comparing import Comparison, compare
    from cliperase_fast.evaluation import evaluate
    from cliperase_fast.inspecting import inspect_data
    from cliperase_fast.integrations.open_clip import patch_open_clip, unpatch_open_clip
    from cliperase_fast.integrations.open_clip_losses import ClipLoss, DistillClipLoss, SigLipLoss
    from cliperase_fast.integrations.transformers import patch_transformers_clip, unpatch_transformers_clip
    from cliperase_fast.ledger import Ledger
    from cliperase_fast.querying import select_by_query
    from cliperase_fast.unlearning import UnlearnResult, unlearn
    from cliperase_fast.unlearning.methods import methods, register_method

_LAZY = {
    "Audit": "cliperase_fast.auditing",
    "ClipLoss": "cliperase_fast.integrations.open_clip_losses",
    "Comparison": "cliperase_fast.comparing",
    "DistillClipLoss": "cliperase_fast.integrations.open_clip_losses",
    "Ledger": "cliperase_fast.ledger",
    "SigLipLoss": "cliperase_fast.integrations.open_clip_losses",
    "audit": "cliperase_fast.auditing",
    "compare": "cliperase_fast.comparing",
    "evaluate": "cliperase_fast.evaluation",
    "methods": "cliperase_fast.unlearning.methods",
    "patch_open_clip": "cliperase_fast.integrations.open_clip",
    "inspect_data": "cliperase_fast.inspecting",
    "patch_transformers_clip": "cliperase_fast.integrations.transformers",
    "register_method": "cliperase_fast.unlearning.methods",
    "select_by_query": "cliperase_fast.querying",
    "unlearn": "cliperase_fast.unlearning",
    "unpatch_open_clip": "cliperase_fast.integrations.open_clip",
    "unpatch_transformers_clip": "cliperase_fast.integrations.transformers",
    "UnlearnResult": "cliperase_fast.unlearning",
}

__all__ = [
    "Audit",
    "CLIPEraseLoss",
    "CalibratedLoss",
    "ClipLoss",
    "Comparison",
    "DistillClipLoss",
    "InputError",
    "Ledger",
    "SigLipLoss",
    "UnlearnConfig",
    "UnlearnResult",
    "UnlearningError",
    "__version__",
    "audit",
    "backends",
    "compare",
    "evaluate",
    "export",
    "functional",
    "inspect_data",
    "methods",
    "patch_open_clip",
    "patch_transformers_clip",
    "register_method",
    "select_by_query",
    "unlearn",
    "unpatch_open_clip",
    "unpatch_transformers_clip",
]


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("cliperase_fast.export")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
