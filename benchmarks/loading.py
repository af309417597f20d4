"""How fast is a checkpoint imported, beside reading the same files with safetensors?

python benchmarks/loading.py --megabytes 512 --out loading.json
python benchmarks/loading.py --megabytes 8 --repetitions 1               # does it run?

A random Llama is written by safetensors' own writer, whole and in shards. Every tensor that is
imported is compared with the file's before anything is timed.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import clock

from aa_jax import platforms

DIM, MLP, VOCAB = 1024, 2816, 8192
OURS, PLAIN, PEER = "models.load", "safetensors", "transformers' from_pretrained"


def write(folder: Path, layers: int, dtype: str, shards: int) -> int:
    """A Llama of random weights; its size in bytes."""
    import safetensors.torch
    import torch

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": DIM, "intermediate_size": MLP, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "dtype": dtype,
        "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "lm_head.weight": (VOCAB, DIM),
              "model.norm.weight": (DIM,)}  # fmt: skip
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{x}_proj.weight": (DIM, DIM) for x in "qkvo"}
        shapes |= {at + f"mlp.{x}_proj.weight": (MLP, DIM) for x in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (DIM, MLP)}
        shapes |= {at + f"{x}_layernorm.weight": (DIM,) for x in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for name, shape in shapes.items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    names = list(made)
    if shards == 1:
        safetensors.torch.save_file(made, folder / "model.safetensors", {"format": "pt"})
    else:
        index = {}
        for number in range(shards):
            file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            some = {name: made[name] for name in names[number::shards]}
            safetensors.torch.save_file(some, folder / file, {"format": "pt"})
            index |= dict.fromkeys(some, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return sum(x.numel() * x.element_size() for x in made.values())


def evict(folder: Path) -> None:
    """Asks the system to forget the files' pages, so that reading them reads the disk."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def plain(folder: Path) -> dict:
    """Every tensor read into memory of its own by safetensors."""
    from safetensors import safe_open

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            # What safetensors hands to torch is mapped; a clone reads it.
            tensors |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return tensors


def check(folder: Path, param_dtype: str) -> None:
    """Every tensor imported is the file's, as our exporter writes it back, bit for bit."""
    import numpy as np

    from aa_jax import models

    model, params = models.load(folder, param_dtype=param_dtype)
    again = folder.with_name(folder.name + "-again")
    models.save(again, model, params)
    stored, back = plain(folder), plain(again)
    same = stored.keys() == back.keys() and all(
        np.array_equal(x.float().numpy(), back[name].float().numpy()) for name, x in stored.items()
    )
    if not same:
        raise SystemExit(f"{folder.name}: what was imported is not what is stored")


def sides_of(folder: Path, param_dtype: str) -> dict:
    """What is timed."""
    import jax
    import torch
    import transformers

    from aa_jax import models

    def ours():
        return jax.block_until_ready(models.load(folder, param_dtype=param_dtype)[1])

    def peer():
        kind = getattr(torch, param_dtype)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=kind)
        return [p.data.clone() for p in model.parameters()]  # what is still mapped is read

    return {OURS: ours, PLAIN: lambda: plain(folder), PEER: peer}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512, help="size of a bfloat16 checkpoint")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="forget the files' pages before each")
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: temporary")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    platforms.start()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    each = 2 * (4 * DIM * DIM + 3 * DIM * MLP)
    layers = max(1, (options.megabytes * 2**20 - 4 * VOCAB * DIM) // each)
    cases = {
        "bfloat16, one file": ("bfloat16", "bfloat16", 1),
        f"bfloat16, {options.shards} files": ("bfloat16", "bfloat16", options.shards),
        "bfloat16 to float32, one file": ("bfloat16", "float32", 1),
        "float32, one file": ("float32", "float32", 1),
    }
    results = {}
    facts = platforms.environment() | {"load average": f"{os.getloadavg()[0]:.2f}"}
    print(f"{facts['device']}, load {facts['load average']}, "
          f"{'from the disk' if options.cold else 'from the page cache'}")  # fmt: skip
    for title, (dtype, param_dtype, shards) in cases.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder = Path(temporary) / "checkpoint"
            size = write(folder, layers, dtype, shards)
            check(folder, param_dtype)
            sides = sides_of(folder, param_dtype)
            spent = {name: [] for name in sides}
            for number in range(options.repetitions + 1):
                for name, call in sides.items():
                    if options.cold:
                        evict(folder)
                    seconds, _ = clock.timed(call)
                    if number:  # the first round imports and compiles
                        spent[name].append(seconds)
        rates = {name: clock.spread([size / s / 1e9 for s in x]) for name, x in spent.items()}
        ratios = {
            f"{OURS} / {base}": clock.spread(
                [b / a for a, b in zip(spent[OURS], spent[base], strict=True)]
            )
            for base in (PLAIN, PEER)
        }
        print(f"\n{title}: {size / 1e9:.2f} GB, {layers} layers")
        for name, rate in rates.items():
            print(
                f"  {name:32}{rate['median']:>7.2f} GB/s  ({rate['min']:.2f} - {rate['max']:.2f})"
            )
        for name, ratio in ratios.items():
            print(f"  {name}: {ratio['median']:.2f}x  ({ratio['min']:.2f} - {ratio['max']:.2f})")
        results[title] = {"bytes": size, "seconds": spent, "gigabytes_per_second": rates,
                          "ratio": ratios}  # fmt: skip
    if options.out:
        found = {"environment": facts, "cold": options.cold, **results}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
