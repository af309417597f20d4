"""A program: one process of a job that trains tests/training/tiny.py's model through `fit`.

``python train_tiny.py WORKDIR TOTAL_STEPS SECONDS_PER_STEP CHECKPOINT_EVERY [MESH...]``, mesh sizes
like ``fsdp=2``. Every process leaves its number as ``pid<index>`` and, at the end, the ids of the
rows it has read as ``rows<index>.json``.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

ROWS, BATCH = 61, 8


def make_loader(tiny, read, **options):
    """Batches of tiny.py's rows; the ids of those that are read are appended to `read`."""
    import numpy as np

    from aa_jax.data.loader import Loader

    class Rows(Sequence):
        def __len__(self):
            return ROWS

        def __getitem__(self, index):
            read.append(index)
            return {name: x[0] for name, x in tiny.make_batch(index, 1).items()}

    def collate(items, batch_rows):
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        return {
            name: np.concatenate([x, np.zeros((batch_rows - len(x), *x.shape[1:]), x.dtype)])
            for name, x in batch.items()
        }

    return Loader(Rows(), collate, BATCH, epochs=None, seed=3, **options)


def main():
    """Joins the job and trains."""
    from aa_jax import hosts, platforms

    platforms.start()

    import jax
    import numpy as np
    import tiny

    from aa_jax.sharding import make_mesh, share
    from aa_jax.training.loop import fit
    from aa_jax.training.metrics import MetricWriter

    workdir, total, seconds, every, *sizes = sys.argv[1:]
    Path(workdir).mkdir(parents=True, exist_ok=True)
    (Path(workdir) / f"pid{hosts.index()}").write_text(str(os.getpid()))
    mesh = make_mesh(**{name: int(size) for name, size in (word.split("=") for word in sizes)})
    read = []

    class Slow:
        def __init__(self, batches):
            self._batches, self.share = batches, batches.share

        def __next__(self):
            time.sleep(float(seconds))
            return next(self._batches)

        def get_state(self):
            return self._batches.get_state()

        def set_state(self, state):
            self._batches.set_state(state)

    step, state = tiny.setup(mesh=mesh, accumulation=2)
    loader = make_loader(tiny, read, share=share(mesh), multiple_of=step.rows_multiple)
    with MetricWriter(workdir, "sft", tensorboard=False) as writer:
        final = fit(
            step=step, state=state, batches=Slow(iter(loader)), total_steps=int(total),
            workdir=workdir, stage="sft", checkpoint_every=int(every), writer=writer,
        )  # fmt: skip
    leaves = [hosts.to_host(x) for x in jax.tree.leaves(final["params"])]
    (Path(workdir) / f"rows{hosts.index()}.json").write_text(json.dumps(read))
    if hosts.index() == 0:
        np.savez(Path(workdir) / "final.npz", *leaves)


if __name__ == "__main__":
    from aa_jax import config

    config.run_main(main, argv=["train_tiny"])
