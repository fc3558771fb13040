from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture() -> Callable[..., Path]:
    """Writes a small image file whose colour tells it from others."""

    def write(path: Path, shade: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 6, 3), (shade, 255 - shade, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write
