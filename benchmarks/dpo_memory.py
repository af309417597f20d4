"""Temporary memory of DPO: response tokens against the head in blocks, or all logits.

    python benchmarks/dpo_memory.py                          # both tables, nothing is executed
    python benchmarks/dpo_memory.py --vocab 32000 --skip-step
    python benchmarks/dpo_memory.py --dim 4096 --length 2048 --out result.json

Everything is compiled, nothing runs: the figures are the compiler's own account
(``memory_analysis().temp_size_in_bytes``: what a call needs beside its arguments and results), so
shapes may be larger than the machine. Three contestants, compiled in the same run:

    ours      hidden states of response slots only, logits in blocks, recomputed backward
    all       logits of every token of the same rows, log-softmax, gather
    separate  the same as "all" with chosen and rejected in rows of their own, prompt repeated

The first table is the gradient of the log-prob part alone, with respect to hidden states and head;
the second the gradient of a whole DPO step of a small LLaVA, reference included.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from aa_jax import losses, models, objectives
from aa_jax.losses.preference import pair_up

CONTESTANTS = ("ours", "all", "separate")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a preference batch.

    Attributes:
      pairs: number of pairs.
      length: tokens of a row ``prompt | chosen | rejected``.
      responses: slots of one response.
      dim: width of the hidden states.
      vocab: size of the vocabulary.
    """

    pairs: int = 4
    length: int = 1024
    responses: int = 192
    dim: int = 512
    vocab: int = 32_000

    def separate(self) -> "Shape":
        """The same pairs in rows of their own: the prompt twice, one response each."""
        return dataclasses.replace(self, length=self.length - self.responses)

    def batch(self, sequences: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The abstract batch with `sequences` responses per row."""
        rows = self.pairs * 2 // sequences
        ints, floats = [
            lambda *shape, dtype=dtype: jax.ShapeDtypeStruct((rows, *shape), dtype)
            for dtype in (jnp.int32, jnp.float32)
        ]
        slots = (sequences, self.responses)
        return {
            "tokens": ints(self.length),
            "positions": ints(self.length),
            "intervals": ints(self.length, 4),
            "target_positions": ints(*slots),
            "targets": ints(*slots),
            "loss_mask": floats(*slots),
            "sequence_mask": floats(sequences),
        }


def temporary_bytes(function: Callable, *abstract) -> int:
    """What one call of the compiled function needs beside its arguments and results."""
    compiled = jax.jit(function).lower(*abstract).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def all_logits(hidden, head, target_positions, targets, loss_mask):
    """[B, S, R] log-probs the direct way: logits of every token first."""
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    rows = jnp.arange(targets.shape[0])[:, None, None]
    return log_p[rows, target_positions, targets] * loss_mask


def blocks(hidden, head, target_positions, targets, loss_mask):
    """[B, S, R] log-probs as the library computes them."""
    return losses.response_logps(hidden, head, target_positions, targets, loss_mask).logps


def dpo_from(logps, loss_mask, ref_logps, sequence_mask):
    """The default DPO loss of token log-probs [B, S, R]."""
    sums, lengths = losses.sequence_logps(logps, loss_mask)
    return losses.preference_loss(pair_up(sums, ref_logps, lengths, sequence_mask))[0]


def logprob_bytes(contestant: str, shape: Shape, dtype: str = "float32") -> int:
    """Temporary bytes of the gradient of DPO with respect to hidden states and head."""
    shape = shape.separate() if contestant == "separate" else shape
    batch = shape.batch(1 if contestant == "separate" else 2)
    rows = batch["tokens"].shape[0]
    compute = blocks if contestant == "ours" else all_logits

    def loss(hidden, head, batch):
        names = ("target_positions", "targets", "loss_mask")
        logps = compute(hidden, head, *(batch[name] for name in names))
        mask = batch["sequence_mask"]
        return dpo_from(logps, batch["loss_mask"], jnp.zeros_like(mask), mask)

    hidden = jax.ShapeDtypeStruct((rows, shape.length, shape.dim), dtype)
    head = jax.ShapeDtypeStruct((shape.vocab, shape.dim), dtype)
    return temporary_bytes(jax.grad(loss, (0, 1)), hidden, head, batch)


def small_llava(shape: Shape, layers: int, dtype: str) -> models.Model:
    """LLaVA's architecture with 64 image tokens, at the width and vocabulary of the shape."""
    heads = max(shape.dim // 64, 1)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 5,
        "text_config": {
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.dim,
            "intermediate_size": 4 * shape.dim,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 4096,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
        },
    }
    return models.build(config, dtype=dtype, remat="full")


def step_bytes(contestant: str, shape: Shape, layers: int = 4, dtype: str = "float32") -> int:
    """Temporary bytes of loss and gradient of a DPO step, reference log-probs in the step."""
    shape = shape.separate() if contestant == "separate" else shape
    model = small_llava(shape, layers, dtype)
    batch = shape.batch(1 if contestant == "separate" else 2)
    rows, length = batch["tokens"].shape
    pixels = jax.ShapeDtypeStruct((rows, 1, 3, 112, 112), jnp.float32)
    batch["media"] = {"pixel_values": pixels}
    batch["feature_index"] = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def direct(params, batch, reference):
        names = ("target_positions", "targets", "loss_mask")

        def logps(params):
            hidden = model.hidden_states(params, batch)
            return all_logits(hidden, model.head(params), *(batch[name] for name in names))

        ref = jax.lax.stop_gradient(losses.sequence_logps(logps(reference), batch["loss_mask"])[0])
        return dpo_from(logps(params), batch["loss_mask"], ref, batch["sequence_mask"])

    def ours(params, batch, reference):
        return objectives.dpo(model)(params, batch, reference=reference)[0]

    step = jax.value_and_grad(ours if contestant == "ours" else direct)
    return temporary_bytes(step, model.abstract(), batch, model.abstract())


def table(title: str, measure: Callable, shapes: list[Shape]) -> list[dict]:
    """Measures, prints, and returns one row per shape."""
    print(f"\n{title}\n  {'vocab':>8}" + "".join(f"{name:>12}" for name in CONTESTANTS))
    rows = []
    for shape in shapes:
        figures = {name: measure(name, shape) for name in CONTESTANTS}
        row = {"shape": dataclasses.asdict(shape), "temporary_bytes": figures}
        row["ratio"] = {name: figures[name] / figures["ours"] for name in CONTESTANTS[1:]}
        cells = "".join(f"{figures[name] / 2**20:>8.0f} MiB" for name in CONTESTANTS)
        ratios = ", ".join(f"{name} / ours = {x:.1f}" for name, x in row["ratio"].items())
        print(f"  {shape.vocab:>8}{cells}   {ratios}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Shape):
        if field.name != "vocab":
            parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_000, 128_256])
    parser.add_argument("--layers", type=int, default=4, help="of the LLaVA in the second table")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--skip-step", action="store_true", help="only the log-prob part")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    shapes = [
        Shape(args.pairs, args.length, args.responses, args.dim, vocab) for vocab in args.vocab
    ]
    if args.length <= 2 * args.responses:
        parser.error("--length must hold the prompt and both responses")
    print(f"{jax.default_backend()}, jax {jax.__version__}, {args.dtype}; {shapes[0]}")
    result = {"backend": jax.default_backend(), "jax": jax.__version__, "dtype": args.dtype}
    result["logprob"] = table(
        "gradient of the log-prob part: temporary memory",
        lambda name, shape: logprob_bytes(name, shape, args.dtype),
        shapes,
    )
    if not args.skip_step:
        result["step"] = table(
            f"gradient of a DPO step, LLaVA of {args.layers} layers: temporary memory",
            lambda name, shape: step_bytes(name, shape, args.layers, args.dtype),
            shapes,
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
