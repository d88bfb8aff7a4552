"""Methods of a split transformers model that know of the grid: what it writes, and what it refuses."""

import pytest
import torch
import transformers
from harness import encoders
from harness.calls import mesh, on_ranks, text_of
from harness.decoders import make

import two_level_mha as tlm

MODELS = {"its own head": "llama", "a tied head": "gemma", "fused experts": "mixtral"}


def written(grid, name: str, directory: str, by_hand: bool, rest: bool) -> list[str]:
    """What differs of a model that was written by every rank's save_pretrained and read by transformers."""
    stock = encoders.make(name) if name in encoders.MODELS else make(name)
    ours = tlm.parallelize(type(stock)(stock.config).double(), mesh(grid), rest=rest)
    ours.load_state_dict(stock.state_dict())
    if by_hand:
        ours.save_pretrained(directory, state_dict=tlm.full_state_dict(ours))
    else:
        ours.save_pretrained(directory)
    if grid is not None:
        torch.distributed.barrier()
    again = type(stock).from_pretrained(directory, dtype=torch.float64).state_dict()
    wanted = stock.state_dict()
    return [key for key in again.keys() | wanted.keys() if not torch.equal(again[key], wanted[key])]


@pytest.mark.parametrize("grid", [None, (1, 2)])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("name", [*MODELS.values(), "BertModel"])
def test_save_pretrained(pool, tmp_path, name, by_hand, grid):
    """E. Localises: keys or shapes of ours in the file, another rank's file over the first one's, tied tensors."""
    for differing in on_ranks(pool, written, grid, name, str(tmp_path), by_hand, name != "mixtral"):
        assert not differing


def refused(grid) -> list[str]:
    ours = tlm.parallelize(make("llama"), mesh(grid))
    apart = text_of(ours.save_pretrained, f"folder {torch.distributed.get_rank()}")
    return [apart, text_of(ours.resize_token_embeddings, 70), text_of(ours.resize_token_embeddings)]


def test_refused(pool):
    """Localises: ranks that write different folders; an embedding that is changed where it is split."""
    for apart, resized, asked in pool.run(refused, 2, (1, 2)):
        assert apart.startswith("save_directory differs between ranks of the grid: folder 0 on rank 0, folder 1 on")
        assert resized == (
            "resize_token_embeddings cannot change an embedding or a head that is split over the grid: resize the "
            "model first, then call parallelize"
        )
        assert asked == "no error"


def resized(grid) -> list[tuple]:
    ours = tlm.parallelize(make("llama"), mesh(grid), rest=False)
    ours.resize_token_embeddings(70)
    ids = torch.full((1, 3), 69)
    return [
        tuple(ours(ids, use_cache=False).logits.shape),
        type(ours).__name__,
        isinstance(ours, transformers.LlamaForCausalLM),
    ]


def test_resized_where_the_embedding_is_whole(pool):
    """Localises: a model whose attention alone is split, which may have other words."""
    for found in pool.run(resized, 2, (1, 2)):
        assert found == [(1, 3, 70), "LlamaForCausalLM", True]
