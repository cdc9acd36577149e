"""A drawn figure as a small PNG, for pictures that are committed."""

import io
import warnings
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` with 130 pixels an inch and 256 colours, the palette that comes nearest.

    Half the bytes of full colour. On the 81 pictures of results/ no channel of a pixel is more than 16 of 255 off.
    """
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        # Drawn as a box. The warning would bring a stranger's control characters to the terminal.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        figure.savefig(drawn, dpi=130, format="png")
    with Image.open(drawn) as image:
        palette = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, format="PNG", optimize=True)
