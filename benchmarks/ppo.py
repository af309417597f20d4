"""Whole PPO iterations on a CPU, text: aa_jax's training loop beside the PPOTrainer of TRL 1.12.

    pip install --no-deps --target DIR trl==1.12.0     # the last TRL that has PPO
    TRL_PPO=DIR python benchmarks/ppo.py --out ppo.json
    TRL_PPO=DIR python benchmarks/ppo.py --size tiny --repetitions 1        # does it run?

Both sides run their own training loop, iteration by iteration in turn: responses to problems of the
arithmetic world, rewards, log-probs of policy and reference, values, advantages, updates of policy
and critic. Before anything is timed TRL's forward pass must give our log-probs, and TRL's own
statements our loss and gradient norm for our first minibatch. README.md says what is in the times.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import json
import math
import os
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

if "TRL_PPO" not in os.environ:
    sys.exit(
        "This measures against TRL 1.12.0, which has to lie beside the installed TRL:\n"
        "    pip install --no-deps --target DIR trl==1.12.0\n"
        "    TRL_PPO=DIR python benchmarks/ppo.py"
    )
sys.path.insert(0, os.environ["TRL_PPO"])
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import jax
import numpy as np
import torch
import transformers
from clock import cores, environment, spread, timed
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from aa_jax import models, platforms
from aa_jax.data import arithmetic
from aa_jax.data.encoded import EncodedExamples
from aa_jax.data.processor import Processor
from aa_jax.rewards.base import Result
from aa_jax.rl import train as rl
from aa_jax.rl.actor import Actor
from aa_jax.sharding import make_mesh

ONE = 11  # the token "1", which the reward counts
LR, KL = 3e-6, 0.05


@dataclasses.dataclass(frozen=True)
class Size:
    """Models and an iteration; every field is a flag.

    Attributes:
      vocab: rows of embedding and head; the arithmetic world's 25 words and unused ones.
      dim: width of policy, reference and critic.
      layers: depth.
      heads: attention heads.
      mlp_dim: width of the SwiGLU.
      prompts: of an iteration, one response each.
      new_tokens: most tokens of a response.
      epochs: passes over the responses.
      minibatches: updates of a pass.
    """

    vocab: int = 25
    dim: int = 96
    layers: int = 3
    heads: int = 4
    mlp_dim: int = 256
    prompts: int = 64
    new_tokens: int = 64
    epochs: int = 4
    minibatches: int = 4


SIZES = {
    "arithmetic": Size(),
    "small": Size(vocab=8192, dim=256, layers=4, mlp_dim=704),
    "tiny": Size(dim=32, layers=1, mlp_dim=64, prompts=4, new_tokens=8, epochs=2, minibatches=2),
}  # fmt: skip


class Turns:
    """Two training loops in turn: each runs one iteration, then waits for the other's."""

    def __init__(self, iterations: int):
        self._mine = {"ours": threading.Semaphore(0), "theirs": threading.Semaphore(0)}
        self._began = (0.0, 0.0)
        self.iterations = iterations
        self.seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.busy: dict[str, list[float]] = {"ours": [], "theirs": []}
        self.error: BaseException | None = None

    def begin(self, side: str) -> None:
        """Waits for the turn, and starts the clock."""
        self._mine[side].acquire()
        if self.error is not None:
            raise SystemExit(1)
        self.start()

    def start(self) -> None:
        """Starts the clock again."""
        self._began = time.perf_counter(), time.process_time()

    def end(self, side: str) -> None:
        """Stops the clock and hands over."""
        wall, busy = self._began
        self.seconds[side].append(time.perf_counter() - wall)
        self.busy[side].append(time.process_time() - busy)
        self.pass_on(side)

    def pass_on(self, side: str) -> None:
        """Lets the other side go on."""
        self._mine["theirs" if side == "ours" else "ours"].release()


class World:
    """The same random weights, problems and reward for both sides."""

    def __init__(self, size: Size, folder: Path):
        self.size = size
        self.processor = Processor.from_pretrained(arithmetic.write_processor(folder / "p"))
        problems = arithmetic.problems(1024, 0, "train", digits=2)
        self.prompts = [problem.example() for problem in problems]
        encoded = EncodedExamples(self.prompts, self.processor)
        self.ids = [[int(i) for i in encoded[row].prompt] for row in range(len(encoded))]
        config = transformers.LlamaConfig(
            vocab_size=size.vocab, hidden_size=size.dim, intermediate_size=size.mlp_dim,
            num_hidden_layers=size.layers, num_attention_heads=size.heads,
            max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=None,  # of which torch would leave the embedding's gradient out
            initializer_range=0.1, tie_word_embeddings=False, num_labels=1,
        )  # fmt: skip
        torch.manual_seed(0)
        self.policy = transformers.LlamaForCausalLM(config)
        self.policy.save_pretrained(folder / "policy")
        self.reference, self.critic = (
            kind.from_pretrained(folder / "policy")
            for kind in (transformers.LlamaForCausalLM, transformers.LlamaForSequenceClassification)
        )
        self.model, self.params = models.load(folder / "policy")
        head = self.critic.score.weight.detach().numpy().T.copy()
        self.critic_params = {"model": self.params, "score_head": {"kernel": head}}

    def reward(self, requests) -> list[Result]:
        """Ours: tenths of the number of 1s in the response."""
        return [Result(0.1 * request.response.count("1")) for request in requests]


