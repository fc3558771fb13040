"""What unlearning left behind and what it damaged, measured before and after and against models that never knew."""

from cliperase_fast.audit.api import audit
from cliperase_fast.audit.result import Audit

__all__ = ["Audit", "audit"]
