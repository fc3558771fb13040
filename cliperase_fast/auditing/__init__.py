"""What unlearning left behind and what it damaged, measured before and after and against models that never knew."""

from cliperase_fast.auditing.api import audit
from cliperase_fast.auditing.result import Audit

__all__ = ["Audit", "audit"]
