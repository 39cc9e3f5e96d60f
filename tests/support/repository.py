"""Where things of the repository are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
SUPPORT = ROOT / "tests" / "support"
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
TINY = ROOT / "models" / "tiny"
HELDOUT = TINY / "heldout"
