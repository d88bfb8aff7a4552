"""A small model with LoRA of PEFT, unsplit and split, before and after: trained, merged and stored, compared."""

from contextlib import nullcontext

import peft
import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

import two_level_mha as tlm

from .calls import mesh
from .decoders import BASE, make
from .families import build
from .wide import in_float64

GENERATED = "steps of a generation"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head")
SMALL = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def stock(kind: str | tuple, seed: int = 0) -> nn.Module:
    """kind: of this table, of decoders', or a family with sizes of its configuration."""
    if isinstance(kind, tuple):
        return build(kind[0], **dict(kind[1])).double()
    if kind == "gpt2":
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, **drops)).double().eval()
    if kind == "doge":
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**BASE)).double().eval()
    return make(kind, exact=True, seed=seed)


def adapted(model: nn.Module, targets=ALL, seed: int = 5, **lora) -> nn.Module:
    """With LoRA as PEFT starts it."""
    torch.manual_seed(seed)
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **lora))


def split(kind: str, before: bool, grid: tuple[int, int] = (2, 2), targets=ALL, lora=(), seed=0, **options):
    """The same on ranks, put there before the split or after it."""
    if before:
        return tlm.parallelize(adapted(stock(kind, seed), targets, **dict(lora)), mesh(grid), **options)
    model = tlm.parallelize(stock(kind, seed), mesh(grid), **options)
    with tlm.adaptable(model):
        return adapted(model, targets, **dict(lora))


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert not any(isinstance(x, DTensor) for x in state.values())
    return {name: x.clone() for name, x in state.items()}


def set_b(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """B is zero at the start, of embeddings A; with it nothing that goes wrong in A's products would show."""
    draw = torch.Generator().manual_seed(3)
    for name, p in sorted(model.named_parameters()):
        if "lora_B" in name or "lora_embedding_A" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * scale)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module, steps: int = 4) -> list[float]:
    """Of a training in which adapters alone are trained, by torch's own optimizer and clipping; a step each."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for step in range(steps):
        torch.manual_seed(100 + step)  # of dropout
        logits = model(input_ids=tokens(), use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    model.eval()
    return found


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def farthest(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max((got[name] - x).abs().max().item() for name, x in expected.items())


def compare(kind: str | tuple, before: bool, options: dict) -> dict[str, float]:
    """Distances to the unsplit model with the same adapters: at the start, in training, merged and unmerged."""
    with in_float64(stock(kind)) if isinstance(kind, tuple) else nullcontext():
        return _compare(kind, before, options)


def _compare(kind: str | tuple, before: bool, options: dict) -> dict[str, float]:
    given = {key: options[key] for key in ("targets", "lora") if key in options}
    whole = adapted(stock(kind), given.get("targets", ALL), **dict(given.get("lora", ())))
    ours = split(kind, before, **options)
    found = {"start": farthest(adapters(ours), adapters(whole))}
    whole, ours = set_b(whole), set_b(ours)
    expected, got = losses(whole), losses(ours)
    assert abs(expected[0] - expected[-1]) > 0.1
    found["losses"] = max(abs(x - y) for x, y in zip(expected, got, strict=True))
    found["trained"] = farthest(adapters(ours), adapters(whole))
    y = logits(whole)
    found["logits"] = (logits(ours) - y).abs().max().item()
    with whole.disable_adapter(), ours.disable_adapter():
        assert (logits(whole) - y).abs().max() > 0.1
        found["disabled"] = (logits(ours) - logits(whole)).abs().max().item()
    steps = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    generated = [model.generate(input_ids=tokens(), **steps) for model in (ours, whole)]
    assert torch.equal(*(one.sequences for one in generated))
    mine, theirs = (torch.stack(one.logits) for one in generated)
    found[GENERATED] = (mine - theirs).abs().max().item()
    for model in (ours, whole):
        model.merge_adapter(safe_merge=True)
    found["merged"] = (logits(ours) - logits(whole)).abs().max().item()  # not y where two adapters are on one weight
    for model in (ours, whole):
        model.unmerge_adapter()
    found["unmerged"] = (logits(ours) - y).abs().max().item()
    ours, whole = ours.merge_and_unload(), whole.merge_and_unload()
    found["unloaded"] = (logits(ours) - logits(whole)).abs().max().item()
    state = tlm.full_state_dict(ours)
    if torch.distributed.get_rank() == 0:
        found["stored"] = farthest(state, whole.state_dict())
    limits = {GENERATED: 1e-6}  # generate gives logits in float32
    return {name: distance for name, distance in found.items() if not distance <= limits.get(name, 1e-10)}
