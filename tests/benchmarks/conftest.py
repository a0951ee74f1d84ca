from collections.abc import Iterator

import baselines
import pytest
import torch
from baselines import Baseline

from harness import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept-baseline", action="store_true", help="on a GPU: store its times as the new baseline")


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def baseline(request: pytest.FixtureRequest) -> Iterator[Baseline]:
    """This GPU's accepted times, or with --accept-baseline an empty one, saved at the end."""
    if not torch.cuda.is_available():
        pytest.skip("times are held to baselines on a GPU only.")
    accepting = request.config.getoption("--accept-baseline", default=False)
    expected = baselines.expected(torch.cuda.get_device_name(), accepting)
    if expected is None:
        pytest.skip("no GPU's times have been accepted yet: add --accept-baseline to store this one's.")
    yield expected
    if expected.accepting and expected.cases:
        baselines.save(expected, machine.describe("cuda"))
