import pytest
import torch

from sparse_kernels import read_bandwidth
from sparse_kernels.bandwidth import ELEMENTS, STEPS, stream_read


def test_stream_read_reads_everything_once(device):
    data = torch.randint(-8, 8, (2 * ELEMENTS * STEPS,), device=device).float()
    sums = torch.empty(2, device=device)
    stream_read(data, sums)
    assert torch.equal(sums, data.reshape(2, -1).sum(1))


def test_read_bandwidth_needs_a_gpu():
    with pytest.raises(ValueError, match="CUDA device"):
        read_bandwidth("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_read_bandwidth_is_plausible():
    assert 1e11 < read_bandwidth("cuda", gib=1) < 2e13
