"""The host as it is read from files: every layout of cgroups, affinity, instruction sets, GPUs."""

from pathlib import Path

import pytest

from variants.hardware import CudaDevice, Hardware, detect_hardware, parse_nvidia_smi, possible_precision

CPUINFO = "processor\t: {n}\nmodel name\t: Testium 9000\nflags\t\t: fpu avx2 avx512f avx512_vnni {extra}\n\n"


def host(root: Path, files: dict[str, str], processors: int = 16, extra_flags: str = "") -> Hardware:
    """What is detected below a root with these files and a /proc that shows `processors` CPUs."""
    cpuinfo = "".join(CPUINFO.format(n=n, extra=extra_flags) for n in range(processors))
    for name, text in {"proc/cpuinfo": cpuinfo, "proc/meminfo": "MemTotal:  8000000 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return detect_hardware(root)


V1 = {"proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"}
V2 = {"proc/self/cgroup": "0::/kubepods/pod1/box\n"}
V2_TOP = "sys/fs/cgroup/kubepods"
HYBRID = {"proc/self/cgroup": "5:cpu:/\n1:name=systemd:/init\n0::/init\n"}

CORES = {
    "no cgroup file: the processors": ({}, 16),
    "v2 max is no limit": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "max 100000\n"}, 16),
    "v2 whole quota": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "400000 100000\n"}, 4),
    "v2 fraction rounds down": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "350000 100000\n"}, 3),
    "v2 below one core is one": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "50000 100000\n"}, 1),
    "v2 other period": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "50000 10000\n"}, 5),
    "v2 parent is tighter": (
        V2 | {f"{V2_TOP}/pod1/box/cpu.max": "max 100000\n", f"{V2_TOP}/pod1/cpu.max": "200000 100000\n"},
        2,
    ),
    "v2 grandparent is tighter": (
        V2 | {f"{V2_TOP}/pod1/box/cpu.max": "800000 100000\n", f"{V2_TOP}/cpu.max": "300000 100000\n"},
        3,
    ),
    "v2 own cgroup mounted at the top": (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
    "v1 quota": (
        V1
        | {
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1 no limit": (
        V1
        | {
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        16,
    ),
    "v1 own cgroup mounted at the top": (
        V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "600000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "v1 parent is tighter": (
        V1
        | {
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "900000\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us": "700000\n",
            "sys/fs/cgroup/cpu/docker/cpu.cfs_period_us": "100000\n",
        },
        7,
    ),
    "hybrid, limited through v1": (
        HYBRID | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "hybrid, limited through v2": (HYBRID | {"sys/fs/cgroup/unified/init/cpu.max": "300000 100000\n"}, 3),
    "affinity alone": ({"proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-3,8,10-11\n"}, 7),
    "affinity tighter than quota": (
        V2 | {f"{V2_TOP}/pod1/box/cpu.max": "400000 100000\n", "proc/self/status": "Cpus_allowed_list:\t5\n"},
        1,
    ),
    "quota tighter than affinity": (
        V2 | {f"{V2_TOP}/pod1/box/cpu.max": "200000 100000\n", "proc/self/status": "Cpus_allowed_list:\t0-7\n"},
        2,
    ),
    "a damaged quota is no limit": (V2 | {f"{V2_TOP}/pod1/box/cpu.max": "nonsense\n"}, 16),
    "a path that climbs out is ignored": (
        {
            "proc/self/cgroup": "0::/../../other\n",
            "sys/other/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        16,
    ),
}


@pytest.mark.parametrize(("files", "cores"), CORES.values(), ids=CORES.keys())
def test_cores(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    """The cores are the least of the processors, the affinity and every quota on the way up, and at least one."""
    assert host(tmp_path, files).cores == cores


def test_empty_root(tmp_path: Path) -> None:
    """A root without any file still gives at least one core and claims no instruction set."""
    hardware = detect_hardware(tmp_path)
    assert hardware.cores >= 1
    assert (hardware.cpu, hardware.isa, hardware.memory_bytes, hardware.cuda) == ("unknown", frozenset(), 0, ())


def test_isa(tmp_path: Path) -> None:
    """Only flags that change which kernels run are kept, in upper case, with the CPU's model name."""
    hardware = host(tmp_path, {}, extra_flags="avx512_bf16 amx_tile amx_int8 amx_bf16 pni")
    assert hardware.cpu == "Testium 9000"
    assert hardware.isa == {"AVX2", "AVX512F", "AVX512_VNNI", "AVX512_BF16", "AMX_TILE", "AMX_INT8", "AMX_BF16"}


def test_arm(tmp_path: Path) -> None:
    """Arm's Features line is read like x86's flags."""
    text = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU part\t: 0xd40\n"
    assert host(tmp_path, {"proc/cpuinfo": text}).isa == {"ASIMD", "ASIMDDP", "I8MM", "BF16"}


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({}, 8000000 * 1024),
        (V2 | {f"{V2_TOP}/memory.max": "1073741824\n", f"{V2_TOP}/pod1/box/memory.max": "max\n"}, 1 << 30),
        (V1 | {"sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "536870912\n"}, 1 << 29),
        (V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8000000 * 1024),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], memory: int) -> None:
    """The memory is the least of the host's and every cgroup limit; v1's huge number is no limit."""
    assert host(tmp_path, files).memory_bytes == memory


def test_cuda_from_driver_files(tmp_path: Path) -> None:
    """Without nvidia-smi the driver's own files name the GPUs."""
    text = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 60\n"
    gpus = {f"proc/driver/nvidia/gpus/0000:0{n}:00.0/information": text for n in (1, 2)}
    assert host(tmp_path, gpus).cuda == (CudaDevice("NVIDIA H200"), CudaDevice("NVIDIA H200"))


@pytest.mark.parametrize(
    ("setting", "names"),
    [("", ""), ("-1", ""), ("0", "A"), ("1,0", "BA"), ("1,7,0", "B"), ("GPU-8932f937", "A"), ("NoDevFiles", "")],
)
def test_hidden_gpus_are_not_ours(tmp_path: Path, setting: str, names: str) -> None:
    """CUDA_VISIBLE_DEVICES chooses and orders, and ends at the first device that does not exist."""
    for number, name in enumerate("AB"):
        folder = tmp_path / f"proc/driver/nvidia/gpus/{number}"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: {name}\n")
    found = detect_hardware(tmp_path, {"CUDA_VISIBLE_DEVICES": setting}).cuda
    assert "".join(gpu.name for gpu in found) == names
    assert len(detect_hardware(tmp_path, {}).cuda) == 2


def test_nvidia_smi_table() -> None:
    """nvidia-smi's rows give names and memory; a name may hold a comma and memory may be unknown."""
    found = parse_nvidia_smi("NVIDIA H200, 143771\nTegra, model X, [N/A]\n")
    assert found == (CudaDevice("NVIDIA H200", 143771 << 20), CudaDevice("Tegra, model X", None))


def test_fingerprint() -> None:
    """The fingerprint is stable and changes with whatever changes latency, but not with memory."""
    base = Hardware(2, "cpu", frozenset({"AVX2", "AVX512_VNNI"}), 1 << 30)
    same = Hardware(2, "cpu", frozenset({"AVX512_VNNI", "AVX2"}), 1 << 31)
    others = [
        Hardware(4, "cpu", base.isa),
        Hardware(2, "other", base.isa),
        Hardware(2, "cpu", frozenset({"AVX2"})),
        Hardware(2, "cpu", base.isa, cuda=(CudaDevice("H200"),)),
    ]
    assert base.fingerprint == same.fingerprint
    assert len({hardware.fingerprint for hardware in (base, *others)}) == 5


@pytest.mark.parametrize(
    ("hardware", "device", "precision", "why"),
    [
        (Hardware(2, "x"), "cpu", None, "neither AMX_BF16 nor AVX512_BF16"),
        (Hardware(2, "x", frozenset({"AVX512_VNNI"})), "cpu", None, "neither"),
        (Hardware(2, "x", frozenset({"AVX512_BF16"})), "cpu", "bf16", "AVX512_BF16"),
        (Hardware(2, "x", frozenset({"AMX_BF16"})), "cpu", "bf16", "AMX_BF16"),
        (Hardware(2, "x", cuda=(CudaDevice("H200"),)), "cuda", "fp16", "H200"),
        (Hardware(2, "x", cuda=(CudaDevice("H200"),)), "cuda:1", None, "no CUDA device 1"),
        (Hardware(2, "x"), "cuda", None, "no CUDA device 0"),
    ],
)
def test_amp(hardware: Hardware, device: str, precision: str | None, why: str) -> None:
    """AMP is fp16 on a GPU that exists, bf16 on a CPU that has it, and otherwise nothing, with the reason."""
    found = possible_precision(hardware, device)
    assert found.precision == precision
    assert why in found.reason


def test_this_host() -> None:
    """The real host gives at least one core, a memory size, and the same answer twice."""
    hardware = detect_hardware()
    assert hardware.cores >= 1
    assert hardware.memory_bytes > 0
    assert detect_hardware() == hardware
