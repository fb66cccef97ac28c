"""The data of the log benches: corpora and rule sets that make_corpus.py of the development data writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("EMISSARY_DATA", ROOT.parent / "shared/data"))


def make(kind: str, out: Path, *arguments: str) -> Path:
    """`corpus` or `rules`, written to `out`. Skips where the data is not."""
    if not (DATA / "make_corpus.py").exists():
        pytest.skip("development data: EMISSARY_DATA does not name its folder")
    subprocess.run([sys.executable, DATA / "make_corpus.py", kind, *arguments, out], check=True, capture_output=True)
    return out
