"""Load the fixtures in the processes that run tests, and put the slowest tests first."""

import pytest

# Whatever starts servers, browsers and clusters. At the end, one process would run them while the others wait.
SLOWEST = ("test_cluster.py", "test_browser.py", "test_sessions.py", "test_load.py", "test_hostile.py")


def pytest_configure(config: pytest.Config) -> None:
    """Leave fixtures out in the process that only distributes the tests; importing PyTorch would delay all others."""
    distributes = bool(config.getoption("tx", None)) and not hasattr(config, "workerinput")
    if not distributes:
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file; within a file, the order stays."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))
