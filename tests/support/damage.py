"""What may happen to a file whose last bytes are a checksum: each takes a bytearray of it."""


def flip(data, at):
    data[at] ^= 1
    return data


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:50],
    "cut in the data": lambda data: data[: len(data) // 2],
    "cut by a byte": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "a bit in the middle": lambda data: flip(data, len(data) // 2),
    "a bit of a checksum": lambda data: flip(data, len(data) - 8),
    "nothing came to the disk": lambda data: bytes(len(data)),
}
