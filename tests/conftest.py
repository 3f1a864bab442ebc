"""Have the processes of pytest-xdist import what the tests share, and spare the one that only hands tests out."""


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("runs")
