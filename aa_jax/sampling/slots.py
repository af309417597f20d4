"""Continuous batching: many samples of many prompts through a fixed number of slots.

A slot holds one prompt, prefilled once with its media. Its W lanes write samples of that prompt
side by side and read the prompt's keys and values without a copy; a lane whose sample has ended
begins the prompt's next one in the same compiled loop. When a slot's samples are done, the next
prompt moves in; it has been read while the others wrote. Nothing waits for the longest response of
a batch, and no prompt is computed or stored twice.

A sample depends on its prompt and its seed only: not on slot, lane, neighbours, or who came before.
"""

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from aa_jax.errors import ConfigError
from aa_jax.models import caches
from aa_jax.sampling.choose import Choice
from aa_jax.sampling.constraints import Constraint
from aa_jax.sampling.draw import uniforms
from aa_jax.sampling.stop import Stop
from aa_jax.sharding.batches import put_batch
from aa_jax.sharding.mesh import BATCH_AXES, batch_devices

State = dict[str, Any]
_OF_LANES = ("k", "v", "sample", "count", "live", "token", "constraint")  # others: of slots
_CACHES = ("prompt_k", "prompt_v", "k", "v")  # a layer of them is [rows, K, S, Dh]
_KEPT = ("prompt_k", "prompt_v", "prompt_length", "prompt_position", "first", "start", "samples",
         "limits", "uniform")  # by the loop; it moves the others  # fmt: skip
_INPUTS = ("tokens", "positions", "intervals", "last_positions", "feature_index", "media")


class Sample(NamedTuple):
    """One sampled response.

    Attributes:
      tokens: int32 ids with the end token, where there is one.
      logps: float32, log-probability of each under softmax(logits / temperature) over the whole
        vocabulary, before any truncation (greedy: temperature 1).
      finished: False where the length limit cut it.
    """

    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


def _row_axis(name: str, array: Any) -> int:
    """Where an entry of the state has its slots or lanes."""
    return array.ndim - 4 if name in _CACHES else 0


