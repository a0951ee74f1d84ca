"""The operators as PyTorch sees them: fake tensors, compilation, FLOPs, gradients of the definitions, no Triton."""

import subprocess
import sys

import pytest
import torch
from support import choose, index_list
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from sparse_kernels import compact, expert_ffn, input_linear
from sparse_kernels.expert_ffn import naive as ffn
from sparse_kernels.input_linear import naive as linear


def operands():
    torch.manual_seed(0)
    index, count = index_list(choose(64, 0.5, "cpu"))
    return torch.randn(2, 64), torch.randn(64, 96), index.clamp(min=0), count


def test_operators_are_well_formed():
    x, weight_t, index, count = operands()
    threshold, score = torch.tensor([0.5]), torch.randn(2, 3)
    blocks = compact(score, torch.zeros(1), False)
    up = torch.randn(96, 64)
    ops = torch.ops.sparse_kernels
    opcheck(ops.compact, (x, threshold, True))
    opcheck(ops.input_linear, (x, weight_t, index, count, threshold, torch.randn(96), 1))
    opcheck(ops.input_linear, (x, weight_t, index[:16] // 4, count // 4, None, None, 4))
    opcheck(ops.expert_hidden, (x, up, up, None, None, score, torch.zeros(1), *blocks, "silu"))


def test_fake_tensors_have_the_real_shapes():
    with FakeTensorMode():
        x = torch.empty(4, 64, dtype=torch.bfloat16, device="cuda")
        index, count = compact(x, torch.empty(1, device="cuda"))
        assert (index.shape, count.shape, index.dtype) == ((64,), (1,), torch.int32)
        y = input_linear(x, torch.empty(64, 80, dtype=torch.bfloat16, device="cuda"), index, count)
        assert (y.shape, y.dtype, y.device.type) == ((4, 80), torch.bfloat16, "cuda")


def network(x, weight_t, up, score):
    index, count = compact(x, torch.full((1,), 0.5))
    zero = torch.zeros(1)
    y = input_linear(x, weight_t, index, count, torch.full((1,), 0.5))
    return y, expert_ffn(x, up, up, up, None, None, None, score, zero, "silu")


def test_compiles_as_one_graph():
    arguments = (torch.randn(2, 64), torch.randn(64, 96), torch.randn(96, 64), torch.randn(2, 3))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), network(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_flops_are_those_of_the_dense_layers():
    x, score = torch.zeros(2, 64), torch.zeros(2, 3)
    weight_t, up = torch.randn(64, 96), torch.randn(96, 64)
    with FlopCounterMode(display=False) as counter:
        network(x, weight_t, up, score)
    dense_linear, dense_ffn = 2 * 2 * 64 * 96, 3 * 2 * 2 * 64 * 96
    assert counter.get_total_flops() == dense_linear + dense_ffn


@pytest.mark.parametrize("gated", [True, False])
def test_definitions_are_differentiable(gated):
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(12, 8, dtype=torch.float64, requires_grad=True) if gated else None
    up, down_t = (torch.randn(12, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    score, threshold = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]), torch.zeros(1)

    def run(x, up, down_t):
        return ffn.expert_ffn(x, gate, up, down_t, None, None, None, score, threshold, "silu")

    assert torch.autograd.gradcheck(run, (x, up, down_t))
    index, count = index_list(torch.tensor([True, False] * 4))
    weight_t = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    limit = torch.tensor([0.1])
    assert torch.autograd.gradcheck(lambda x, w: linear.input_linear(x, w, index, count, limit), (x, weight_t))


def test_works_where_triton_is_missing():
    program = """
import sys
sys.modules["triton"] = None
import torch, sparse_kernels
x = torch.randn(1, 8)
index, count = sparse_kernels.compact(x, torch.zeros(1))
assert torch.allclose(sparse_kernels.input_linear(x, torch.eye(8), index, count), x)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
