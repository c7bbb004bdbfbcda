"""The runtimes: the same protocol, every datatype, what is refused and why, many threads on one session."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_files import identity, load, needs_openvino, save, tensor

from variants.datatypes import DATATYPES, from_numpy, from_onnx, from_torch
from variants.hardware import CudaDevice, Hardware
from variants.runtimes import available_runtimes, runtime_version
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.runtimes.openvino_runtime import OpenVino
from variants.runtimes.runtime import Array, RuntimeUnavailable
from variants.runtimes.torch_runtime import TorchRuntime, save_archive
from variants.variant import TensorSpec

PLAIN = Hardware(2, "test", frozenset({"AVX512_VNNI"}))
WITH_BF16 = Hardware(2, "test", frozenset({"AMX_BF16"}))
WITH_CUDA = Hardware(2, "test", cuda=(CudaDevice("H200"),))


def sample(datatype: str, shape: tuple[int, ...]) -> Array:
    """An array of a datatype with values that tell positions apart and reach beyond narrower types."""
    count = int(np.prod(shape))
    if datatype == "BYTES":
        return np.array([f"é{n}\n" for n in range(count)], dtype=object).reshape(shape)
    values = np.arange(count)
    if datatype == "BOOL":
        values = values % 2 == 1
    array: Array = values.astype(DATATYPES[datatype].numpy).reshape(shape)
    if count and datatype in {"INT64", "UINT64", "FP64"}:
        array.flat[0] = {"INT64": -(2**60), "UINT64": 2**63 + 1, "FP64": 1 + 2**-50}[datatype]
    return array


def assert_same(found: Array, expected: Array) -> None:
    """Equal in type, shape and every value."""
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tolist() == expected.tolist()


def test_datatypes_agree_with_the_libraries() -> None:
    """Every row names the same type in numpy, ONNX and torch, and is found from each of them."""
    import torch

    assert len(DATATYPES) == 14
    for name, row in DATATYPES.items():
        assert from_onnx(row.onnx) is row
        assert helper.tensor_dtype_to_np_dtype(row.onnx) == row.numpy
        assert from_numpy(row.numpy) is row
        if row.torch:
            assert from_torch(str(getattr(torch, row.torch))) is row
            assert getattr(torch, row.torch).itemsize == row.numpy.itemsize, name


def test_datatype_of_odd_arrays() -> None:
    """Strings of any kind are BYTES, byte order does not matter, and strangers raise KeyError."""
    assert from_numpy(np.dtype("U5")).name == from_numpy(np.dtype("S5")).name == "BYTES"
    assert from_numpy(np.dtype(">i4")).name == "INT32"
    with pytest.raises(KeyError):
        from_numpy(np.dtype("complex64"))
    with pytest.raises(KeyError):
        from_onnx(TensorProto.COMPLEX64)


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize(
    ("declared", "shape"), [(["n", 3], (2, 3)), (["n", 3], (0, 3)), ([], ()), ([4], (4,)), (["n"], (1,))]
)
def test_onnxruntime_passes_every_datatype(
    tmp_path: Path, datatype: str, declared: list[str | int], shape: tuple[int, ...]
) -> None:
    """Every datatype of the protocol goes in and comes out unchanged: batches, empty batches, scalars, no batch."""
    session = load(identity(tmp_path, declared, DATATYPES[datatype].onnx))
    spec_shape = tuple(dim if isinstance(dim, int) else -1 for dim in declared)
    assert session.inputs == (TensorSpec("x", datatype, spec_shape),)
    assert session.outputs == (TensorSpec("y", datatype, spec_shape),)
    array = sample(datatype, shape)
    [answer] = session.run({"x": array})
    assert_same(answer, array)
    again = answer.copy()
    session.run({"x": np.zeros_like(array)})
    assert_same(answer, again)  # an answer must not live in memory that the next run overwrites


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16", "INT32", "INT64"])
def test_onnxruntime_casts_to_and_from_bf16(tmp_path: Path, datatype: str) -> None:
    """bf16 values are computed, not only passed through, in both directions."""
    other, bf16 = DATATYPES[datatype].onnx, TensorProto.BFLOAT16
    nodes = [helper.make_node("Cast", ["a"], ["x"], to=bf16), helper.make_node("Cast", ["b"], ["y"], to=other)]
    inputs, outputs = [tensor("a", ["n"], other), tensor("b", ["n"], bf16)], [tensor("x", ["n"], bf16)]
    session = load(save(tmp_path / "m.onnx", nodes, inputs, [*outputs, tensor("y", ["n"], other)]))
    values = np.array([1, 2, 300])
    x, y = session.run({"a": values.astype(DATATYPES[datatype].numpy), "b": values.astype(ml_dtypes.bfloat16)})
    assert_same(x, values.astype(ml_dtypes.bfloat16))
    assert_same(y, values.astype(DATATYPES[datatype].numpy))


def mixed(path: Path, *kinds: int) -> Path:
    """A model that passes one tensor of each element type."""
    nodes = [helper.make_node("Identity", [f"x{kind}"], [f"y{kind}"]) for kind in kinds]
    inputs = [tensor(f"x{kind}", ["n"], kind) for kind in kinds]
    return save(path, nodes, inputs, [tensor(f"y{kind}", ["n"], kind) for kind in kinds])


def test_bf16_beside_others(tmp_path: Path) -> None:
    """A model may mix bf16 with other types; strings beside it are refused at load, since no run could take them."""
    session = load(mixed(tmp_path / "m.onnx", TensorProto.INT64, TensorProto.BFLOAT16))
    integers, numbers = sample("INT64", (4,)), sample("BF16", (8,))[::2]
    found = session.run({"x16": numbers, "x7": integers})
    assert_same(found[0], integers)
    assert_same(found[1], numbers)
    with pytest.raises(RuntimeUnavailable, match="BYTES beside BF16"):
        load(mixed(tmp_path / "m.onnx", TensorProto.STRING, TensorProto.BFLOAT16))


def test_a_failing_run_raises_and_stays_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a graph cannot take or compute raises, prints nothing, and the session goes on working."""
    pairs = helper.make_tensor("pairs", TensorProto.INT64, [2], [-1, 2])
    node = helper.make_node("Reshape", ["x", "pairs"], ["y"])
    session = load(save(tmp_path / "m.onnx", [node], [tensor("x", ["n"])], [tensor("y", ["m", 2])], [pairs]))
    for wrong in ({"x": np.zeros(3, np.float32)}, {"x": np.zeros((2, 2), np.float32)}, {"x": np.zeros(2)}, {}):
        with pytest.raises(Exception, match="x"):
            session.run(wrong)
    assert "".join(capfd.readouterr()) == ""
    assert session.run({"x": np.ones(4, np.float32)})[0].shape == (2, 2)


