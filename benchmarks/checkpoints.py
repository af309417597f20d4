"""How fast are checkpoints, beside writing and reading the same bytes without one?

python benchmarks/checkpoints.py --megabytes 1024 --out checkpoints.json
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import clock

from aa_jax import platforms


def evict(folder: Path) -> None:
    """Asks the system to forget the files' pages, so that reading them reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def raw_write(folder: Path, arrays: dict) -> None:
    """One file per array, each forced to the disk."""
    folder.mkdir(parents=True)
    for name, x in arrays.items():
        with open(folder / name, "wb") as file:
            file.write(memoryview(x).cast("B"))
            file.flush()
            os.fsync(file.fileno())


def raw_read(folder: Path, arrays: dict) -> None:
    """Every file into fresh memory."""
    import numpy as np

    for name, x in arrays.items():
        with open(folder / name, "rb") as file:
            file.readinto(memoryview(np.empty_like(x)).cast("B"))


def rounds(folder: Path, arrays: dict, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each side, in turn."""
    import jax

    from aa_jax.training.checkpoint import Checkpointer
    from aa_jax.training.state import as_abstract

    state = {name: jax.device_put(x) for name, x in arrays.items()}
    jax.block_until_ready(state)
    wanted = as_abstract(state)
    spent: dict[str, list[float]] = {}

    def note(name: str, call) -> object:
        seconds, value = clock.timed(call)
        spent.setdefault(name, []).append(seconds)
        return value

    with Checkpointer(folder / "warm") as saver:  # compiles the checksums
        saver.save(0, state)
    shutil.rmtree(folder / "warm")
    for number in range(repetitions):
        plain, kept = folder / f"raw{number}", folder / f"checkpoint{number}"
        note("raw write", lambda plain=plain: raw_write(plain, arrays))
        with Checkpointer(kept) as saver:

            def save(saver=saver):
                note("save: until training goes on", lambda: saver.save(1, state))
                saver.wait()

            note("save: until complete", save)
        evict(folder)
        note("raw read", lambda plain=plain: raw_read(plain, arrays))
        with Checkpointer(kept) as saver:
            note("restore, verified", lambda saver=saver: jax.block_until_ready(
                saver.restore(wanted)[0]))  # fmt: skip
        for path in (plain, kept):
            shutil.rmtree(path)
    return spent


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the state")
    parser.add_argument("--arrays", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: temporary")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    platforms.start()
    import numpy as np

    rng = np.random.default_rng(0)
    count = options.megabytes * 2**20 // 4 // options.arrays
    # Normal numbers, as parameters are: they hardly compress.
    arrays = {f"x{i}": rng.standard_normal(count, np.float32) for i in range(options.arrays)}
    size = sum(x.nbytes for x in arrays.values())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        spent = rounds(Path(folder), arrays, options.repetitions)
    rates = {
        name: clock.spread([size / s / 1e9 for s in seconds]) for name, seconds in spent.items()
    }
    pairs = [
        ("save: until training goes on", "raw write"), ("save: until complete", "raw write"),
        ("restore, verified", "raw read"),
    ]  # fmt: skip
    ratios = {
        f"{side} / {base}": clock.spread(
            [b / a for a, b in zip(spent[side], spent[base], strict=True)]
        )
        for side, base in pairs
    }
    facts = platforms.environment()
    load = f"{os.getloadavg()[0]:.2f}"
    print(f"{size / 1e9:.2f} GB in {options.arrays} arrays, {facts['device']}, load {load}")
    for name, rate in rates.items():
        seconds = statistics.median(spent[name])
        print(f"  {name:30}{rate['median']:>7.2f} GB/s{seconds:>8.2f} s")
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio['median']:.2f}x  ({ratio['min']:.2f} - {ratio['max']:.2f})")
    if options.out:
        found = {
            "bytes": size, "arrays": options.arrays, "seconds": spent,
            "gigabytes_per_second": rates, "ratio": ratios, "load_average": load,
            "environment": facts,
        }  # fmt: skip
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
