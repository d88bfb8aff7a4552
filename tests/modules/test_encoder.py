"""Inside stock's Transformer layers: replaced attention gives stock's numbers in every mode, and really runs where
stock's fast path would go around it.
"""

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from harness.calls import mesh, on_ranks
from torch import nn

import two_level_mha as tlm

SIZES = {"d_model": 16, "nhead": 4, "dim_feedforward": 24, "dropout": 0.0}


def replace_attention(model: nn.Module, grid) -> int:
    """Swaps every nn.MultiheadAttention in place; returns how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention)
    ]
    for parent, name, child in found:
        setattr(parent, name, tlm.TwoLevelMultiheadAttention.from_torch(child, mesh(grid)))
    return len(found)


@contextmanager
def counted(model: nn.Module):
    """Counts our forwards; without hooks, since stock takes its slow path for a module that has one."""
    calls: list[str] = []
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, tlm.TwoLevelMultiheadAttention)]
    for name, module in modules:
        module.forward = partial(_forward, calls, name, module.forward)
    yield calls
    for _, module in modules:
        del module.forward


def _forward(calls, name, forward, *args, **kwargs):
    calls.append(name)
    return forward(*args, **kwargs)


def build(kind: str, norm_first: bool, batch_first: bool, bias: bool) -> nn.Module:
    options = {**SIZES, "norm_first": norm_first, "batch_first": batch_first, "bias": bias, "dtype": torch.float64}
    layer = (nn.TransformerEncoderLayer if "encoder" in kind else nn.TransformerDecoderLayer)(**options)
    if kind == "encoder":
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first and batch_first)
    if kind == "decoder":
        return nn.TransformerDecoder(layer, 2)
    return layer


def masks(kind: str, which: str, L: int, S: int, B: int) -> dict:
    """Keyword arguments of the call."""
    padding_BL = (torch.arange(L) >= L - 2).expand(B, L).clone()
    padding_BL[0] = False
    causal_LL = torch.ones(L, L, dtype=torch.bool).triu(1)
    prefix = "src" if "encoder" in kind else "tgt"
    mask = {"encoder": "mask", "encoder layer": "src_mask"}.get(kind, "tgt_mask")
    padding_name = f"{prefix}_key_padding_mask"
    found = {"none": {}, "padding": {padding_name: padding_BL}, "causal": {mask: causal_LL},
             "both": {padding_name: padding_BL, mask: causal_LL}}[which]  # fmt: skip
    if which == "causal":
        found["is_causal" if "encoder" in kind else "tgt_is_causal"] = True
    if prefix == "tgt" and which in ("padding", "both"):
        found["memory_key_padding_mask"] = (torch.arange(S) == S - 1).expand(B, S)
    return found


def run(model: nn.Module, inputs: list[torch.Tensor], keywords: dict, training: bool, valid: torch.Tensor):
    """The valid rows, and in training the gradients of inputs and of what is not attention."""
    model.train(training)
    leaves = [x.clone().requires_grad_(training) for x in inputs]
    with torch.set_grad_enabled(training):
        y = model(*leaves, **keywords)
        if not training:
            return [y[valid]]
    for p in model.parameters():
        p.grad = None
    (y[valid] ** 2).sum().backward()
    rest = [p.grad for name, p in model.named_parameters() if "attn" not in name]
    return [y[valid].detach(), *(x.grad for x in leaves), *rest]


def against_stock(grid, kind: str) -> list[str]:
    failed = []
    B, L, S = 3, 6, 5
    for norm_first, batch_first, bias in ((False, True, True), (True, True, True), (False, False, False)):
        torch.manual_seed(0)
        stock = build(kind, norm_first, batch_first, bias)
        ours = copy.deepcopy(stock)
        layers = replace_attention(ours, grid)
        ours = copy.deepcopy(ours)  # as nn.TransformerEncoder does to its layer
        shapes = [(B, L, 16)] + ([(B, S, 16)] if "decoder" in kind else [])
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        for which in ("none", "padding", "causal", "both"):
            keywords = masks(kind, which, L, S, B)
            valid = ~keywords.get("src_key_padding_mask", torch.zeros(B, L, dtype=torch.bool))
            given = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
            valid = valid if batch_first else valid.T
            for training in (True, False):
                with counted(ours) as calls:
                    expected, found = (run(model, given, keywords, training, valid) for model in (stock, ours))
                errors = [(x - y).abs().max().item() for x, y in zip(found, expected, strict=True)]
                if not max(errors) <= 1e-10 or len(calls) != layers:
                    failed.append(f"{which}, {training=}, {norm_first=}, {batch_first=}: {errors}, ran {calls}")
    return failed


@pytest.mark.parametrize("kind", ["encoder layer", "encoder", "decoder layer", "decoder"])
@pytest.mark.parametrize("grid", [None, (2, 2)])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_equals_stock(pool, grid, kind):
    """In train mode and in eval mode without grad, where the fast path would skip our forward."""
    results = on_ranks(pool, against_stock, grid, kind)
    for failed in results:
        assert not failed, "\n".join(failed)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_copies_its_layer():
    """A layer replaced first, then copied by nn.TransformerEncoder, under inference_mode."""
    layer = nn.TransformerEncoderLayer(**SIZES, batch_first=True)
    layer.self_attn = tlm.TwoLevelMultiheadAttention.from_torch(layer.self_attn)
    encoder = nn.TransformerEncoder(layer, 3).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with counted(encoder) as calls, torch.inference_mode():
        encoder(torch.randn(2, 5, 16), src_key_padding_mask=padding)
    assert len(calls) == 3


def test_transformer():
    """nn.Transformer as a whole, encoder and decoder."""
    torch.manual_seed(0)
    stock = nn.Transformer(16, 4, 2, 2, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    ours = copy.deepcopy(stock)
    assert replace_attention(ours, None) == 6
    source, target = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for training in (True, False):
        results = [model.train(training)(source, target, tgt_mask=mask) for model in (stock, ours)]
        torch.testing.assert_close(*results, rtol=0, atol=1e-10)
