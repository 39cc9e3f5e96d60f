"""What a picture shows: the characters, colours and shapes there are, and the `Scene`."""

from dataclasses import dataclass, field

from PIL import Image

Colour = tuple[int, int, int]

GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
COLOURS: dict[str, Colour] = {
    "red": (214, 32, 38),
    "green": (34, 150, 60),
    "blue": (32, 84, 210),
    "yellow": (245, 215, 40),
    "orange": (243, 132, 26),
    "purple": (134, 44, 160),
    "black": (22, 22, 24),
    "white": (246, 246, 244),
}
PATCHES = 12  # a side of a tile
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
FIRST_MIDDLE = 1 + len(GLYPHS) + len(COLOURS) * len(SHAPES)
PATCH_CLASSES = FIRST_MIDDLE + len(COLOURS) * len(SHAPES)


Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as fractions of the picture


@dataclass
class Shape:
    """One coloured shape."""

    name: str
    colour: str
    box: Box


@dataclass
class Scene:
    """A picture and what is in it. `kind`: display, label, handwriting, word or shapes."""

    kind: str
    image: Image.Image
    classes: Image.Image  # mode L, same size; 0 or a class below PATCH_CLASSES
    text: str = ""
    shapes: list[Shape] = field(default_factory=list)


@dataclass
class Style:
    """How a picture may be drawn. `difficulty` 0..1 scales tilt, blur, noise and low contrast."""

    difficulty: float = 1.0
    heldout: bool = False


def glyph_class(character: str) -> int:
    """The patch class of a character, 1 and up."""
    return GLYPHS.index(character) + 1


def shape_class(shape: str, colour: str, middle: bool = False) -> int:
    """The patch class of a coloured shape, after those of the characters.

    The patch in a shape's middle has a class of its own: shapes are counted by it.
    """
    kind = list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)
    return (FIRST_MIDDLE if middle else 1 + len(GLYPHS)) + kind
