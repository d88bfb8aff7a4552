"""Breaks one rank of a training job and tells how the others end: python tests/faults/ranks.py --ranks 4 kill_forward

Every case forks the ranks of a grid, plain processes under no launcher, which train a tiny Llama whose every part is
split; rank 2 does what the case says in its third step. One line of JSON a case: for every rank its exit status, the
seconds from the fault to its end, the class and the text of what it raised, and its losses. A rank that is alive
DEADLINE seconds after the fault is killed and counts as alive.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import two_level_mha as tlm

LIMIT = 5.0  # seconds: timeout= of the mesh
DEADLINE = LIMIT + 5.0
STEPS, WHEN = 5, 2  # steps of a job, and the one with the fault
TOLD = 1.5  # seconds until the others know which exchange a rank was in: all tell it each second
PATIENCE = 60.0  # seconds for a job to reach its fault on a busy machine
GRIDS = {4: (2, 2), 8: (2, 4)}


class Job:
    """What one rank runs; `odd` is the rank with the fault."""

    def __init__(self, rank: int, ranks: int, odd: int, channel: Connection, directory: Path) -> None:
        self.rank, self.ranks, self.odd, self.channel, self.directory = rank, ranks, rank == odd, channel, directory
        self.losses: list[float] = []

    def start(self) -> None:
        self.mesh = tlm.init_mesh("cpu", GRIDS[self.ranks], timeout=PATIENCE)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
            vocab_size=64, max_position_embeddings=64, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = tlm.parallelize(transformers.LlamaForCausalLM(config), self.mesh)
        self.optimizer = torch.optim.AdamW(tlm.param_groups(self.model), lr=1e-3)
        tlm.init_mesh("cpu", GRIDS[self.ranks], timeout=LIMIT)  # the same mesh: ranks on a busy machine start apart

    def step(self, number: int) -> None:
        ids = torch.arange(24).reshape(2, 12) + number
        loss = self.model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def fault(self) -> None:
        """Tells the supervisor that now is the time."""
        self.channel.send(("fault", time.time()))

    def layer(self, number: int) -> nn.Module:
        return self.model.model.layers[number].self_attn

    def in_layer(self, number: int, what: Callable) -> None:
        """Runs `what` in the forward pass, before a layer."""
        self.layer(number).register_forward_pre_hook(lambda *_: what())

    def kill(self) -> None:
        self.fault()
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> None:
        self.fault()
        os.kill(os.getpid(), signal.SIGSTOP)

    def in_backward(self, what: Callable) -> None:
        def hook(module, args, output):
            output[0].register_hook(lambda grad: what())

        self.layer(0).register_forward_hook(hook)


def kill_forward(job: Job) -> None:
    job.in_layer(1, job.kill)


def kill_backward(job: Job) -> None:
    job.in_backward(job.kill)


def kill_between(job: Job) -> None:
    job.kill()


def stop_forward(job: Job) -> None:
    job.in_layer(1, job.stop)


def stop_backward(job: Job) -> None:
    job.in_backward(job.stop)


def pause(job: Job) -> None:
    """Stands still for less than the limit."""
    pid = os.getpid()
    if os.fork() == 0:
        time.sleep(LIMIT / 4)
        os.kill(pid, signal.SIGCONT)
        os._exit(0)
    job.stop()


def skip_layer(job: Job) -> None:
    job.fault()
    job.model.model.layers = job.model.model.layers[:1]


def swap_layers(job: Job) -> None:
    job.fault()
    first, second = job.model.model.layers[0], job.model.model.layers[1]
    first.self_attn, second.self_attn = second.self_attn, first.self_attn


def fail(job: Job) -> None:
    job.fault()
    raise KeyError("the odd rank's batch")


def raise_in_forward(job: Job) -> None:
    job.in_layer(1, lambda: fail(job))


def raise_and_go_on(job: Job) -> None:
    """Skips its batch: its next step meets the others' this one."""
    job.fault()
    raise StopIteration


def raise_and_live(job: Job) -> None:
    """Leaves the guarded block, and stays alive."""
    job.in_layer(1, lambda: fail(job))
    job.lives = True


def no_memory(job: Job) -> None:
    def allocate():
        job.fault()
        torch.empty(1 << 50, dtype=torch.uint8)

    job.in_layer(1, allocate)


def once(hooked: nn.Module, what: Callable) -> None:
    """Runs `what` before the next forward pass of a module, and not again."""

    def hook(*_) -> None:
        handle.remove()
        what()

    handle = hooked.register_forward_pre_hook(hook)


def no_memory_once(job: Job) -> None:
    def allocate():
        job.fault()
        torch.rand(3)  # draws that the others do not make
        torch.empty(1 << 50, dtype=torch.uint8)

    once(job.layer(1), allocate)


def fail_in_backward(job: Job) -> None:
    def hook(module, args, output):
        handle.remove()
        output[0].register_hook(lambda grad: fail(job))

    handle = job.layer(0).register_forward_hook(hook)


def other_tokens(job: Job) -> None:
    job.fault()
    job.model.register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True, prepend=True
    )


def no_grad(job: Job) -> None:
    job.fault()
    torch.set_grad_enabled(False)


def autocast(job: Job) -> None:
    job.fault()
    torch.autocast("cpu", torch.bfloat16).__enter__()


TRAINING = (
    *(kill_forward, kill_backward, kill_between, stop_forward, stop_backward, pause, skip_layer, swap_layers),
    *(raise_in_forward, raise_and_go_on, raise_and_live, no_memory, other_tokens, no_grad, autocast),
)