@needs_openvino
@pytest.mark.parametrize("datatype", DATATYPES)
def test_openvino_keeps_values_or_refuses(tmp_path: Path, datatype: str) -> None:
    """OpenVINO either computes a datatype exactly or refuses it, since it would narrow it silently."""
    element = DATATYPES[datatype].onnx
    inputs, outputs = [tensor("x", ["n", 2], element)], [tensor("y", ["n", 2], element)]
    operator = {"BOOL": "Or", "BYTES": "Identity"}.get(datatype, "Add")
    node = helper.make_node(operator, ["x"] if operator == "Identity" else ["x", "x"], ["y"])
    path = save(tmp_path / "m.onnx", [node], inputs, outputs)
    if datatype in {"BYTES", "BF16", "FP64", "UINT32", "UINT64"}:
        with pytest.raises(RuntimeUnavailable, match=datatype):
            load(path, "openvino")
        return
    session = load(path, "openvino")
    for size in (1, 3, 0):
        array = np.arange(size * 2).reshape(size, 2).astype(DATATYPES[datatype].numpy)
        assert_same(session.run({"x": array})[0], array | array if datatype == "BOOL" else array + array)


@needs_openvino
def test_openvino_refuses_to_cut_int64(tmp_path: Path) -> None:
    """A value that needs more than 32 bits raises instead of being cut."""
    session = load(identity(tmp_path, ["n"], TensorProto.INT64), "openvino")
    for value in (2**31 - 1, -(2**31)):
        assert session.run({"x": np.array([value])})[0].tolist() == [value]
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(OverflowError, match="32 bits"):
            session.run({"x": np.array([1, value])})


