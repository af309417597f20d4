"""Prefill and decoding of one model on a CPU, beside transformers on torch.

    python benchmarks/decoding.py --out decoding.json           # size "digits"; or --size small
    python benchmarks/decoding.py --size tiny --repetitions 1 --seconds 0.01      # does it run?

Both sides have the same random weights and prompts. Before the clock starts their logits after the
prompt and their greedy tokens must be the same. README.md says what is in the times.
"""

import argparse
import dataclasses
import json
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from clock import cores, environment, measure, show, timed
from jax.sharding import NamedSharding, PartitionSpec

from aa_jax import models, platforms
from aa_jax.models import caches
from aa_jax.sharding import make_mesh, put_batch

OURS, BARE, GENERATE = "aa_jax", "transformers, a bare loop", "transformers' generate"


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama and its requests; every field is a flag.

    Attributes:
      vocab: rows of embedding and head.
      dim: width.
      layers: depth.
      heads: attention heads.
      kv_heads: key-value heads.
      mlp_dim: width of the SwiGLU.
      rows: prompts at a time.
      prompt: tokens of a prompt.
      new_tokens: tokens written behind each.
    """

    vocab: int = 512
    dim: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    mlp_dim: int = 256
    rows: int = 16
    prompt: int = 64
    new_tokens: int = 64


SIZES = {
    "digits": Size(),
    "small": Size(vocab=8192, dim=512, layers=6, heads=8, kv_heads=2, mlp_dim=1408, rows=8,
                  prompt=256),
    # One request to a model of the size the tests and the digits world train.
    "one": Size(vocab=78, dim=64, layers=2, kv_heads=2, mlp_dim=128, rows=1, prompt=32),
    "tiny": Size(vocab=64, dim=32, layers=1, mlp_dim=64, rows=2, prompt=8, new_tokens=8),
}  # fmt: skip


def checkpoint(size: Size, folder: str):
    """(transformers model, our model, our parameters), the same random weights."""
    config = transformers.LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=size.mlp_dim,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    return reference, *models.load(folder)


class Ours:
    """Prefill, and decoding from a cache that is kept."""

    def __init__(self, model, params, prompts: np.ndarray, size: Size):
        rows, length = prompts.shape
        steps = np.broadcast_to(np.arange(length, dtype=np.int32), prompts.shape)
        intervals = np.zeros((rows, length, 4), np.int32)
        intervals[..., 3] = steps + 1
        self.batch = {
            "tokens": prompts, "positions": steps, "intervals": intervals,
            "last_positions": np.full((rows, 1), length - 1, np.int32),
        }  # fmt: skip
        mesh = make_mesh()  # rows over the devices, as in the samplers
        self.batch = put_batch(self.batch, mesh)
        self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

        @jax.jit
        def prefill(params, batch):
            hidden, cache = model.prefill(params, batch, length + size.new_tokens)
            return hidden[:, -1] @ model.head(params).T, cache

        @jax.jit
        def decode(params, logits, cache):
            # As in the samplers.
            head, decode_one = model.head(params), model.decoder(params)
            cache = caches.for_loop(cache)

            def step(carry, _):
                logits, cache = carry
                token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
                hidden, cache = decode_one(token, cache)
                return (hidden @ head.T, cache), token

            return jax.lax.scan(step, (logits, cache), length=size.new_tokens)[1].T

        self._prefill, self._decode = prefill, decode
        self.state = self.prefill()

    def prefill(self):
        """Logits after the prompts, and the cache."""
        return jax.block_until_ready(self._prefill(self.params, self.batch))

    def decode(self) -> np.ndarray:
        """Greedy tokens behind the prompts."""
        return np.asarray(self._decode(self.params, *self.state))

    def generate(self) -> np.ndarray:
        """Both."""
        return np.asarray(self._decode(self.params, *self._prefill(self.params, self.batch)))


class Theirs:
    """The same with transformers."""

    def __init__(self, reference, prompts: np.ndarray, size: Size):
        self.model, self.size = reference, size
        self.ids = torch.tensor(prompts).long()
        reference.generation_config.eos_token_id = None

    @torch.inference_mode()
    def prefill(self):
        """Logits after the prompts, and the cache."""
        out = self.model(self.ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    def decode(self) -> np.ndarray:
        """Greedy tokens by the least a loop needs; afterwards the cache is as it was."""
        logits, cache = self.state
        tokens = []
        with torch.inference_mode():
            for _ in range(self.size.new_tokens):
                token = logits.argmax(-1, keepdim=True)
                tokens.append(token)
                out = self.model(token, past_key_values=cache, use_cache=True)
                logits = out.logits[:, -1]
            cache.crop(-self.size.new_tokens)
        return torch.cat(tokens, 1).numpy()

    @torch.inference_mode()
    def generate(self) -> np.ndarray:
        """Prefill and greedy tokens by transformers' own sampler."""
        mask = torch.ones_like(self.ids)
        out = self.model.generate(
            input_ids=self.ids, attention_mask=mask, do_sample=False, pad_token_id=0,
            max_new_tokens=self.size.new_tokens,
        )  # fmt: skip
        return out[:, self.ids.shape[1] :].numpy()

    def whole(self) -> np.ndarray:
        """Prefill and the bare loop."""
        self.state = self.prefill()
        return self.decode()


