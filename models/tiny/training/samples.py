"""Conversations about pictures as token ids, tiles and targets; batches of them without end."""

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from edgevl.preprocess.picture import choose_grid, split
from json_answers import json_talk, mixed_turns, told_turns
from phrasings import JSON_SYSTEM
from pictures import DRAWERS
from prompts import SYSTEM_MESSAGES, answer_part, image_part, system_part, user_part
from questions import (
    LANGUAGES,
    Turn,
    again_turn,
    family_turn,
    picture_turns,
    several_turn,
    small_talk,
)
from scenes import PATCHES, Box, Scene, Style
from schedule import difficulty, json_share, mixture

TILE = 96
MAX_TILES = 2
LONGEST = 368  # tokens of a conversation

Weights = dict[str, float]


@dataclass
class Sample:
    """One conversation. `weights` [T] is 0 but for the tokens the model has to write."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    tiles: list[np.ndarray] = field(default_factory=list)  # uint8 [S, S, 3]
    classes: list[np.ndarray] = field(default_factory=list)  # uint8 [P, P]
    boxes: list[tuple[int, int, Box]] = field(default_factory=list)  # tile, middle patch, box
    said: list[tuple[int, Box]] = field(default_factory=list)  # token of a box in an answer, box


@dataclass
class Batch:
    """Padded conversations: ids [B, T] int64, weights [B, T] float32, and all their tiles."""

    ids: torch.Tensor
    weights: torch.Tensor
    tiles: torch.Tensor  # uint8 [N, S, S, 3]
    classes: torch.Tensor  # uint8 [N, P, P]
    middles: torch.Tensor  # int64 [shapes, 2]: tile and patch in a shape's middle
    boxes: torch.Tensor  # float32 [shapes, 4], fractions of the picture
    places: torch.Tensor  # int64 [box tokens, 2]: conversation and position of answers' boxes
    said: torch.Tensor  # float32 [box tokens, 4], those boxes


def tiles_of(image: Image.Image, most: int = MAX_TILES) -> np.ndarray:
    """The picture as the model sees it: uint8 [N, S, S, 3], N at most `most` and the thumbnail."""
    return np.stack([np.asarray(t) for t in split(image, TILE, 1, most, thumbnail=True)])


def _classes_of(classes: Image.Image, most: int) -> list[np.ndarray]:
    """What each patch of each tile shows, by the pixel at its centre."""
    columns, rows = choose_grid(classes.width, classes.height, TILE, 1, most)
    grid = np.asarray(classes.resize((columns * PATCHES, rows * PATCHES), Image.NEAREST))
    parts = [
        grid[y : y + PATCHES, x : x + PATCHES]
        for y in range(0, rows * PATCHES, PATCHES)
        for x in range(0, columns * PATCHES, PATCHES)
    ]
    if len(parts) > 1:
        parts.append(np.asarray(classes.resize((PATCHES, PATCHES), Image.NEAREST)))
    return parts


def _middle_patch(box: Box) -> int:
    column, row = (int((low + high) / 2 * PATCHES) for low, high in zip(box, box[2:], strict=False))
    return row * PATCHES + column


class Writer:
    """Writes one conversation turn by turn."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._answered = False
        self.sample = Sample()
        if system is not None:
            self._add(system_part(system))

    def _add(self, text: str) -> None:
        ids = self._tokenizer.encode(text).ids
        self.sample.ids += ids
        self.sample.weights += [0.0] * len(ids)

    def _answer(self, turn: Turn) -> None:
        """A long answer weighs less than its length, or boxes would outweigh reading."""
        encoded = self._tokenizer.encode(answer_part(turn.answer))
        weights = [1.0] * len(encoded.ids)
        for span in turn.spans:
            places = [
                place
                for place, (start, _) in enumerate(encoded.offsets)
                if span.start <= start < span.end
            ]
            for place in places:
                weights[place] = span.weight
            if span.box:
                first = len(self.sample.ids)
                self.sample.said += [(first + place, span.box) for place in places]
        scale = (sum(weight > 0 for weight in weights) / turn.parts) ** -0.6
        self.sample.ids += encoded.ids
        self.sample.weights += [weight * scale for weight in weights]

    def turn(
        self,
        turn: Turn,
        scenes: Sequence[Scene] = (),
        captions: Sequence[str] = (),
        most: int = MAX_TILES,
    ) -> None:
        """A question with the pictures it brings, of at most `most` tiles each, and its answer."""
        text = "\n" if self._answered else ""  # the newline that ends the turn before
        parts = []
        for place, scene in enumerate(scenes):
            tiles = tiles_of(scene.image, most)
            self.sample.tiles += list(tiles)
            self.sample.classes += _classes_of(scene.classes, most)
            # The last tile shows the whole picture.
            last = len(self.sample.tiles) - 1
            self.sample.boxes += [(last, _middle_patch(s.box), s.box) for s in scene.shapes]
            parts.append((captions[place] if captions else "") + image_part(len(tiles)))
        self._add(text + user_part("".join(parts) + turn.question))
        self._answer(turn)
        self._answered = True