@needs_openvino
@pytest.mark.parametrize("shape", [(), (3,)])
def test_openvino_without_a_batch(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Scalars and fixed shapes pass, and an answer keeps its values when the session runs again."""
    session = load(identity(tmp_path, list(shape)), "openvino")
    first = session.run({"x": np.full(shape, 2, np.float32)})[0]
    session.run({"x": np.full(shape, 5, np.float32)})
    assert_same(first, np.full(shape, 2, np.float32))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small network as model.onnx and model.pt2."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("network")
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    save_archive(program, folder / "model.pt2", ["logits"])
    weights = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Conv", ["input", "0.weight", "0.bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "3.weight", "3.bias"], ["logits"], transB=1),
    ]
    save(folder / "model.onnx", nodes, [tensor("input", ["n", 1, 8, 8])], [tensor("logits", ["n", 10])], tensors)
    return folder


RUNTIMES = [
    ("onnxruntime", "model.onnx"),
    ("torch", "model.pt2"),
    pytest.param("openvino", "model.onnx", marks=needs_openvino),
]


@pytest.mark.parametrize(("runtime", "artefact"), RUNTIMES)
def test_the_same_protocol(both: Path, runtime: str, artefact: str) -> None:
    """Every runtime shows the same specs and gives the same answers, also for strided and read-only inputs."""
    session, reference = load(both / artefact, runtime), load(both / "model.onnx")
    assert (session.inputs, session.outputs) == (reference.inputs, reference.outputs)
    assert session.batch_axis
    images = np.random.default_rng(0).standard_normal((6, 1, 8, 8)).astype(np.float32)
    images.flags.writeable = False
    for batch in (images, images[:1], images[:0], images[::2], images[..., ::-1]):
        [expected], [found] = reference.run({"input": batch}), session.run({"input": batch})
        assert (found.dtype, found.shape) == (np.float32, (len(batch), 10))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("runtime", "artefact"), RUNTIMES)
def test_many_threads_on_one_session(both: Path, runtime: str, artefact: str) -> None:
    """Threads that share a session, with batches of different sizes, each get their own answers."""
    session = load(both / artefact, runtime)
    images = np.random.default_rng(1).standard_normal((64, 1, 8, 8)).astype(np.float32)
    expected = session.run({"input": images})[0]

    def ask(first: int) -> bool:
        size = first % 5 + 1
        return np.allclose(
            session.run({"input": images[first : first + size]})[0], expected[first : first + size], atol=1e-5
        )

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(ask, [n % 59 for n in range(200)]))


def test_torch_computes_bf16(tmp_path: Path) -> None:
    """A graph exported in bf16 takes and gives bf16 arrays, several outputs, and names them as saved."""
    import torch

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"double": x * 2, "rest": (x + 1, x.float())}

    example = (torch.zeros(2, 3, dtype=torch.bfloat16),)
    program = torch.export.export(Twice(), example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(ValueError, match="3 outputs"):
        save_archive(program, tmp_path / "model.pt2", ["one"])
    save_archive(program, tmp_path / "model.pt2", ["twice", "next", "wide"])
    session = load(tmp_path / "model.pt2", "torch")
    x = np.array([[1, 2, 3]], dtype=ml_dtypes.bfloat16)
    twice, following, wide = session.run({"x": x})
    assert_same(twice, np.array([[2, 4, 6]], dtype=ml_dtypes.bfloat16))
    assert_same(following, np.array([[2, 3, 4]], dtype=ml_dtypes.bfloat16))
    assert_same(wide, np.array([[1, 2, 3]], dtype=np.float32))
    assert [(spec.name, spec.datatype) for spec in session.outputs] == [
        ("twice", "BF16"),
        ("next", "BF16"),
        ("wide", "FP32"),
    ]


def test_torch_refuses_a_damaged_archive(tmp_path: Path) -> None:
    """A file that is no archive is refused with a reason."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"garbage")
    with pytest.raises(RuntimeUnavailable, match=r"model\.pt2"):
        load(path, "torch")


ONNX, PT2 = Path("model.onnx"), Path("model.pt2")
WHY_NOT = [
    ("onnxruntime", ONNX, "fp32", PLAIN, None),
    ("onnxruntime", ONNX, "int8", PLAIN, None),
    ("onnxruntime", PT2, "fp32", PLAIN, r"\.pt2"),
    ("onnxruntime", ONNX, "bf16", WITH_BF16, "no bf16 kernels"),
    ("onnxruntime", ONNX, "fp16", PLAIN, "CUDA"),
    ("onnxruntime", ONNX, "fp16", WITH_CUDA, None),
    ("torch", PT2, "fp32", PLAIN, None),
    ("torch", ONNX, "fp32", PLAIN, r"\.onnx"),
    ("torch", PT2, "bf16", PLAIN, "neither"),
    ("torch", PT2, "bf16", WITH_BF16, None),
    ("torch", PT2, "fp16", PLAIN, "CUDA"),
    ("torch", PT2, "fp16", WITH_CUDA, None),
    pytest.param("openvino", ONNX, "fp32", PLAIN, None, marks=needs_openvino),
    pytest.param("openvino", PT2, "fp32", PLAIN, r"\.pt2", marks=needs_openvino),
    pytest.param("openvino", ONNX, "bf16", PLAIN, "neither", marks=needs_openvino),
    pytest.param("openvino", ONNX, "bf16", WITH_BF16, None, marks=needs_openvino),
    pytest.param("openvino", ONNX, "fp16", WITH_CUDA, "fp16", marks=needs_openvino),
]


@pytest.mark.parametrize(("runtime", "artefact", "precision", "hardware", "why"), WHY_NOT)
def test_why_not(runtime: str, artefact: Path, precision: str, hardware: Hardware, why: str | None) -> None:
    """A runtime says beforehand, and why, that a kind of file or a precision is not for it on this hardware."""
    reason = available_runtimes()[runtime].why_not(artefact, precision, hardware)
    if why is None:
        assert reason is None
    else:
        with pytest.raises(RuntimeUnavailable, match=why):
            raise RuntimeUnavailable(reason)


def test_devices_that_are_not_here(both: Path) -> None:
    """Asking for a GPU that a runtime cannot use is refused with a reason, not answered from the CPU."""
    import onnxruntime
    import torch

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(RuntimeUnavailable, match="without CUDA"):
            OnnxRuntime().load(both / "model.onnx", precision="fp32", threads=1, device="cuda:0")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeUnavailable, match="CUDA"):
            TorchRuntime().load(both / "model.pt2", precision="fp32", threads=1, device="cuda")
    with pytest.raises(RuntimeUnavailable, match="int8"):
        OnnxRuntime().load(both / "model.onnx", precision="int8", threads=1, device="cuda")
    with pytest.raises(RuntimeUnavailable, match="CPU"):
        OpenVino().load(both / "model.onnx", precision="fp32", threads=1, device="cuda")


