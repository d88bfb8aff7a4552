"""An optimizer made before the model was split: it would go on in silence and train nothing."""

import pytest
import torch
from harness.calls import mesh, text_of
from harness.decoders import make, make_meta, prompt
from torch import nn

import two_level_mha as tlm


def told(name: str, by: str = "parallelize") -> str:
    return (
        f"{name} was replaced by {by}, and what still holds it, an optimizer for instance, would train nothing: call "
        f"{by} first, then make the optimizer, of two_level_mha.param_groups(model)"
    )


def steps(grid, options: dict, stepped: bool) -> list[str]:
    """What the calls of a loop say, with an optimizer of the stock model's parameters."""
    model = make("llama").train()
    optimizer = torch.optim.AdamW(list(model.model.layers.parameters()), lr=0.1, **options)
    ids, _ = prompt()

    def backward() -> None:
        model(ids, use_cache=False).logits.square().mean().backward()

    if stepped:
        backward()
        optimizer.step()
    tlm.parallelize(model, mesh(grid))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    backward()
    clip = nn.utils.clip_grad_norm_
    return [text_of(optimizer.zero_grad), text_of(clip, parameters, 1.0), text_of(optimizer.step)]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("stepped", [False, True])
def test_optimizer_before_parallelize(pool, options, stepped):
    """Localises: a parameter that is replaced, of attention or of an MLP, and whose holders do not hear of it."""
    for texts in pool.run(steps, 2, (1, 2), options, stepped):
        assert texts == [told("model.layers.0.self_attn.q_proj.weight")] * 3


def mlp_alone(grid) -> list[str]:
    model = make("llama")
    optimizer = torch.optim.SGD(model.model.layers[0].mlp.parameters(), lr=0.1)
    kept = torch.optim.SGD(model.model.norm.parameters(), lr=0.1)
    before = text_of(optimizer.zero_grad)
    tlm.parallelize(model, mesh(grid))
    return [before, text_of(optimizer.step), text_of(kept.step)]


def test_what_is_not_attention(pool):
    """Localises: what transformers' code replaces; and that what is kept, a norm, trains as before."""
    for texts in pool.run(mlp_alone, 2, (1, 2)):
        assert texts == ["no error", told("model.layers.0.mlp.gate_proj.weight"), "no error"]


def test_one_process():
    """Localises: fused projections, of which one becomes three, and a model without a mesh."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    tlm.parallelize(model, None)
    assert text_of(optimizer.step) == told("layers.0.self_attn.in_proj_weight")
    torch.optim.AdamW(model.parameters()).step()


def loaded(grid, directory: str) -> list[str]:
    model = tlm.parallelize(make_meta("llama"), mesh(grid))
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.1)
    own = torch.optim.SGD(model.model.layers[0].self_attn.parameters(), lr=0.1)
    tlm.load_pretrained(model, directory)
    again = torch.optim.SGD(tlm.param_groups(model), lr=0.1)
    return [text_of(optimizer.step), text_of(own.step), text_of(again.step)]


def test_optimizer_before_load_pretrained(pool, tmp_path):
    """Localises: weights that reading puts in the place of those that a model on meta had."""
    make("llama").save_pretrained(tmp_path)
    for head, attention, again in pool.run(loaded, 2, (1, 2), str(tmp_path)):
        assert head == told("lm_head.weight", "load_pretrained")
        assert attention == told("model.layers.0.self_attn.q_weight", "load_pretrained")
        assert again == "no error"