class CountOnes(torch.nn.Module):
    """TRL's: the same number as a reward model, read at the response's last token."""

    base_model_prefix = "backbone"

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.backbone = self._count

    def _count(self, input_ids, **_) -> SimpleNamespace:
        counted = (input_ids == ONE) & (torch.arange(input_ids.shape[1]) >= self.width)
        return SimpleNamespace(hidden_states=[0.1 * counted.cumsum(1)[..., None]])

    def score(self, hidden):
        """Already the score."""
        return hidden


class Theirs:
    """TRL's trainer; its pad token lies outside the vocabulary, so that no policy writes it."""

    def __init__(self, world: World, turns: Turns, folder: Path):
        size, self.turns = world.size, turns
        self.pad, self.width = size.vocab, max(map(len, world.ids))
        args = PPOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=size.prompts,
            gradient_accumulation_steps=1, num_mini_batches=size.minibatches,
            num_ppo_epochs=size.epochs, local_rollout_forward_batch_size=size.prompts,
            total_episodes=size.prompts * turns.iterations, response_length=size.new_tokens,
            temperature=1.0, kl_coef=KL, learning_rate=LR, lr_scheduler_type="constant",
            stop_token="eos", num_sample_generations=0, report_to="none", save_strategy="no",
            disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        self.ends: list[float] = []
        self.trainer = PPOTrainer(
            args=args,
            processing_class=SimpleNamespace(pad_token_id=self.pad, eos_token_id=2),
            model=world.policy, ref_model=world.reference, value_model=world.critic,
            reward_model=CountOnes(self.width),
            train_dataset=Dataset.from_dict({"input_ids": world.ids}),
            eval_dataset=Dataset.from_dict({"input_ids": world.ids[:1]}),
            data_collator=self._collate, callbacks=[_Callback(self)],
        )  # fmt: skip
        self.trainer.remove_callback(transformers.PrinterCallback)

    def _collate(self, rows):
        padded = [[self.pad] * (self.width - len(r["input_ids"])) + r["input_ids"] for r in rows]
        return {"input_ids": torch.tensor(padded)}

    def check(self, batch, loss: float, norm: float) -> dict[str, float]:
        """Largest differences from ours, by TRL's forward pass and TRL's own statements."""
        there = np.argwhere(batch["sequence_mask"] > 0)  # (row, sequence) of each response
        rows, slots = len(there), batch["targets"].shape[-1]

        def of(key):
            return batch[key][*there.T]

        mask = of("loss_mask") > 0
        answers = np.where(mask, of("targets"), 0)
        texts = np.full((rows, self.width + slots), self.pad, np.int64)
        for text, (row, _), last in zip(texts, there, of("target_positions")[:, 0], strict=True):
            first = batch["intervals"][row, last, 2]  # of the prompt, which may share its row
            text[self.width - (last + 1 - first) : self.width] = (
                batch["tokens"][row, first : last + 1]
            )  # fmt: skip
        texts[:, self.width :][mask] = answers[mask]
        model = self.trainer.model
        arrays = {
            name: torch.tensor(of(key))
            for name, key in [("mb_advantage", "advantages"), ("mb_return", "returns"),
                              ("mb_logprobs", "old_logps"), ("mb_values", "old_values")]
        }  # fmt: skip
        outside = torch.tensor(~mask)
        arrays["mb_logprobs"] = arrays["mb_logprobs"].masked_fill(outside, 1.0)
        space = dict(vars(ppo_trainer)) | arrays | dict(
            args=self.trainer.args, model=model, context_length=self.width,
            processing_class=self.trainer.processing_class,
            mb_query_responses=torch.tensor(texts), mb_responses=torch.tensor(answers),
            padding_mask=outside, padding_mask_p1=outside, micro_batch_inds=torch.arange(rows),
        )  # fmt: skip
        source = inspect.getsource(PPOTrainer.train).split("\n")
        first = next(i for i, line in enumerate(source) if "output, vpred_temp = forward(" in line)
        last = next(i for i, line in enumerate(source) if "loss = pg_loss + args.vf_coef" in line)
        exec(compile(textwrap.dedent("\n".join(source[first : last + 1])), "trl", "exec"), space)
        space["loss"].backward()
        square = sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        theirs = space["new_logprobs"].detach().numpy()
        return {
            "log-prob": float(np.abs(theirs - of("old_logps"))[mask].max()),
            "loss": abs(float(space["loss"].detach()) - loss) / abs(loss),
            "gradient norm": abs(math.sqrt(square) - norm) / norm,
        }

    def run(self) -> None:
        """All iterations."""
        self.turns.begin("theirs")
        with contextlib.redirect_stdout(io.StringIO()):
            self.trainer.train()


