"""What `--model` says, and the network that it means for a data set."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from rewire.app.errors import TrainError, did_you_mean
from rewire.app.importing import call_with, is_importable, load_object, made_network
from rewire.app.models import images, sequences

__all__ = ["NAMES", "Signature", "build", "parse"]


@dataclass(frozen=True)
class Signature:
    """What a network reads and gives.

    Attributes:
        shape: of one sample.
        outputs: numbers that it gives: one for each class, or for each target of a regression.
        each_step: whether it gives them for each step of a sequence.
        tokens: how many different tokens there are, where samples are sequences of such; else 0.
    """

    shape: tuple[int, ...]
    outputs: int
    each_step: bool = False
    tokens: int = 0

    @property
    def features(self) -> int:
        """Numbers of one sample."""
        return math.prod(self.shape)


Maker = Callable[[tuple[int, ...], Signature, float], nn.Module]


def _of_images(name: str, make: Callable[..., nn.Module]) -> Maker:
    def made(numbers: tuple[int, ...], signature: Signature, width: float) -> nn.Module:
        shape = signature.shape
        if signature.each_step or len(shape) not in (2, 3):
            raise TrainError(f"--model: {name} is for images, and {_samples(signature)}")
        whole = shape if len(shape) == 3 else (1, *shape)
        network = make(whole, signature.outputs, width)
        # grey images have no dimension for channels
        return (
            network if len(shape) == 3 else nn.Sequential(nn.Unflatten(1, (1, shape[0])), network)
        )

    return made


def _lstm(numbers: tuple[int, ...], signature: Signature, width: float) -> nn.Module:
    if len(signature.shape) != 2 or signature.tokens:
        raise TrainError(
            f"--model: lstm reads sequences of numbers, (steps, features), and "
            f"{_samples(signature)}"
        )
    return sequences.BidirectionalLSTM(
        signature.shape[1],
        signature.outputs,
        max(1, round(numbers[0] * width)),
        each_step=signature.each_step,
    )


def _gpt(numbers: tuple[int, ...], signature: Signature, width: float) -> nn.Module:
    if not signature.tokens or not signature.each_step:
        raise TrainError(
            f"--model: gpt predicts the next token of sequences, and {_samples(signature)}"
        )
    layers, size = numbers
    # a multiple of 8, so that it divides among heads
    scaled = size if width == 1 else max(8, 8 * round(size * width / 8))
    return sequences.GPT(signature.shape[0], signature.tokens, layers, scaled)


def _samples(signature: Signature) -> str:
    what = "tokens" if signature.tokens else "numbers"
    return f"the samples are {' x '.join(map(str, signature.shape))} {what}"


def _wrn(numbers: tuple[int, ...], signature: Signature, width: float) -> nn.Module:
    depth, widen = numbers

    def make(shape: tuple[int, int, int], outputs: int, width: float) -> nn.Module:
        return images.wide_resnet(shape, outputs, width, depth=depth, widen=widen)

    return _of_images("wrn", make)(numbers, signature, width)


@dataclass(frozen=True)
class _Known:
    """A network by name: the pattern of what the user types, how that is shown, its maker."""

    pattern: str
    shown: str
    make: Maker


_KNOWN = (
    _Known(r"lenet5", "lenet5", _of_images("lenet5", images.lenet5)),
    _Known(r"cifar-cnn", "cifar-cnn", _of_images("cifar-cnn", images.cifar_cnn)),
    _Known(r"wrn-(\d{1,4})-(\d{1,4})", "wrn-22-2", _wrn),
    _Known(r"resnet18", "resnet18", _of_images("resnet18", images.resnet18)),
    _Known(r"lstm:(\d{1,6})", "lstm:200", _lstm),
    _Known(r"gpt:(\d{1,4})x(\d{1,6})", "gpt:4x256", _gpt),
)

#: How the networks are called, with sizes as examples.
NAMES = ("mlp:300,100", *(known.shown for known in _KNOWN))


def parse(source: str) -> tuple[_Known, tuple[int, ...]] | None:
    """The network that ``source`` names, and its sizes; None for "mlp" and "module:callable".

    Raises TrainError for anything else.
    """
    if source == "mlp":
        return None
    for known in _KNOWN:
        if found := re.fullmatch(known.pattern, source):
            numbers = tuple(map(int, found.groups()))
            if min(numbers, default=1) < 1:
                raise TrainError(f"--model: given {source!r}, allowed are sizes of at least 1")
            if known.shown.startswith("wrn") and (numbers[0] < 10 or (numbers[0] - 4) % 6):
                raise TrainError(
                    f"--model: given {source!r}, allowed are depths of 10, 16, 22, 28, ... "
                    "(4 more than a multiple of 6)"
                )
            return known, numbers
    module, colon, attribute = source.partition(":")
    if colon and attribute and not _misspelt(module) and is_importable(module):
        return None
    hint = did_you_mean(source, NAMES, 0.5)
    raise TrainError(
        f"--model: unknown name {source!r}{hint}; allowed are {', '.join(NAMES)}, or "
        "path.to.module:callable for one of your own"
    )


def _misspelt(module: str) -> bool:
    """Whether this is the name of a network with sizes that it cannot have."""
    return module in {"mlp", *(re.split(r"[:-]", known.shown)[0] for known in _KNOWN)}


def build(source: str, signature: Signature, width: float = 1.0) -> nn.Module:
    """The dense network that ``source`` means, its first values drawn by torch's generator.

    Args:
        source: as for `parse`, but "mlp".
        signature: what it reads and gives.
        width: a factor on the units of all hidden layers.

    Raises TrainError for a network that does not fit the samples, or that cannot be made.
    """
    found = parse(source)
    if found is None:
        return _own(source, signature, width)
    known, numbers = found
    return known.make(numbers, signature, width)


def _own(source: str, signature: Signature, width: float) -> nn.Module:
    function = load_object("--model", source)
    offered: dict[str, Any] = {
        "shape": signature.shape,
        "outputs": signature.outputs,
        "tokens": signature.tokens,
    }
    if width != 1.0:
        if "width" not in inspect.signature(function).parameters:
            raise TrainError(
                f"--method small-dense: {source} does not say how to make a smaller network: give "
                "the callable a parameter width, a factor on the units of its hidden layers"
            )
        offered["width"] = width
    return made_network(source, lambda: call_with(function, offered))