def _kinds(arrays: Any) -> tuple:
    """What a compiled program depends on."""
    leaves, structure = jax.tree.flatten(arrays)
    return structure, *((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)


def _to_host(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """Whole arrays, of several processes too."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return {n: multihost_utils.process_allgather(x, tiled=True) for n, x in arrays.items()}


class SlotSampler:
    """Samples through `slots` prompts with `lanes` samples of each at a time.

    Args:
      model: an `aa_jax.models` Model.
      mesh: device mesh; slots are spread over its batch axes.
      slots: prompts at a time.
      lanes: samples of a prompt at a time.
      samples: G, most samples of a prompt.
      max_new_tokens: R, the longest response including its end token.
      eos_ids: tokens that end a response.
      choice: temperature and truncation.
      constraint: takes tokens away before one is chosen.
      stop: texts that end a response.
      prefill_rows: prompts prefilled together; a slot waits until so many are free. Default: a
        quarter of the slots.
      narrow: when nothing waits and only a quarter of the slots still writes, go on with so many:
        the last long samples need not drag empty slots along. It compiles a second program, and is
        done from 16 slots on.

    Raises:
      ConfigError: sizes below 1, no end token, or a constraint no response can satisfy.
    """

    def __init__(
        self,
        model: Any,
        mesh: Mesh,
        *,
        slots: int,
        lanes: int = 1,
        samples: int = 1,
        max_new_tokens: int,
        eos_ids: Sequence[int],
        choice: Choice | None = None,
        constraint: Constraint | None = None,
        stop: Stop | None = None,
        prefill_rows: int | None = None,
        narrow: bool = True,
    ):
        sizes = {"slots": slots, "lanes": lanes, "samples": samples,
                 "max_new_tokens": max_new_tokens}  # fmt: skip
        if wrong := [f"{name} is {size}" for name, size in sizes.items() if size < 1]:
            raise ConfigError(f"{', '.join(wrong)}; at least 1.")
        if not eos_ids:
            raise ConfigError("eos_ids is empty: a response could never end. Give the tokenizer's.")
        if constraint is not None:
            constraint.check(max_new_tokens)
        many = batch_devices(mesh)
        self.model, self.mesh, self.choice = model, mesh, choice or Choice()
        self.slots, self.lanes, self.samples = -(-slots // many) * many, lanes, samples
        self.room, self.constraint, self.stop = max_new_tokens, constraint, stop
        rows = max(1, self.slots // 4) if prefill_rows is None else prefill_rows
        self.prefill_rows = min(-(-rows // many) * many, self.slots)
        few = -(-self.slots // 4 // many) * many
        narrow = narrow and self.slots >= 16 and few <= self.slots // 2
        self._few = few if narrow else self.slots
        self._many, self._apart = many, many == mesh.shape["data"] == mesh.size > 1
        self._ends = np.asarray(sorted(eos_ids), np.int32)
        self._state_places: Any = None
        self._jitted: dict[str, Any] = {}
        self._decoders: dict[tuple, Callable] = {}
        self._empty: dict[tuple, Callable[[], State]] = {}
        # By a thread beside the loop: where programs of several processes or devices wait for each
        # other, two threads could start them in different orders.
        self._reads_ahead = jax.process_count() == 1 and (self._apart or mesh.size == 1)

    # ------------------------------------------------------------------ on the host

    def run(
        self,
        params: Any,
        count: int,
        prompts: Callable[[Sequence[int], int], Mapping[str, Any]],
        seeds: np.ndarray,
        limits: np.ndarray | None = None,
        done: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """Samples of `count` prompts, in their order.

        Args:
          params: the model's parameters.
          count: N.
          prompts: ``(indices, rows) -> batch`` of the layout "prompt" with so many rows; always of
            the same shapes.
          seeds: [N, G] uint32, one per sample.
          limits: [N, G], longest response of each sample in tokens, 1 to R; None: R for all.
          done: called with a prompt's number and its samples as soon as they are there.
        """
        if not count:
            return []
        seeds = np.asarray(seeds, np.uint32)
        limits = np.full(seeds.shape, self.room) if limits is None else np.asarray(limits)
        if seeds.shape[1] > self.samples or limits.max() > self.room or limits.min() < 1:
            raise ConfigError(
                f"{seeds.shape[1]} samples of up to {limits.max()} tokens each were asked for, but "
                f"this sampler was made for {self.samples} of 1 to {self.room}."
            )
        found: list[list[Sample]] = [[] for _ in range(count)]
        # A prefill costs the same for few rows as for many: it waits for its rows.
        waiting = deque(
            np.split(np.arange(count), range(self.prefill_rows, count, self.prefill_rows))
        )

        def read() -> Any:
            batch = prompts(waiting[0].tolist(), self.prefill_rows)
            inputs = {name: batch[name] for name in _INPUTS if name in batch}
            return self._jit("read", self._read_prompts)(params, put_batch(inputs, self.mesh))

        def hand_on(ended: list[tuple[int, list[tuple]]]) -> None:
            for prompt, pairs in ended:
                found[prompt] = [self._sample(*pair) for pair in pairs]
                if done is not None:
                    done(prompt, found[prompt])

        ahead, state, decode, ended = None, None, None, []
        holds = np.full(self.slots, -1)
        with ThreadPoolExecutor(1, "decode") as thread:
            while True:
                free = np.flatnonzero(holds < 0)
                # Dealt out to the devices, which write at their own pace.
                free = free[np.argsort(free % (len(holds) // self._many), kind="stable")]
                while waiting and len(free) >= len(waiting[0]):
                    rows = read() if ahead is None else ahead
                    some, ahead = waiting.popleft(), None
                    where, free = np.split(free, [len(some)])
                    state = self._start(rows) if state is None else state
                    state = self._admit(state, rows, where, seeds[some], limits[some])
                    holds[where] = some
                if not (holds >= 0).any():
                    hand_on(ended)
                    return found
                if not waiting and len(holds) > self._few >= np.sum(holds >= 0):
                    state, holds = self._narrow(state, holds)
                    decode = None
                wake = len(holds) - (self._few if len(holds) > self._few else 0)
                wake = np.int32(len(waiting[0]) if waiting else wake)
                decode = decode or self._compiled(params, state, wake)
                if self._reads_ahead:
                    writing = thread.submit(decode, params, state, wake)
                    if waiting and ahead is None:
                        ahead = read()
                    hand_on(ended)
                    state = writing.result()
                else:
                    hand_on(ended)
                    state = decode(params, state, wake)
                state, ended = self._collect(state, holds, seeds.shape[1])

    def _start(self, rows: Any) -> State:
        key = _kinds(rows)
        if key not in self._empty:
            self._empty[key] = self._make_empty(rows)
        return self._empty[key]()

    def _make_empty(self, rows: Any) -> Callable[[], State]:
        """A program that makes the state of empty slots, for prompts that read as these do."""
        shapes = jax.eval_shape(self._new_state, rows)
        self._state_places = {
            name: jax.tree.map(
                lambda x, n=name: NamedSharding(
                    self.mesh, P(*[None] * _row_axis(n, x), BATCH_AXES)
                ),
                leaf,
            )
            for name, leaf in shapes.items()
        }

        def zeros() -> State:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        return jax.jit(zeros, out_shardings=self._state_places)

    def _admit(
        self, state: State, rows: Any, where: np.ndarray, seeds: np.ndarray, limits: np.ndarray
    ) -> State:
        slots = np.full(self.prefill_rows, self.slots, np.int32)  # beyond the last: dropped
        slots[: len(where)] = where
        wide = np.zeros((2, self.prefill_rows, self.samples), np.uint32)
        wide[0, : len(where), : seeds.shape[1]] = seeds
        wide[1, : len(where), : seeds.shape[1]] = limits
        due = np.where(slots < self.slots, seeds.shape[1], 0).astype(np.int32)
        new = {"seeds": wide[0], "limits": wide[1].astype(np.int32), "samples": due}
        return self._jit("move_in", self._move_in)(state, rows, slots, new)

    def _compiled(self, params: Any, state: State, wake: Any) -> Callable:
        """`_decode`, compiled here: what JAX is told in a `with` holds for this thread only."""
        key = _kinds((params, state))
        if key not in self._decoders:
            jitted = jax.jit(self._decode, donate_argnums=1, out_shardings=self._state_places)
            self._decoders[key] = jitted.lower(params, state, wake).compile()
        return self._decoders[key]

    def _collect(
        self, state: State, holds: np.ndarray, samples: int
    ) -> tuple[State, list[tuple[int, list[tuple]]]]:
        """Takes what slots that are done have written, and ends samples that met a stop text."""
        names = ("next", "samples", "live", "sample", "tokens", "logps")
        seen = _to_host({name: state[name] for name in names})
        live = seen["live"].reshape(-1, self.lanes)
        done = ~live.any(1) & (seen["next"] >= seen["samples"])
        ended = []
        for slot in np.flatnonzero(done & (holds >= 0)):
            both = zip(seen["tokens"][slot], seen["logps"][slot], strict=True)
            ended.append((int(holds[slot]), list(itertools.islice(both, samples))))
            holds[slot] = -1
        if self.stop is None or done.all():
            return state, ended
        limits = np.full((len(holds), self.samples), self.room, np.int32)
        sample = seen["sample"].reshape(live.shape)
        for slot, lane in zip(*np.nonzero(live), strict=True):
            at = (slot, sample[slot, lane])
            written = seen["tokens"][at]
            if self.stop.length(written[written >= 0]) is not None:
                limits[at] = 1
        shorten = self._jit("shorten", lambda state, new: {
            **state, "limits": jnp.minimum(state["limits"], new)})  # fmt: skip
        return shorten(state, limits), ended

    def _narrow(self, state: State, holds: np.ndarray) -> tuple[State, np.ndarray]:
        """The slots that still write, and some that do not, in a state of few slots."""
        stay = np.argsort(holds < 0, kind="stable")[: self._few].astype(np.int32)
        stay = stay.reshape(-1, self._many).T.reshape(-1)  # to every device as many that write
        lanes = (stay[:, None] * self.lanes + np.arange(self.lanes, dtype=np.int32)).reshape(-1)

        def take(state: State, stay: Any, lanes: Any) -> State:
            return {
                name: jax.tree.map(
                    lambda x, n=name: jnp.take(
                        x, lanes if n in _OF_LANES else stay, axis=_row_axis(n, x)
                    ),
                    entry,
                )
                for name, entry in state.items()
            }

        return self._jit("narrow", take)(state, stay, lanes), holds[stay]

    def _sample(self, tokens: np.ndarray, logps: np.ndarray) -> Sample:
        count = int(np.sum(tokens >= 0))
        ended = bool(np.isin(tokens[count - 1], self._ends))
        if self.stop is not None and (at := self.stop.length(tokens[:count])) is not None:
            count, ended = at, True
        return Sample(tokens[:count].copy(), logps[:count].copy(), ended)

    def _jit(self, name: str, function: Callable) -> Any:
        if name not in self._jitted:
            options = dict(donate_argnums=0, out_shardings=self._state_places)
            if name == "narrow":  # its result is smaller than what it gets
                del options["donate_argnums"]
            self._jitted[name] = jax.jit(function, **({} if name == "read" else options))
        return self._jitted[name]

    # ------------------------------------------------------------------ inside jit

    def _new_state(self, rows: Any) -> State:
        """Its shapes: P slots of S tokens, B = P · W lanes, G samples of R tokens per slot."""
        hidden, cache, start = rows
        lanes = self.slots * self.lanes

        def rows(x: Any, count: int) -> Any:
            return jnp.zeros((count, *x.shape[1:]), x.dtype)

        def keys(count: int, room: int) -> Any:
            def empty(x: Any) -> Any:
                *layers, _, heads, _, dim = x.shape
                return jnp.zeros((*layers, count, heads, room, dim), x.dtype)

            return jax.tree.map(empty, cache["k"])

        width = jax.tree.leaves(cache["k"])[0].shape[-2]
        each = jnp.zeros((self.slots, self.samples), jnp.int32)
        written = jnp.zeros((self.slots, self.samples, self.room), jnp.int32)
        number, lane = jnp.zeros(self.slots, jnp.int32), jnp.zeros(lanes, jnp.int32)
        return {
            "prompt_k": keys(self.slots, width), "prompt_v": keys(self.slots, width),
            "prompt_length": number, "prompt_position": number,
            "first": rows(hidden, self.slots),
            "start": jax.tree.map(lambda x: rows(x, self.slots), start),
            "next": number, "samples": number, "limits": each,
            "uniform": written.astype(jnp.float32),
            "k": keys(lanes, self.room), "v": keys(lanes, self.room),
            "sample": lane, "count": lane, "live": lane != 0, "token": lane,
            "constraint": jax.tree.map(lambda x: rows(x, lanes), start),
            "tokens": written, "logps": written.astype(jnp.float32),
        }  # fmt: skip

    def _read_prompts(self, params: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Prefill: (hidden state before the first token [A, D], cache, constraint's state)."""
        features = None
        if "media" in inputs:
            features = self.model.encode_media(params, inputs["media"])
        width = inputs["tokens"].shape[1]
        hidden, cache = self.model.prefill(params, inputs, width, features)
        cache = caches.for_loop(cache)
        last = jnp.asarray(inputs["last_positions"])[:, :1]
        hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)[:, 0]
        start = ()
        if self.constraint is not None:
            start = self.constraint.start(jnp.asarray(inputs["tokens"]), last[:, 0])
        return hidden, cache, start

    def _move_in(self, state: State, rows: Any, slots: Any, new: Any) -> State:
        """Prompts that were read into slots that are free."""
        hidden, cache, start = rows
        rows = {
            "prompt_length": cache["length"],
            "prompt_position": cache.get("position", cache["length"]),
            "first": hidden, "start": start, "next": jnp.zeros_like(slots),
            "samples": new["samples"], "limits": new["limits"],
            "uniform": uniforms(new["seeds"], self.room),
            "tokens": jnp.full((*new["seeds"].shape, self.room), -1, jnp.int32),
        }  # fmt: skip
        state = dict(state)
        for name, value in rows.items():
            state[name] = jax.tree.map(
                lambda old, x: old.at[slots].set(x.astype(old.dtype), mode="drop"),
                state[name], value,
            )  # fmt: skip
        for name in ("prompt_k", "prompt_v"):
            state[name] = jax.tree.map(
                lambda old, x, n=name: old.at[(slice(None),) * _row_axis(n, old) + (slots,)].set(
                    x, mode="drop"
                ),
                state[name], cache[name.removeprefix("prompt_")],
            )  # fmt: skip
        return state

    def _decode(self, params: Any, state: State, wake: Any) -> State:
        """Steps until `wake` slots are done (or have never been filled), or it is time to look.

        Where every device has the whole model, each runs the loop over its own slots until its part
        of them is done: in one loop over all, devices would wait for each other at every token.
        """
        kept = {name: state[name] for name in _KEPT}
        moving = {name: value for name, value in state.items() if name not in kept}
        if not self._apart:
            return {**state, **self._loop(params, kept, moving, wake)}
        places = jax.tree.map(lambda place: place.spec, self._state_places)
        moves = {name: places[name] for name in moving}
        loop = jax.shard_map(
            self._loop, mesh=self.mesh, out_specs=moves, check_vma=False,
            in_specs=(P(), {name: places[name] for name in kept}, moves, P()),
        )  # fmt: skip
        return {**state, **loop(params, kept, moving, -(-wake // self._many))}

    def _loop(self, params: Any, kept: State, moving: State, wake: Any) -> State:
        head, decode = self.model.head(params), self.model.decoder(params)
        most = self.stop.every if self.stop is not None else self.room * (self.samples + 1)

        def going(carry: tuple) -> Any:
            step, now = carry
            live = now["live"].reshape(-1, self.lanes).any(1)
            done = ~live & (now["next"] >= kept["samples"])
            return (step < most) & (jnp.sum(done) < wake)

        def advance(carry: tuple) -> tuple:
            step, now = carry
            return step + 1, self._step(decode, head, kept, now)

        return jax.lax.while_loop(going, advance, (jnp.int32(0), moving))[1]

    def _step(self, decode: Any, head: Any, kept: State, now: State) -> State:
        # Slots are batch dimensions of all that is read and written at an index: with slot numbers
        # as indices, devices that share the slots would send each other everything.
        each = lambda x: jnp.repeat(x, self.lanes, axis=0)  # noqa: E731
        lanes = lambda x: x.reshape(-1, self.lanes)  # noqa: E731
        pick = jax.vmap(lambda x, *at: x[at])
        put = jax.vmap(lambda x, value, *at: x.at[at].set(value, mode="drop"))
        # Lanes without work take their prompt's next samples, in order.
        idle = ~lanes(now["live"])
        turn = now["next"][:, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
        takes = idle & (turn < kept["samples"][:, None])
        begun = takes.reshape(-1)
        sample = jnp.where(begun, turn.reshape(-1), now["sample"])
        count = jnp.where(begun, 0, now["count"])
        live = now["live"] | begun
        limits = pick(kept["limits"], lanes(sample)).reshape(-1)
        # The token written last enters the cache; a new sample has none and reads the prompt's end.
        cache = {
            **{name: kept[name] for name in ("prompt_k", "prompt_v", "prompt_length")},
            "k": now["k"], "v": now["v"],
            "spot": jnp.where(live & (count > 0), count - 1, self.room),
            "position": each(kept["prompt_position"]) + count - 1,
        }  # fmt: skip
        hidden, cache = decode(now["token"], cache)
        hidden = jnp.where((count == 0)[:, None], each(kept["first"]), hidden)
        allowed = state = None
        if self.constraint is not None:
            state = jax.tree.map(
                lambda start, old: jnp.where(
                    begun.reshape(-1, *[1] * (old.ndim - 1)), each(start), old
                ),
                kept["start"], now["constraint"],
            )  # fmt: skip
            left = jnp.maximum(limits - count, 1)
            allowed = jax.vmap(self._allowed)(state, left)
        uniform = pick(kept["uniform"], lanes(sample), lanes(count)).reshape(-1)
        token, logp = self.choice(hidden @ head.T, uniform, allowed)
        if self.constraint is not None:
            state = self.constraint.advance(state, token)
        ended = jnp.any(token[:, None] == self._ends[None, :], axis=-1)
        count = count + 1
        row = jnp.where(live, sample, self.samples)  # beyond the last: not written
        at = lanes(row), lanes(count - 1)
        return {
            "k": cache["k"], "v": cache["v"], "token": token, "sample": sample, "count": count,
            "live": live & ~ended & (count < limits),
            "constraint": () if state is None else state,
            "next": now["next"] + jnp.sum(takes, axis=1, dtype=jnp.int32),
            "tokens": put(now["tokens"], lanes(token), *at),
            "logps": put(now["logps"], lanes(logp), *at),
        }  # fmt: skip

    def _allowed(self, state: Any, room: Any) -> Any:
        """The constraint of one row: each has its own room left."""
        return self.constraint.allowed(jax.tree.map(lambda x: x[None], state), room)[0]
