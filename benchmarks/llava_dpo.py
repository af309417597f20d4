"""DPO steps and sampling of a small LLaVA: aa_jax beside transformers + TRL, in one run on a CPU.

    python benchmarks/llava_dpo.py --out llava_dpo.json          # both sizes
    python benchmarks/llava_dpo.py --size small --dim 384 --pairs 16
    python benchmarks/llava_dpo.py --size long                   # what sharing and caching spare

Both sides load the same float32 weights and get the same pairs; they are compared before the clock
starts, and the program ends with an error if they do not compute the same. README.md says what the
units are, what is and is not in the times, and what is unequal between the sides.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import llava_torch as other
import numpy as np
import torch
import transformers
from clock import cores, environment, measure, show, timed

from aa_jax import models, objectives, platforms
from aa_jax.data import digits
from aa_jax.data.collate import collate, plan_shapes
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import Encoded
from aa_jax.llf.start import llava_config
from aa_jax.sampling import Samples, generate, make_sampler
from aa_jax.sharding import make_mesh, shardings
from aa_jax.training.flops import matmul_flops
from aa_jax.training.optim import make_optimizer
from aa_jax.training.state import init_state
from aa_jax.training.step import make_step

BETA = 0.1
ADAMW = {"lr": 3e-6, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0}
FROZEN = ("vision_tower/*",)
CHECKED_STEPS, CHECKED_REQUESTS = 3, 8
PAD, START, END, IMAGE = 0, 1, 2, 4  # ids of the digits vocabulary, kept by every size

SHARED = "aa_jax"
ROWS = "aa_jax, prompt not shared"
NAIVE = "aa_jax, naive pairs"
TRL = "TRL's DPO loss"
BARE = "torch, bare DPO loss"
GENERATE = "transformers' generate"


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and its data; every field is a flag. The defaults are the digits world's.

    Attributes:
      vocab: rows of the embedding and of the head.
      dim: width of the decoder.
      layers: its depth.
      heads: its attention heads.
      mlp_dim: width of its SwiGLU.
      vision_dim: width of the CLIP tower.
      vision_layers: its depth.
      side: patches (8 x 8 pixels) per image side; side**2 image tokens in a prompt.
      pairs: preference pairs per step.
      prompt: text tokens of a random prompt, a third of this to this; 0: the digits world's.
      response: tokens of a random response, a third of this to this.
      requests: prompts sampled at once.
      new_tokens: tokens sampled per request.
    """

    vocab: int = 78
    dim: int = 96
    layers: int = 3
    heads: int = 4
    mlp_dim: int = 256
    vision_dim: int = 64
    vision_layers: int = 3
    side: int = 3
    pairs: int = 64
    prompt: int = 0
    response: int = 0
    requests: int = 256
    new_tokens: int = 28


SIZES = {
    # The model, pairs per step, requests and answer length of configs/ti2t/digits_llf.py.
    "digits": Size(),
    # Wide and deep enough that arithmetic, not the overhead per operation, takes the time.
    "small": Size(
        vocab=32_000, dim=256, layers=4, mlp_dim=688, side=8, pairs=8, prompt=48, response=96,
        requests=16, new_tokens=64,
    ),
    # One 576-token image (24 x 24 patches, as in LLaVA-1.5) and answers of up to 128 tokens.
    "long": Size(
        vocab=32_000, dim=256, layers=4, mlp_dim=688, side=24, pairs=4, prompt=48, response=128,
        requests=4, new_tokens=32,
    ),
    "tiny": Size(
        vocab=101, dim=16, layers=1, heads=2, mlp_dim=24, vision_dim=16, vision_layers=2, side=2,
        pairs=2, prompt=6, response=5, requests=2, new_tokens=3,
    ),
}  # fmt: skip


class Unequal(Exception):
    """The sides do not compute the same: timing them would mean nothing."""


