"""Boxes in answers."""

import pytest
from PIL import Image

from edgevl.evaluate.boxes import Box, draw_boxes, iou, mean_iou, parse_boxes


def test_parse():
    text = (
        "<ref>red circle</ref><box>[[10, 20, 300, 400]]</box> and "
        "<ref>猫</ref><box>[[1,2,3,4], [5.5,6,7,8]]</box><box>[[0,0,1000,1000]]</box>"
    )
    assert parse_boxes(text) == [
        Box(10, 20, 300, 400, "red circle"),
        Box(1, 2, 3, 4, "猫"),
        Box(5.5, 6, 7, 8, "猫"),
        Box(0, 0, 1000, 1000, ""),
    ]


def test_parse_orders_and_bounds_corners():
    assert parse_boxes("<box>[[900, 50, 100, 99999]]</box>") == [Box(100, 50, 900, 1000)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "<box>[[1, 2, 3]]</box>",
        "<box>[[1, 2, 3, 4]]",
        "[[1, 2, 3, 4]]",
        "<box>[[a, b, c, d]]</box>",
        "<box>[[-1, 2, 3, 4]]</box>",
    ],
)
def test_parse_leaves_out_what_is_malformed(text):
    assert parse_boxes(text) == []


def test_iou():
    assert iou(Box(0, 0, 10, 10), Box(0, 0, 10, 10)) == 1
    assert iou(Box(0, 0, 10, 10), Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou(Box(0, 0, 10, 10), Box(10, 0, 20, 10)) == 0
    assert iou(Box(3, 3, 3, 3), Box(3, 3, 3, 3)) == 0


def test_mean_iou_pairs_in_any_order_and_needs_the_count():
    a, b = Box(0, 0, 10, 10), Box(50, 50, 90, 90)
    assert mean_iou([a, b], [b, a]) == 1
    assert mean_iou([a, a], [a, b]) == 0.5
    assert mean_iou([a], [a, b]) == 0
    assert mean_iou([a, b], [a]) == 0
    assert mean_iou([], []) == 0


def test_draw_marks_the_edges_and_leaves_the_original():
    image = Image.new("RGB", (200, 100), "white")
    drawn = draw_boxes(image, [Box(500, 500, 1000, 1000, "dog 狗"), Box(0, 0, 100, 100, "dog 狗")])
    assert drawn.size == image.size
    assert image.getextrema() == ((255, 255),) * 3
    for x, y in [(100, 75), (199, 75), (150, 99), (0, 5), (10, 9)]:
        assert drawn.getpixel((x, y)) != (255, 255, 255), (x, y)
    assert drawn.getpixel((50, 75)) == (255, 255, 255)


def test_draw_on_a_tiny_picture():
    assert draw_boxes(Image.new("RGB", (1, 1)), [Box(0, 0, 1000, 1000, "x")]).size == (1, 1)
