"""Compress a wheel's files again, with Zopfli: the same files in a smaller wheel.

The files stay as they are, and with them the checksums that the wheel has of them. Zopfli writes
what every unpacker reads; it only takes longer.
"""

import struct
import sys
import zipfile
from pathlib import Path

from zopfli.zlib import compress

ITERATIONS = 5  # more gain less than a kilobyte

path = Path(sys.argv[1])
body, directory = bytearray(), bytearray()
with zipfile.ZipFile(path) as wheel:
    entries = wheel.infolist()
    for entry in entries:
        name, data = entry.filename.encode("ascii"), wheel.read(entry)
        deflated = compress(data, numiterations=ITERATIONS)[2:-4]  # without zlib's frame
        year, month, day, hour, minute, second = entry.date_time
        common = struct.pack(
            "<5H3L2H",
            *(20, 0, zipfile.ZIP_DEFLATED),
            *(hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day),
            *(entry.CRC, len(deflated), len(data)),
            *(len(name), 0),
        )
        system = 3 << 8 | 20  # Unix, so that permissions are kept
        place = struct.pack("<3H2L", 0, 0, 0, entry.external_attr, len(body))
        directory += b"PK\1\2" + struct.pack("<H", system) + common + place + name
        body += b"PK\3\4" + common + name + deflated
end = struct.pack("<4s4H2LH", b"PK\5\6", *(0, 0), *[len(entries)] * 2, len(directory), len(body), 0)

beside = path.with_suffix(".unfinished")
beside.write_bytes(body + directory + end)
with zipfile.ZipFile(beside) as smaller, zipfile.ZipFile(path) as wheel:
    for name in wheel.namelist():
        if smaller.read(name) != wheel.read(name):
            sys.exit(f"{name} is not the same after compression")
print(f"{path.name}: {path.stat().st_size} bytes, compressed again {beside.stat().st_size}")
beside.replace(path)
