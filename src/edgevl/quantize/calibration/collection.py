"""The entrance: from settings to a calibration set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import TEXT
from edgevl.engine.base import Floats
from edgevl.errors import ImageError
from edgevl.generate import Model
from edgevl.preprocess import load_image, prepare_picture
from edgevl.quantize.calibration.calibration_set import CalibrationSet, Example, Sample, tally
from edgevl.quantize.calibration.conversations import (
    MAX_WINDOW,
    ConversationLog,
    Kind,
    Request,
    converse,
    heldout_count,
    kinds,
    requests,
    text_sample,
    to_sample,
    token_windows,
)
from edgevl.quantize.calibration.pictures import (
    FoundPicture,
    PictureFiles,
    choose_pictures,
    drawn,
    open_pictures,
    set_apart,
    thumbnail,
)
from edgevl.quantize.settings import QuantizationError, QuantizationSettings
from edgevl.work import Tell

#: Tiles to calibrate vision on, and held out.
MAX_TILES = (8, 4)

#: Fewer sequences are no sample of anything.
MIN_SAMPLES = 8
#: With fewer tokens than this many times the inputs of the widest layer, a note says so.
GOOD_TOKENS_PER_INPUT = 4


def collect(
    model: Model,
    settings: QuantizationSettings,
    work: Path,
    progress: Tell = lambda done, total: None,
    text_only: bool = False,
) -> CalibrationSet:
    """Collect what to calibrate on; called again after an interruption, go on from there.

    ``conversations.jsonl`` in ``work`` has the conversations so far.

    Args:
        model: what is to be quantized; it answers the questions.
        settings: what the user wants.
        work: a directory that exists.
        progress: called with how many sequences are done, and how many there will be.
        text_only: leave pictures out, to measure what they do for.

    Raises:
        QuantizationError: the user's pictures or text cannot be used or are too few.
    """
    if settings.samples < MIN_SAMPLES:
        raise QuantizationError(
            f"samples is {settings.samples}: {MIN_SAMPLES} is the least to calibrate on, "
            f"{QuantizationSettings.samples} the default"
        )
    pictures = None if text_only else settings.calibration_images
    opened: AbstractContextManager[PictureFiles | None] = nullcontext()
    if pictures is not None:
        opened = closing(open_pictures(pictures))
    with opened as files:
        return _Collector(model, settings, work, text_only, files).run(progress)


def collection_key(checkpoint: Checkpoint, settings: QuantizationSettings) -> str:
    """Return what tells one calibration set from another: hexadecimal digits."""
    parts = [
        checkpoint.fingerprint(),
        [str(path) for path in settings.calibration_text],
        str(settings.calibration_images),
        settings.samples,
        settings.seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class _Collector:
    """Chooses questions, and has the conversations; sets are in pairs, the second is held out."""

    def __init__(
        self,
        model: Model,
        settings: QuantizationSettings,
        work: Path,
        text_only: bool,
        files: PictureFiles | None,
    ) -> None:
        """Choose everything; ``files`` are the user's pictures."""
        assert isinstance(model.checkpoint, Checkpoint)  # whoever quantizes opened one
        self._checkpoint = model.checkpoint
        self._model, self._settings, self._files = model, settings, files
        self._notes: list[str] = []
        self._tiles: tuple[list[Floats], list[Floats]] = ([], [])
        counts = (settings.samples, heldout_count(settings.samples))
        self._kinds = [kinds(settings, count, text_only) for count in counts]
        self._windows = self._cut_windows()
        found = self._choose_pictures(files) if files is not None else ([], [])
        most = self._checkpoint.config.max_tiles
        self._requests = [
            requests(self._kinds[heldout], settings.seed, bool(heldout), found[heldout], most)
            for heldout in (0, 1)
        ]
        log = work / "conversations.jsonl"
        self._log = ConversationLog(log, self._checkpoint.fingerprint())

    def run(self, progress: Tell) -> CalibrationSet:
        """Make every sample."""
        total = sum(map(len, self._kinds))
        sets: tuple[list[Sample], list[Sample]] = ([], [])
        examples: list[Example | None] = []
        for heldout, samples in enumerate(sets):
            windows = iter(self._windows[heldout])
            for request in self._requests[heldout]:
                if request is None:
                    sample, example = text_sample(self._model, next(windows)), None
                else:
                    sample, example = self._conversation(request, heldout)
                samples.append(sample)
                if heldout:
                    examples.append(example)
                progress(len(sets[0]) + len(sets[1]), total)
        if self._settings.text != "none" and self._settings.method == "gptq":
            self._notes += notes_on_size(sets[0], self._checkpoint)
        size = self._checkpoint.config.vision.image_size
        none = np.empty((0, 3, size, size), np.float32)
        tiles, heldout_tiles = (np.stack(each) if each else none for each in self._tiles)
        return CalibrationSet(
            tuple(sets[0]),
            tuple(sets[1]),
            tuple(examples),
            tiles,
            heldout_tiles,
            tuple(self._sources(sets)),
            tuple(self._notes),
        )

    def _conversation(self, request: Request, heldout: int) -> tuple[Sample, Example | None]:
        images = [self._image(picture) for picture in request.pictures]
        replies = self._log.replies(request)
        if replies is None:
            replies = converse(self._model, request, images)
            self._log.add(request, replies)
        config = self._checkpoint.config
        prepared = [prepare_picture(image, config, request.max_tiles) for image in images]
        sample = to_sample(self._model, request, prepared, replies)
        tiles = self._tiles[heldout]
        for picture in prepared:
            if len(tiles) < MAX_TILES[heldout]:
                # Parts of a picture as well as whole ones.
                tiles.append(picture.pixels[len(tiles) % len(picture.pixels)])
        if not heldout:
            return sample, None
        pictures = tuple(map(thumbnail, images))
        return sample, Example(pictures, request.questions, tuple(reply.text for reply in replies))

    def _image(self, picture: Any) -> Image.Image:
        if not isinstance(picture, FoundPicture):
            return drawn(picture.place, picture.seed)
        assert self._files is not None  # pictures are found only there
        try:
            return load_image(self._files.read(picture.place))
        except ImageError as error:
            raise QuantizationError(
                f"{self._files.path}: changed while it was read ({error}); run the command again"
            ) from None

    def _cut_windows(self) -> list[list[list[int]]]:
        """Cut the user's text: -> windows to calibrate on, and those held out."""
        wanted = [sum(kind == "window" for kind in part) for part in self._kinds]
        if not sum(wanted):
            return [[], []]
        windows = token_windows(
            self._settings.calibration_text,
            self._model.prompts.tokenizer,
            sum(wanted),
            self._model.engine.max_context,
        )
        if len(windows[0]) < MAX_WINDOW:
            self._notes.append(
                f"the text is short: its windows have {len(windows[0])} tokens, with more text "
                f"{MAX_WINDOW}"
            )
        return list(set_apart(windows, wanted[1]))

    def _choose_pictures(
        self, files: PictureFiles
    ) -> tuple[list[FoundPicture], list[FoundPicture]]:
        """Choose of the user's pictures: -> those to calibrate on, and those held out."""
        wanted = [sum(kind == "pictures" for kind in part) for part in self._kinds]
        found, skipped = choose_pictures(files, sum(wanted))
        if skipped:
            self._notes.append(f"{files.path}: {skipped} of its files cannot be read as pictures")
        if len(found) < 2:
            raise QuantizationError(
                f"{files.path}: has one readable picture only; at least 2 are needed, since what "
                "is calibrated on is not measured with"
            )
        if len(found) < sum(wanted):
            self._notes.append(
                f"{files.path}: {len(found)} different pictures for {sum(wanted)} conversations; "
                "they are used more than once"
            )
        heldout = max(1, len(found) * wanted[1] // sum(wanted))
        return set_apart(found, heldout)

    def _sources(self, sets: Sequence[Sequence[Sample]]) -> Iterator[dict[str, Any]]:
        settings = self._settings
        texts = ", ".join(map(str, settings.calibration_text))
        by_the_model = "answered by the model"
        descriptions: dict[Kind, tuple[str, str]] = {
            "drawn": (
                "conversations about drawn pictures",
                f"EdgeVL's drawn pictures and questions, {by_the_model}",
            ),
            "pictures": (
                "conversations about pictures",
                f"{settings.calibration_images}, {by_the_model}",
            ),
            "chat": ("conversations without pictures", f"asked by EdgeVL, {by_the_model}"),
            "window": ("windows of text", texts),
        }
        for name, all_kinds, samples in zip(
            ("calibration", "heldout"), self._kinds, sets, strict=True
        ):
            for kind, (description, origin) in descriptions.items():
                chosen = [s for k, s in zip(all_kinds, samples, strict=True) if k == kind]
                if chosen:
                    yield {
                        "set": name,
                        "kind": description,
                        "count": len(chosen),
                        **tally(chosen),
                        "origin": origin,
                    }


def notes_on_size(samples: Sequence[Sample], checkpoint: Checkpoint) -> list[str]:
    """Compare the tokens of the calibration sequences with the widest layer: -> notes.

    Raises:
        QuantizationError: they are fewer than its inputs, whose second moments are then certain to
            be singular.
    """
    tokens, inputs = sum(len(sample.token_ids) for sample in samples), widest_inputs(checkpoint)
    mean = tokens / len(samples)
    if tokens < inputs:
        raise QuantizationError(
            f"samples is {len(samples)}: they have {tokens} tokens, fewer than the {inputs} inputs "
            f"of the widest layer; calibrate on at least {-(-inputs // mean):.0f}"
        )
    good = GOOD_TOKENS_PER_INPUT * inputs
    if tokens >= good:
        return []
    return [
        f"{tokens} tokens to calibrate on are few for a layer of {inputs} inputs; "
        f"{-(-good // mean):.0f} samples would do"
    ]


def widest_inputs(checkpoint: Checkpoint) -> int:
    """Return the most inputs of a linear layer of the decoder."""
    return max(
        checkpoint.shape(name)[1]
        for name in checkpoint.names()
        if name.startswith(TEXT) and name.endswith("_proj.weight")
    )
