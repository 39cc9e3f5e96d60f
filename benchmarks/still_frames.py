"""What `--frame-threshold` saves, and what it does to answers.

    python benchmarks/still_frames.py [CLIP ...] [--frames 64]

First of clips that are made here: a camera that looks at a display, of which the last digits count
on, with noise and in H.264. Then of CLIPs. The shipped model is asked about every frame as it is,
and as the threshold has it. Prints a table:

- encoded: frames that are encoded, of those that are shown;
- features: root mean square of how far the features of a frame are off, relative to their own, over
  all frames, and the largest of a frame;
- answers: those that change, of all frames.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import edgevl
from edgevl.generate import Model
from edgevl.preprocess import Picture, prepare_video

THRESHOLDS = (4.0, 10.0, 20.0)
#: Standard deviations of the noise, in 8-bit values.
NOISES = (0.0, 2.0, 4.0)
QUESTIONS = {True: "What number is on the display?", False: "What is in the picture?"}
SIZE = (320, 240)
#: Frames for which the display stays as it is.
STEADY = 8
#: Lines of a digit, x and y of their ends, and which of them each digit has.
SEGMENTS = (
    (0, 0, 1, 0), (1, 0, 1, 1), (1, 1, 1, 2), (0, 2, 1, 2), (0, 1, 0, 2), (0, 0, 0, 1), (0, 1, 1, 1)
)  # fmt: skip
DIGITS = ("012345", "12", "01346", "01236", "1256", "02356", "023456", "012", "0123456", "012356")


def display(number: int) -> Image.Image:
    """Draw a display of four digits on a wall."""
    image = Image.new("RGB", SIZE, (150, 140, 130))
    draw = ImageDraw.Draw(image)
    draw.rectangle((40, 60, 280, 180), (15, 25, 20))
    for place, digit in enumerate(f"{number:04}"):
        for segment in DIGITS[int(digit)]:
            x0, y0, x1, y1 = SEGMENTS[int(segment)]
            left = 62 + 55 * place
            line = (left + 30 * x0, 85 + 35 * y0, left + 30 * x1, 85 + 35 * y1)
            draw.line(line, (90, 255, 140), 7)
    return image


def write_still_clip(path: Path, frames: int, noise: float) -> Path:
    """Write what a camera that stands still sees of a display that counts."""
    import av

    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "23"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            scene = np.asarray(display(2307 + number // STEADY), np.float64)
            pixels = (scene + rng.normal(0, noise, scene.shape)).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


class Asked:
    """What the model sees in frames, and says of them; of each once."""

    def __init__(self, model: Model, question: str) -> None:
        self._model, self._question = model, question
        self._features: dict[str, NDArray[np.float32]] = {}
        self._answers: dict[str, str] = {}

    def features(self, frame: Picture) -> NDArray[np.float32]:
        """Return a frame's features."""
        if frame.digest not in self._features:
            self._features[frame.digest] = self._model.engine.encode_images(frame.pixels)
        return self._features[frame.digest]

    def answer(self, frame: Picture) -> str:
        """Return what is said of a frame."""
        if frame.digest not in self._answers:
            answer = self._model.ask(self._question, images=[frame], max_tokens=24)
            self._answers[frame.digest] = answer.text
        return self._answers[frame.digest]


def rows(model: Model, name: str, clip: Path, frames: int, question: str) -> Iterator[str]:
    """Yield the table's rows of a clip."""
    config = model.checkpoint.config
    asked = Asked(model, question)
    own = prepare_video(clip, config, frames)
    for threshold in THRESHOLDS:
        shown = prepare_video(clip, config, frames, threshold)
        off = []
        for frame, instead in zip(own, shown, strict=True):
            expected = asked.features(frame)
            error = np.linalg.norm(asked.features(instead) - expected)
            off.append(float(error / np.linalg.norm(expected)))
        pairs = zip(own, shown, strict=True)
        changed = sum(asked.answer(frame) != asked.answer(instead) for frame, instead in pairs)
        mean = float(np.sqrt(np.mean(np.square(off))))
        yield (
            f"| {name} | {threshold:g} | {len(set(shown))} of {len(set(own))} "
            f"| {mean:.3f}, {max(off):.3f} | {changed} of {frames} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", nargs="*", type=Path, metavar="CLIP")
    parser.add_argument("--frames", type=int, default=64, help="taken of each clip")
    arguments = parser.parse_args()
    model = edgevl.load("tiny")
    print("| clip | threshold | encoded | features | answers |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for noise in NOISES:
            clip = write_still_clip(Path(directory) / "still.mp4", arguments.frames, noise)
            name = f"display, noise {noise:g}"
            for row in rows(model, name, clip, arguments.frames, QUESTIONS[True]):
                print(row, flush=True)
    for clip in arguments.clips:
        for row in rows(model, clip.stem, clip, arguments.frames, QUESTIONS[False]):
            print(row, flush=True)


if __name__ == "__main__":
    main()