def model_config(size: Size) -> dict:
    """config.json of the model; wider initial weights than usual make its answers differ."""
    config = llava_config(
        size.side, vision_dim=size.vision_dim, vision_layers=size.vision_layers, dim=size.dim,
        layers=size.layers, heads=size.heads, kv_heads=size.heads, mlp_dim=size.mlp_dim,
    )  # fmt: skip
    config["text_config"] |= {"vocab_size": size.vocab, "initializer_range": 0.08}
    return config


def digits_pairs(size: Size, folder: Path, count: int, seed: int) -> list[Encoded]:
    """Real strips of digits with two different answers each."""
    digits.write_processor(folder, max_digits=size.side)
    rng = np.random.default_rng(seed)
    examples = []
    for example in digits.evaluation_prompts(count, seed, "train", max_digits=size.side):
        first = second = digits.sample_response(example.task, rng).text
        while second == first:
            second = digits.sample_response(example.task, rng).text
        examples.append(example.to_data_example((first, second)))
    return list(EncodedExamples(examples, Processor.from_pretrained(folder), strict=True))


def random_pairs(size: Size, count: int, seed: int) -> list[Encoded]:
    """Random tokens and pixels of unequal lengths: ``<s> image text | response </s>``."""
    rng = np.random.default_rng(seed)
    pixels = (8 * size.side, 8 * size.side)

    def words(most: int, end: tuple = ()) -> np.ndarray:
        length = rng.integers(math.ceil(most / 3), most + 1) - len(end)
        return np.append(rng.integers(IMAGE + 1, size.vocab, length), end).astype(np.int32)

    def pair() -> Encoded:
        image = np.full(size.side**2, IMAGE)
        prompt = np.concatenate([[START], image, words(size.prompt)]).astype(np.int32)
        seen = prompt == IMAGE
        return Encoded(
            prompt=prompt,
            responses=(words(size.response, (END,)), words(size.response, (END,))),
            ended=(True, True),
            feature_index=np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32),
            trained=np.zeros(len(prompt), bool),
            images=1,
            media={"pixel_values": rng.normal(size=(1, 3, *pixels)).astype(np.float32)},
            image_size=pixels,
        )

    return [pair() for _ in range(count)]


def dpo_step(
    model, params, reference, items, shapes, layout, *, cached: bool = True
) -> Callable[[], dict[str, float]]:
    """One update as `aa_jax.recipes.train` puts it together, and its figures.

    With ``cached`` the reference's log-probs are in the batch, computed once; else the step
    computes them from the reference's parameters. ``update.temporary`` is the compiler's account
    of the bytes a step needs beside its arguments and results, ``update.flops`` the arithmetic of
    its matrix products.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = collate(items, shapes, layout, pad_id=PAD)
    roles = {} if cached else {"reference": reference}
    if cached:
        compute = jax.jit(objectives.compute_ref_logps(model))
        batch["ref_logps"] = np.asarray(compute(reference, batch))
    tx, _ = make_optimizer(total_steps=1, schedule="constant", warmup_steps=0, **ADAMW)
    objective = objectives.dpo(model, beta=BETA, entropy=True)  # TRL's entropy is not optional
    step = make_step(objective, tx, mesh=mesh, frozen=FROZEN)
    places = shardings(model.axes(), model.abstract(), mesh)
    state = init_state(params, tx, mesh=mesh, shardings=places, frozen=FROZEN)

    def update() -> dict[str, float]:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, **roles))
        names = ("loss", "grad_norm", "chosen_logps", "rejected_logps", "entropy")
        return {name: float(metrics[name].mean) for name in names}

    compiled = step.lower(state, batch, **roles).compile()
    update.temporary = int(compiled.memory_analysis().temp_size_in_bytes)
    update.flops = matmul_flops(step.trace(state, batch, **roles).jaxpr)
    return update


def sampling(model, params, items, shapes, new_tokens: int) -> Callable[[], Samples]:
    """One batch of requests through the compiled sampler: right padding, static cache."""
    never = model.config.text.vocab_size  # an id that cannot be drawn: every request runs on
    sampler = make_sampler(model, max_new_tokens=new_tokens, eos_ids=[never], pad_id=PAD)
    batch = collate(items, shapes, "prompt", pad_id=PAD)
    return lambda: generate(sampler, params, batch, np.arange(len(items)))


def gap(ours, theirs, floor: float = 0.0) -> float:
    """Largest difference relative to the expected values (at least `floor`); inf for nan."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    worst = np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), floor))
    return float(worst) if np.isfinite(worst) else math.inf


