"""A model on its way to the device: torch module, per-layer shapes, plan and quantization, as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgekd.arch import Arch
from edgekd.errors import ModelError
from edgekd.families import arch_of, boost, compact, family_of
from edgekd.families.family import Family
from edgekd.families.zeros import lost_zeros

SECTION = "edgekd"
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "preprocessor_config.json",
)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A transformers model with what edgekd knows of it.

    `plan` is the shape that search chose and prune has not cut yet; `quantization` is how export lowers the graph.
    `sparsity` is what `edgekd.families.zeros` promises of zeros in the weights.
    `ordered`: the heads and neurons of each layer are sorted, so that every prefix is a good sub-network; `trained`
    says down to which share of the `heads` and `neurons` and how many `layers`.
    """

    model: Any
    arch: Arch
    processor_dir: Path | None = None
    plan: Arch | None = None
    quantization: dict[str, Any] | None = None
    sparsity: dict[str, Any] | None = None
    ordered: bool = False
    trained: dict[str, Any] | None = None

    @property
    def family(self) -> Family:
        """The architecture family of the model."""
        return family_of(self.model.config.model_type)

    def with_model(self, model: Any) -> Student:
        """The same student around another torch module (shapes are read anew, sources kept)."""
        sources = tuple(layer.source for layer in self.arch.layers)
        return replace(self, model=model, arch=arch_of(model, sources))

    def save(self, folder: Path) -> None:
        """Write `config.json` (with its `edgekd` section), `model.safetensors` and the processor files."""
        folder.mkdir(parents=True, exist_ok=True)
        section: dict[str, Any] = {"arch": self.arch.to_dict()}
        if self.plan is not None:
            section["plan"] = self.plan.to_dict()
        if self.quantization is not None:
            section["quantization"] = self.quantization
        if self.sparsity is not None:
            section["sparsity"] = self.sparsity
        if (beside := boost.described(self.model)) is not None:
            section["boost"] = beside
        if self.ordered:
            section["ordered"] = True
        if self.trained is not None:
            section["trained"] = self.trained
        if self.arch.vocabulary:
            self.model.config.vocab_size = self.arch.vocabulary
        setattr(self.model.config, SECTION, section)
        with quiet_transformers():
            self.model.save_pretrained(folder, safe_serialization=True)
        copy_processor(self.processor_dir, folder)


def copy_processor(source: Path | None, folder: Path) -> None:
    """Copy tokenizer and image-processor files from one model folder to another."""
    for name in PROCESSOR_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def load_student(source: str | Path, *, auto_class: str) -> Student:
    """Load a model folder, non-uniform shapes included, in float32 and `eval()` mode.

    Args:
        source: a Hugging Face folder, or a hub id.
        auto_class: the transformers class, for instance `AutoModelForSequenceClassification`.

    Raises:
        ModelError: no folder, no config, no safetensors weights, weights that do not fit or have lost the zeros that
            the config promises, or an unknown family.
    """
    folder = local_folder(str(source))
    config = read_config(folder)
    if config.get("quantization_config"):
        raise ModelError(f"{folder} comes quantized (its config has a quantization_config): give the float model")
    family_of(str(config.get("model_type")))
    require_weights(folder)
    section = config.get(SECTION) or {}
    model = _build(folder, auto_class, section)
    arch = Arch.from_dict(section["arch"]) if "arch" in section else arch_of(model)
    plan = Arch.from_dict(section["plan"]) if "plan" in section else None
    real = arch_of(model, tuple(layer.source for layer in arch.layers))
    if real != replace(arch, channels=arch.channels or real.channels):
        raise ModelError(f"{folder}: the weights do not have the shapes that config.json states ({arch.describe()})")
    if problem := lost_zeros(model, section.get("sparsity")):
        raise ModelError(f"{folder}: {problem}")
    return Student(
        model=model.eval(),
        arch=real,
        processor_dir=folder,
        plan=plan,
        quantization=section.get("quantization"),
        sparsity=section.get("sparsity"),
        ordered=bool(section.get("ordered", False)),
        trained=section.get("trained"),
    )


def local_folder(source: str) -> Path:
    """The folder itself, or the local snapshot of a hub id.

    Raises:
        ModelError: neither a folder nor a reachable hub id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file() or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise ModelError(f"no model folder at {source!r}; give a folder with config.json and model.safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{source!r} is not a local folder, and the hub did not give it ({type(error).__name__}); "
            "check the spelling or download it first"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model folder as plain data.

    Raises:
        ModelError: it is missing or not JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder that save_pretrained wrote")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from None
    return config


def require_weights(folder: Path) -> None:
    """Refuse a folder without safetensors weights.

    Raises:
        ModelError: no weights, or only pickled ones, which edgekd never opens.
    """
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise ModelError(
            f"{folder} has only pickled weights, which can run code when opened; "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"{folder} has no weights: model.safetensors is missing")


def _build(folder: Path, auto_class: str, section: dict[str, Any]) -> Any:
    import transformers
    from safetensors import SafetensorError

    auto = getattr(transformers, auto_class)
    with quiet_transformers():
        try:
            if "arch" not in section:
                model, report = auto.from_pretrained(
                    folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
                if report["missing_keys"]:
                    missing = ", ".join(sorted(report["missing_keys"])[:3])
                    raise ModelError(
                        f"{folder} lacks weights of {type(model).__name__} ({missing} …): it is not a finished model "
                        "of this task; train one first with `edgekd finetune`"
                    )
                return model
            return _rebuild(folder, auto, Arch.from_dict(section["arch"]), section)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded as {auto_class}: {error}") from None


def _rebuild(folder: Path, auto: Any, arch: Arch, section: dict[str, Any]) -> Any:
    """Build the teacher's own shape without values, cut it to the student's, and load the weights."""
    from safetensors.torch import load_file
    from transformers import AutoConfig
    from transformers.modeling_utils import no_init_weights

    config = AutoConfig.from_pretrained(folder)
    if arch.vocabulary:
        config.vocab_size = arch.vocabulary
    with no_init_weights():
        model = auto.from_config(config, dtype=torch.float32)
    _shape(model, arch)
    # Folders of earlier versions have it beside the zeros.
    boost.restore(model, section.get("boost") or (section.get("sparsity") or {}).get("boost"))
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise ModelError(f"{folder}: model.safetensors does not match config.json ({[*unexpected, *missing][:3]} …)")
    return model.float()


def _shape(model: Any, arch: Arch) -> None:
    """Bring a freshly built model to a shape; which channels, heads and neurons are kept does not matter."""
    family = family_of(model.config.model_type)
    for layer, shape in zip(family.layers(model), arch.layers, strict=True):
        if shape.heads != family.heads(layer):
            family.slice_heads(layer, _any(shape.heads), arch.head_dim)
        family.slice_neurons(layer, _any(shape.neurons))
    if family.slice_channels is not None and arch.channels:
        for index, (width, have) in enumerate(zip(arch.channels, family.channels(model), strict=True)):
            if width != have:
                family.slice_channels(model, index, _any(width))
    elif family.slice_hidden is not None and arch.hidden != family.hidden(model):
        family.slice_hidden(model, _any(arch.hidden))
    compact.install(model, family, arch.layers, fresh=True)


def _any(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.long)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own log lines and bars off the user's terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