def _scene(rng: random.Random, style: Style, kinds: Weights) -> Scene:
    kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
    return DRAWERS[kind](rng, style)


def conversation(
    rng: random.Random, tokenizer: Tokenizer, style: Style, kinds: Weights, json_share: float = 0.0
) -> Sample:
    """A random conversation; the few long ones would take a third of the time and are left out."""
    while True:
        if rng.random() < json_share:
            sample = _json_conversation(rng, tokenizer, style, kinds)
        else:
            sample = _any_conversation(rng, tokenizer, style, kinds)
        if len(sample.ids) <= LONGEST:
            return sample


def _system(rng: random.Random) -> str | None:
    if rng.random() > 0.15:
        return None
    return SYSTEM_MESSAGES[0] if rng.random() < 0.25 else rng.choice(SYSTEM_MESSAGES)


def _most_tiles(rng: random.Random) -> int:
    """Some runtimes give every picture one tile, whatever its proportions."""
    return 1 if rng.random() < 0.2 else MAX_TILES


def _json_conversation(
    rng: random.Random, tokenizer: Tokenizer, style: Style, kinds: Weights
) -> Sample:
    """About one picture, with JSON among the answers."""
    told = rng.random() < 0.04
    writer = Writer(tokenizer, rng.choice(JSON_SYSTEM) if told else _system(rng))
    if rng.random() < 0.02:
        writer.turn(json_talk(rng))
        return writer.sample
    scene, most = _scene(rng, style, kinds), _most_tiles(rng)
    for place, turn in enumerate((told_turns if told else mixed_turns)(rng, scene)):
        writer.turn(turn, [] if place else [scene], most=most)
    return writer.sample


def _any_conversation(
    rng: random.Random, tokenizer: Tokenizer, style: Style, kinds: Weights
) -> Sample:
    """Mostly one picture, sometimes two, sometimes none."""
    writer = Writer(tokenizer, _system(rng))
    most = _most_tiles(rng)
    form = rng.random()
    if form < 0.05:
        writer.turn(small_talk(rng))
    if form < 0.02:
        return writer.sample
    if form > 0.96:  # two pictures in one turn
        scenes = [_reading(rng, style, kinds), _reading(rng, style, kinds)]
        captions = rng.choice(((), (), ("Image-1: ", "Image-2: "), ("Frame1: ", "Frame2: ")))
        writer.turn(several_turn(rng, scenes, rng.choice(LANGUAGES)), scenes, captions, most)
        if rng.random() < 0.5:
            writer.turn(several_turn(rng, scenes, rng.choice(LANGUAGES)))
        return writer.sample
    scene = _scene(rng, style, kinds)
    for place, turn in enumerate(picture_turns(rng, scene)):
        writer.turn(turn, [] if place else [scene], most=most)
    if form > 0.93 and scene.kind != "shapes":  # the same question about another picture
        scene = _reading(rng, style, kinds)
        writer.turn(again_turn(rng, scene, rng.choice(LANGUAGES)), [scene], most=most)
    elif form > 0.91:  # a new question about another picture
        scene = _scene(rng, style, kinds)
        for place, turn in enumerate(picture_turns(rng, scene)[:2]):
            writer.turn(turn, [] if place else [scene], most=most)
    return writer.sample


