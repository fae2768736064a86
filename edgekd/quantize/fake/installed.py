"""Putting fake quantization on a model in place, and taking it off again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from edgekd.errors import DataError, ModelError, RecipeError, unknown
from edgekd.families import FAMILIES, Family
from edgekd.families.compact import kept_tokens
from edgekd.quantize.fake.activations import Activation
from edgekd.quantize.fake.fold import folded
from edgekd.quantize.fake.grid import snap_rows, straight_through
from edgekd.quantize.fake.operands import quantize_attention
from edgekd.quantize.fake.scheme import HEAD_BITS, OBSERVERS, Scheme, within
from edgekd.quantize.fake.weights import weight_quantizer

Range = tuple[float, float]
_TYPES = {kind: family for family in FAMILIES.values() for kind in family.model_types}
_MARK = "fake_quantized"


class FakeQuantized(nn.Module):
    """What `install` has put on a model: the ranges of its activations, and the way back.

    The model is no child of it. Its state (ranges, steps, what is learned) must be trained and kept with the model's:
    give a training job both as modules, and call `step` after every optimizer step.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, scheme: Scheme, *, observer: str, learned: bool) -> None:
        super().__init__()
        self.scheme, self.observer, self.learned = scheme, observer, learned
        self.places: dict[str, str] = {}
        """Which quantizer rounds the input of a module, or an operand of attention (`module:operand`)."""
        self.quantizers = nn.ModuleDict()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        # A part of the state, so that a checkpoint of another scheme is not taken for one of this.
        about = json.dumps([scheme.to_dict(), observer, learned], sort_keys=True).encode()
        self.register_buffer("about", torch.tensor(list(about), dtype=torch.uint8))
        self._dynamic = scheme.activations == "dynamic"
        self._stands_at: int | None = None
        self._last: tuple[str, Tensor, Tensor] | None = None
        self._readers: list[tuple[str, Tensor]] | None = None
        self._mask: Tensor | None = None
        self._model: tuple[nn.Module, ...] = (model,)  # in a tuple, so that it is no child
        self._handles: list[RemovableHandle] = []
        self._trained: list[nn.Parameter] = []
        self._norms: list[nn.BatchNorm2d] = []
        self._make: Any = lambda: Activation(scheme, observer=observer, learned=learned)

    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Observe ranges on inputs of the model; modules that read the same tensor get one range.

        Raises:
            DataError: there are no inputs, or some lead to values that are not finite.
        """
        if self.scheme.activations != "static":
            return
        (model,) = self._model
        training = model.training
        model.eval()
        self._set(observing=True)
        count = 0
        try:
            with torch.no_grad():
                for count, batch in enumerate(batches, 1):
                    self._readers = [] if count == 1 else None
                    model(**batch)
                    self._share()
        finally:
            self._readers = None
            self._set(observing=False)
            model.train(training)
        if not count:
            raise DataError("static ranges need examples to calibrate on, and there are none")
        for quantizer in self._all():
            quantizer.settle()

    @torch.no_grad()
    def take(self, ranges: Mapping[str, Range]) -> None:
        """Set the ranges that are named, as `ranges` and `attention_ranges` tell them; `calibrate` must come first."""
        for name, (low, high) in ranges.items():
            if name in self.places:
                quantizer: Any = self.quantizers[self.places[name]]
                quantizer.low.fill_(low)
                quantizer.high.fill_(high)

    def step(self) -> None:
        """Count a step of training."""
        self.steps += 1

    def freeze(self, at: int = 0) -> None:
        """Let ranges stand from step `at` of training on, or at once."""
        self._stands_at = at

    @property
    def frozen(self) -> bool:
        """Whether ranges stand."""
        return self._stands_at is not None and int(self.steps) >= self._stands_at

    def ranges(self) -> dict[str, Range]:
        """The range of the input of each linear layer and convolution, by its name; empty unless they are static."""
        return {name: ends for name, ends in self._ranges() if ":" not in name}

    def attention_ranges(self) -> dict[str, Range]:
        """The range of each operand of attention, as `name of the attention module:operand`."""
        return {name: ends for name, ends in self._ranges() if ":" in name}

    def _ranges(self) -> Iterator[tuple[str, Range]]:
        for name, key in self.places.items():
            quantizer: Any = self.quantizers[key]
            if not quantizer.dynamic and not quantizer.low.isnan():
                low, high = (float(end) for end in quantizer.range())
                yield name, (min(low, 0.0), max(high, 0.0))

    def originals(self) -> dict[str, nn.Parameter]:
        """The float weights behind the rounded ones, by the name of their module: what masks must be applied to."""
        (model,) = self._model
        return {
            name: module.parametrizations.weight.original
            for name, module in model.named_modules()
            if parametrize.is_parametrized(module, "weight")
        }

    @torch.no_grad()
    def strip(self) -> None:
        """Take everything off the model; its weights stay as they were last rounded."""
        (model,) = self._model
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in list(model.modules()):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
                _weight_first(module)
            elif isinstance(module, nn.Embedding) and self.scheme.embeddings and not self._kept(model, module):
                module.weight.copy_(snap_rows(module.weight, bits=self.scheme.embedding_bits))
        for parameter in self._trained:
            parameter.requires_grad_(True)
        model.__dict__.pop(_MARK, None)

    def _kept(self, model: nn.Module, module: nn.Module) -> bool:
        return any(each is module and within(name, self.scheme.keep_float) for name, each in model.named_modules())

    def _all(self) -> Iterator[Any]:
        yield from self.quantizers.values()

    def _set(self, **flags: bool) -> None:
        for quantizer in self._all():
            for name, value in flags.items():
                setattr(quantizer, name, value)

    def _share(self) -> None:
        """Give modules that have read the very same tensor one quantizer."""
        owners: dict[int, str] = {}
        for name, tensor in self._readers or ():
            self.places[name] = owners.setdefault(id(tensor), self.places[name])
        if self._readers:
            used = set(self.places.values())
            for key in [key for key in self.quantizers if key not in used]:
                del self.quantizers[key]
        self._readers = None

    def add(self, name: str) -> None:
        """Make a quantizer for the input of a module, or for an operand of attention."""
        key = name.replace(".", "/")
        self.places[name], self.quantizers[key] = key, self._make()

    def round(self, name: str, inputs: Tensor, axis: int = 1) -> Tensor:
        """The rounded input of a module; `axis` is where its tokens are."""
        key = self.places[name]
        if self._readers is not None:
            self._readers.append((name, inputs))
        elif self._last is not None and self._last[1] is inputs and (self._dynamic or self._last[0] == key):
            return self._last[2]
        quantizer: Any = self.quantizers[key]
        rounded: Tensor = quantizer(inputs, self._real(inputs, axis))
        self._last = (key, inputs, rounded)
        return rounded

    def _real(self, inputs: Tensor, axis: int) -> Tensor | None:
        """Which of the input's tokens are no padding, broadcastable to it; None if all are, or if it has none."""
        mask = self._mask
        if mask is None or inputs.dim() < 3 or inputs.shape[0] != len(mask):
            return None
        if inputs.shape[axis] != mask.shape[1]:
            (model,) = self._model
            kept = kept_tokens(model, 1 << 30)
            if kept is None or kept.shape[1] != inputs.shape[axis]:
                return None
            mask = mask.gather(1, kept)
        shape = [1] * inputs.dim()
        shape[0], shape[axis] = mask.shape
        return mask.view(shape)

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._set(frozen=self.frozen)
        mask = kwargs.get("attention_mask")
        self._mask = None if mask is None or bool(mask.all()) else mask.bool()
        self._last = None

    def _end(self, *_: Any) -> None:
        self._mask = self._last = None


