"""The packed layout of `native/kernels/layout.h`, written out once more in NumPy."""

import numpy as np

LANES = 16


def padded(size, multiple):
    return -(-size // multiple) * multiple


def padded_cols(kind, cols, group):
    return padded(cols, 2 if kind == "bf16" else group)


def panels(rows):
    return padded(rows, 2 * LANES) // LANES


def scale_bytes(kind, cols, group):
    groups = padded_cols(kind, cols, group) // group
    grouped = padded(groups * 32, 64)
    return {"int4": grouped, "split": grouped, "int8": 64, "bf16": 0}[kind]


def panel_bytes(kind, cols, group):
    columns_per_line = {"int4": 8, "split": 16, "int8": 4, "bf16": 2}[kind]
    lines = padded_cols(kind, cols, group) // columns_per_line
    return scale_bytes(kind, cols, group) + 64 * lines


def product_bytes(kind, rows, cols, group):
    return panels(rows) * panel_bytes(kind, cols, group)


def lower_bytes(cols, group):
    width = padded_cols("split", cols, group)
    return padded(width // group * 2, 64) + 64 * padded(width, 256) // 256


def packed_bytes(kind, rows, cols, group):
    lower = panels(rows) * LANES * lower_bytes(cols, group) if kind == "split" else 0
    return product_bytes(kind, rows, cols, group) + lower


def unpack(kind, data, rows, cols, group):
    """Return the float32 [rows, cols] that packed bytes stand for."""
    if kind == "split":
        return sum(unpack_split(data, rows, cols, group))
    width = padded_cols(kind, cols, group)
    panel = data.reshape(panels(rows), panel_bytes(kind, cols, group))
    scales, lines = np.split(panel, [scale_bytes(kind, cols, group)], axis=1)
    count = len(panel)
    if kind == "bf16":
        halves = np.ascontiguousarray(lines).view("<u2").reshape(count, width // 2, LANES, 2)
        bits = halves.transpose(0, 2, 1, 3).astype(np.uint32) << 16
        weight = bits.view(np.float32).reshape(count * LANES, width)
    elif kind == "int8":
        quads = lines.reshape(count, width // 4, LANES, 4).astype(np.float32) - 128
        weight = quads.transpose(0, 2, 1, 3).reshape(count, LANES, width)
        weight = weight * np.ascontiguousarray(scales).view("<f4")[:, :, None]
    else:
        bytes_ = lines.reshape(count, width // 8, LANES, 4)
        nibbles = np.concatenate((bytes_ & 15, bytes_ >> 4), axis=3).astype(np.float32) - 8
        weight = nibbles.transpose(0, 2, 1, 3).reshape(count, LANES, width // group, group)
        halves = np.ascontiguousarray(scales).view("<f2").reshape(count, -1, LANES)
        by_group = halves[:, : width // group].astype(np.float32).transpose(0, 2, 1)
        weight = weight * by_group[..., None]
    return weight.reshape(count * LANES, width)[:rows, :cols].astype(np.float32)


def unpack_split(data, rows, cols, group):
    """Return what the upper and the lower parts stand for, float32 [rows, cols] each."""
    width, count = padded_cols("split", cols, group), panels(rows)
    panel, lower = np.split(data, [product_bytes("split", rows, cols, group)])
    lines = panel.reshape(count, -1)[:, scale_bytes("split", cols, group) :]
    bytes_ = lines.reshape(count, width // 16, LANES, 4)
    upper = np.stack([bytes_ >> 2 * j & 3 for j in range(4)], axis=3)
    upper = upper.transpose(0, 2, 1, 3, 4).reshape(count * LANES, width)
    scales, words = np.split(
        lower.reshape(count * LANES, -1), [padded(width // group * 2, 64)], axis=1
    )
    words = np.ascontiguousarray(words).view("<u4").reshape(count * LANES, -1, LANES)
    rest = np.stack([words >> 2 * j & 3 for j in range(16)], axis=2)
    rest = rest.reshape(count * LANES, -1)[:, :width]
    halves = np.ascontiguousarray(scales).view("<f2")[:, : width // group]
    scale = np.repeat(halves.astype(np.float32), group, axis=1)
    parts = (scale * (2.0 * upper - 3), scale * (rest - 1.5) / 2)
    return tuple(part[:rows, :cols].astype(np.float32) for part in parts)
