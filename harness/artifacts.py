"""Where prepared artifacts are: in the user's cache, shipped with the embedded models, or still to be made."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from methods.artifact import CONFIG_FILE, Artifact, fingerprint
from methods.base import Data, Progress
from methods.errors import UsageError

from . import machine
from .corpus import Corpus, Document, token_windows

if TYPE_CHECKING:
    from methods.base import Method

    from .models import LoadedModel, ModelSpec

SHIPPED = Path(__file__).parent / "reference" / "artifacts"
SHIPPED_SEED = 0
WINDOW = 512  # tokens per calibration or training window
CALIBRATION_WINDOWS = 64


def cache_dir() -> Path:
    """`$ACTIVATION_SPARSITY_CACHE`, or `activation-sparsity` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("ACTIVATION_SPARSITY_CACHE") or base / "activation-sparsity").expanduser()


def ensure_writable(target: Path, advice: str) -> None:
    """Raises UsageError, with the advice, where no artifact could be saved as `target`: training may take hours."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in (target.parent, target) if target.exists() else (target.parent,):
            TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"no artifact can be saved as '{target}' ({error.strerror}): {advice}.") from None


def shipped(spec: ModelSpec, method: Method, density: float | None, seed: int) -> Path | None:
    """The artifact that comes with an embedded model: it stands for the method's default options and seed."""
    if spec.kind != "reference" or method.given or density is None:
        return None
    if seed != SHIPPED_SEED:  # a repeat that did not train again would have no spread
        return None
    folder = SHIPPED / spec.name / f"{method.name}-{density:g}"
    return folder if (folder / CONFIG_FILE).is_file() else None


def window_of(config: Any) -> int:
    """Tokens per window of what a model with this config prepares from."""
    return min(WINDOW, getattr(config.get_text_config(), "max_position_embeddings", WINDOW))


def data_for(loaded: LoadedModel, corpus: Corpus, seed: int, workspace: Path | None) -> Data:
    """Calibration and training windows of a corpus, in the model's own tokens."""
    window = window_of(loaded.config)
    calibration = token_windows(corpus.calibration, loaded.tokenizer, window, CALIBRATION_WINDOWS, seed)
    return Data(
        calibration=calibration,
        train=lambda n: token_windows(_shuffled(corpus.train, seed), loaded.tokenizer, window, n),
        corpus={"name": corpus.name, "hash": corpus.hash},
        workspace=None if workspace is None else str(workspace),
        seed=seed,
    )


def _shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    """In an order that only the seed decides, so that the first windows are a fair sample and the rest stay unread."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    return order


def obtain(
    loaded: LoadedModel,
    method: Method,
    densities: Sequence[float | None],
    corpus: Corpus,
    seed: int,
    progress: Progress,
    force: bool = False,
) -> Iterator[Artifact]:
    """One artifact per density, in order: cached, else shipped, else prepared now and cached. `force` prepares anew."""
    if method.training == "none":
        yield from (method.artifact(loaded.model, density, {}, {}) for density in densities)
        return
    found = {d: None if force else existing(loaded, method, d, corpus, seed) for d in densities}
    missing = [density for density in densities if found[density] is None]
    for density in missing if machine.rank() == 0 else ():
        ensure_writable(
            _cached(loaded, method, density, corpus, seed), "set ACTIVATION_SPARSITY_CACHE to another folder"
        )
    data = data_for(loaded, corpus, seed, cache_dir() / "training") if missing else None
    made = iter(()) if data is None else method.prepare(loaded.model, data, missing, progress)
    for density in densities:
        artifact = found[density]
        if artifact is None:
            artifact = next(made)
            artifact.manifest.update(_origin(loaded))
            if machine.rank() == 0:
                artifact.save_pretrained(_cached(loaded, method, density, corpus, seed))
        yield artifact


def existing(loaded: LoadedModel, method: Method, density: float | None, corpus: Corpus, seed: int) -> Artifact | None:
    """The artifact that is cached or shipped, if any. Raises UsageError when it is damaged or of other weights."""
    folder = _cached(loaded, method, density, corpus, seed)
    place = folder if (folder / CONFIG_FILE).is_file() else shipped(loaded.spec, method, density, seed)
    if place is None:
        return None
    artifact = Artifact.from_pretrained(place)
    artifact.require(loaded.model)
    return artifact


def _cached(loaded: LoadedModel, method: Method, density: float | None, corpus: Corpus, seed: int) -> Path:
    model = fingerprint(loaded.model)
    identity = json.dumps([model, method.name, asdict(method.options), density, corpus.hash, seed], sort_keys=True)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_dir() / "artifacts" / f"{method.name}-{key}"


def _origin(loaded: LoadedModel) -> dict[str, Any]:
    """What a reader of the artifact needs to make it again elsewhere."""
    device = str(next(loaded.model.parameters()).device)
    described = machine.describe(device)
    return {
        "base_model": loaded.spec.hub_id or loaded.spec.name,
        "gpu": described["gpu"]["name"] if described["gpu"] else None,
        **{name: described[name] for name in ("python", "torch", "transformers")},
    }
