"""From a bare checkout the pytest plugin is not installed: load it here."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    names = ("rooftune", "rooftune.pytest_plugin")  # by its entry point, by -p
    if not any(config.pluginmanager.hasplugin(name) for name in names):
        config.pluginmanager.import_plugin("rooftune.pytest_plugin")
