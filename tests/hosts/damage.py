"""A program: saves three checkpoints, damages what one process has to read of the last, restores.

``python damage.py FOLDER truncated | bit``
"""

import sys
from pathlib import Path


def main():
    """Writes what was found as ``FOLDER/found<index>``."""
    from aa_jax import hosts, platforms

    platforms.start()
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from aa_jax.sharding import make_mesh
    from aa_jax.training.checkpoint import Checkpointer
    from aa_jax.training.state import as_abstract

    folder, how = Path(sys.argv[1]), sys.argv[2]
    mesh = make_mesh(data=1, fsdp=-1)

    def make(value):
        w = np.random.default_rng(value).normal(size=(8, 6400)).astype(np.float32)
        place = NamedSharding(mesh, P("fsdp"))
        return {"w": jax.make_array_from_callback(w.shape, place, lambda index: w[index])}

    with Checkpointer(folder) as saver:
        for step in (1, 2, 3):
            saver.save(step, make(step), {"position": step})
    hosts.barrier("saved")
    if hosts.index() == 0:
        for file in (folder / "3/state/ocdbt.process_1/d").iterdir():
            data, middle = file.read_bytes(), file.stat().st_size // 2
            rest = bytes([data[middle] ^ 4]) + data[middle + 1 :] if how == "bit" else b""
            file.write_bytes(data[:middle] + rest)
    hosts.barrier("damaged")
    with Checkpointer(folder) as saver:
        state, data, _ = saver.restore(as_abstract(make(0)))
    same = np.array_equal(hosts.to_host(state["w"]), hosts.to_host(make(2)["w"]))
    (folder / f"found{hosts.index()}").write_text(f"{data} {same}")


if __name__ == "__main__":
    from aa_jax import config

    config.run_main(main, argv=["damage"])
