"""The interface of a method, and the reversible attachment of what it prepared to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .artifact import Artifact, fingerprint
from .errors import UsageError, unknown

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from sparse_kernels.meter import Meter, Phase
    from sparse_kernels.selectors import Tap


# Selectors that tell how good a learned one is. The oracle computes what it leaves out, chance has learned nothing:
# neither is a method, so neither is timed, ranked or held for a claim.
CONTROLS = ("oracle", "random")


class Progress(Protocol):
    """Reports long work: `done` of `total`, in words a reader understands."""

    def __call__(self, text: str, done: float, total: float) -> None: ...


def silent(text: str, done: float, total: float) -> None:
    """The progress report of someone who does not want one."""


@dataclass(frozen=True)
class Data:
    """Text for `prepare`, tokenised. `calibration`: int64 [n, window]; `train(n)`: up to n such windows, seeded.

    `corpus` names the text and its hash for the manifest; `workspace` is a folder for checkpoints of long training.
    """

    calibration: Tensor
    train: Callable[[int], Tensor]
    corpus: dict[str, str]
    workspace: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class NoOptions:
    """A method without settings."""


class Method:
    """One paper. A subclass lives in one file and states what it is; the harness knows nothing else about it.

    Class attributes: `summary`, `paper`, `training` ("none", "training-free" or "trained"), `sites` (where it skips),
    `activation` (what the model must have: "any" or "relu"), `modes`, `densities` (the defaults of a run; None where
    the method has no density), `fidelity` (what is the paper's, what is adapted), `Options` (a frozen dataclass; its
    fields are the settings a user can give as `name:field=value`).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = "-"
    training: ClassVar[str] = "none"
    sites: ClassVar[tuple[str, ...]] = ()
    activation: ClassVar[str] = "any"
    modes: ClassVar[tuple[str, ...]] = ("decode", "all", "last")
    densities: ClassVar[tuple[float | None, ...]] = (0.7, 0.5)
    fidelity: ClassVar[str] = ""
    origin: ClassVar[str] = "built-in"
    Options: ClassVar[type] = NoOptions

    def __init__(self, **given: Any) -> None:
        known = {f.name: f for f in fields(self.Options)}
        for key in given:
            if key not in known:
                raise unknown(f"option of method {self.name}", key, known or ["(none)"])
        self.given = dict(given)
        self.options = self.Options(**given)

    @property
    def control(self) -> bool:
        return getattr(self.options, "selector", None) in CONTROLS

    def target(self, density: float | None) -> float:
        """The density, for a method that needs one. Raises UsageError where none is given, and outside (0, 1]."""
        if density is None:
            raise UsageError(f"{self.name} needs a target density: add --density 0.5.")
        if not 0 < density <= 1:
            raise UsageError(f"{self.name} cannot reach density {density:g}: choose one in (0, 1], like 0.5.")
        return density

    def why_not(self, config: Any) -> str | None:
        """One sentence when the method cannot serve a model with this transformers config, else None."""
        return None

    def skips(self, config: Any) -> tuple[str, ...]:
        """Of its sites, or of the linear layers in them, those where it skips something of a model with this config."""
        return self.sites

    def unreachable(self, config: Any, density: float) -> str | None:
        """One sentence when a model with this config cannot have this density, else None."""
        return None

    def budget(self, config: Any) -> int:
        """Windows of text that training reads for one density, at most."""
        return 0

    def prepare(
        self, model: PreTrainedModel, data: Data, densities: Sequence[float | None], progress: Progress = silent
    ) -> Iterator[Artifact]:
        """Calibrates or trains; yields one artifact per target density, in order. Leaves the model as it was."""
        for density in densities:
            yield self.artifact(model, density, {}, {"corpus": data.corpus})

    def synthesize(
        self, model: PreTrainedModel, density: float | None, tokens: Tensor, last: int | None = None
    ) -> Artifact:
        """For random weights: an artifact with the method's shapes and the asked density, from these tokens alone.

        tokens: int64 [n, length]; what is set so that the density is met is set on the `last` of them, or as `prepare`
        sets it where that is None. It carries FLOPs and latency, never an accuracy.
        """
        return self.artifact(model, density, {}, {"synthetic": True})

    def attach(self, attachment: Attachment) -> None:
        """Puts the method's layers in place through `attachment.replace`, `.set_parameter` and `.tap`."""

    def artifact(
        self, model: PreTrainedModel, density: float | None, tensors: dict[str, Tensor], manifest: dict[str, Any]
    ) -> Artifact:
        return Artifact(self.name, asdict(self.options), density, fingerprint(model), manifest, tensors)


