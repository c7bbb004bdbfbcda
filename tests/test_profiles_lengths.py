"""Profiles by the length of the inputs: which lengths are tried, what that costs, and what a request's length is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from fakes import World, infer_call, one_variant
from serving import request_for
from test_measure import MS, Clock

from server.candidates import Host
from server.loading import load_model
from server.scheduling.admission import make_request
from server.wire.inference import Signature, read_request
from variants.lengths import length_of, measure_lengths, scaled_examples
from variants.measure import batch_of
from variants.repository import ModelFolder
from variants.runtimes.runtime import Array
from variants.variant import LatencyProfile, TensorSpec

IDS, MASK = TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "FP32", (-1, -1))
IMAGE = TensorSpec("image", "FP32", (-1, 3, -1, -1))


def test_all_variable_axes_grow_alike() -> None:
    """Inputs that share a symbol stay as long as one another, and hold the real sample cut off or repeated."""
    sample: dict[str, Array] = {"ids": np.arange(4).reshape(1, 4), "mask": np.ones((1, 4), np.float32)}
    found = scaled_examples(sample, (IDS, MASK), batched=True)
    assert sorted(found) == [2, 4, 16, 32]
    for length, example in found.items():
        assert not callable(example)
        assert example["ids"].tolist() == [[place % 4 for place in range(length // 2)]]
        assert example["mask"].shape == example["ids"].shape


def test_a_larger_image_keeps_its_proportions() -> None:
    """Both sides grow by the root, so that the elements grow from a quarter to four times; channels stay."""
    found = scaled_examples({"image": np.zeros((1, 3, 8, 16), np.float32)}, (IMAGE,), batched=True)
    shapes = {length: example["image"].shape for length, example in found.items() if not callable(example)}
    assert shapes[min(shapes)] == (1, 3, 4, 8)
    assert shapes[max(shapes)] == (1, 3, 16, 32)
    assert len(shapes) == 4


@pytest.mark.parametrize("shape", [(-1, 4), (-1,)])
def test_where_only_the_batch_varies_there_are_no_lengths(shape: tuple[int, ...]) -> None:
    """Nothing is tried for a model whose requests differ in nothing but their number of samples."""
    sample = {"x": np.zeros((1, *shape[1:]), np.float32)}
    assert scaled_examples(sample, (TensorSpec("x", "FP32", shape),), batched=True) == {}


def test_without_a_batch_the_first_axis_counts() -> None:
    """A model that takes one sequence as it is has lengths along dim 0."""
    found = scaled_examples(lambda _: {"x": np.zeros((8, 2))}, (TensorSpec("x", "FP64", (-1, 2)),), batched=False)
    assert {length: batch_of(example, 1)["x"].shape for length, example in found.items()} == {
        4: (2, 2), 8: (4, 2), 32: (16, 2), 64: (32, 2)
    }  # fmt: skip


class Growing:
    """A session whose run takes what `duration` says for a batch size and a length; it refuses some lengths."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, -1)),)
    outputs: tuple[TensorSpec, ...] = ()
    batch_axis = True

    def __init__(self, clock: Clock, duration: Callable[[int, int], int], refused: tuple[int, ...] = ()) -> None:
        self._clock, self._duration, self._refused = clock, duration, refused
        self.seen: set[tuple[int, int]] = set()

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """Let the clock move, or refuse."""
        size, length = inputs["x"].shape
        if length in self._refused:
            raise ValueError("too odd")
        self.seen.add((size, length))
        self._clock.now += self._duration(size, length)
        return []


def measure(
    duration: Callable[[int, int], int], budget_s: float = 10.0, refused: tuple[int, ...] = ()
) -> tuple[dict[int, LatencyProfile], Growing, float]:
    """A session's profiles by length around 16, batches up to 8; the session; and how many seconds that took."""
    clock = Clock()
    session = Growing(clock, duration, refused)
    examples = scaled_examples({"x": np.zeros((1, 16), np.float32)}, session.inputs, batched=True)
    sizes = (1, 2, 4, 8)
    real = LatencyProfile(sizes, tuple(duration(size, 16) for size in sizes))
    found = measure_lengths({"m": session}, examples, {"m": real}, 16, budget_s=budget_s, clock=clock)["m"]
    assert [length for length, _ in found] == sorted(length for length, _ in found)
    assert dict(found)[16] == real
    return dict(found), session, clock.now / 1e9


