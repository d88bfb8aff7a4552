"""Streams tokens from a decoder on more ranks than it has key/value heads, by an unmodified model.generate().

    torchrun --nproc-per-node 8 examples/generate.py
    torchrun --nproc-per-node 8 examples/generate.py --model /path/to/a/model --prompt "The sea" --tokens 100

Without --model: a small Qwen2 with 14 query and 2 key/value heads and random weights from a fixed seed, whose "text" is
token numbers. The weights of attention and the KV cache lie once on the grid of ranks. Rank 0 also runs the model whole
and compares the tokens; then all ranks try transformers' own tensor parallelism at the same size. Runs on one GPU for
each rank (NCCL) where there are enough, else on the CPU (Gloo). Exit code 1: the tokens differ.
"""

import argparse
import copy
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import two_level_mha as tlm

HEADS, KV_HEADS, HEAD_DIM = 14, 2, 16


class Numbers(BaseStreamer):
    """Prints token numbers as they come, the prompt left out."""

    def __init__(self) -> None:
        self.started = False

    def put(self, value: torch.Tensor) -> None:
        if self.started:
            print(*value.flatten().tolist(), end=" ", flush=True)
        self.started = True

    def end(self) -> None:
        print(flush=True)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory with a model and its tokenizer")
    parser.add_argument("--prompt", default="The sea is", help="with --model")
    parser.add_argument("--tokens", type=int, default=50, help="how many to generate (50)")
    parser.add_argument("--cache", choices=("position", "batch"), default="position", help="layout of the KV cache")
    parser.add_argument("--grid", metavar="NxM", help="head groups x slices; by default the one predicted fastest")
    return parser.parse_args(words)


def load(path: str | None, prompt: str) -> tuple[Any, torch.Tensor, Any]:
    """The model in eval mode, the prompt (1, L), and the tokenizer if there is one; the same on every rank."""
    if path is not None:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
        return model.eval(), tokenizer(prompt, return_tensors="pt").input_ids, tokenizer
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000, hidden_size=HEADS * HEAD_DIM, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, initializer_range=0.2,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return model.eval(), torch.randint(2, config.vocab_size, (1, 16)), None


def make_mesh(model: PreTrainedModel, text: str | None, device: str) -> DeviceMesh:
    config: Any = model.config.get_text_config()
    h, k = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    if text is not None:
        grid = tlm.Grid.parse(text)
        return tlm.init_mesh(device, (grid.head_groups, grid.slices))
    d = getattr(config, "head_dim", None) or config.hidden_size // h
    return tlm.init_mesh(device, num_heads=h, num_kv_heads=k, head_dim=d)


def theirs(model: Any, ids: torch.Tensor, mesh: DeviceMesh) -> str:
    """What transformers' own tensor parallelism does with this model on as many ranks, in a sentence."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    try:
        plan = model._resolve_parallel_plans(DistributedConfig(tp_size=mesh.size()))[0]
        model = apply_tensor_parallelism(model, mesh._flatten("grid"), plan)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    except Exception as error:  # whatever it is, it is the answer
        return f"fails: {type(error).__name__}: {error}"
    return "runs"


def run(args: argparse.Namespace, device: str) -> bool:
    """All of it, in ranks that are already started; whether the tokens are those of the unsplit model."""
    first = dist.get_rank() == 0
    model, ids, tokenizer = load(args.model, args.prompt)
    model, ids = model.to(device), ids.to(device)
    options = {"max_new_tokens": args.tokens, "do_sample": False}
    whole: torch.Tensor | None = model.generate(ids, **options) if first else None
    other = copy.deepcopy(model)
    mesh = make_mesh(model, args.grid, device)
    model = tlm.parallelize(model, mesh, cache=args.cache)
    cache = tlm.KVCache(model.config, mesh, layout=args.cache, max_length=ids.shape[1] + args.tokens)
    streamer: BaseStreamer | None = None
    if first:
        print(f"grid {mesh.shape[0]} x {mesh.shape[1]} on {mesh.size()} ranks\n{tlm.report(model)}\n")
        streamer = Numbers() if tokenizer is None else TextStreamer(tokenizer, skip_prompt=True)
    start = time.perf_counter()
    split = model.generate(ids, past_key_values=cache, streamer=streamer, **options)
    seconds = time.perf_counter() - start
    equal = [whole is None or torch.equal(split, whole)]
    dist.broadcast_object_list(equal)
    answer = theirs(other, ids, mesh)
    if first:
        made = split.shape[1] - ids.shape[1]
        print(f"\n{made} tokens, {made / seconds:.1f} tokens/s")
        print(f"equal to the unsplit model's: {'yes' if equal[0] else 'NO'}")
        print(f"KV cache: {cache.nbytes:,} bytes on each of {mesh.size()} ranks, {cache.nbytes * mesh.size():,} in all")
        print(f"transformers' own tensor parallelism on {mesh.size()} ranks {answer}", flush=True)
    dist.barrier()  # what failed may have left ranks at different places
    return equal[0]


def main() -> int:
    args = parse_args()
    if "RANK" not in os.environ:
        print("start it by torchrun --nproc-per-node RANKS examples/generate.py", file=sys.stderr)
        return 2
    logging.set_verbosity_error()
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    device = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    if device == "cuda":
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")
    try:
        return 0 if run(args, device) else 1
    except tlm.GridError as error:
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        dist.barrier()  # a rank that is gone would have torchrun stop rank 0 before it prints
        return 2
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
