"""Every CUDA kernel of this package once, and ATen's of attention, on small odd sizes: what a memory checker watches.

    python -m gpu.small [--device cuda|cpu]        in benchmarks/

Values are checked by the tests; here only that nothing is NaN, and what the ranks compare, which tests emulate.
"""

import argparse

import torch

import two_level_mha  # noqa: F401  registers the operators

ops = torch.ops.two_level_mha
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packing(device: str) -> None:
    for dtype in DTYPES:
        tensors = [torch.randn(2, 3, 7, 5, device=device).to(dtype), torch.randn(2, 4, 6, 8, device=device).to(dtype)]
        for zigzag in (False, True):
            for dims in ([2, -1], [0, 1]):
                buffer = ops.pack(tensors, dims, 2, zigzag)
                sizes = [size for x in tensors for size in x.shape]
                assert all(x.isfinite().all() for x in ops.unpack(buffer, sizes, dims, 2, zigzag))


def merging(device: str) -> None:
    for dtype in DTYPES:
        outs, sums = torch.randn(3, 2, 4, 5, 7, device=device).to(dtype), torch.randn(3, 2, 4, 5, device=device)
        sums[1, 0, 2] = -torch.inf
        outs, sums = outs.requires_grad_(), sums.requires_grad_()
        out, logsumexp = ops.merge_partials(outs, sums)
        (out.float().sum() + logsumexp.sum()).backward()
        assert outs.grad.isfinite().all()


def dropping(device: str) -> None:
    seed = torch.tensor([3], device=device)
    assert ops.dropout_keep_mask(seed, 0.3, [2, 3, 5, 41], [1, 2, 3]).any()


def turning(device: str) -> None:
    for dtype in DTYPES:
        q, k = (torch.randn(2, heads, L, 40, device=device).to(dtype) for heads, L in ((4, 5), (1, 7)))
        weights = [torch.randn(40, device=device) for _ in range(2)]
        angles = [[torch.randn(1, 1, L, 24, device=device) for _ in range(2)] for L in (5, 7)]
        with torch.no_grad():
            for turned in ops.norm_rotary(q, k, weights, 1e-6, *angles, True):
                assert turned.isfinite().all()


def sealing(device: str) -> None:
    """What the ranks compare: one rank with itself, then with another hash."""
    verdict = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=device == "cuda")
    for count in (3, 100_003):
        seal = ops.seal([torch.randn(count, device=device), torch.randn(5, device=device).half()], [1], "layer")
        other = ops.seal([torch.randn(count, device=device)], [1], "layer", seal)
        for dtype in (*DTYPES, torch.float64):
            digits = ops.seal_digits(seal, dtype, 2)
            for sums, differs in ((2 * digits, 0), (digits + ops.seal_digits(other, dtype, 2), 1)):
                ops.seal_verdict(sums, seal, 2, verdict.zero_())
                if device == "cuda":
                    torch.cuda.synchronize()
                assert verdict[0] == differs and verdict[1] == seal.cpu(), (count, dtype, differs)


# d_qk, d_v, query heads, KV heads, options of the operator
ATTENTION = [
    (64, 64, 4, 4, {"causal": 0}),
    (256, 256, 4, 2, {"causal": 5}),
    (512, 256, 2, 2, {}),
    (40, 24, 4, 1, {"causal": 3, "window": 9}),
    (64, 64, 2, 2, {"causal": 40, "key_stride": 2}),
    (64, 64, 2, 2, {"dropout_p": 0.2}),
]


def attending(device: str) -> None:
    for dtype in DTYPES:
        for d_qk, d_v, heads, kv_heads, options in ATTENTION:
            q = torch.randn(2, heads, 37, d_qk, device=device).to(dtype).requires_grad_()
            k, v = (torch.randn(2, kv_heads, 53, d, device=device).to(dtype).requires_grad_() for d in (d_qk, d_v))
            seed = {"seed": torch.tensor([3], device=device)} if "dropout_p" in options else {}
            out, logsumexp = ops.partial_attention(q, k, v, **options, **seed)
            (out.float().sum() + logsumexp[logsumexp.isfinite()].sum()).backward()
            assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))


WORK = {
    "packing": packing,
    "merging": merging,
    "dropping": dropping,
    "turning": turning,
    "sealing": sealing,
    "attending": attending,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", choices=WORK, nargs="+", default=list(WORK))
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.only:
        WORK[name](args.device)
        print(f"{name} done", flush=True)
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