def check_steps(figures: dict[str, list[dict]], tolerance: float) -> dict[str, float]:
    """Every side against TRL's, step by step; returns the largest gap of each figure.

    Raises:
      Unequal: one is larger than the tolerance.
    """
    gaps: dict[str, float] = defaultdict(float)
    for side in figures.keys() - {TRL}:
        for number, (ours, theirs) in enumerate(zip(figures[side], figures[TRL], strict=True)):
            for name, value in ours.items():
                found = gap(value, theirs[name])
                gaps[name] = max(gaps[name], found)
                if found > tolerance:
                    raise Unequal(
                        f"{name} of step {number + 1} is {value!r} for {side!r} and "
                        f"{theirs[name]!r} for {TRL!r}: a relative difference of {found:.1e}."
                    )
    return dict(gaps)


def check_samples(samples: Samples, model, items: list[Encoded], tolerance: float) -> float:
    """The sampler's log-probs of its tokens against transformers', for the first requests.

    Raises:
      Unequal: a log-prob differs, or a request stopped early.
    """
    if not np.all(samples.mask == 1):
        raise Unequal("a request ended before its last token.")
    # transformers would take a sampled image token for the place of a further image
    rows = [row for row in range(len(items)) if IMAGE not in samples.tokens[row]]
    if not rows:
        raise Unequal("every request sampled an image token: nothing is left to compare.")
    worst = max(
        gap(samples.logps[r], other.sampled_logps(model, items[r], samples.tokens[r]), floor=1.0)
        for r in rows[:CHECKED_REQUESTS]
    )
    if worst > tolerance:
        raise Unequal(f"log-probs of sampled tokens differ by {worst:.1e}.")
    return worst


def compare(sides: dict, baselines: tuple, tokens: int, first: dict, options) -> dict:
    """`measure` with the baselines on their best number of threads."""
    threads = dict.fromkeys(sides, cores())
    for name in set(baselines) & {TRL, BARE, GENERATE}:
        threads[name], sides[name] = other.with_best_threads(sides[name], cores())
    times = measure(
        sides, baselines, tokens, repetitions=options.repetitions, seconds=options.seconds
    )
    return {"threads": threads, "first_call_seconds": first, **times}


