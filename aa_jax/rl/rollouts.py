"""On-policy data: the iterator of batches whose responses the current policy has written itself.

One iteration: take prompts, sample G responses to each, pay rewards, score every token under the
policy that sampled it (and the reference, and the critic), estimate advantages; then hand out
minibatches for several epochs, and begin again with the policy as it is by then.

The training loop gives the current parameters (`set_params`) before it asks for a batch, and keeps
this iterator's state in its checkpoints: a killed run continues in the middle of an iteration with
the responses it had, bit for bit.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aa_jax.data.collate import Batch, collate
from aa_jax.data.tokens import Encoded
from aa_jax.errors import ConfigError, DataError
from aa_jax.rewards.base import Request, Reward, RewardError, Scores
from aa_jax.rl.actor import Actor, Sample, with_responses
from aa_jax.rl.alarms import Alarms
from aa_jax.rl.algorithms import CostLimit
from aa_jax.rl.estimators import Experience
from aa_jax.rl.judging import Judge
from aa_jax.rl.packing import Packer, Packing
from aa_jax.training.metrics import MetricWriter

log = logging.getLogger(__name__)

# Sampler and trainer run the same mathematics in another order. More than this apart means that
# one of them reads other weights, positions or media.
_LOGP_GAP = 1e-2


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
      prompts: per iteration.
      samples: G, responses per prompt.
      epochs: passes over an iteration's responses.
      minibatches: updates per pass; divides `prompts`.
      iterations: how often to begin anew.
      max_kl: the passes of an iteration end early once the policy is further from the one that
        sampled: mean k3 estimate in nats per token, measured before each pass but the first. The
        run then makes fewer updates than `updates`.
      patience: so many iterations in a row without a usable reward end the run.
    """

    prompts: int
    samples: int = 1
    epochs: int = 1
    minibatches: int = 1
    iterations: int = 100
    max_kl: int | float | None = None
    patience: int = 3

    def __post_init__(self):
        if self.max_kl is not None and self.max_kl <= 0:
            raise ConfigError(f"rollout.max_kl is {self.max_kl}; give nats per token above 0.")
        for field in dataclasses.fields(self):
            if field.name != "max_kl" and getattr(self, field.name) < 1:
                raise ConfigError(
                    f"rollout.{field.name} is {getattr(self, field.name)}; at least 1."
                )
        if self.prompts % self.minibatches:
            raise ConfigError(
                f"rollout.prompts = {self.prompts} cannot be cut into rollout.minibatches = "
                f"{self.minibatches} equal parts; choose a divisor."
            )

    @property
    def updates(self) -> int:
        """Updates of the whole run, if none is left out."""
        return self.iterations * self.epochs * self.minibatches


