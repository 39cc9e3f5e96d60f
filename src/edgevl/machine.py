"""What machine this is: processor, cores a process may use, instruction sets, memory."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edgevl.files import system_text as _read

#: Flag in /proc/cpuinfo -> the name people know it by; x86 first, then Arm.
FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimdhp": "NEON FP16",
    "asimddp": "NEON dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}

#: Of ``mallopt`` (malloc.h of glibc).
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Machine:
    """A machine as a process sees it.

    Attributes:
        cpu: the processor's name, or the board's where the processor has none.
        architecture: such as ``x86_64`` or ``aarch64``.
        logical_cores: all there are, hyper-threads counted.
        physical_cores: those this process may run on (affinity), hyper-threads not counted.
        usable_cores: those this process may keep busy (affinity and cgroup quota); can be broken.
        features: instruction sets that matter here, by the names in `FEATURES`.
        memory_bytes: all there is, or what the cgroup allows if that is less.
        available_bytes: what can be had now without swapping, in memory and in the cgroup.
    """

    cpu: str
    architecture: str
    logical_cores: int
    physical_cores: int
    usable_cores: float
    features: tuple[str, ...]
    memory_bytes: int
    available_bytes: int

    @property
    def threads(self) -> int:
        """Threads that a computation should use: more would wait for each other.

        One for each physical core, and no more than a quota pays for in whole: threads that wait
        for each other at every step lose more when one of them is stopped than the part is worth.
        """
        return max(1, min(self.physical_cores, int(self.usable_cores)))


def this_machine() -> Machine:
    """Describe this machine."""
    info = _fields(_read(Path("/proc/cpuinfo")))
    logical = os.cpu_count() or 1
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    total, available = memory()
    allowed, left = cgroup_memory()
    return Machine(
        cpu=info.get("model name") or _board() or platform.processor() or "unknown",
        architecture=platform.machine(),
        logical_cores=logical,
        physical_cores=physical_cores(cpus),
        usable_cores=min(len(cpus) if cpus else logical, cgroup_cores()),
        features=features(info),
        memory_bytes=int(min(total, allowed)),
        available_bytes=int(min(available, left)),
    )


def features(info: dict[str, str]) -> tuple[str, ...]:
    """Return the known instruction sets among the flags of ``/proc/cpuinfo``."""
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return tuple(name for flag, name in FEATURES.items() if flag in flags)


def physical_cores(
    cpus: Collection[int] | None, root: Path = Path("/sys/devices/system/cpu")
) -> int:
    """Count the cores of some processors: hyper-threads of one core count once.

    Args:
        cpus: their numbers; None for all of the machine.
        root: where the system describes them.
    """
    if cpus is None:
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    # A processor whose topology is not told (in some sandboxes) counts as a core of its own.
    siblings = {_read(root / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return len(siblings)


def memory() -> tuple[int, int]:
    """Return the bytes of memory that there are, and those that can be had without swapping."""
    info = _fields(_read(Path("/proc/meminfo")))
    if "MemTotal" in info and "MemAvailable" in info:
        total, available = (int(info[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        return 1024 * total, 1024 * available  # "kB" there
    import psutil  # not Linux

    found = psutil.virtual_memory()
    return found.total, found.available


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the cores that the cgroup's quota pays for; infinity without a quota."""
    quotas = [_read(directory / "cpu.max").split() for directory in _cgroups(root)]
    # Version 1 of cgroups; there -1 is no quota.
    quotas.append([_read(root / f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")])
    return min(
        (
            int(quota[0]) / int(quota[1])
            for quota in quotas
            if len(quota) == 2 and all(map(str.isdigit, quota))
        ),
        default=math.inf,
    )


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, float]:
    """Return the bytes that the process's cgroups allow, and leave; infinity without limits.

    File pages that are not in active use do not count as taken: they are dropped when needed.
    """
    total = available = math.inf
    places = [(directory, "memory.max", "memory.current") for directory in _cgroups(root)]
    places.append((root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    for directory, limit_file, usage_file in places:
        limit = _read(directory / limit_file).strip()
        if not limit.isdigit():
            continue
        usage = _read(directory / usage_file).strip()
        inactive = re.search(
            r"^(?:total_)?inactive_file (\d+)$", _read(directory / "memory.stat"), re.MULTILINE
        )
        taken = (int(usage) if usage.isdigit() else 0) - (int(inactive[1]) if inactive else 0)
        total = min(total, int(limit))
        available = min(available, max(int(limit) - max(taken, 0), 0))
    return total, available


def _cgroups(root: Path) -> list[Path]:
    """Return the directories of this process's cgroup (version 2), from the root down."""
    directories = [root]
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        if line.startswith("0::/"):
            for part in Path(line[len("0::/") :]).parts:
                if part != "..":
                    directories.append(directories[-1] / part)
    return directories


def _fields(text: str) -> dict[str, str]:
    """Return the values of ``key: value`` lines; of several with one key, the first."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _board() -> str:
    return _read(Path("/proc/device-tree/model")).strip("\0 \n")


def share_heap() -> None:
    """Let all threads that come use two heaps, where that can be said (glibc).

    By default there are up to eight a core, and each keeps the most that a thread has ever needed:
    under load a server of ``tiny`` grew to 183 MB instead of 149. What is large goes back to the
    system when it is freed; by default a heap keeps up to 32 MB of what was freed once, so that
    requests with pictures left hundreds of megabytes of holes.
    """
    options = getattr(ctypes.CDLL(None), "mallopt", None)
    if options is not None and not os.environ.get("MALLOC_ARENA_MAX"):  # who sets it knows better
        options(_M_ARENA_MAX, 2)
        options(_M_MMAP_THRESHOLD, 4 * 2**20)


def trim_heap() -> None:
    """Give memory that has been freed back to the system, where the C library can (glibc).

    Tensors of many sizes leave holes between them, which malloc would keep.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