def run(name: str, size: Size, options: argparse.Namespace, folder: Path) -> dict:
    """Builds, compares and times one size.

    Raises:
      Unequal: the sides do not compute the same.
    """
    count = max(options.pool, size.pairs, size.requests)
    if size.prompt:
        pool = random_pairs(size, count, options.seed)
    else:
        pool = digits_pairs(size, folder / "processor", count, options.seed)
    items, requests = pool[: size.pairs], pool[: size.requests]
    model = models.build(model_config(size))
    params, reference = (model.init(jax.random.key(options.seed + i)) for i in (0, 1))
    models.save(folder / "policy", model, params)
    models.save(folder / "reference", model, reference)
    print(f"\n=== {name}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters")

    inputs = other.pairs(items, PAD)
    inputs |= other.ref_logps(folder / "reference", inputs)
    ours = functools.partial(dpo_step, model, params, reference, items)
    theirs = functools.partial(other.dpo_step, folder / "policy", inputs, beta=BETA, **ADAMW)
    # Our shapes are static: as in training they hold the longest example of the whole pool.
    steps = {
        SHARED: ours(plan_shapes(pool, "preference"), "preference"),
        TRL: theirs(other.trl_loss),
        BARE: theirs(other.bare_loss),
        ROWS: ours(plan_shapes(pool, "preference_rows"), "preference_rows"),
        NAIVE: ours(plan_shapes(pool, "preference_rows"), "preference_rows", cached=False),
    }
    temporary = {side: step.temporary for side, step in steps.items() if side not in (TRL, BARE)}
    flops = {side: steps[side].flops for side in temporary}
    first, figures = {}, {}
    for side, step in steps.items():
        first[side], figure = timed(step)
        figures[side] = [figure, *(step() for _ in range(CHECKED_STEPS - 1))]
    gaps = check_steps(figures, options.tolerance)
    losses = [figure["loss"] for figure in figures[TRL]]
    print(f"the sides agree over {CHECKED_STEPS} updates: loss {losses[0]:.6f} to {losses[-1]:.6f}")
    print("  relative differences:", ", ".join(f"{key} {gaps[key]:.1e}" for key in sorted(gaps)))
    tokens = sum(len(item.prompt) + sum(map(len, item.responses)) for item in items)
    print("temporary memory of a compiled update:", ", ".join(
        f"{side} {size / 2**20:,.0f} MiB" for side, size in temporary.items()))  # fmt: skip
    print("matrix products of an update: " + ", ".join(
        f"{side} {count / 1e9:,.0f} GFLOP" for side, count in flops.items()))  # fmt: skip
    training = compare(steps, (TRL, BARE, NAIVE), tokens, first, options)
    show(f"DPO update: {size.pairs} pairs, {tokens} tokens (a pair's prompt counts once, padding "
         "does not)", training)  # fmt: skip
    del steps

    judge = other.load(folder / "policy").eval()
    samplers = {
        SHARED: sampling(model, params, requests, plan_shapes(pool, "prompt"), size.new_tokens),
        GENERATE: other.sampling(judge, requests, size.new_tokens, PAD),
    }
    first = {}
    first[SHARED], samples = timed(samplers[SHARED])
    first[GENERATE], drawn = timed(samplers[GENERATE])
    if drawn.shape != samples.tokens.shape:
        raise Unequal(f"generate made {drawn.shape} tokens, the sampler {samples.tokens.shape}.")
    worst = check_samples(samples, judge, requests, options.tolerance)
    print(f"\nlog-probs of sampled tokens: largest difference from transformers' {worst:.1e}")
    tokens = size.requests * size.new_tokens
    sampled = compare(samplers, (GENERATE,), tokens, first, options)
    show(f"Sampling: {size.requests} requests x {size.new_tokens} new tokens (prefill and image "
         "included)", sampled)  # fmt: skip
    return {
        "size": dataclasses.asdict(size),
        "dpo": {
            **training,
            "losses": losses,
            "gaps": gaps,
            "temporary_bytes": temporary,
            "flops": flops,
        },
        "sampling": {**sampled, "gap": worst},
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("both", *SIZES), default="both", help="digits and small")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds A B C A B C ...")
    parser.add_argument("--seconds", type=float, default=0.5, help="per round and side, at least")
    parser.add_argument("--pool", type=int, default=512, help="examples our shapes must hold")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative, between the sides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allocator", choices=("keep", "system"), default="keep",
                        help="keep freed memory in the process, or as the system does")  # fmt: skip
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    fields = [field.name for field in dataclasses.fields(Size)]
    for name in fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="changes the size")
    options = parser.parse_args(arguments)
    settings = {k: v for k, v in vars(options).items() if k != "out" and v is not None}
    changes = {name: settings.pop(name) for name in fields if name in settings}
    names = ("digits", "small") if options.size == "both" else (options.size,)
    if "digits" in names and changes.keys() & {"vocab", "prompt", "response"}:
        parser.error("the digits world has its own vocabulary and texts: use --size small")

    platforms.start(keep_memory=options.allocator == "keep")
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(cores())
    torch.manual_seed(options.seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    facts = environment() | {"freed memory": options.allocator}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    results = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                size = dataclasses.replace(SIZES[name], **changes)
                results[name] = run(name, size, options, Path(folder))
            except Unequal as error:
                sys.exit(f"{name}: the sides do not compute the same, nothing is timed: {error}")
    if options.out:
        record = {"environment": facts, "settings": settings, "sizes": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
