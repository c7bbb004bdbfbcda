"""Multi-head attention in plain layers, whose heads can go one by one; torch's own is bound to keep its width."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Answers as the `nn.MultiheadAttention` it is made from, in whose place it stands (Vaswani et al., 2017).

    It has as many heads as its projections are wide.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        together = original.in_proj_weight
        weights = original.q_proj_weight, original.k_proj_weight, original.v_proj_weight
        biases = (None, None, None) if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
        query, key, value = zip(weights if together is None else together.chunk(3), biases, strict=True)
        self.query, self.key, self.value = _linear(*query), _linear(*key), _linear(*value)
        self.out = _linear(original.out_proj.weight, original.out_proj.bias)
        self.head_dim, self.dropout, self.batch_first = original.head_dim, original.dropout, original.batch_first
        self.in_proj_weight = self.in_proj_bias = None  # so that torch's encoder layer takes no path around `forward`
        self.train(original.training)

    def forward(  # noqa: PLR0913, PLR0917 - the signature is torch's
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, length, width] each, length first without `batch_first`, or without a batch; (answer, weights)."""
        del is_causal  # it only says of what form `attn_mask` is
        batched = query.dim() == 3
        taken = [each if batched else each.unsqueeze(0) for each in (query, key, value)]
        if batched and not self.batch_first:
            taken = [each.transpose(0, 1) for each in taken]
        q, k, v = (
            project(each).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, length, head_dim]
            for project, each in zip((self.query, self.key, self.value), taken, strict=True)
        )
        mixed, weights = self._attend(q, k, v, _merged(attn_mask, key_padding_mask, q), need_weights)
        answer = self.out(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return answer.squeeze(0), None if weights is None else weights.squeeze(0)
        return answer if self.batch_first else answer.transpose(0, 1), weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Values mixed by softmax(q k / sqrt(head_dim) + mask), and the weights if they are needed."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = functional.dropout(weights, self.dropout, self.training)
        return weights @ v, weights


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks as one to add to the scores [batch, heads, length, keys]; a true one forbids."""
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (query.shape[0], query.shape[1])) if per_head else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]))
    added = [
        torch.zeros_like(m, dtype=query.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks
    ]
    return sum(added[1:], added[0]) if added else None


def with_plain_attention(module: nn.Module) -> None:
    """Put `Attention` in place of torch's, wherever its form is known: no extra key, value or zero, no tied weights.

    What several places share they share afterwards too.
    """
    made: dict[nn.Module, Attention] = {}
    holders = Counter(id(weight) for part in module.modules() for weight in part.parameters(recurse=False))
    for path, part in list(module.named_modules(remove_duplicate=False)):
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # nested tensors know torch's own attention only
        if not path or not isinstance(part, nn.MultiheadAttention) or part.bias_k is not None or part.add_zero_attn:
            continue
        if all(holders[id(weight)] == 1 for weight in part.parameters()):
            made[part] = made.get(part) or Attention(part)
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, made[part])
