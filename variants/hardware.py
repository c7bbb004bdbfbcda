"""What this host offers: cores we may really use, instruction sets, memory, GPUs.

Rules: everything is read from files below a root and from a given environment, so that tests can lay out any host;
nothing here imports a runtime. The cores are what the cgroup quota and the affinity mask leave us, never the node's: a
runtime that starts a thread per node core inside a small quota is throttled for most of every period.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# flags that change which kernels a runtime picks; the x86 names as in /proc/cpuinfo, then Arm's
_ISA = frozenset(
    {"AVX2", "FMA", "F16C", "AVX512F", "AVX512_VNNI", "AVX_VNNI", "AVX512_BF16", "AVX512_FP16"}
    | {"AMX_TILE", "AMX_BF16", "AMX_INT8", "AMX_FP16"}
    | {"ASIMD", "ASIMDHP", "ASIMDDP", "I8MM", "BF16", "SVE", "SVE2"}
)
_BF16_FLAGS = ("AMX_BF16", "AVX512_BF16", "BF16")
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One NVIDIA GPU; its memory is None where only the driver's own files could be read."""

    name: str
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """The part of the host that is ours. `isa` holds flags such as AVX512_VNNI; `memory_bytes` is 0 if unknown."""

    cores: int
    cpu: str
    isa: frozenset[str] = field(default_factory=frozenset)
    memory_bytes: int = 0
    cuda: tuple[CudaDevice, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A stable hash of what decides how fast a variant runs here; keys measured latency profiles."""
        facts = {"cpu": self.cpu, "isa": sorted(self.isa), "cores": self.cores, "cuda": [asdict(d) for d in self.cuda]}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class AmpPrecision(NamedTuple):
    """What mixed precision means on a device: "fp16", "bf16" or None, and why in a sentence."""

    precision: str | None
    reason: str


def possible_precision(hardware: Hardware, device: str) -> AmpPrecision:
    """What the `amp` variant is on `device` ("cpu", "cuda" or "cuda:N")."""
    if device.startswith("cuda"):
        index = int(device.partition(":")[2] or 0)
        if index < len(hardware.cuda):
            return AmpPrecision("fp16", f"fp16 on {hardware.cuda[index].name}")
        return AmpPrecision(None, f"there is no CUDA device {index} here")
    found = [flag for flag in _BF16_FLAGS if flag in hardware.isa]
    if found:
        return AmpPrecision("bf16", f"bf16 on a CPU with {found[0]}")
    return AmpPrecision(None, "this CPU has neither AMX_BF16 nor AVX512_BF16, and fp16 is never faster on a CPU")


def needs_reduced_range(hardware: Hardware) -> bool:
    """Whether this x86 CPU adds pairs of U8S8 products in 16 bits, where 8-bit weights would saturate: no VNNI."""
    return "AVX2" in hardware.isa and not hardware.isa & {"AVX512_VNNI", "AVX_VNNI", "AMX_INT8"}


def detect_hardware(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> Hardware:
    """Read the host below `root`. Whatever cannot be read falls back to the modest answer: one core, no flags."""
    cpu, isa, processors = _cpu(root)
    allowed = _affinity(root) or processors or os.cpu_count() or 1
    quotas = [quota for quota in _cpu_quotas(root) if quota > 0]
    return Hardware(
        cores=max(1, int(min([allowed, *quotas]))),  # a fraction of a core more would only be throttled
        cpu=cpu,
        isa=isa,
        memory_bytes=min([limit for limit in _memory_limits(root) if limit < _UNLIMITED_BYTES], default=0),
        cuda=_visible(_cuda(root), environment.get("CUDA_VISIBLE_DEVICES")),
    )


def _read(path: Path) -> str:
    """A file's text, empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _cpu(root: Path) -> tuple[str, frozenset[str], int]:
    """The CPU's model name, its flags that matter, and how many processors the kernel shows."""
    model, flags, processors = "", set[str](), 0
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor":
            processors += 1
        elif key in ("flags", "Features"):
            flags = {flag.upper() for flag in value.split()}
        elif key == "model name" or (key in ("Processor", "CPU part") and not model):
            model = value
    return model or "unknown", _ISA.intersection(flags), processors


def _affinity(root: Path) -> int:
    """How many processors this process may run on, 0 if unknown. The status file says so for any root."""
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", _read(root / "proc/self/status"), re.MULTILINE)
    if not match:
        return 0
    ranges = (part.partition("-") for part in match[1].split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _cgroups(root: Path) -> dict[str, str]:
    """Controller -> this process's path in its hierarchy; the unified (v2) hierarchy has the empty name."""
    lines = (line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines())
    return {controller: line[2] for line in lines if len(line) == 3 for controller in line[1].split(",")}


def _levels(mount: Path, path: str) -> Iterator[Path]:
    """The process's cgroup folder and all its parents up to the mount.

    A container often sees only its own subtree, mounted at the top, while the path still counts from the node's
    root; folders that do not exist read as empty, and the mount itself is always among the levels.
    """
    relative = PurePosixPath(path.lstrip("/"))
    if ".." not in relative.parts:
        yield mount / relative
        yield from (mount / parent for parent in relative.parents)
    yield mount


def _unified_mounts(root: Path) -> tuple[Path, ...]:
    """Where a v2 hierarchy may be: alone, or beside v1 in the hybrid layout."""
    return root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"


def _v1_levels(root: Path, controller: str) -> Iterator[Path]:
    """All levels of a v1 controller, mounted under its own name or, where nobody linked it, together with cpuacct."""
    cgroups = _cgroups(root)
    if controller in cgroups:
        for name in (controller, "cpu,cpuacct"):
            yield from _levels(root / "sys/fs/cgroup" / name, cgroups[controller])


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Every quota on the way up, in cores; the tightest one holds."""
    for mount in _unified_mounts(root):
        for folder in _levels(mount, _cgroups(root).get("", "/")):
            match = re.match(r"(\d+)\s+(\d+)", _read(folder / "cpu.max"))
            if match and int(match[2]):
                yield int(match[1]) / int(match[2])
    for folder in _v1_levels(root, "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):  # "-1" is no limit
            yield int(quota) / int(period)


def _memory_limits(root: Path) -> Iterator[int]:
    """The host's memory and every cgroup limit on the way up, in bytes."""
    match = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if match:
        yield int(match[1]) * 1024
    files = [f / "memory.max" for m in _unified_mounts(root) for f in _levels(m, _cgroups(root).get("", "/"))]
    files += [folder / "memory.limit_in_bytes" for folder in _v1_levels(root, "memory")]
    for file in files:
        text = _read(file).strip()
        if text.isdigit():
            yield int(text)


def _cuda(root: Path) -> tuple[CudaDevice, ...]:
    """The NVIDIA GPUs: from nvidia-smi on the real host, else from the driver's own files."""
    if root == Path("/") and (listed := _nvidia_smi()):
        return listed
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = (re.search(r"^Model:\s*(.+?)\s*$", _read(file), re.MULTILINE) for file in files)
    return tuple(CudaDevice(match[1]) for match in names if match)


def _visible(devices: tuple[CudaDevice, ...], setting: str | None) -> tuple[CudaDevice, ...]:
    """The devices that CUDA_VISIBLE_DEVICES leaves to this process, in its order, up to the first that does not exist.

    A device named by its UUID is only counted, which tells what matters: whether there is one.
    """
    if setting is None:
        return devices
    entries = [entry.strip() for entry in setting.split(",")]
    if entries[0].startswith(("GPU-", "MIG-")):
        return devices[: len(entries)]
    exist = takewhile(lambda entry: entry.isdecimal() and int(entry) < len(devices), entries)
    return tuple(devices[int(entry)] for entry in exist)


def _nvidia_smi() -> tuple[CudaDevice, ...]:
    """What nvidia-smi lists, nothing if it is missing, hangs or fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603 - a fixed command
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_nvidia_smi(answer.stdout)


def parse_nvidia_smi(table: str) -> tuple[CudaDevice, ...]:
    """Rows of ``name, MiB`` as nvidia-smi prints them; memory shared with the host reads "[N/A]" there."""
    rows = (line.rpartition(",") for line in table.splitlines() if "," in line)
    return tuple(CudaDevice(name.strip(), int(mib) << 20 if mib.strip().isdigit() else None) for name, _, mib in rows)
