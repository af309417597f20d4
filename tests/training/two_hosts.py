"""A program: one of two hosts with two devices each, training tiny.py's model through `fit`.

``python two_hosts.py RANK PORT WORKDIR TOTAL_STEPS SECONDS_PER_STEP``
"""

import os
import sys
import time


def main(rank, port, workdir, total, seconds):
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(rank))

    import tiny

    from aa_jax.sharding import make_mesh
    from aa_jax.training.loop import fit
    from aa_jax.training.metrics import MetricWriter

    class OwnRows:
        """This host's half of every batch; its state says whose it is."""

        def __init__(self):
            self.position = 0

        def __next__(self):
            time.sleep(float(seconds))
            batch = tiny.make_batch(self.position, n=16)
            self.position += 1
            first = 8 * int(rank)
            return {name: x[first : first + 8] for name, x in batch.items()}

        def get_state(self):
            return {"position": self.position, "rank": rank}

        def set_state(self, state):
            assert state["rank"] == rank
            self.position = state["position"]

    step, state = tiny.setup(mesh=make_mesh(data=2, fsdp=2), accumulation=2)
    with MetricWriter(workdir, "sft", tensorboard=False) as writer:
        fit(
            step=step,
            state=state,
            batches=OwnRows(),
            total_steps=int(total),
            workdir=workdir,
            stage="sft",
            checkpoint_every=100,
            writer=writer,
        )


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(*sys.argv[1:])