class Attachment:
    """Replaces modules and parameters of a model, and puts the very same objects back.

    taps: where selectors listen, by place and block.
    """

    def __init__(self, model: PreTrainedModel, artifact: Artifact, phase: Phase, meter: Meter) -> None:
        self.model, self.artifact, self.phase, self.meter = model, artifact, phase, meter
        self.taps: dict[tuple[str, int], Tap] = {}
        self._undo: list[Callable[[], None]] = []

    def replace(self, path: str, module: nn.Module) -> None:
        parent_path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        original = getattr(parent, name)
        setattr(parent, name, module)
        self._undo.append(lambda: setattr(parent, name, original))

    def set_parameter(self, path: str, value: Tensor) -> None:
        from torch import nn

        parent_path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        original = parent._parameters[name]
        assert original is not None
        parent._parameters[name] = nn.Parameter(value.to(original), requires_grad=False)
        self._undo.append(lambda: parent._parameters.__setitem__(name, original))

    def tap(self, place: str, block: int) -> Tap:
        """The hidden state at one of `families.PLACES` of a block; it is kept until the block after the next one."""
        from sparse_kernels.selectors import Tap

        from .families import layout_of, place_path

        if (place, block) not in self.taps:
            # Every second block writes to the same tap: what is held does not grow with the model's depth.
            same = (tap for (other, index), tap in self.taps.items() if other == place and (index - block) % 2 == 0)
            tap = self.taps[place, block] = next(same, None) or Tap()
            layout = layout_of(self.model.config)
            path = f"{layout.layers}.{block}.{place_path(layout, place)}".rstrip(".")

            def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tap.value = args[0] if args else kwargs["hidden_states"]

            hook = self.model.get_submodule(path).register_forward_pre_hook(listen, with_kwargs=True)
            self._undo.append(hook.remove)
        return self.taps[place, block]

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


class SparseModel:
    """A model with a method attached: which positions are sparse, what was active, and how to take it off again."""

    def __init__(self, model: PreTrainedModel, artifact: Artifact, method: Method, mode: str = "decode") -> None:
        from sparse_kernels.layers import SparseLayer
        from sparse_kernels.meter import Meter, Phase

        self.model, self.artifact, self.method, self.mode = model, artifact, method, mode
        self.fraction = parse_mode(mode)
        self.phase, self.meter = Phase(), Meter()
        self._override = False
        self._attachment = Attachment(model, artifact, self.phase, self.meter)
        try:
            method.attach(self._attachment)
        except BaseException:
            self._attachment.undo()
            raise
        self.taps = self._attachment.taps
        self._layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        for layer in self._layers:
            if layer.density is None:
                layer.density = 1.0 if artifact.density is None else artifact.density
        self._hook = model.register_forward_pre_hook(self._set_phase, with_kwargs=True)

    def layers(self) -> list[Any]:
        """The sparse layers, in model order."""
        return self._layers

    def remove(self) -> None:
        """Restores the model: the same modules and the same parameter objects, hence the same bits."""
        self._hook.remove()
        self._attachment.undo()

    def mask(self, batch: int, length: int, device: torch.device | str) -> bool | Tensor:
        """The rule of this mode for one forward pass over `length` positions: False, True or a mask [batch, length]."""
        import torch

        if length == 1 or self.fraction == 1.0:
            return True
        sparse = round(length * self.fraction)
        return (torch.arange(length, device=device) >= length - sparse).expand(batch, -1) if sparse else False

    def _set_phase(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        self.meter.steps = inputs.shape[1] == 1
        if not self._override:
            self.phase.active = self.mask(inputs.shape[0], inputs.shape[1], inputs.device)

    @contextmanager
    def positions(self, active: bool | Tensor, apart: bool = False) -> Iterator[None]:
        """Within: exactly these positions are sparse, whatever the mode. active: bool, or bool [B, T].

        apart: rows of one token are texts of their own, so that no method chooses for all of them together.
        """
        before = self._override, self.phase.active, self.phase.apart
        self._override, self.phase.active, self.phase.apart = True, active, apart
        try:
            yield
        finally:
            self._override, self.phase.active, self.phase.apart = before

    def dense(self) -> Any:
        """Within: every position dense."""
        return self.positions(False)

    def sparse(self) -> Any:
        """Within: every position sparse."""
        return self.positions(True)


def parse_mode(mode: str) -> float:
    """The share of a prompt's positions that are sparse: decode 0, all 1, last-50% 0.5. Raises UsageError."""
    if mode == "decode":
        return 0.0
    if mode == "all":
        return 1.0
    if mode.startswith("last-") and mode.endswith("%"):
        try:
            share = float(mode[5:-1]) / 100
        except ValueError:
            share = -1.0
        if 0 < share <= 1:
            return share
    raise UsageError(f"unknown mode '{mode}': choose decode, all or last-<x>% with x in (0, 100].")


@contextmanager
def sparsify(model: PreTrainedModel, artifact: Artifact, mode: str = "decode") -> Iterator[SparseModel]:
    """Attaches a prepared method to a model for the length of a `with` block; afterwards the model is bit-exact.

        with sparsify(model, artifact): model.generate(...)

    Raises UsageError when the artifact was prepared for other weights.
    """
    handle = _attach(model, artifact, mode)
    try:
        yield handle
    finally:
        handle.remove()


def sparsify_(model: PreTrainedModel, artifact: Artifact, mode: str = "decode") -> nn.Module:
    """Attaches in place and returns the model; `model.sparse_model.remove()` takes it off again."""
    model.sparse_model = _attach(model, artifact, mode)  # type: ignore[assignment]
    return model


def load_artifact(source: str) -> Artifact:
    """Reads an artifact from a folder or a hub id."""
    return Artifact.from_pretrained(source)


def _attach(model: PreTrainedModel, artifact: Artifact, mode: str) -> SparseModel:
    from .registry import create

    if getattr(model, "sparse_model", None) is not None:
        raise UsageError("the model is sparse already: call model.sparse_model.remove() first.")
    artifact.require(model)
    return SparseModel(model, artifact, create(artifact.method, artifact.options), mode)