def install(model: Any, scheme: Scheme, *, observer: str = "minmax", learned: bool = False) -> FakeQuantized:
    """Round weights and activations of a model as the scheme says, in place; no module is replaced.

    Weights are rounded by parametrizations, activations by hooks on the modules that read them, so that pruned,
    factorised and compact layers, and masks on weights, go along. Batch normalizations are folded first, and keep
    their statistics. Static ranges must be calibrated before the model is run.

    Args:
        model: a transformers model, or any other module.
        scheme: what is rounded, and how.
        observer: which static range is chosen: a name of `OBSERVERS`.
        learned: learn static ranges with the weights (LSQ), and how far weights of few bits are cut.

    Raises:
        ModelError: the model is under fake quantization already, or `keep_float` names a module it has not.
        RecipeError: unknown observer.
    """
    if observer not in OBSERVERS:
        raise RecipeError(unknown("observer", observer, OBSERVERS))
    if _MARK in model.__dict__:
        raise ModelError("the model is under fake quantization already; strip() it first")
    modules = dict(model.named_modules())
    for name in scheme.keep_float:
        if name not in modules:
            raise ModelError(f"keep_float names what the model has not: {unknown('module', name, modules)}")
    family = _TYPES.get(getattr(getattr(model, "config", None), "model_type", ""))
    made = FakeQuantized(model, scheme, observer=observer, learned=learned)
    made._norms = folded(model)
    _freeze_norms(made)
    inner = _inner(model, family)
    for name, module in modules.items():
        if not within(name, scheme.keep_float):
            _quantize_module(made, name, module, inner is None or name in inner, learned)
    if scheme.attention and family is not None and family.places is not None and scheme.activations != "none":
        made._handles += quantize_attention(made, family.layers(model), family.places, modules)
    made._handles += [
        model.register_forward_pre_hook(made._begin, with_kwargs=True),
        model.register_forward_hook(made._end, always_call=True),
    ]
    model.__dict__[_MARK] = made
    made.train(model.training)
    return made


