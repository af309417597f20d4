"""What a training state holds at LLaVA-1.5-7B's shapes, with and without adapters.

python benchmarks/lora_memory.py

Shapes only, nothing is allocated. Activations are not counted; they are the same in all rows. A
full update keeps the reference's log-probs, not a second model, so no row counts a reference.
"""

import os
import runpy
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from aa_jax import models
from aa_jax.models import adapt
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import frozen_paths, split

CONFIG = runpy.run_path(str(Path(__file__).parents[1] / "tests/published.py"))["LLAVA_7B"]
ROWS = {
    "everything but the tower trains": ({}, None, ("vision_tower/*",)),
    "adapters, rank 64": ({}, {"rank": 64}, ()),
    "adapters, rank 64, base in int8": ({"quantize": {"kind": "int8"}}, {"rank": 64}, ()),
    "adapters, rank 64, base in nf4": ({"quantize": {"kind": "nf4"}}, {"rank": 64}, ()),
}


def size(tree):
    """GiB."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30


def measure(options, lora, frozen):
    """(parameters that train, GiB of parameters, of fp32 gradients, of optimizer state)."""
    model = models.build(CONFIG, param_dtype="bfloat16", **options)
    params = model.abstract()
    if lora:
        made = []
        params = jax.eval_shape(
            lambda p: made.append(adapt.attach(model, p, **lora)) or made[-1][1], params
        )
        model = made[-1][0]
    trainable, _ = split(params, frozen_paths(params, (*model.frozen, *frozen)))
    count = sum(x.size for x in jax.tree.leaves(trainable))
    tx, _ = make_optimizer(1e-5, 100)
    return count, size(params), 4 * count / 2**30, size(jax.eval_shape(tx.init, trainable))


def main():
    print("| | trains | parameters, GiB | gradients | optimizer | together |")
    print("|---|---|---|---|---|---|")
    for name, case in ROWS.items():
        count, *parts = measure(*case)
        cells = " | ".join(f"{part:.2f}" for part in (*parts, sum(parts)))
        print(f"| {name} | {count:,} | {cells} |")


if __name__ == "__main__":
    main()
