"""What tests of data sources share."""

import datasets
import pytest


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Caches of the test's own, and passes of `datasets` that end at once."""
    monkeypatch.setenv("NPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.2)  # 5 s at the end of each pass otherwise
    datasets.disable_progress_bars()
