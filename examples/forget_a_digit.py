"""Forget the digit seven. The model comes from the demo's cache, or is trained in seconds on the first call.

Needs: no extra.
"""

import cliperase_fast as cf
from cliperase_fast.demo import cached_small_clip
from cliperase_fast.demo_models import DEMO_MODELS

print("A small CLIP of handwritten digits forgets the seven.")
model = cached_small_clip("demo", DEMO_MODELS["demo"])
result = cf.unlearn(f"local-dir:{model}", "demo#class:seven", "rest")
print(result.summary())
