"Shared fixtures: where the optional real data is, and quiet single-threaded torch"
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "agg")


def data_root():
    "The folder of optional real data: VISDET_DATA, or ../shared/data beside the repository"
    return Path(os.environ.get("VISDET_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data():
    "Path to the optional real data; skips where it is absent"
    p = data_root()
    if not p.is_dir():
        pytest.skip("no real data here: set VISDET_DATA to use it")
    return p