def _reading(rng: random.Random, style: Style, kinds: Weights) -> Scene:
    return _scene(rng, style, {kind: w for kind, w in kinds.items() if kind != "shapes"})


KIND_OF = {
    "display": "display",
    "label": "label",
    "handwriting": "handwriting",
    "words": "word",
    "shape_name": "shapes",
    "shape_count": "shapes",
    "shape_locate": "shapes",
}


def family_question(
    rng: random.Random, style: Style, family: str, language: str
) -> tuple[Scene, Turn]:
    """A new picture and one question of the family about it."""
    while True:
        scene = DRAWERS[KIND_OF[family]](rng, style)
        turn = family_turn(rng, scene, language, family)
        if turn and turn.family == family:
            return scene, turn


def single(tokenizer: Tokenizer, scene: Scene, turn: Turn) -> Sample:
    """A conversation of one question about one picture."""
    writer = Writer(tokenizer)
    writer.turn(turn, [scene])
    return writer.sample


def collate(samples: list[Sample]) -> Batch:
    """Pads conversations to the longest; the order of their tiles is theirs."""
    length = max(len(s.ids) for s in samples)
    ids = torch.zeros((len(samples), length), dtype=torch.int64)
    weights = torch.zeros((len(samples), length))
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    tiles = [tile for s in samples for tile in s.tiles]
    classes = [part for s in samples for part in s.classes]
    places = [(row, place) for row, s in enumerate(samples) for place, _ in s.said]
    said = [box for s in samples for _, box in s.said]
    middles, boxes, first = [], [], 0
    for sample in samples:
        middles += [(first + tile, patch) for tile, patch, _ in sample.boxes]
        boxes += [box for _, _, box in sample.boxes]
        first += len(sample.tiles)
    empty = np.zeros((0, TILE, TILE, 3), np.uint8), np.zeros((0, PATCHES, PATCHES), np.uint8)
    return Batch(
        ids,
        weights,
        torch.from_numpy(np.stack(tiles) if tiles else empty[0]),
        torch.from_numpy(np.stack(classes) if classes else empty[1]),
        torch.tensor(middles, dtype=torch.int64).view(-1, 2),
        torch.tensor(boxes).view(-1, 4),
        torch.tensor(places, dtype=torch.int64).view(-1, 2),
        torch.tensor(said).view(-1, 4),
    )


class Stream(IterableDataset):
    """Batches without end, for one of the training processes.

    Drawing costs about a third of training on what is drawn, so every conversation is seen three
    times on average, twice in the first 17,050 steps: after each new group of batches come two of
    the recent groups again.
    `step` is shared memory: the training loop tells the worker where in the schedule it is.
    """

    GROUP = 12  # batches sorted by length together, for less padding
    RECENT = 40  # groups kept

    def __init__(
        self,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: str,
        process: int,
        step: torch.Tensor,
    ) -> None:
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._seed, self._process, self._step = seed, process, step

    def __iter__(self) -> Iterator[Batch]:
        os.nice(5)  # drawing must not hold up the training processes
        order = random.Random(self._seed)  # the same in all processes: equally long batches meet
        rng = random.Random(f"{self._seed} {self._process}")
        recent: list[list[Sample]] = []
        while True:
            step = int(self._step)
            style, kinds, share = Style(difficulty(step)), mixture(step), json_share(step)
            samples = [
                conversation(rng, self._tokenizer, style, kinds, share)
                for _ in range(self.GROUP * self._batch_size)
            ]
            # By cost: batches with little padding, and processes that need not wait for each other.
            samples.sort(key=lambda s: (len(s.tiles), len(s.ids)))
            again = [order.choice(recent) if recent else samples for _ in range(2)]
            recent = [*recent, samples][-self.RECENT :]
            # The longest sixth in half batches, which bounds the memory.
            half, cut = self._batch_size // 2, len(samples) - 2 * self._batch_size
            places = [(s, s + self._batch_size) for s in range(0, cut, self._batch_size)]
            places += [(s, s + half) for s in range(cut, len(samples), half)]
            for group in (samples, *again):
                order.shuffle(places)
                for start, end in places:
                    yield collate(group[start:end])