def test_listing_runtimes_imports_none() -> None:
    """To know which runtimes exist costs no import of any of them."""
    code = (
        "import sys; from variants.runtimes import available_runtimes; print(sorted(available_runtimes()));"
        "sys.exit(bool({'torch', 'openvino', 'onnxruntime'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "'onnxruntime'" in answer.stdout


@needs_openvino
def test_openvino_does_not_phone_home(both: Path) -> None:
    """Loading a model through OpenVINO never loads the module that reports its use to the maker."""
    code = (
        "import sys; from pathlib import Path; from variants.runtimes.openvino_runtime import OpenVino;"
        f"OpenVino().load(Path({str(both / 'model.onnx')!r}), precision='fp32', threads=1, device='cpu');"
        "assert 'openvino' in sys.modules; assert sys.modules['openvino_telemetry'] is None"
    )
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def test_versions() -> None:
    """Every available runtime has a version, and another name is an error."""
    assert all(runtime_version(name)[0].isdigit() for name in available_runtimes())
    with pytest.raises(KeyError):
        runtime_version("tensorflow")


@needs_openvino
def test_openvino_leaves_the_process_able_to_take_a_signal(tmp_path: Path) -> None:
    """A session that was let go takes nothing away that a signal handler needs."""
    path = identity(tmp_path, ["batch", 2])
    script = f"""
import gc, os, signal
from pathlib import Path
import numpy as np
from variants.runtimes.openvino_runtime import OpenVino
sessions = [OpenVino(2).load(Path({str(path)!r}), precision="fp32", threads=1, device="cpu") for _ in range(3)]
while sessions:
    sessions.pop(0).run({{"x": np.ones((2, 2), np.float32)}})
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