def check(ours: Ours, theirs: Theirs) -> None:
    """Exits with an error unless both sides score and write alike."""
    gap = float(np.abs(np.asarray(ours.state[0]) - theirs.state[0].numpy()).max())
    scale = float(theirs.state[0].abs().max())
    texts = [ours.decode(), ours.generate(), theirs.decode(), theirs.generate(), theirs.whole()]
    print(f"largest difference of a logit after the prompt: {gap:.1e} (logits up to {scale:.1f})")
    if not gap < 1e-4 * max(scale, 1.0):
        sys.exit("logits differ: nothing is timed")
    if not all(np.array_equal(text, texts[0]) for text in texts):
        sys.exit("greedy tokens differ: nothing is timed")
    print(f"{texts[0].size} greedy tokens equal, with ours, a bare loop and generate")


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="digits")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=field.type)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices our rows lie on")
    parser.add_argument("--out")
    flags = vars(parser.parse_args())
    given = {k: v for k, v in flags.items() if v is not None and k in Size.__annotations__}
    size = dataclasses.replace(SIZES[flags["size"]], **given)
    jax.config.update("jax_num_cpu_devices", flags["devices"])
    platforms.start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prompts = np.random.default_rng(0).integers(1, size.vocab, (size.rows, size.prompt))
    prompts = prompts.astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        reference, model, params = checkpoint(size, folder)
    compiled, ours = timed(lambda: Ours(model, params, prompts, size))
    theirs = Theirs(reference, prompts, size)
    theirs.state = theirs.prefill()
    check(ours, theirs)

    asked = {
        "prefill": (
            size.rows * size.prompt, {OURS: ours.prefill, BARE: theirs.prefill}, (BARE,),
        ),
        "decode": (
            size.rows * size.new_tokens, {OURS: ours.decode, BARE: theirs.decode}, (BARE,),
        ),
        "generate": (
            size.rows * size.new_tokens,
            {OURS: ours.generate, BARE: theirs.whole, GENERATE: theirs.generate},
            (BARE, GENERATE),
        ),
    }  # fmt: skip
    result = {"environment": environment(), "size": dataclasses.asdict(size)}
    for title, (tokens, sides, baselines) in asked.items():
        best = {}
        for name in baselines:  # torch on all cores or on one, whichever is faster
            spent = {}
            for count in sorted({1, cores()}):
                torch.set_num_threads(count)
                sides[name]()
                spent[count] = min(timed(sides[name])[0] for _ in range(3))
            best[name] = min(spent, key=spent.get)
        torch.set_num_threads(best[baselines[0]])
        first = {name: timed(call)[0] for name, call in sides.items()}
        found = measure(
            sides, baselines, tokens,
            repetitions=flags["repetitions"], seconds=flags["seconds"],
        )  # fmt: skip
        threads = {OURS: cores(), **dict.fromkeys(baselines, best[baselines[0]])}
        result[title] = found | {"first_call_seconds": first, "threads": threads}
        show(f"{title}: {size.rows} rows, prompts of {size.prompt}, {size.new_tokens} behind each",
             result[title])  # fmt: skip
    print(f"\ncompiling and the first prefill took {compiled:.1f} s")
    if flags["out"]:
        with open(flags["out"], "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