class Rollouts(Iterator[Batch]):
    """See the module's docstring.

    Args:
      prompts: encoded prompts by random access.
      sources: the same prompts as Examples, as the reward wants to see them.
      actor: samples and scores.
      reward: see `aa_jax.rewards`; a request's prompt is the Example, its reference the prompt's
        meta under `reference_key`.
      estimator: `Experience -> arrays`, see `rl.estimators`.
      plan: sizes.
      seed: of the order of prompts, the samples and the minibatches.
      policy: takes the policy's parameters out of the trained ones.
      critic: takes the critic's, or None.
      reference: parameters of the reference, or None.
      reference_key: where a prompt's meta holds the truth.
      cost: a reward that says how harmful a response is, for PPO-Lagrangian, or None.
      cost_critic: takes the parameters of its critic.
      limit: the `CostLimit` that prices it.
      ptx: ``(update, rows) -> batch`` of other data, put under "ptx" into every minibatch.
      alarms: see `rl.alarms`, or None.
      controller: KL price: has `coef` and `update(kl, tokens)`; None: `kl_coef` 0.
      score_rows: rows scored at once.
      share_rows: short prompts without media may share a row, see `rl.packing`; not where the loss
        compares the responses of a row with each other.
      writer: opens a `MetricWriter` for the figures of every iteration.
      watch: called with (iteration, prompts' indices, texts [P][G], values [P, G]).
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Encoded],
        sources: Sequence[Any],
        actor: Actor,
        reward: Reward,
        estimator: Callable[[Experience], Mapping[str, np.ndarray]],
        plan: Plan,
        seed: int,
        policy: Callable[[Any], Any] = lambda params: params,
        critic: Callable[[Any], Any] | None = None,
        reference: Any = None,
        reference_key: str = "reference",
        cost: Reward | None = None,
        cost_critic: Callable[[Any], Any] | None = None,
        limit: CostLimit | None = None,
        ptx: Callable[[int, int], Batch] | None = None,
        alarms: Alarms | None = None,
        controller: Any = None,
        score_rows: int = 16,
        share_rows: bool = True,
        writer: Callable[[], MetricWriter] | None = None,
        watch: Callable[[int, list[int], list[list[str]], np.ndarray], None] | None = None,
    ):
        if not len(prompts):
            raise DataError("there are no prompts to answer.")
        self.prompts, self.sources, self.actor, self.reward = prompts, sources, actor, reward
        self.estimator, self.plan, self.seed = estimator, plan, seed
        self._policy, self._critic, self._reference = policy, critic, reference
        self._reference_key, self._ptx, self._alarms = reference_key, ptx, alarms
        self._cost, self._cost_critic, self._limit = cost, cost_critic, limit
        self._unpaid = 0
        self._controller, self._score_rows = controller, score_rows
        self._open_writer, self._watch = writer, watch
        self._writer: MetricWriter | None = None
        shapes = actor.prompt_shapes
        self._shapes = dataclasses.replace(shapes, response_length=actor.max_new_tokens)
        text = not (shapes.images or shapes.media)
        self._packer = Packer(
            shapes.length + plan.samples * actor.max_new_tokens,
            share=share_rows and text and ptx is None,
        )
        self._answered: list[Encoded] = []
        self._params: Any = None
        self._iteration, self._cursor = 0, 0
        self._buffer: Batch | None = None
        self.figures: dict[str, float] = {}

    # ------------------------------------------------------------------ what the loop calls

    def set_params(self, params: Any) -> None:
        """The trained parameters as they are now; read only until the next batch is returned."""
        self._params = params

    def __next__(self) -> Batch:
        if self._too_far():
            self._buffer, self._iteration = None, self._iteration + 1
        if self._buffer is None:
            if self._iteration == self.plan.iterations:
                raise StopIteration
            self._buffer = self._collect()
            self._cursor = 0
        batch = self._minibatch(self._cursor)
        self._cursor += 1
        if self._cursor == self.plan.epochs * self.plan.minibatches:
            self._buffer, self._iteration = None, self._iteration + 1
        self._params = None
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able, with the responses of the iteration in progress."""
        return {
            "iteration": self._iteration, "cursor": self._cursor, "buffer": self._buffer,
            "rows": self._packer.get_state(),
            "kl_coef": None if self._controller is None else self._controller.coef,
            "limit": None if self._limit is None else self._limit.get_state(),
            "alarms": None if self._alarms is None else self._alarms.get_state(),
            "unpaid": self._unpaid,
            "seed": self.seed, "plan": dataclasses.asdict(self.plan),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `get_state` was called.

        Raises:
          DataError: the state is of another plan or seed.
        """
        here = {"seed": self.seed, "plan": dataclasses.asdict(self.plan)}
        if changed := [key for key, value in here.items() if state[key] != value]:
            raise DataError(
                f"the saved rollouts were made with another {' and '.join(changed)}: "
                f"{ {k: state[k] for k in changed} } there, { {k: here[k] for k in changed} } here."
            )
        self._iteration, self._cursor = state["iteration"], state["cursor"]
        if self._open_writer is not None:
            with self._open_writer() as writer:
                writer.rewind(self._iteration - (state["buffer"] is None))
        if "rows" in state:
            self._packer.set_state(state["rows"])
        elif state["buffer"] is not None:
            raise DataError(
                "the saved rollouts are of an earlier version, in the middle of an iteration, and "
                "cannot be continued. Finish the run with that version, or begin in a new workdir."
            )
        self._buffer, self._answered = None, []
        if state["buffer"] is not None:
            self._buffer = dict(state["buffer"])
            texts, lengths = self._buffer["responses"], self._buffer["lengths"]
            self._answered = [
                with_responses(self.prompts[i], [ids[:n] for ids, n in zip(*group, strict=True)])
                for i, *group in zip(self._chosen(), texts, lengths, strict=True)
            ]
        if self._controller is not None:
            self._controller.coef = state["kl_coef"]
        if self._limit is not None:
            self._limit.set_state(state["limit"])
        if self._alarms is not None:
            self._alarms.set_state(state["alarms"])
        self._unpaid = state["unpaid"]

    def close(self) -> None:
        """Closes the metrics."""
        if self._writer is not None:
            self._writer.close()

    def policy_of(self, params: Any) -> Any:
        """The policy's part of the trained parameters."""
        return self._policy(params)

    # ------------------------------------------------------------------ one iteration

    def _generator(self, *use: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self._iteration, *use])

    def _chosen(self) -> list[int]:
        """Prompts of this iteration: every prompt once per pass over them, in a new order."""
        first = self._iteration * self.plan.prompts
        chosen = []
        for i in range(first, first + self.plan.prompts):
            epoch, at = divmod(i, len(self.prompts))
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.prompts))
            chosen.append(int(order[at]))
        return chosen

    def _collect(self) -> Batch:
        plan, actor = self.plan, self.actor
        params = self._policy(self._params)
        indices = self._chosen()
        encoded = [self.prompts[i] for i in indices]
        seeds = self._generator(2).integers(0, 2**32, (plan.prompts, plan.samples), np.uint32)
        judges = [Judge(reward) for reward in (self.reward, self._cost) if reward is not None]
        written: dict[int, list[Request]] = {}

        def put(row: int, answers: Sequence[Sample], read: Sequence[tuple]) -> None:
            written[row] = self._requests(indices[row], answers, read)
            for judge in judges:
                judge.put(row, written[row])

        def done(row: int, answers: Sequence[Sample]) -> None:
            if not actor.draws:
                put(row, answers, actor.read(answers))

        with contextlib.ExitStack() as stack:
            for judge in judges:
                stack.callback(judge.close)
            samples = actor.respond(params, encoded, seeds, done=done)
            if actor.draws:  # pictures are made on the device, all at once
                read = iter(actor.read([sample for group in samples for sample in group]))
                for row, group in enumerate(samples):
                    put(row, group, [next(read) for _ in group])
            tokens = [[sample.tokens for sample in group] for group in samples]
            self._answered = [with_responses(*pair) for pair in zip(encoded, tokens, strict=True)]
            self._packer.fit([_tokens(item) for item in self._answered])
            buffer = _responses(tokens, actor.max_new_tokens)
            logps, reference, values, cost_values = self._scored(params)
            scores, *priced = (judge.scores() for judge in judges)
        texts = [[request.response for request in written[row]] for row in range(plan.prompts)]
        valid = scores.valid.reshape(plan.prompts, plan.samples)
        rewards = scores.values.reshape(valid.shape)
        costs, more = None, {}
        for found in priced:
            valid = valid & found.valid.reshape(valid.shape)
            costs = np.where(valid, found.values.reshape(valid.shape), 0.0).astype(np.float32)
            more = {k.replace("reward/", "cost/", 1): v for k, v in found.figures().items()}
            more["multiplier"] = self._limit.multiplier
        self._check_paid(valid, scores)
        # A response without a usable reward teaches nothing, and is not counted as a token either.
        buffer["sequence_mask"] = valid.astype(np.float32)
        slots = np.arange(actor.max_new_tokens) < buffer["lengths"][..., None]
        mask = (slots & valid[..., None]).astype(np.float32)
        gap = self._check_logps(samples, logps)
        coef = 0.0 if self._controller is None else float(self._controller.coef)
        experience = Experience(
            np.where(valid, rewards, 0.0).astype(np.float32), valid.astype(np.float32), logps,
            reference, values, mask, coef, costs, cost_values,
            0.0 if self._limit is None else self._limit.multiplier,
        )  # fmt: skip
        buffer |= {k: np.asarray(v) for k, v in self.estimator(experience).items()}
        buffer |= {"old_logps": logps, "loss_mask": mask}
        if reference is not None:
            buffer["ref_token_logps"] = reference
        self.figures = self._figures(experience, samples, gap) | scores.figures() | more
        if self._alarms is not None:
            self.figures |= self._alarms.check(self._iteration, self.figures)
        if self._limit is not None:
            self._limit.update(costs, valid)
        if self._controller is not None and reference is not None:
            self._controller.update(self.figures["kl"], int(mask.sum()))
        if self._open_writer is not None:
            # Not earlier: the loop's own writer cuts the shared file to size when it starts.
            self._writer = self._writer or self._open_writer()
            self._writer.write(self._iteration, self.figures)
        if self._watch is not None:
            self._watch(self._iteration, indices, texts, rewards)
        return buffer

    def _scored(self, params: Any) -> tuple[np.ndarray | None, ...]:
        """[P, G, R]: log-probs of policy and reference, values, cost values."""
        packing, batch = self._rows(np.arange(len(self._answered)))
        actor, rows = self.actor, self._score_rows
        found: list[np.ndarray | None] = [actor.logps(params, batch, rows), None, None, None]
        if self._reference is not None:
            found[1] = actor.logps(self._reference, batch, rows)
        for place, critic in ((2, self._critic), (3, self._cost_critic)):
            if critic is not None:
                found[place] = actor.values(critic(self._params), batch, rows)
        return tuple(None if array is None else packing.take(array) for array in found)

    def _rows(self, places: np.ndarray) -> tuple[Packing, Batch]:
        """Prompts of this iteration with their responses, as a batch."""
        chosen = [self._answered[i] for i in places]
        packing = self._packer.pack([_tokens(item) for item in chosen])
        shapes = dataclasses.replace(
            self._shapes, length=self._packer.length,
            sequences=packing.groups * self.plan.samples,
        )  # fmt: skip
        batch = collate(
            [[chosen[i] for i in row] for row in packing.rows], shapes, "group",
            batch_rows=packing.size, pad_id=self.actor.processor.pad_id,
        )  # fmt: skip
        return packing, batch

    def _requests(
        self, index: int, answers: Sequence[Sample], read: Sequence[tuple]
    ) -> list[Request]:
        """What the reward is asked about one prompt's responses, given their text and pictures."""
        prompt = self.sources[index]
        requests = []
        for sample, (text, pictures) in zip(answers, read, strict=True):
            meta = {
                **prompt.meta, "response_tokens": len(sample.tokens), "finished": sample.finished,
            }  # fmt: skip
            truth = prompt.meta.get(self._reference_key)
            requests.append(Request(prompt, text, truth, meta, pictures))
        return requests

    def _check_paid(self, valid: np.ndarray, scores: Scores) -> None:
        """Ends a run that learns nothing because nobody judges it."""
        self._unpaid = 0 if valid.any() else self._unpaid + 1
        if self._unpaid >= self.plan.patience:
            reasons = ", ".join(k for k in scores.counts if k.startswith("invalid"))
            raise RewardError(
                f"no response of the last {self._unpaid} iterations got a usable reward "
                f"({reasons}). Mend the reward and run the same command again: it continues from "
                "the last checkpoint; rollout.patience says how long to go on without."
            )

    def _too_far(self) -> bool:
        """Whether the passes over this iteration's responses end here, see `Plan.max_kl`."""
        passed, rest = divmod(self._cursor, self.plan.minibatches)
        if self._buffer is None or self.plan.max_kl is None or rest or not passed:
            return False
        packing, batch = self._rows(np.arange(len(self._answered)))
        logps = self.actor.logps(self._policy(self._params), batch, self._score_rows)
        logps = packing.take(logps)
        mask = self._buffer["loss_mask"]
        gap = np.where(mask > 0, self._buffer["old_logps"] - logps, 0.0)
        kl = float((np.expm1(gap) - gap).sum() / max((mask > 0).sum(), 1))
        if kl <= self.plan.max_kl:
            return False
        log.info(
            "iteration %d: %.3g nats per token from the policy that sampled, after %d of %d passes",
            self._iteration, kl, passed, self.plan.epochs,
        )  # fmt: skip
        return True

    def _check_logps(self, samples: Sequence[Sequence[Sample]], logps: np.ndarray) -> float:
        """Largest difference between the sampler's and the trainer's log-prob of a token."""
        gap = 0.0
        for row, group in enumerate(samples):
            for s, sample in enumerate(group):
                here = logps[row, s, : len(sample.logps)]
                gap = max(gap, float(np.max(np.abs(here - sample.logps), initial=0.0)))
        if not gap < _LOGP_GAP:  # catches NaN
            log.warning(
                "iteration %d: sampler and trainer disagree by %.3g nats on a token's log-prob. "
                "In low precision that may be rounding; otherwise they see different inputs.",
                self._iteration, gap,
            )  # fmt: skip
        return gap

    def _figures(
        self,
        experience: Experience,
        samples: Sequence[Sequence[Sample]],
        gap: float,
    ) -> dict[str, float]:
        valid = experience.valid > 0
        lengths = np.array([[len(s.tokens) for s in group] for group in samples])
        cut = np.array([[not s.finished for s in group] for group in samples])
        within = np.where(valid, experience.rewards, np.nan)
        same = [np.nanmax(row) == np.nanmin(row) for row in within if np.isfinite(row).any()]
        figures = {
            "response_length": float(lengths.mean()),
            "cut": float(cut.mean()),
            "sampler_gap": gap,
        }
        if self.plan.samples > 1 and same:
            figures["equal_groups"] = float(np.mean(same))  # these teach a group method nothing
        if experience.ref_logps is not None:
            d = (experience.logps - experience.ref_logps) * experience.mask
            figures["kl"] = float(d.sum() / max(valid.sum(), 1))
            figures["kl_coef"] = experience.kl_coef
        return figures

    def _minibatch(self, cursor: int) -> Batch:
        epoch, part = divmod(cursor, self.plan.minibatches)
        size = self.plan.prompts // self.plan.minibatches
        order = self._generator(3, epoch).permutation(self.plan.prompts)
        places = order[part * size : (part + 1) * size]
        packing, batch = self._rows(places)
        batch |= {
            name: packing.place(array[places])
            for name, array in self._buffer.items()
            if name not in ("responses", "lengths")
        }
        if self._ptx is not None:
            update = self._iteration * self.plan.epochs * self.plan.minibatches + cursor
            batch["ptx"] = self._ptx(update, size)
        return batch


def _tokens(answered: Encoded) -> int:
    """Tokens of a prompt with its responses."""
    return len(answered.prompt) + sum(map(len, answered.responses))


def _responses(tokens: Sequence[Sequence[Sequence[int] | np.ndarray]], longest: int) -> Batch:
    """What was written, as arrays."""
    lengths = np.array([[len(ids) for ids in group] for group in tokens], np.int32)
    responses = np.zeros((*lengths.shape, longest), np.int32)
    for row, group in zip(responses, tokens, strict=True):
        for slots, ids in zip(row, group, strict=True):
            slots[: len(ids)] = ids
    return {"responses": responses, "lengths": lengths}
