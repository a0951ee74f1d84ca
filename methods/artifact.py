"""What `prepare` makes and `sparsify` takes: a small folder of JSON and safetensors, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

CONFIG_FILE = "sparsity_config.json"
TENSOR_FILE = "sparsity.safetensors"
SCHEMA = 1


class Stored(dict[str, "Tensor"]):
    """Tensors from disk. A name that is not there is the file's fault: nothing may stand in for it."""

    def __missing__(self, name: str) -> Tensor:
        raise UsageError(
            f"the artifact has no tensor '{name}', which another version of the method would explain: "
            "run `python -m harness prepare --force`."
        )


@dataclass(frozen=True)
class Artifact:
    """A prepared method for one model and one target density.

    method, options: what was prepared, and with which settings; density: the target (None: the method has none);
    model: fingerprint of the dense model it belongs to; manifest: data, tokens, seed, seconds, device, versions;
    tensors: thresholds, routers, permutations, weight differences, by name.
    """

    method: str
    options: dict[str, Any]
    density: float | None
    model: str
    manifest: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Content hash over everything except the manifest's timings."""
        digest = hashlib.sha256()
        head = [self.method, self.options, self.density, self.model]
        digest.update(json.dumps(head, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.view(-1).view(_bytes()).numpy().tobytes())
        return digest.hexdigest()[:16]

    def require(self, model: PreTrainedModel) -> None:
        """Raises UsageError when it was prepared for other weights."""
        found = fingerprint(model)
        if self.model != found:
            raise UsageError(
                f"the {self.method} artifact belongs to weights {self.model}, this model has {found}: "
                "run `python -m harness prepare` for this model."
            )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the two files; a reader never sees half of them, because the folder appears under its name at once."""
        from safetensors.torch import save_file

        target = Path(folder).expanduser()
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        scratch.mkdir(parents=True, exist_ok=True)
        config = {
            "schema": SCHEMA,
            "method": self.method,
            "options": self.options,
            "density": self.density,
            "model": self.model,
            "hash": self.hash,
            "manifest": self.manifest,
        }
        save_file({k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}, scratch / TENSOR_FILE)
        (scratch / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        target.mkdir(parents=True, exist_ok=True)
        for name in (TENSOR_FILE, CONFIG_FILE):  # the config last: its presence marks a complete artifact
            os.replace(scratch / name, target / name)
        scratch.rmdir()
        return target

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> Artifact:
        """Reads a folder, or a hub repository 'org/name'. Raises UsageError when it is missing or damaged."""
        folder = Path(source).expanduser()
        if not folder.is_dir():
            folder = _download(str(source))
        try:
            from safetensors.torch import load_file

            config = json.loads((folder / CONFIG_FILE).read_text())
            tensors = load_file(folder / TENSOR_FILE)
            artifact = cls(
                config["method"],
                config["options"],
                config["density"],
                config["model"],
                config["manifest"],
                Stored(tensors),
            )
            recorded = config["hash"]
        except Exception as error:  # safetensors raises its own type; any of them means a damaged folder
            raise UsageError(
                f"the artifact in {folder} cannot be read ({error}): delete the folder and run "
                "`python -m harness prepare --force`."
            ) from error
        if artifact.hash != recorded:
            raise UsageError(
                f"the artifact in {folder} does not match its recorded hash: delete the folder and run "
                "`python -m harness prepare --force`."
            )
        return artifact


def _bytes() -> Any:
    import torch

    return torch.uint8


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, TENSOR_FILE]))
    except Exception as error:  # the hub client raises many types; all mean the same to the reader
        raise UsageError(
            f"no artifact at '{name}': give a folder with {CONFIG_FILE}, or a hub id you can reach."
        ) from error


def fingerprint(model: PreTrainedModel) -> str:
    """Identifies weights whatever dtype they were loaded in: hashes every parameter's name, shape and 16 of its values.

    Values are rounded to bfloat16, the coarsest dtype in use, so bf16 and fp32 copies of one checkpoint agree.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().view(-1) if parameter.is_contiguous() else parameter.detach().reshape(-1)
        # Integers: float32 cannot tell the positions of a large tensor apart, and would step over its end.
        at = torch.arange(16, device=flat.device) * (flat.numel() - 1) // 15
        values = flat[at].to(torch.bfloat16).float().cpu().tolist()
        digest.update(f"{name}{tuple(parameter.shape)}{values}".encode())
    return digest.hexdigest()[:16]
