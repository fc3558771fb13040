import sys
from pathlib import Path

# benchmarks/ is not installed; the tests use its measurements.
sys.path.insert(0, str(Path(__file__).parents[1]))