class _Callback(transformers.TrainerCallback):
    def __init__(self, side: Theirs):
        self._side = side

    def on_log(self, args, state, control, logs=None, **kwargs):
        self._side.ends.append(logs["val/num_eos_tokens"])

    def on_step_end(self, args, state, control, **kwargs):
        turns = self._side.turns
        turns.end("theirs")
        if len(turns.seconds["theirs"]) < turns.iterations:
            turns.begin("theirs")


class Ours:
    """`aa_jax.rl.train.train` in a thread of its own, with clocks around its parts."""

    def __init__(self, world: World, turns: Turns, folder: Path):
        self.world, self.turns, self.folder = world, turns, folder
        self.parts: dict[str, float] = dict.fromkeys(("generation", "scoring", "update"), 0.0)
        self.history: list[dict[str, float]] = []
        self.first: tuple | None = None
        self._replaced: list[tuple] = []
        for name, part in (("respond", "generation"), ("logps", "scoring"), ("values", "scoring")):
            self._put(Actor, name, self._clocked(getattr(Actor, name), part))
        self._put(rl, "make_step", self._make_step(rl.make_step))

    def _put(self, where, name, new) -> None:
        self._replaced.append((where, name, getattr(where, name)))
        setattr(where, name, new)

    def _clocked(self, function, part):
        def call(*args, **kwargs):
            seconds, value = timed(lambda: jax.block_until_ready(function(*args, **kwargs)))
            self.parts[part] += seconds
            return value

        return call

    def _make_step(self, make_step):
        def make(*args, **kwargs):
            step, ours = make_step(*args, **kwargs), self

            class Step:
                def __getattr__(self, name):
                    return getattr(step, name)

                def __call__(self, state, batch, **roles):
                    if ours.first is None:
                        held = jax.device_get(batch)
                        state, metrics = step(state, batch, **roles)
                        ours.first = held, jax.device_get(metrics)
                        return state, metrics
                    return ours._clocked(step, "update")(state, batch, **roles)

            return Step()

        return make

    def run(self) -> None:
        """All iterations."""
        size, turns = self.world.size, self.turns
        try:
            turns.begin("ours")
            rl.train(
                "ppo", model=self.world.model, params=self.world.params,
                critic=(self.world.model, self.world.critic_params),
                processor=self.world.processor, prompts=self.world.prompts,
                reward=self.world.reward, workdir=self.folder / "run",
                mesh=make_mesh(),
                rollout=dict(prompts=size.prompts, samples=1, epochs=size.epochs,
                             minibatches=size.minibatches, iterations=turns.iterations + 1),
                sampling=dict(max_new_tokens=size.new_tokens, batch_rows=size.prompts),
                optim=dict(lr=LR, schedule="constant", warmup_ratio=0.0, clip_norm=None, b2=0.999),
                kl=dict(coef=KL), evaluate=self._between,
                eval_every=size.epochs * size.minibatches,
            )  # fmt: skip
        except _Enough:
            pass
        except BaseException as error:
            turns.error = error
            turns.pass_on("ours")
            raise
        finally:
            for where, name, old in self._replaced:
                setattr(where, name, old)

    def _between(self, params, step) -> dict[str, float]:
        jax.block_until_ready(params)
        self.turns.end("ours")
        self.history.append(dict(self.parts))
        self.parts = dict.fromkeys(self.parts, 0.0)
        if len(self.history) == self.turns.iterations:
            raise _Enough
        self.turns.begin("ours")
        return {}


class _Enough(Exception):
    """All iterations are measured."""


def ratio_of(terms) -> float:
    """Mean of a metric, or the sum of its terms' means."""
    terms = [terms] if not isinstance(terms[0], tuple) else terms
    return float(sum(total / count for total, count in terms))


