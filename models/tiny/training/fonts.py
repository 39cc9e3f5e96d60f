"""The fonts that the pictures are drawn with, all from packages of requirements.txt."""

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

PRINT_FONTS = (
    ("font_roboto", "Roboto-Regular.ttf Roboto-Bold.ttf Roboto-Black.ttf Roboto-Medium.ttf"),
    ("font_source_sans_pro", "SourceSansPro-Regular.ttf SourceSansPro-Bold.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-Regular.ttf SourceSerifPro-Bold.ttf"),
    ("font_hanken_grotesk", "HankenGrotesk-Regular.otf HankenGrotesk-Bold.otf"),
    ("font_manrope", "Manrope-Medium.ttf Manrope-SemiBold.ttf"),
    ("font_caladea", "Caladea-Regular.ttf Caladea-Bold.ttf"),
    ("font_fredoka_one", "FredokaOne-Regular.ttf"),
    ("matplotlib", "DejaVuSans.ttf DejaVuSans-Bold.ttf DejaVuSerif.ttf DejaVuSansMono.ttf"),
    ("matplotlib", "DejaVuSansMono-Bold.ttf STIXGeneral.ttf STIXGeneralBol.ttf"),
)
HAND_FONTS = (
    ("font_amatic_sc", "AmaticSC-Bold.ttf"),
    ("font_intuitive", "Intuitive.ttf"),
    ("font_roboto", "Roboto-LightItalic.ttf"),
    ("font_source_serif_pro", "SourceSerifPro-It.ttf"),
    ("font_caladea", "Caladea-Italic.ttf"),
    ("matplotlib", "STIXGeneralItalic.ttf DejaVuSans-Oblique.ttf"),
)


@functools.cache
def font_paths(groups: tuple[tuple[str, str], ...]) -> list[str]:
    """Files of (package, its font files' names)."""
    paths = []
    for package, names in groups:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                f"the font package {package} is missing: "
                "pip install -r models/tiny/training/requirements.txt"
            )
        found = {p.name: str(p) for p in Path(spec.submodule_search_locations[0]).rglob("*.?tf")}
        paths += [found[name] for name in names.split()]
    return paths


@functools.lru_cache(maxsize=2048)
def font_at(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of a file at a size in pixels."""
    return ImageFont.truetype(path, size)
