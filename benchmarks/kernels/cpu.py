"""The two operators on a CPU: log-probs beside naive jnp and chunked torch, attention by its masks.

    python benchmarks/kernels/cpu.py --out cpu.json
    python benchmarks/kernels/cpu.py --tokens 64 --dim 64 --vocab 3000 --length 256 --repetitions 1

Forward and backward, float32, sides in turn. The log-probs of all three sides must agree first, and
so must the gradients. Naive jnp holds all logits and is differentiated by JAX. Torch's chunks are
those of ``torch.utils.checkpoint`` around a cross entropy, swept, and its fastest counts.
Temporary memory is the compiler's account (``memory_analysis``) of the same programs.

Attention runs rows of packed sequences, rows in which two responses share a prompt, and causal
ones: with intervals, with all scores formed at once (our own path for small problems), without a
mask, and as a dense mask on ``jax.nn.dot_product_attention``. ``visible`` is the share of the
scores that anybody sees, ``visited`` that of the tiles in which any is.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import sys

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
from clock import environment, measure

from aa_jax.kernels.attention import attention, tile, visible, xla
from aa_jax.kernels.linear_logprob import linear_logprob

OURS, NAIVE = "aa_jax, blocks", "naive jnp"
INTERVALS, DENSE, FULL = "aa_jax, intervals", "jax.nn, dense mask", "aa_jax, full"
ALL_SCORES = "aa_jax, all scores"
MIB = 2**20


def naive(hidden, head, targets):
    """Sum of log-probs with all logits at once."""
    logits = hidden @ head.T
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1).sum()


def torch_chunks(hidden, head, targets, chunk):
    """-> a call that returns torch's gradients, logits formed for ``chunk`` tokens at a time."""
    h, w = (torch.tensor(np.asarray(x)).requires_grad_() for x in (hidden, head))
    t = torch.tensor(np.asarray(targets), dtype=torch.long)

    def part(h, w, t):
        return -torch.nn.functional.cross_entropy(h @ w.T, t, reduction="sum")

    def call():
        h.grad = w.grad = None
        loss = 0.0
        for at in range(0, len(t), chunk):
            rows = slice(at, at + chunk)
            loss = loss + torch.utils.checkpoint.checkpoint(
                part, h[rows], w, t[rows], use_reentrant=False
            )
        loss.backward()
        return h.grad, w.grad

    return call


def log_probs(options):
    """Timings and memory of the log-probs."""
    rng = np.random.default_rng(0)
    n, d, v = options.tokens, options.dim, options.vocab
    hidden = jnp.asarray(rng.normal(size=(n, d)), jnp.float32)
    head = jnp.asarray(2 * rng.normal(size=(v, d)) / d**0.5, jnp.float32)
    targets = jnp.asarray(rng.integers(0, v, n), jnp.int32)

    def ours(hidden, head, targets):
        return linear_logprob(hidden, head, targets, impl="xla").logps.sum()

    sides, memory, results = {}, {}, {}
    for name, function in ((OURS, ours), (NAIVE, naive)):
        step = jax.jit(jax.grad(function, (0, 1))).lower(hidden, head, targets).compile()
        memory[name] = step.memory_analysis().temp_size_in_bytes / MIB
        sides[name] = lambda step=step: jax.block_until_ready(step(hidden, head, targets))
        results[name] = sides[name]()
    for chunk in options.chunks:
        name = f"torch, chunks of {chunk}"
        sides[name] = torch_chunks(hidden, head, targets, chunk)
        results[name] = sides[name]()
    for found in results.values():
        for a, b in zip(found, results[NAIVE], strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)
    baselines = [name for name in sides if name != OURS]
    times = measure(
        sides, baselines, n, repetitions=options.repetitions, seconds=options.seconds
    )  # fmt: skip
    return {"shape": [n, d, v], "temporary_mib": memory, **times}


def packed(length):
    """Four sequences of equal length in a row, causal."""
    t = np.arange(length)
    start = t // (length // 4) * (length // 4)
    return np.stack([0 * t, 0 * t, start, t + 1], -1)


