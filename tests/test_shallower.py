"""Shallower students: which blocks are repeated, and what goes when some of them do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_fixtures import stack

from variants.recipes.distillation.shallower import shallower
from variants.recipes.recipe import RecipeRejected

INPUT = {"input": torch.randn(2, 4)}


@pytest.mark.parametrize(("depth", "kept"), [(0.5, [1, 5]), (0.3, [1, 5]), (0.75, [1, 3, 5]), (0.1, [1])])
def test_a_shallower_student_keeps_evenly_spread_blocks(depth: float, kept: list[int]) -> None:
    """Of four Linear-ReLU blocks at 1, 3, 5 and 7 the named ones stay, with their weights; entrance and head too."""
    teacher: Any = stack(4)
    student: Any = shallower(teacher, INPUT, depth)
    left = [teacher[position].weight for position in (0, *kept, 9)]
    found = [layer.weight for layer in student if isinstance(layer, nn.Linear)]
    assert len(found) == len(left)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, left, strict=True))


class Listed(nn.Module):
    """Blocks in a list, each with blocks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(4))
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        for block in self.blocks:
            input = input + block(input)  # noqa: A001
        answer: Tensor = self.head(input)
        return answer


def test_blocks_in_lists_go_whole() -> None:
    """Two of four blocks go and one of two alike layers of the head, but nothing inside the blocks that stay."""
    student: Any = shallower(Listed().eval(), INPUT, 0.5)
    assert [len(student.blocks), len(student.blocks[0]), len(student.head)] == [2, 2, 2]


class Counting(Listed):
    """Blocks that are asked for by their number."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        for number in range(4):
            input = self.blocks[number](input)  # noqa: A001
        answer: Tensor = self.head(input)
        return answer


def test_blocks_that_are_counted_on_stay() -> None:
    """What would not run without its blocks keeps them; other blocks of it still go."""
    student: Any = shallower(Counting().eval(), INPUT, 0.5)
    assert [len(student.blocks), len(student.head)] == [4, 2]


class Shifted(nn.Linear):
    """A block that rolls its input by its own number of places, as every second one of a Swin transformer does."""

    def __init__(self, shift: list[int]) -> None:
        super().__init__(4, 4)
        self.shift = shift

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        return super().forward(input.roll(self.shift, [1]))


def test_blocks_with_other_attributes_are_not_alike() -> None:
    """Shifted and plain blocks take turns: pairs of them go, never all the shifted ones."""
    module: Any = nn.Sequential(*(Shifted([number % 2]) for number in range(8)), nn.Linear(4, 2)).eval()
    student: Any = shallower(module, INPUT, 0.5)
    assert [block.shift for block in student[:-1]] == [[0], [1], [0], [1]]


def test_blocks_that_know_their_place_are_alike() -> None:
    """Transformers number their layers for a cache; that makes no block another."""

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            for number, block in enumerate(self.blocks, start=1):
                setattr(block, "layer_idx", number)  # noqa: B010 - a linear layer declares no such attribute

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            for block in self.blocks:
                input = input + block(input)  # noqa: A001
            return input

    student: Any = shallower(Numbered().eval(), INPUT, 0.5)
    assert [block.layer_idx for block in student.blocks] == [1, 3]


def test_an_activation_used_many_times_counts_where_it_stands() -> None:
    """One ReLU between all blocks: two of four blocks go with theirs."""
    relu = nn.ReLU()
    module = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(4, 4), relu)), nn.Linear(4, 2)).eval()
    student: Any = shallower(module, INPUT, 0.5)
    assert [type(part).__name__ for part in student] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_layers_side_by_side_stay_though_their_shapes_fit() -> None:
    """Each reads a part of the input of its own: without one of them the student would be blind to that part."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 2)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            answer: Tensor = self.head(sum(part(input.roll(at, 1)) for at, part in enumerate(self.parts)))
            return answer

    with pytest.raises(RecipeRejected, match="no repeated blocks"):
        shallower(Beside().eval(), INPUT, 0.5)


def test_layers_side_by_side_stay_in_a_loop_too() -> None:
    """From the second round on each of them depends on all the others; the first round tells."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relations, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), nn.Linear(4, 2)

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            for _ in range(3):
                input = torch.stack([relation(input) for relation in self.relations]).mean(0)  # noqa: A001
            answer: Tensor = self.head(input)
            return answer

    with pytest.raises(RecipeRejected, match="no repeated blocks"):
        shallower(Rounds().eval(), INPUT, 0.5)


def test_layers_side_by_side_stay_where_chance_plays_a_part() -> None:
    """Noise that is drawn anew in every run is no sign that one layer needs another."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            return torch.stack([part(nn.functional.dropout(input, 0.5)) for part in self.parts]).sum(0)

    with pytest.raises(RecipeRejected, match="no repeated blocks"):
        shallower(Noisy().eval(), INPUT, 0.5)


