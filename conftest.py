"""Which tests run: the quick ones, all with `--run-slow`, and those of trained models with `--run-trained`."""

import pytest

REASONS = {"slow": "slow: --run-slow runs it", "trained": "fetches a trained model: --run-trained runs it"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run all tests but those of trained models")
    parser.addoption("--run-trained", action="store_true", help="run tests that fetch a trained model, too")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Of several processes each begins with whole files, whose fixtures are made once, and the last ones are shared."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in REASONS.items():
        if not config.getoption(f"--run-{marker}"):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))