def _weight_first(module: nn.Module) -> None:
    """Parameters in the order that a module is made with, which optimizers and fingerprints go by."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({"weight": parameters.pop("weight"), **parameters})


def _quantize_module(made: FakeQuantized, name: str, module: nn.Module, inner: bool, learned: bool) -> None:
    scheme = made.scheme
    if isinstance(module, nn.Embedding) and scheme.embeddings:
        bits = scheme.embedding_bits
        made._handles.append(module.register_forward_hook(lambda _, __, rows: _through(rows, bits)))
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return
    bits = scheme.weight_bits if inner else max(scheme.weight_bits, HEAD_BITS)
    quantizer = weight_quantizer(
        module.weight, bits=bits, group=scheme.group if bits == scheme.weight_bits else 0, learned=learned
    )
    parametrize.register_parametrization(module, "weight", quantizer)
    if scheme.activations != "none":
        made.add(name)
        made._handles.append(
            module.register_forward_pre_hook(lambda _, inputs: (made.round(name, inputs[0]), *inputs[1:]))
        )


def _through(rows: Tensor, bits: int) -> Tensor:
    """Rounded rows of a table, with the gradient of the float ones."""
    return straight_through(snap_rows(rows.detach(), bits=bits), rows)


def _freeze_norms(made: FakeQuantized) -> None:
    """Keep the statistics of batch normalizations, and the scale that the convolution has taken."""

    def keep(module: nn.Module, _: Any) -> None:
        module.training = False

    for norm in made._norms:
        if norm.weight.requires_grad:
            norm.weight.requires_grad_(False)
            made._trained.append(norm.weight)
        made._handles.append(norm.register_forward_pre_hook(keep))


def _inner(model: Any, family: Family | None) -> set[str] | None:
    """Names of all modules within the residual layers; None where there is no telling them from others."""
    if family is None:
        return None
    within = {id(module) for layer in family.layers(model) for module in layer.modules()}
    return {name for name, module in model.named_modules() if id(module) in within}