def measure(size: Size, repetitions: int, folder: Path) -> dict:
    """Times one size; exits with an error if the sides do not compute the same."""
    warm = 3  # compilation and first minibatch; torch on one thread; on all cores
    turns = Turns(warm + repetitions)
    world = World(size, folder)
    theirs, ours = Theirs(world, turns, folder), Ours(world, turns, folder)
    thread = threading.Thread(target=ours.run, daemon=True)
    thread.start()
    turns.pass_on("theirs")
    threads: dict[int, float] = {}
    counts = [1, cores()]
    begin, gaps = turns.begin, {}

    def begin_theirs(side: str) -> None:
        begin(side)
        if side == "ours":
            return
        done = len(turns.seconds["theirs"])
        if done == 0:  # after our first iteration: TRL's models are still as they were loaded
            batch, metrics = ours.first
            loss, norm = ratio_of(metrics["loss"]), ratio_of(metrics["grad_norm"])
            gaps.update(theirs.check(batch, loss, norm))
            shown = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
            print(f"largest differences from TRL: {shown}", flush=True)
            if max(gaps.values()) > 1e-3:
                turns.error = RuntimeError("TRL computes something else: nothing is timed")
                turns.pass_on("theirs")
                sys.exit(str(turns.error))
        if done in (1, 2):
            torch.set_num_threads(counts[done - 1])
        if done == 3:
            threads.update(zip(counts, turns.seconds["theirs"][1:3], strict=True))
            torch.set_num_threads(min(threads, key=threads.get))
        turns.start()

    turns.begin = begin_theirs
    theirs.run()
    thread.join()
    wall = {side: spent[warm:] for side, spent in turns.seconds.items()}
    busy = {side: spent[warm:] for side, spent in turns.busy.items()}
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rollouts = [line for line in map(json.loads, lines) if "response_length" in line]
    measured = ours.history[warm:]
    parts = {name: [one[name] for one in measured] for name in measured[0]}
    rest = [1 - sum(p[i] for p in parts.values()) / wall["ours"][i] for i in range(repetitions)]
    return {
        "differences": gaps,
        "seconds_per_iteration": wall,
        "cpu_seconds_per_iteration": busy,
        "cpu_ratio": spread([b / a for a, b in zip(busy["ours"], busy["theirs"], strict=True)]),
        "ratio": spread([b / a for a, b in zip(wall["ours"], wall["theirs"], strict=True)]),
        "threads": {"ours": cores(), "theirs": torch.get_num_threads()},
        "shares": {
            **{name: spread([s / t for s, t in zip(spent, wall["ours"], strict=True)])
               for name, spent in parts.items()},
            "everything else": spread(rest),
        },
        "response_length": {
            "ours": float(np.mean([line["response_length"] for line in rollouts])),
            # generate fills up with end tokens, and nearly every response has one of its own
            "theirs": size.new_tokens + 1 - float(np.mean(theirs.ends)) / size.prompts,
        },
    }  # fmt: skip


def show(name: str, found: dict) -> None:
    """Prints one measurement."""
    print(f"\n{name}")
    for side, spent in found["seconds_per_iteration"].items():
        each = spread(spent)
        label = "aa_jax" if side == "ours" else "TRL 1.12"
        busy = spread(found["cpu_seconds_per_iteration"][side])["median"]
        print(f"  {label:10}{each['median']:8.2f} s per iteration ({each['min']:.2f} - "
              f"{each['max']:.2f}), {busy:.2f} s of CPU, {found['threads'][side]} threads, "
              f"{found['response_length'][side]:.1f} tokens per response")  # fmt: skip
    for name, title in (("ratio", "aa_jax / TRL 1.12"), ("cpu_ratio", "the same in CPU time")):
        ratio = found[name]
        print(f"  {title}: {ratio['median']:.2f}x  ({ratio['min']:.2f} - {ratio['max']:.2f})")
    shares = ", ".join(f"{k} {100 * v['median']:.1f} %" for k, v in found["shares"].items())
    print(f"  our iteration: {shares}")


def main() -> None:
    """Measures one size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="arithmetic")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of our mesh")
    parser.add_argument("--out")
    flags = vars(parser.parse_args())
    given = {k: v for k, v in flags.items() if v is not None and k in Size.__annotations__}
    size = dataclasses.replace(SIZES[flags["size"]], **given)
    jax.config.update("jax_num_cpu_devices", flags["devices"])
    platforms.start()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(cores())
    facts = environment()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(size, flags["repetitions"], Path(folder))
    show(flags["size"], found)
    if flags["out"]:
        result = {"environment": facts, "size": dataclasses.asdict(size), **found}
        with open(flags["out"], "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
