"""The parts every task has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Ints = npt.NDArray[np.int64]


class Rows(Protocol):
    """Examples to encode."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """Role (`text`, `text_pair`, `image`) to N values."""
        ...

    @property
    def labels(self) -> Ints | None:
        """Class numbers [N], -1 where there is none; None if no example has one."""
        ...

    @property
    def digests(self) -> Sequence[bytes]:
        """SHA-256 of the inputs of each example; empty where unknown."""
        ...

    def __len__(self) -> int: ...


class Encoded(Protocol):
    """Examples as the model takes them, encoded once."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each example [N]; 1 for images."""
        ...

    @property
    def labels(self) -> Ints | None:
        """Class numbers [N], -1 where there is none; None if no example has one."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the inputs, labels left out: what a cache of model outputs depends on."""
        ...

    def __len__(self) -> int: ...

    def collate(self, indices: Ints, length: int | None = None) -> dict[str, torch.Tensor]:
        """The model inputs of some examples; text is padded to the longest of them, or to `length`."""
        ...

    def take(self, indices: Ints) -> Encoded:
        """Some of the examples, in the order of `indices`."""
        ...


@dataclass(frozen=True, eq=False)
class Processor:
    """What turns raw inputs into model inputs.

    Attributes:
        hf: the tokenizer or image processor of transformers.
        input_names: names of the model's inputs, which are those of its ONNX graph.
        max_length: the longest input the model takes, in tokens; None for images.
        shape: (channels, height, width) the model takes; None for text.
        vocabulary: number of tokens the model knows; None for images.
    """

    hf: Any
    input_names: tuple[str, ...]
    max_length: int | None = None
    shape: tuple[int, int, int] | None = None
    vocabulary: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of problem, as data and functions.

    Attributes:
        name: the name of the task on the Hugging Face hub.
        kind: what an example is.
        metric: what `score` computes; higher is better.
        auto_class: the class of transformers that loads its models.
        architecture: how the name of such a model's class ends.
        load_processor: (model folder) -> Processor.
        encode: (processor, examples, longest input in tokens or None) -> Encoded.
        loss: (logits [B, C], labels [B]) -> scalar.
        score: (logits [N, C], labels [N]) -> float.
        feeds: (processor, batch, sequence) -> inputs of the ONNX graph.
    """

    name: str
    kind: Literal["text", "image"]
    metric: str
    auto_class: str
    architecture: str
    load_processor: Callable[[str | Path], Processor]
    encode: Callable[[Processor, Rows, int | None], Encoded]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    score: Callable[[npt.NDArray[Any], Ints], float]
    feeds: Callable[[Processor, int, int | None], dict[str, npt.NDArray[Any]]]
