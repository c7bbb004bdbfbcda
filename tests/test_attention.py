"""Attention in plain layers stands in for torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from variants.recipes.pruning.attention import Attention, with_plain_attention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 3, 5, 6, 16, 4
FORBIDDEN = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) > 0.6
FORBIDDEN[:, 0] = False
PADDING = torch.zeros(BATCH, KEYS, dtype=torch.bool)
PADDING[1, 4:] = True
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "forbidden keys": {"attn_mask": FORBIDDEN},
    "added scores": {"attn_mask": torch.randn(QUERIES, KEYS)},
    "scores by head": {"attn_mask": torch.randn(BATCH * HEADS, QUERIES, KEYS)},
    "padding": {"key_padding_mask": PADDING},
    "both": {"attn_mask": FORBIDDEN, "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("weights", [{"need_weights": False}, {}, {"average_attn_weights": False}])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"kdim": 12, "vdim": 12}, {"bias": False, "batch_first": True}]
)
def test_it_answers_as_torchs_own(options: dict[str, Any], mask: str, weights: dict[str, Any]) -> None:
    """Answers and attention weights, with every kind of mask, layout and projection."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    for parameter in original.parameters():
        nn.init.normal_(parameter, std=0.3)
    query, key = torch.randn(BATCH, QUERIES, WIDTH), torch.randn(BATCH, KEYS, options.get("kdim", WIDTH))
    if not original.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    for found, wanted in zip(
        Attention(original)(query, key, key, **MASKS[mask], **weights),
        original(query, key, key, **MASKS[mask], **weights),
        strict=True,
    ):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_it_takes_one_sample_without_a_batch() -> None:
    """As torch's does: the answers have no batch either."""
    original = nn.MultiheadAttention(WIDTH, HEADS).eval()
    query, key = torch.randn(QUERIES, WIDTH), torch.randn(KEYS, WIDTH)
    for found, wanted in zip(Attention(original)(query, key, key), original(query, key, key), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_padded_encoder_answers_as_torchs_own() -> None:
    """Torch's encoder takes no path of its own, nested tensors included, around the attention that stands in."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x = torch.randn(BATCH, KEYS, WIDTH)
    wanted = module(x, src_key_padding_mask=PADDING)
    with_plain_attention(module)
    with torch.no_grad():
        found = module(x, src_key_padding_mask=PADDING)
    assert not any(isinstance(part, nn.MultiheadAttention) for part in module.modules())
    torch.testing.assert_close(found[~PADDING], wanted[~PADDING], atol=1e-5, rtol=1e-5)


def test_attention_with_more_than_plain_layers_hold_stays() -> None:
    """An extra key and value, or a zero to attend to, have no place in it."""
    module = nn.ModuleList(
        [nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True), nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True)]
    )
    with_plain_attention(module)
    assert all(isinstance(part, nn.MultiheadAttention) for part in module)


def test_a_shared_attention_stays_shared() -> None:
    """One attention in three places, two of them in one module, becomes one that stands in all three."""
    own = nn.MultiheadAttention(WIDTH, HEADS)
    module = nn.ModuleDict({"one": own, "two": own, "inner": nn.ModuleDict({"three": own})})
    before = sum(parameter.numel() for parameter in module.parameters())
    with_plain_attention(module)
    assert isinstance(module["one"], Attention)
    assert module["one"] is module["two"] is module.get_submodule("inner.three")
    assert sum(parameter.numel() for parameter in module.parameters()) == before


def test_attention_that_ties_its_weights_to_others_stays() -> None:
    """Copies would be trained apart, and counted twice."""
    first, second, free = (nn.MultiheadAttention(WIDTH, HEADS) for _ in range(3))
    first.out_proj.weight = second.out_proj.weight
    module = nn.ModuleList([first, second, free])
    with_plain_attention(module)
    assert [type(part) for part in module] == [nn.MultiheadAttention, nn.MultiheadAttention, Attention]


def test_frozen_projections_stay_frozen() -> None:
    """What did not learn in torch's attention does not in the one that stands in for it."""
    original = nn.MultiheadAttention(WIDTH, HEADS)
    original.out_proj.requires_grad_(False)
    learning = {name: value.requires_grad for name, value in Attention(original).named_parameters()}
    assert learning == {
        f"{n}.{kind}": n != "out" for n in ("query", "key", "value", "out") for kind in ("weight", "bias")
    }
    assert not any(value.requires_grad for value in Attention(original.requires_grad_(False)).parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_falls_on_the_weights_in_training_only(need_weights: bool) -> None:
    """With all of them dropped the answer is the output's bias; in eval mode none is."""
    original = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5)
    plain, x = Attention(original), torch.randn(KEYS, BATCH, WIDTH)
    plain.dropout = 1.0
    nn.init.normal_(plain.out.bias)
    torch.testing.assert_close(plain(x, x, x, need_weights=need_weights)[0], plain.out.bias.expand_as(x))
    torch.testing.assert_close(
        plain.eval()(x, x, x, need_weights=need_weights)[0], original.eval()(x, x, x)[0] + plain.out.bias
    )
