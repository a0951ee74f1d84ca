"""Two processes on the CPU, as torchrun starts them, fine-tune a student, are interrupted, and leave a checkpoint.

Argument: a folder, where the folders "ddp" and "fsdp" are. accelerate itself offers FSDP on accelerators only; torch
has it on CPUs.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from methods.base import silent
from methods.shared import training
from methods.shared.student import Student, Tuning, dense_ffn
from tests.methods.models import llama, windows

STEPS, BATCH = 6, 4


def tuned(folder: Path | None, stop: int | None = None) -> tuple[Student, list[float]]:
    """A student after STEPS steps in float32, the same for any number of processes; `stop`: interrupted before one.

    After each of them the held-out windows are asked, which is what the processes do together beside the steps.
    """
    torch.cpu._is_avx512_bf16_supported = lambda: False
    training.CHECKPOINT_SECONDS = 0.0
    model = Student(llama(), Tuning(windows(12), BATCH, 1e-3, 0, silent, patience=STEPS), None, dense_ffn("relu"))

    def loss(ids: torch.Tensor, done: float) -> torch.Tensor:
        if stop is not None and done >= stop / STEPS:
            raise KeyboardInterrupt
        return model.task_loss(ids)

    place = None if folder is None else folder / "state.safetensors"
    return model, model.train(loss, STEPS, "test", place)


def work(rank: int, port: int, out: Path) -> None:
    """What one process does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    if out.name == "fsdp":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
        from accelerate.state import DistributedType, PartialState

        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    assert training.accelerator().num_processes == 2 and training.sharded() == (out.name == "fsdp")
    try:
        tuned(out, 3)
    except KeyboardInterrupt:
        pass
    found, losses = tuned(None)
    assert training.agreed(float(training.accelerator().process_index)) == 0.0
    save_file(found.state() | {"losses": torch.tensor(losses)}, out / f"rank{training.accelerator().process_index}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Forked: most of the time of a process of its own would go into imports.
        torch.multiprocessing.start_processes(work, (port, Path(sys.argv[1]) / kind), nprocs=2, start_method="fork")
