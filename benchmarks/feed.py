"""What does the training loop cost beside its steps, and do images decoded from bytes keep up?

python benchmarks/feed.py --out feed.json
"""

import argparse
import dataclasses
import functools
import io
import json
import os
import tempfile
from pathlib import Path

import clock

from aa_jax import platforms


def build(options: argparse.Namespace, folder: Path) -> tuple:
    """(model, parameters, dataset of photographs as JPEG bytes)."""
    import jax
    import numpy as np
    from PIL import Image

    from aa_jax import models
    from aa_jax.data import digits
    from aa_jax.data.dataset import Dataset
    from aa_jax.data.processor import Processor
    from aa_jax.data.sources import rows_source
    from aa_jax.llf.start import llava_config

    sizes = dict(vision_dim=64, dim=options.dim, layers=3, heads=4, mlp_dim=2 * options.dim)
    model = models.build(llava_config(3, **sizes))
    processor = Processor.from_pretrained(digits.write_processor(folder, max_digits=3, patch=8))
    processor.image_processor = dataclasses.replace(
        processor.image_processor, do_resize=True, size={"height": 24, "width": 24}
    )
    rng = np.random.default_rng(0)

    def photograph() -> bytes:
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        out = io.BytesIO()
        small.resize((options.pixels,) * 2, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
        return out.getvalue()

    rows = [
        {**row, "image": {"bytes": photograph(), "path": None}}
        for row in digits.preference_rows(options.rows, 0, "train", annotator=digits.calibrated())
    ]
    data = Dataset(rows_source(rows), "AA_TI2T", "supervised", processor=processor)
    return model, model.init(jax.random.key(0)), data


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=336, help="edge of a JPEG")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    platforms.start()
    import jax
    import numpy as np

    from aa_jax import objectives
    from aa_jax.data.collate import collate
    from aa_jax.data.loader import Loader
    from aa_jax.sharding import make_mesh, put_batch
    from aa_jax.training.loop import fit
    from aa_jax.training.metrics import MetricWriter, read_metrics
    from aa_jax.training.optim import make_optimizer
    from aa_jax.training.state import init_state
    from aa_jax.training.step import make_step

    class Same:
        """The same batch again and again, from memory."""

        def __init__(self, batch):
            self._batch = batch

        def __next__(self):
            return self._batch

        def get_state(self):
            return {}

        def set_state(self, state):
            pass

    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name)
    model, params, data = build(options, folder / "processor")
    mesh = make_mesh()
    tx, schedule = make_optimizer(1e-4, 10_000)
    step = make_step(objectives.sft(model), tx, mesh=mesh, schedule=schedule)
    form = functools.partial(collate, shapes=data.shapes("supervised"), layout="supervised")

    def loader(threads: int) -> Loader:
        return Loader(data, form, options.batch_rows, epochs=None, threads=threads)

    host = next(iter(loader(0)))
    fresh = lambda: init_state(params, tx, mesh=mesh)  # noqa: E731

    def bare() -> float:
        state, batch = fresh(), put_batch(host, mesh)
        state, _ = step(state, batch)
        jax.block_until_ready(state)

        def run():
            nonlocal state
            for _ in range(options.steps):
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        return clock.timed(run)[0] / options.steps

    runs = 0

    def looped(batches) -> tuple[float, float]:
        """(seconds per step, seconds of them waiting for data) of `fit`, after the first steps."""
        nonlocal runs
        runs += 1
        workdir = folder / f"run{runs}"
        with MetricWriter(workdir, "train", tensorboard=False) as writer:
            fit(
                step=step, state=fresh(), batches=batches, total_steps=options.steps + 4,
                workdir=workdir, writer=writer,
            )  # fmt: skip
        lines = read_metrics(workdir)[2:-1]
        return tuple(
            float(np.mean([line[name] for line in lines]))
            for name in ("step_seconds", "data_seconds")
        )

    def feed(threads: int) -> float:
        batches = iter(loader(threads))
        next(batches)
        run = lambda: [next(batches) for _ in range(options.steps)]  # noqa: E731
        return clock.timed(run)[0] / options.steps

    found: dict[str, list[float]] = {}
    bare()
    for _ in range(options.repetitions):
        for name, seconds in {
            "step alone": bare(),
            "loop, batch in memory": looped(Same(host))[0],
            "feed alone, 0 threads": feed(0),
            "feed alone, 2 threads": feed(2),
        }.items():
            found.setdefault(name, []).append(seconds)
        for threads in (0, 2):
            total, waiting = looped(iter(loader(threads)))
            found.setdefault(f"loop with images, {threads} threads", []).append(total)
            found.setdefault(f"of which waiting, {threads} threads", []).append(waiting)
    temporary.cleanup()

    def ratio(a: str, b: str) -> dict[str, float]:
        return clock.spread([x / y for x, y in zip(found[a], found[b], strict=True)])

    ratios = {
        "loop / step alone": ratio("loop, batch in memory", "step alone"),
        "feed rate / step rate, 0 threads": ratio("step alone", "feed alone, 0 threads"),
        "feed rate / step rate, 2 threads": ratio("step alone", "feed alone, 2 threads"),
        "share of the loop spent waiting, 0 threads": ratio(
            "of which waiting, 0 threads", "loop with images, 0 threads"
        ),
        "share of the loop spent waiting, 2 threads": ratio(
            "of which waiting, 2 threads", "loop with images, 2 threads"
        ),
    }
    facts, load = platforms.environment(), f"{os.getloadavg()[0]:.2f}"
    print(
        f"batches of {options.batch_rows} with JPEGs of {options.pixels} x {options.pixels}, "
        f"{facts['device']}, {facts['CPU cores']} cores, load {load}"
    )
    for name, seconds in found.items():
        each = clock.spread([1e3 * s for s in seconds])
        print(f"  {name:30}{each['median']:>9.1f} ms  ({each['min']:.1f} - {each['max']:.1f})")
    for name, value in ratios.items():
        print(f"  {name}: {value['median']:.2f}  ({value['min']:.2f} - {value['max']:.2f})")
    if options.out:
        report = {
            "options": {k: str(v) for k, v in vars(options).items()}, "seconds_per_step": found,
            "ratio": ratios, "load_average": load, "environment": facts,
        }  # fmt: skip
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