def train(job: Job, case: Callable) -> None:
    with tlm.guard(job.mesh):
        for number in range(STEPS):
            try:
                if number == WHEN and job.odd:
                    case(job)
                job.step(number)
            except StopIteration:
                continue


def train_on(job: Job, case: Callable) -> None:
    """Every rank lives: they open the mesh again and leave the step out."""
    failures = []
    for number in range(STEPS):
        try:
            with tlm.guard(job.mesh):
                if number == WHEN and job.odd:
                    case(job)
                job.step(number)
        except Exception as error:
            failures.append(error)
            tlm.reopen(job.mesh)
            job.optimizer.zero_grad()
    raise failures[0]


def generate(job: Job, case: Callable) -> None:
    with tlm.guard(job.mesh), torch.no_grad():
        job.model.eval()
        case(job)


def kill_generate(job: Job) -> None:
    calls = []
    if job.odd:
        job.in_layer(1, lambda: calls.append(1) or (job.kill() if len(calls) == 6 else None))
    job.model.generate(torch.arange(6).reshape(1, 6) + 1, max_new_tokens=24, do_sample=False)


def fewer_tokens(job: Job) -> None:
    """In a loop of one's own: generate() stops where the first rank does."""
    ids = torch.arange(6).reshape(1, 6) + 1
    for _ in range(8 if job.odd else 24):
        ids = torch.cat([ids, job.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    if job.odd:
        job.fault()
        time.sleep(2 * DEADLINE)


def collective(job: Job, case: Callable) -> None:
    """Something that every rank calls; the odd one dies instead."""
    with tlm.guard(job.mesh):
        job.step(0)
        time.sleep(TOLD)
        if job.odd:
            job.kill()
        case(job)


def together(job: Job, case: Callable) -> None:
    """The same, and the odd one dies in the middle of it."""
    with tlm.guard(job.mesh):
        job.step(0)
        time.sleep(TOLD)
        case(job)


def kill_in_save(job: Job) -> None:
    if job.odd:
        HuggingFaceStorageWriter.write_data = lambda *_: job.kill()
    kill_save(job)


def kill_save(job: Job) -> None:
    tlm.save(job.directory, job.model, job.optimizer, step=1)


def kill_state_dict(job: Job) -> None:
    tlm.full_state_dict(job.model)


def kill_load(job: Job) -> None:
    tlm.load_pretrained(job.model, job.directory)


def other_grid(job: Job, case: Callable) -> None:
    if job.odd:
        job.fault()
    n, m = GRIDS[job.ranks]
    tlm.init_mesh("cpu", (n * m, 1) if job.odd else (n, m), timeout=LIMIT)


def grid(job: Job) -> None:
    pass


CASES: dict[str, tuple[Callable, Callable]] = {case.__name__: (train, case) for case in TRAINING}
CASES |= {case.__name__: (generate, case) for case in (kill_generate, fewer_tokens)}
CASES |= {case.__name__: (collective, case) for case in (kill_save, kill_state_dict, kill_load)}
CASES |= {case.__name__: (train_on, case) for case in (no_memory_once, fail_in_backward)}
CASES["kill_in_save"] = (together, kill_in_save)
CASES["other_grid"] = (other_grid, grid)


def rank_main(name: str, rank: int, ranks: int, odd: int, port: int, channel: Connection, directory: Path) -> None:
    log = os.open(directory / f"{name}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    job = Job(rank, ranks, odd, channel, directory)
    run, case = CASES[name]
    raised = text = ""
    start = time.time()
    try:
        if run is not other_grid:
            job.start()
        start = time.time()
        run(job, case)
    except Exception as error:
        raised, text = type(error).__name__, "\n".join([str(error), *getattr(error, "__notes__", [])])
    channel.send(("end", (time.time(), raised, text, job.losses, start)))
    if getattr(job, "lives", False):
        time.sleep(2 * DEADLINE)
    os._exit(0)


def one_case(name: str, ranks: int, odd: int, directory: Path) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    channels, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(name, rank, ranks, odd, port, theirs, directory), daemon=True)
        process.start()
        theirs.close()
        channels.append(ours)
        processes.append(process)
    results: list[dict] = [{"raised": None, "text": "", "losses": [], "seconds": None} for _ in range(ranks)]
    when: list[float] = []

    def listen(rank: int) -> None:
        try:
            while True:
                kind, value = channels[rank].recv()
                if kind == "fault":
                    when.append(value)
                else:
                    ended, raised, text, losses, _ = value
                    results[rank] |= {"raised": raised, "text": text, "losses": losses, "ended": ended}
        except EOFError:
            return

    listeners = [threading.Thread(target=listen, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in listeners:
        thread.start()
    patience = time.monotonic() + PATIENCE
    while not when and time.monotonic() < patience and any(process.is_alive() for process in processes):
        time.sleep(0.05)
    deadline = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    for thread in listeners:
        thread.join(5)
    for rank, process in enumerate(processes):
        ended = results[rank].pop("ended", None)
        results[rank]["seconds"] = None if ended is None or not when else round(ended - when[0], 2)
        results[rank]["status"] = process.exitcode
    return {"case": name, "ranks": ranks, "odd": odd, "fault": bool(when), "alive": alive, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--ranks", type=int, choices=GRIDS, default=4)
    parser.add_argument("--odd", type=int, default=2, help="the rank with the fault")
    args = parser.parse_args()
    torch.set_num_threads(1)  # before the forks
    with tempfile.TemporaryDirectory() as directory:
        for name in args.cases or CASES:
            print(json.dumps(one_case(name, args.ranks, args.odd, Path(directory))), flush=True)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
