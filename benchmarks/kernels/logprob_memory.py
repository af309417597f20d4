"""Temporary memory of the gradient of log-probs by the compiler's account: ours and naive.

    python benchmarks/kernels/logprob_memory.py                  # N=8192, D=4096, V=128256, float32
    python benchmarks/kernels/logprob_memory.py --tokens 4096 --vocab 32000 --out result.json

Nothing runs: the programs are compiled for this machine's CPU, and the figure is what a call needs
beside its arguments and results (``memory_analysis().temp_size_in_bytes``). On a CPU bfloat16
matmuls are computed in float32, and the copies of the head that takes count on both sides.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from aa_jax.kernels.linear_logprob import linear_logprob

MIB = 2**20


def temporary(impl: str, tokens: int, dim: int, vocab: int, dtype: str) -> float:
    """MiB of the gradient with respect to hidden states and head."""

    def loss(hidden, head, targets):
        return linear_logprob(hidden, head, targets, impl=impl).logps.sum()

    shapes = [((tokens, dim), dtype), ((vocab, dim), dtype), ((tokens,), jnp.int32)]
    abstract = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*abstract).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MIB


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    shape = options.tokens, options.dim, options.vocab, options.dtype
    ours, naive = temporary("xla", *shape), temporary("reference", *shape)
    print(f"gradient of log-probs, N={shape[0]}, D={shape[1]}, V={shape[2]}, {shape[3]}")
    print(f"  ours {ours:.0f} MiB, naive {naive:.0f} MiB temporary: {ours / naive:.1%} of it")
    if options.out:
        result = {"shape": shape, "ours_mib": ours, "naive_mib": naive, "jax": jax.__version__}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
