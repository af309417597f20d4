"""Writes samples as one process of several would, or as one alone; see test_processes.py."""

import argparse
import importlib.util
from pathlib import Path

CASES = {
    "refilled": dict(slots=4, lanes=2, samples=3),
    "narrowed": dict(slots=16, samples=2),
    "stopped": dict(slots=2, samples=3, stop=True),
}
COUNT = 10


def write(folder):
    """Every case's tokens, -1 behind the end, and log-probs, in a file per process."""
    import jax
    import numpy as np

    from aa_jax import hosts, models
    from aa_jax.sampling import SlotSampler, Stop
    from aa_jax.sharding import make_mesh

    spec = importlib.util.spec_from_file_location(
        "sampler_world", Path(__file__).with_name("test_generate.py")
    )
    world = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(world)
    model = models.build(world.CONFIG)
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
    params["language_model"]["head"]["weight"] = 30 * params["language_model"]["head"]["weight"]
    everyone = world.prompts(COUNT)

    def batch(indices, rows):
        where = np.concatenate([indices, np.zeros(rows - len(indices), int)])
        return jax.tree.map(lambda x: x[where], everyone)

    out = {"devices": np.array([hosts.count(), jax.device_count(), jax.local_device_count()])}
    for name, options in CASES.items():
        options = dict(options)
        stop = None
        if options.pop("stop", False):
            stop = Stop(("9", "3 1"), lambda ids: " ".join(map(str, ids)), every=3)
        sampler = SlotSampler(
            model, make_mesh(), max_new_tokens=world.NEW, eos_ids=[world.EOS, 7, 11], stop=stop,
            **options,
        )  # fmt: skip
        seeds = np.arange(COUNT * options["samples"], dtype=np.uint32).reshape(COUNT, -1)
        found = sum(sampler.run(params, COUNT, batch, seeds), [])
        tokens = np.full((len(found), world.NEW), -1)
        logps = np.zeros((len(found), world.NEW), np.float32)
        for row, sample in enumerate(found):
            tokens[row, : len(sample.tokens)] = sample.tokens
            logps[row, : len(sample.logps)] = sample.logps
        out |= {f"{name}/tokens": tokens, f"{name}/logps": logps,
                f"{name}/finished": np.array([s.finished for s in found])}  # fmt: skip
    np.savez(Path(folder) / f"{hosts.index()}.npz", **out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir")
    arguments = parser.parse_args()
    from aa_jax import platforms

    platforms.start()
    write(arguments.workdir)
