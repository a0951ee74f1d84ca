"""Without a GPU, Triton's interpreter runs the kernels on CPU tensors.

Triton decides when it is imported, also about its own library functions, so this happens before anything else imports
it. The variable is taken away again at once: operators on CPU tensors then run their definitions as they do for users,
and only the tests that ask for the kernels (tests/kernels) interpret them.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

KERNEL_MODULES = (
    "selection.kernel",
    "selection.score",
    "selection.top",
    "glue.kernel",
    "input_linear.kernel",
    "input_linear.row",
    "expert_ffn.kernel",
    "neuron_ffn.kernel",
    "attention.kernel",
    "attention.rope",
    "attention.row",
    "spark_attention.kernel",
    "stream",
)

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for module in KERNEL_MODULES:
        importlib.import_module(f"sparse_kernels.{module}")
    if previous is None:
        del os.environ["TRITON_INTERPRET"]
    # Triton's interpreter replaces the functions of its language at every call of a device function, which takes longer
    # than the functions. Once for all of them is enough: those of the language itself know it by its other name.
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if hasattr(interpreter, "_LangPatchScope"):  # since Triton 3.7
        for function in (importlib.import_module("sparse_kernels.blocks").activate.fn, language.sum.fn):
            interpreter._patch_lang(function)
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def check_memory(patch: Callable[[Any, str, Any], None]) -> None:
    """From now on every interpreted load, store and atomic must stay within a tensor that its kernel was given.

    A GPU reports only what leaves the memory of the process, and then at some later call.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    prepare, kernel, given = executor._init_args_hst, "", numpy.empty((0, 2), numpy.uint64)

    def launched(self: Any, *arguments: Any) -> Any:
        nonlocal kernel, given
        found = prepare(self, *arguments)
        tensors = [t for t in (*found[0], *found[1].values()) if isinstance(t, torch.Tensor) and t.numel()]
        extents = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        ranges = [(t.data_ptr(), t.data_ptr() + e * t.element_size()) for t, e in zip(tensors, extents, strict=True)]
        kernel, given = self.fn.__name__, numpy.array(ranges, numpy.uint64).reshape(-1, 2)
        return found

    def checked(name: str, mask_at: int) -> Callable[..., Any]:
        function = getattr(builder, name)

        def access(self: Any, *arguments: Any) -> Any:
            pointer = next(a for a in arguments if hasattr(a, "get_element_ty"))
            size = numpy.uint64(interpreter._get_np_dtype(pointer.get_element_ty()).itemsize)
            mask = numpy.broadcast_to(arguments[mask_at].data.astype(bool), pointer.data.shape)
            begin = pointer.data[mask].reshape(-1, 1)
            inside = ((begin >= given[:, 0]) & (begin + size <= given[:, 1])).any(1)
            assert inside.all(), f"{kernel}: {name} leaves every tensor that it was given"
            return function(self, *arguments)

        return access

    patch(executor, "_init_args_hst", launched)
    for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2), ("create_atomic_rmw", 3)):
        patch(builder, name, checked(name, mask_at))


torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which operators run their kernels in this test, every `torch.empty` full of poison, and without a
    GPU every access checked."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available():
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            pytest.skip("Triton 3.6's interpreter fails on loops with run-time bounds under numpy 2.4 and later.")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        check_memory(monkeypatch.setattr)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    return "cuda" if torch.cuda.is_available() else "cpu"
