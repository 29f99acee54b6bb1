"""The names of VGG-19's layers [VGG], as the papers write them: conv1_1, relu1_1, conv1_2, ..., conv5_4, relu5_4."""

from collections.abc import Iterable

from .errors import UserError

Shape = tuple[int, int]  # (height, width)

CONVOLUTIONS = tuple(f"conv{block}_{i}" for block, n in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, n + 1))
RELUS = tuple(name.replace("conv", "relu") for name in CONVOLUTIONS)
LAYERS = tuple(name for pair in zip(CONVOLUTIONS, RELUS) for name in pair)  # in the network's order
COUNTED = {f"conv_{k}": conv for k, conv in enumerate(CONVOLUTIONS, 1)}  # the assignment's names
FIRST_FIVE = CONVOLUTIONS[:5]  # conv1_1, conv1_2, conv2_1, conv2_2, conv3_1


def layer_name(name: str) -> str:
    """The papers' name of a layer: `conv3_1` is returned as it is, the assignment's `conv_5` as `conv3_1`.

    Raises UserError for a layer that VGG-19 does not have.
    """
    if not isinstance(name, str) or name not in (*LAYERS, *COUNTED):
        raise UserError(f"unknown layer {name!r}: use conv1_1 ... conv5_4, relu1_1 ... relu5_4 or conv_1 ... conv_16")
    return COUNTED.get(name, name)


def as_names(layers: str | Iterable[str]) -> tuple[str, ...]:
    """One layer's name, or several, as a tuple."""
    return tuple(layers) if isinstance(layers, Iterable) and not isinstance(layers, str | bytes) else (layers,)


def block(name: str) -> int:
    """The block of a layer, 1 to 5."""
    return int(layer_name(name)[4])


def stride(name: str) -> int:
    """The distance in image pixels between neighbouring positions of a layer's feature map: 1, 2, 4, 8 or 16."""
    return 2 ** (block(name) - 1)


def deepest(layers: Iterable[str]) -> str:
    """The papers' name of whichever of `layers` comes last in the network."""
    return max(map(layer_name, layers), key=LAYERS.index)


def check_size(shape: Shape, layers: Iterable[str]) -> None:
    """Raise UserError if an image of `shape` has a side shorter than the stride of one of `layers`."""
    for name in layers:
        if min(shape) < stride(name):
            least = f"each side needs {stride(name)} pixels or more"
            raise UserError(f"a {shape[0]}x{shape[1]} image is too small for {layer_name(name)}: {least}")
