"Shared fixtures: where the optional real data is, and quiet single-threaded torch"
import os
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "agg")

if os.environ.get("VISDET_COVERAGE"):  # note which changed statements run, before visdet is imported: `visdet dev coverage` reports it
    from visdet.cli.coverage import start_coverage
    from visdet.core.basics import ConfigError

    try:
        start_coverage(ROOT, os.environ["VISDET_COVERAGE"], os.environ.get("VISDET_AGAINST", "main"))
    except ConfigError as e:
        warnings.warn(f"coverage is not measured: {e}")


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
