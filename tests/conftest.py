"""Load the fixtures in the processes that run tests."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Leave them out in the process that only distributes the tests; importing PyTorch would delay all others."""
    distributes = bool(config.getoption("tx", None)) and not hasattr(config, "workerinput")
    if not distributes:
        config.pluginmanager.import_plugin("shared_fixtures")