def test_lengths_are_measured_at_one_and_the_largest_batch() -> None:
    """Each length has what the session takes, and the real one the profile that was there."""
    found, session, _ = measure(lambda size, length: (3 + size) * length * MS // 16)
    assert session.seen == {(size, length) for size in (1, 8) for length in (4, 8, 32, 64)}
    for length in (4, 8, 32, 64):
        assert found[length] == LatencyProfile((1, 8), (length * MS // 4, 11 * length * MS // 16))


def test_a_length_that_is_refused_is_left_out() -> None:
    """A model that cannot take a length is not asked to again, and has the others."""
    found, _, _ = measure(lambda size, _: size * MS, refused=(8, 64))
    assert sorted(found) == [4, 16, 32]


def test_a_batch_too_slow_to_measure_is_bounded_by_its_samples() -> None:
    """Where only one sample can be afforded, a batch counts as its samples one after another, up to the same size."""
    found, session, took_s = measure(lambda size, length: (1 + size) * length * MS, budget_s=2.0)
    assert (8, 64) not in session.seen
    assert found[64] == LatencyProfile((1, 8), (2 * 64 * MS, 8 * 2 * 64 * MS))
    assert took_s < 2.0


def test_what_takes_too_long_is_not_tried() -> None:
    """What may take four times as long at twice the length is not run at it where that exceeds the budget."""
    found, session, took_s = measure(lambda size, length: size * length**2 * MS // 3, budget_s=1.0)
    assert not session.seen & {(1, 32), (1, 64)}
    assert max(found) == 16
    assert took_s < 1.0


def test_a_served_model_has_lengths_where_requests_choose_them(repository: Path, host: Host) -> None:
    """Tokens have five, the real one with the very profile, all up to the same batch; a fixed model has none."""
    models.add(repository, "tokens", models.tokens())
    models.add(repository, "m", models.mlp())
    tokens = load_model(ModelFolder(repository / "tokens"), host).variants[0]
    assert [length for length, _ in tokens.lengths] == [8, 16, 32, 64, 128]
    assert dict(tokens.lengths)[32] == tokens.profile
    assert {profile.max_batch_size for _, profile in tokens.lengths} == {32}
    assert load_model(ModelFolder(repository / "m"), host).variants[0].lengths == ()


def test_a_model_that_takes_one_length_only_is_served(repository: Path, host: Host) -> None:
    """One whose signature promises more than it can do keeps the length that it was measured at."""
    folder = models.add(repository, "picky", models.picky(7), yaml="evaluation: {data: evaluation.npz}")
    np.savez(folder / "1" / "evaluation.npz", x=np.ones((3, 7), np.float32))
    assert [length for length, _ in load_model(ModelFolder(folder), host).variants[0].lengths] == [7]


def test_lengths_are_remembered(repository: Path, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The second load measures nothing and has the very same."""
    caplog.set_level("INFO")
    folder = ModelFolder(models.add(repository, "tokens", models.tokens()))
    first = load_model(folder, host).variants[0]
    assert "measuring inputs of 8, 16, 64, 128 elements" in caplog.text
    caplog.clear()
    assert load_model(folder, host).variants[0].lengths == first.lengths
    assert "measuring" not in caplog.text


@pytest.mark.parametrize(
    ("inputs", "most", "shape", "length"),
    [((-1, -1), 8, (3, 5), 5), ((-1, -1), 0, (3, 5), 15), ((-1, 5), 8, (3, 5), 0), ((3, 5), 0, (3, 5), 0)],
)
def test_the_length_of_a_request(inputs: tuple[int, ...], most: int, shape: tuple[int, ...], length: int) -> None:
    """It counts the elements of one sample, as the profiles do, and is 0 where a request cannot choose it."""
    x = np.zeros(shape, np.float32)
    signature = Signature((TensorSpec("x", "FP32", inputs),), (TensorSpec("y", "FP32", inputs),), most)
    assert read_request(request_for("m", x=x), signature).length == length
    if length:
        assert length_of({"x": x[:1]} if most else {"x": x}) == length


def test_the_length_counts_every_input() -> None:
    """Two inputs of one sequence are twice its elements, whatever the number of samples."""
    signature = Signature((IDS, MASK), (MASK,), 8)
    request = request_for("m", ids=np.ones((3, 5), np.int64), mask=np.ones((3, 5), np.float32))
    assert read_request(request, signature).length == 10


def test_the_scheduler_is_told_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine passes a request's length on."""
    told: list[int] = []

    def listen(*arguments: Any, length: int, **named: Any) -> Any:
        told.append(length)
        return make_request(*arguments, length=length, **named)

    monkeypatch.setattr("server.engine.make_request", listen)
    with one_variant() as world:
        serve_varying(world)
        call = infer_call([[1, 2, 3]])
        world.transport.send(call)
        assert world.transport.reply_to(call).message is not None
    assert told == [3]


def serve_varying(world: World) -> None:
    """Let the world's model take sequences of any length."""
    x, y = TensorSpec("x", "FP32", (-1, -1)), TensorSpec("y", "FP32", (-1, -1))
    world.engine.add_model(replace(world.model, signature=Signature((x,), (y,), 8)))
