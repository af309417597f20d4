"""Rollouts of unequal length on a CPU: slots beside padded batches beside transformers' generate.

    python benchmarks/sampling.py --out sampling.json
    python benchmarks/sampling.py --size tiny --repetitions 1 --seconds 0.01      # does it run?

Requests have random prompts and lengths drawn from an exponential distribution, the same for every
side. Before the clock starts both sides write greedily and must write the same tokens, and the
log-probs of sampled tokens must be those of transformers' forward pass. README.md says what is in
the times.
"""

import argparse
import dataclasses
import json
import sys
import tempfile

import jax
import numpy as np
import torch
import transformers
from clock import cores, environment, measure, show, timed

from aa_jax import models, platforms
from aa_jax.sampling import Choice, SlotSampler
from aa_jax.sharding import make_mesh

SLOTS, PADDED = "aa_jax, slots", "aa_jax, padded batches"
SHARED, APART = "aa_jax, prompts shared", "aa_jax, each its own"
GENERATE = "transformers' generate"
NEVER = 2**20  # an end token no vocabulary has: lengths are given


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama and its requests; every field is a flag.

    Attributes:
      vocab: rows of embedding and head.
      dim: width.
      layers: depth.
      heads: attention heads.
      mlp_dim: width of the SwiGLU.
      prompt: tokens of a prompt, half of this to this.
      new_tokens: most tokens of a response.
      mean: mean of the exponential distribution the lengths come from.
      requests: number of requests.
      batch: lanes, and rows of a padded batch.
      shared_prompt: tokens of the prompts that have several samples.
      group: samples of each of them.
    """

    vocab: int = 78
    dim: int = 96
    layers: int = 3
    heads: int = 4
    mlp_dim: int = 256
    prompt: int = 32
    new_tokens: int = 128
    mean: float = 32.0
    requests: int = 96
    batch: int = 32
    shared_prompt: int = 256
    group: int = 8


SIZES = {
    "digits": Size(),
    "small": Size(vocab=8192, dim=256, layers=4, mlp_dim=704,
                  requests=64),
    "tiny": Size(dim=32, layers=1, mlp_dim=64, new_tokens=12, mean=5, requests=6, batch=4,
                 shared_prompt=16, group=2),
}  # fmt: skip


def checkpoint(size: Size, folder: str):
    """(transformers model, our model, our parameters), the same random weights."""
    config = transformers.LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=size.mlp_dim,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.save_pretrained(folder)
    return reference, *models.load(folder)


def prompts_of(count: int, longest: int, vocab: int, seed: int) -> list[np.ndarray]:
    """Random prompts, half of the longest to the longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(longest // 2, 1), longest + 1, count)
    return [rng.integers(1, vocab, n).astype(np.int32) for n in lengths]


def lengths_of(count: int, size: Size, seed: int) -> np.ndarray:
    """Length of each response."""
    drawn = np.random.default_rng(seed).exponential(size.mean, count)
    return np.clip(np.ceil(drawn), 1, size.new_tokens).astype(int)


class Ours:
    """A `SlotSampler` for prompts of one longest length."""

    def __init__(self, model, params, longest: int, **options):
        self.sampler = SlotSampler(model, make_mesh(), eos_ids=[NEVER], **options)
        self.params, self.longest = params, longest

    def batch(self, prompts, rows: int) -> dict:
        """A prompt batch with so many rows."""
        tokens = np.zeros((rows, self.longest), np.int32)
        lengths = np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        steps = np.arange(self.longest, dtype=np.int32)
        real = steps < lengths[:, None]
        intervals = np.zeros((rows, self.longest, 4), np.int32)
        intervals[..., 3] = np.where(real, steps + 1, 0)
        return {
            "tokens": tokens, "positions": np.where(real, steps, 0).astype(np.int32),
            "intervals": intervals, "last_positions": lengths[:, None] - 1,
        }  # fmt: skip

    def __call__(self, prompts, limits: np.ndarray) -> list:
        seeds = np.arange(limits.size, dtype=np.uint32).reshape(limits.shape)
        return self.sampler.run(
            self.params, len(prompts),
            lambda indices, rows: self.batch([prompts[i] for i in indices], rows), seeds, limits,
        )  # fmt: skip


class _OwnLength(transformers.StoppingCriteria):
    def __init__(self, width: int, limits: np.ndarray):
        self.width, self.limits = width, torch.tensor(limits)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.width >= self.limits


def theirs(reference, prompts, limits: np.ndarray, batch: int, sample: bool = True) -> list:
    """transformers' generate, batch after batch; every row stops at its own length."""
    out = []
    for start in range(0, len(prompts), batch):
        some, own = prompts[start : start + batch], limits[start : start + batch]
        width = max(map(len, some))
        ids, mask = np.zeros((2, len(some), width), np.int64)
        for row, prompt in enumerate(some):
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
        with torch.no_grad():
            found = reference.generate(
                input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=sample,
                top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=int(own.max()),
                pad_token_id=0, stopping_criteria=[_OwnLength(width, own)],
            )  # fmt: skip
        out += [row[width : width + n].numpy() for row, n in zip(found, own, strict=True)]
    return out


def check(reference, model, params, size: Size) -> None:
    """Exits with an error unless both sides write and score alike."""
    prompts = prompts_of(6, size.prompt, size.vocab, 3)
    limits = lengths_of(6, size, 4)
    options = dict(slots=2, samples=1, max_new_tokens=size.new_tokens)
    greedy = Ours(model, params, size.prompt, choice=Choice(0.0), **options)
    ours = greedy(prompts, limits[:, None])
    for (sample,), text in zip(ours, theirs(reference, prompts, limits, 3, False), strict=True):
        if not np.array_equal(sample.tokens, text):
            sys.exit("greedy texts differ: nothing is timed")
    gap = 0.0
    for prompt, (sample,) in zip(
        prompts, Ours(model, params, size.prompt, **options)(prompts, limits[:, None]), strict=True
    ):
        whole = torch.tensor(np.concatenate([prompt, sample.tokens]))[None].long()
        with torch.no_grad():
            logps = torch.log_softmax(reference(whole).logits[0].float(), -1)
        logps = logps[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])[:, 0]
        gap = max(gap, float(np.abs(logps.numpy() - sample.logps).max()))
    print(f"greedy texts equal; largest difference of a sampled token's log-prob: {gap:.1e}")
    if not gap < 1e-3:
        sys.exit("log-probs differ: nothing is timed")


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="digits")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=type(field.default))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices the slots lie on")
    parser.add_argument("--out")
    flags = vars(parser.parse_args())
    given = {k: v for k, v in flags.items() if v is not None and k in Size.__annotations__}
    size = dataclasses.replace(SIZES[flags["size"]], **given)
    jax.config.update("jax_num_cpu_devices", flags["devices"])
    platforms.start()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        reference, model, params = checkpoint(size, folder)
    check(reference, model, params, size)

    prompts = prompts_of(size.requests, size.prompt, size.vocab, 0)
    limits = lengths_of(size.requests, size, 1)
    common = dict(samples=1, max_new_tokens=size.new_tokens)
    slots = Ours(model, params, size.prompt, slots=size.batch, **common)
    whole = Ours(model, params, size.prompt, slots=size.batch, prefill_rows=size.batch,
                 narrow=False, **common)  # fmt: skip

    def padded() -> None:
        for at in range(0, len(prompts), size.batch):
            whole(prompts[at : at + size.batch], limits[at : at + size.batch, None])

    def torch_side() -> None:
        theirs(reference, prompts, limits, size.batch)

    threads = {}
    for count in sorted({1, cores()}):
        torch.set_num_threads(count)
        torch_side()
        threads[count] = timed(torch_side)[0]
    best = min(threads, key=threads.get)
    torch.set_num_threads(best)
    sides = {SLOTS: lambda: slots(prompts, limits[:, None]), PADDED: padded, GENERATE: torch_side}
    first = {name: timed(call)[0] for name, call in sides.items()}
    options = dict(repetitions=flags["repetitions"], seconds=flags["seconds"])
    unequal = measure(sides, (PADDED, GENERATE), int(limits.sum()), **options)
    unequal |= {"first_call_seconds": first,
                "threads": {SLOTS: cores(), PADDED: cores(), GENERATE: best}}  # fmt: skip
    mean = limits.mean()
    show(f"{size.requests} requests, {mean:.0f} tokens on average, at most {limits.max()}", unequal)

    groups = max(1, size.requests // size.group)
    longer = prompts_of(groups, size.shared_prompt, size.vocab, 5)
    limits = lengths_of(groups * size.group, size, 6).reshape(groups, size.group)
    lanes = min(size.group, max(1, size.batch // 8))
    shared = Ours(
        model, params, size.shared_prompt, slots=max(1, size.batch // lanes), lanes=lanes,
        samples=size.group, max_new_tokens=size.new_tokens,
    )  # fmt: skip
    apart = Ours(model, params, size.shared_prompt, slots=size.batch, **common)
    repeated = [prompt for prompt in longer for _ in range(size.group)]
    sides = {SHARED: lambda: shared(longer, limits),
             APART: lambda: apart(repeated, limits.reshape(-1, 1))}  # fmt: skip
    first = {name: timed(call)[0] for name, call in sides.items()}
    prefix = measure(sides, (APART,), int(limits.sum()), **options)
    prefix |= {"first_call_seconds": first, "threads": dict.fromkeys(sides, cores())}
    show(
        f"{groups} prompts of up to {size.shared_prompt} tokens, {size.group} samples each", prefix
    )
    if flags["out"]:
        result = {"environment": environment(), "size": dataclasses.asdict(size),
                  "devices": flags["devices"],
                  "unequal": unequal, "prefix": prefix}  # fmt: skip
        with open(flags["out"], "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