def test_towers_side_by_side_lose_blocks_each() -> None:
    """They do not follow one another, but what is in each of them does."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))) for _ in range(2))

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            return torch.stack([tower(input) for tower in self.towers]).sum(0)

    student: Any = shallower(Towers().eval(), INPUT, 0.5)
    assert [len(tower) for tower in student.towers] == [2, 2]


class Answering(nn.Module):
    """A block that takes a mask before its input, both by name, and answers with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, mask: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        hidden = self.linear(hidden)
        return {"hidden": torch.where(hidden > 0, hidden, 0) * mask}


def test_blocks_are_known_by_what_they_pass_on() -> None:
    """Whatever the form of call and answer, and with a gap in the list that is none of them."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([None, *(Answering() for _ in range(4))])  # type: ignore[list-item]

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            mask, hidden = torch.ones(2, 4, dtype=torch.long), input
            for block in self.blocks:
                hidden = hidden if block is None else block(mask=mask, hidden=hidden)["hidden"]
            return hidden

    student: Any = shallower(Named().eval(), INPUT, 0.5)
    assert [block is None for block in student.blocks] == [True, False, False]


def test_a_number_that_means_something_is_no_place() -> None:
    """Dilations of 1, 2, 3 rise by one as places do, and are called otherwise."""

    class Dilated(nn.Conv1d):
        def __init__(self, far: int) -> None:
            super().__init__(4, 4, 3)
            self.far = self.num_layers = far

        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
            return nn.functional.conv1d(input, self.weight, self.bias, padding=self.far, dilation=self.far)

    module = nn.Sequential(*(Dilated(far) for far in (1, 2, 3))).eval()
    with pytest.raises(RecipeRejected, match="no repeated blocks"):
        shallower(module, {"input": torch.randn(2, 4, 9)}, 0.5)


class Reading(nn.Module):
    """A block with an LSTM, which refers to its own weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        answer: Tensor = self.recurrent(input)[0]
        return answer


def test_blocks_that_refer_to_themselves_are_alike() -> None:
    """What a layer remembers beside numbers and texts says nothing about its kind."""
    module = nn.Sequential(Reading(), Reading(), nn.Linear(4, 2)).eval()
    student: Any = shallower(module, {"input": torch.randn(2, 5, 4)}, 0.5)
    assert len(student) == 2


class Fields(nn.Module):
    """One table of embeddings for each column of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.head = nn.ModuleList(nn.Embedding(50, 8) for _ in range(4)), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        answer: Tensor = self.head(sum(table(input[:, column]) for column, table in enumerate(self.tables)))
        return answer


def test_tables_of_embeddings_are_no_blocks() -> None:
    """Alike layers side by side do not repeat each other: without one its column would not be read any more."""
    with pytest.raises(RecipeRejected, match="no repeated blocks"):
        shallower(Fields().eval(), {"input": torch.zeros(2, 4, dtype=torch.int64)}, 0.5)


class Recurrent(nn.Module):
    """Three recurrent layers over steps [batch, steps, 4]."""

    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        options: dict[str, Any] = {"batch_first": True, "dropout": 0.1, "bidirectional": True}
        self.recurrent: Any = layer(4, 8, 3, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(16, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        answer: Tensor = self.head(self.recurrent(input)[0][:, -1])
        return answer


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_lose_the_last_of_their_layers(layer: type[nn.RNNBase]) -> None:
    """Of three layers the first two stay, with their weights; no dropout is left where there is nothing between."""
    teacher = Recurrent(layer).eval()
    student: Any = shallower(teacher, {"input": torch.randn(2, 5, 4)}, 0.5)
    assert [student.recurrent.num_layers, student.recurrent.dropout] == [2, 0.1]
    assert torch.equal(student.recurrent.weight_hh_l1_reverse, teacher.recurrent.weight_hh_l1_reverse)
    flat: Any = shallower(teacher, {"input": torch.randn(2, 5, 4)}, 0.1)
    assert [flat.recurrent.num_layers, flat.recurrent.dropout] == [1, 0.0]