def shared_prefix(length):
    """A prompt of half the row, and two responses that both see it and not each other."""
    t = np.arange(length)
    prompt, half = length // 2, length // 4
    start = np.where(t < prompt, 0, prompt + (t - prompt) // half * half)
    return np.stack([0 * t, np.where(t < prompt, 0, prompt), start, t + 1], -1)


def causal(length):
    """One sequence."""
    t = np.arange(length)
    return np.stack([0 * t, 0 * t, 0 * t, t + 1], -1)


def visited(q, k, intervals):
    """Share of the tiles that are computed, of all there are; 1 if nothing is cut into tiles."""
    tiles = xla.tiles_for(q, k, intervals)
    if tiles is None:
        return 1.0
    limits = jnp.pad(intervals, ((0, 0), (0, -q.shape[1] % tiles.queries), (0, 0)))
    return float(tile.touched(limits, tiles.queries, k.shape[1], tiles.keys).mean())


def processor_time(times):
    """Medians of processor time over those with intervals: waiting for other programs is not in."""
    median = {name: float(np.median(x)) for name, x in times["cpu_seconds_per_call"].items()}
    return {name: x / median[INTERVALS] for name, x in median.items() if name != INTERVALS}


def masks(options):
    """Timings of attention with interval masks."""
    rng = np.random.default_rng(0)
    length, heads, depth = options.length, 4, 64
    q, k, v = (
        jnp.asarray(rng.normal(size=(1, length, heads, depth)), jnp.float32) for _ in range(3)
    )
    found = {}
    for kind, intervals in (
        ("packed", packed(length)), ("shared prefix", shared_prefix(length)),
        ("causal", causal(length)),
    ):  # fmt: skip
        iv = jnp.asarray(intervals, jnp.int32)[None]
        dense = visible(iv, length)
        calls = {
            INTERVALS: lambda q, k, v, iv=iv: attention(q, k, v, intervals=iv, impl="xla"),
            FULL: lambda q, k, v: attention(q, k, v, impl="xla"),
            ALL_SCORES: lambda q, k, v, iv=iv: xla.attention(
                q, k, v, iv, depth**-0.5, block=length
            ),
            DENSE: lambda q, k, v, m=dense: jax.nn.dot_product_attention(q, k, v, mask=m[:, None]),
        }
        sides, results = {}, {}
        for name, call in calls.items():
            step = jax.jit(jax.grad(lambda *x, call=call: (call(*x) ** 2).sum(), (0, 1, 2)))
            sides[name] = lambda step=step: jax.block_until_ready(step(q, k, v))
            results[name] = sides[name]()
        for a, b in zip(results[INTERVALS], results[DENSE], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)
        times = measure(
            sides,
            [DENSE, FULL, ALL_SCORES],
            length,
            repetitions=options.repetitions,
            seconds=options.seconds,
        )
        shares = {"visible": float(dense.mean()), "visited": visited(q, k, iv)}
        found[kind] = {**shares, **times, "processor_time": processor_time(times)}
    return found


def show(title, times):
    """Prints ratios alone: seconds of a shared machine say little."""
    print(title)
    for name, ratio in times["ratio"].items():
        print(f"  {name}: {ratio['median']:.2f}x  ({ratio['min']:.2f} - {ratio['max']:.2f})")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--length", type=int, default=2048, help="of attention, a multiple of 4")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256], help="of torch")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.01, help="least time of one round")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    result = {"environment": environment(), "log_probs": log_probs(options)}
    memory = result["log_probs"]["temporary_mib"]
    shape = "N={}, D={}, V={}".format(*result["log_probs"]["shape"])
    show(f"log-probs forward and backward, {shape}", result["log_probs"])
    print(
        f"  temporary memory: {memory[OURS]:.0f} of {memory[NAIVE]:.0f} MiB, "
        f"{memory[OURS] / memory[NAIVE]:.1%}"
    )
    result["attention"] = masks(options)
    for kind, times in result["attention"].items():
        shares = f"{times['visible']:.0%} visible, {times['visited']:.0%} of the tiles visited"
        show(f"attention, {kind}, T={options.length}, {shares}", times)
        shown = [f"{name} {x:.2f}x" for name, x in times["processor_time"].items()]
        print(f"  in processor time: {', '.join(shown)}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
