"""What the tests share: the scripts are importable, runs are small, and real data is looked for in $AUX_DATA."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def real_data() -> str:
    """The --data-root with real data sets; the test is skipped where there is none."""
    root = os.environ.get("AUX_DATA")
    if not root:
        pytest.skip("AUX_DATA names no folder with real data sets")
    return root


def relative_difference(a, b) -> float:
    """Largest entry of a - b over the largest entry of b."""
    return float((a - b).abs().max() / b.abs().max())
