"""Dynamic tiling against the algorithm of the InternVL repository, written out once more."""

import numpy as np
import pytest
from PIL import Image

from edgevl.preprocess.picture import choose_grid, split, to_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def original_grid(width, height, image_size, min_num, max_num):
    """``find_closest_aspect_ratio`` and the table that ``dynamic_preprocess`` gives it."""
    target_ratios = {
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= max_num and i * j >= min_num
    }
    best_ratio_diff, best_ratio = float("inf"), (1, 1)
    for ratio in sorted(target_ratios, key=lambda x: x[0] * x[1]):
        ratio_diff = abs(width / height - ratio[0] / ratio[1])
        if ratio_diff < best_ratio_diff:
            best_ratio_diff, best_ratio = ratio_diff, ratio
        elif (
            ratio_diff == best_ratio_diff
            and width * height > 0.5 * image_size * image_size * ratio[0] * ratio[1]
        ):
            best_ratio = ratio
    return best_ratio


def original_tiles(image, image_size, min_num, max_num, use_thumbnail):
    """``dynamic_preprocess``."""
    columns, rows = original_grid(*image.size, image_size, min_num, max_num)
    target_width = image_size * columns
    resized = image.resize((target_width, image_size * rows))
    tiles = []
    for i in range(columns * rows):
        left = (i % (target_width // image_size)) * image_size
        upper = (i // (target_width // image_size)) * image_size
        tiles.append(resized.crop((left, upper, left + image_size, upper + image_size)))
    if use_thumbnail and len(tiles) != 1:
        tiles.append(image.resize((image_size, image_size)))
    return tiles


def original_pixels(tiles, image_size):
    """``build_transform``: Resize (bicubic), ToTensor, Normalize, in float32 step by step."""
    values = []
    for tile in tiles:
        tile = tile.resize((image_size, image_size), Image.Resampling.BICUBIC)
        tensor = np.array(tile, np.uint8).transpose(2, 0, 1).astype(np.float32)
        tensor = np.divide(tensor, np.float32(255), dtype=np.float32)
        for channel in range(3):
            tensor[channel] -= np.float32(MEAN[channel])
            tensor[channel] /= np.float32(STD[channel])
        values.append(tensor)
    return np.stack(values)


def random_picture(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_grid_is_the_originals_for_every_number_of_tiles():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 3000, (300, 2)).tolist()
    # Ties: exactly between the ratios of two grids, small and large.
    sizes += [(3 * n, 4 * n) for n in (1, 100, 400)] + [(5 * n, 4 * n) for n in (1, 100, 400)]
    sizes += [(448 * a, 448 * b) for a in range(1, 8) for b in range(1, 8)]
    sizes += [(56 * a, 56 * b) for a in range(1, 8) for b in range(1, 8)]
    for max_tiles in (1, 2, 5, 6, 12, 16, 20, 24, 40):
        for width, height in sizes:
            expected = original_grid(width, height, 448, 1, max_tiles)
            assert choose_grid(width, height, 448, 1, max_tiles) == expected


def test_tie_goes_to_the_larger_grid_only_for_a_large_picture():
    assert choose_grid(100, 100, 448, 1, 12) == (1, 1)
    assert choose_grid(800, 800, 448, 1, 12) == (2, 2)
    assert choose_grid(2000, 2000, 448, 1, 12) == (3, 3)


def test_pixels_are_the_originals_to_the_bit_over_hundreds_of_sizes():
    rng = np.random.default_rng(1)
    size = 28
    seen = set()
    for number in range(300):
        width, height = np.exp(rng.uniform(0, np.log(400), 2)).astype(int).tolist()
        thumbnail, max_tiles = number % 5 != 0, (12, 6, 1, 24)[number % 4]
        image = random_picture(rng, width, height)
        expected = original_tiles(image, size, 1, max_tiles, thumbnail)
        pixels = to_pixels(split(image, size, 1, max_tiles, thumbnail), MEAN, STD)
        assert pixels.dtype == np.float32
        assert pixels.shape == (len(expected), 3, size, size)
        assert pixels.tobytes() == original_pixels(expected, size).tobytes()
        seen.add(len(pixels))
    assert {1, 3, 5, 7, 13} <= seen


@pytest.mark.parametrize("size", [(1000, 747), (448, 448), (300, 1200), (1, 1), (3, 900)])
def test_pixels_are_the_originals_at_full_tile_size(size):
    image = random_picture(np.random.default_rng(2), *size)
    pixels = to_pixels(split(image, 448, 1, 12, True), MEAN, STD)
    expected = original_pixels(original_tiles(image, 448, 1, 12, True), 448)
    assert pixels.tobytes() == expected.tobytes()


def test_tiles_come_row_by_row_with_the_thumbnail_last():
    image = Image.new("RGB", (30, 20))
    for column in range(3):
        for row in range(2):
            box = (column * 10, row * 10, column * 10 + 10, row * 10 + 10)
            image.paste((column * 50, row * 100, 0), box)
    tiles = split(image, 10, 1, 6, True)
    centres = [tile.getpixel((5, 5)) for tile in tiles]
    assert centres[:6] == [(c * 50, r * 100, 0) for r in range(2) for c in range(3)]
    assert len(tiles) == 7
    assert tiles[6].size == (10, 10)
    assert len(split(image, 10, 1, 6, False)) == 6


def test_normalisation_is_torchs():
    torch = pytest.importorskip("torch")
    image = random_picture(np.random.default_rng(3), 40, 30)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    expected = tensor.sub_(mean).div_(std).numpy()
    assert to_pixels([image], MEAN, STD)[0].tobytes() == expected.tobytes()


def test_pixels_are_those_of_transformers():
    pytest.importorskip("torch")
    module = pytest.importorskip(
        "transformers.models.got_ocr2.image_processing_pil_got_ocr2", exc_type=ImportError
    )
    processor = module.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, crop_to_patches=True
    )
    rng = np.random.default_rng(4)
    for number in range(100):
        width, height = np.exp(rng.uniform(1, np.log(300), 2)).astype(int).tolist()
        # From 2 tiles on, grids of one area can tie, and then the order of candidates counts.
        least = 1 + number % 2
        image = random_picture(rng, width, height)
        batch = processor(image, return_tensors="np", min_patches=least, max_patches=12)
        pixels = to_pixels(split(image, 28, least, 12, True), MEAN, STD)
        assert np.array_equal(np.asarray(batch["pixel_values"]), pixels)
    for size in [(50, 40), (500, 400), (40, 50), (400, 500)]:
        image = random_picture(rng, *size)
        batch = processor(image, return_tensors="np", min_patches=2, max_patches=3)
        pixels = to_pixels(split(image, 28, 2, 3, True), MEAN, STD)
        assert np.array_equal(np.asarray(batch["pixel_values"]), pixels)
