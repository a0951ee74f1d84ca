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
    gpu = torch.cuda.get_device_name()
    if not request.config.getoption("--accept-baseline", default=False):
        if not any(baselines.FOLDER.glob("*.json")):
            pytest.skip("no GPU's times have been accepted yet: add --accept-baseline to store this one's.")
        yield baselines.load(gpu)
        return
    accepted = Baseline(gpu, accepting=True)
    yield accepted
    if accepted.cases:
        baselines.save(accepted, machine.describe("cuda"))
