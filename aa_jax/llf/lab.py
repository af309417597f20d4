"""What the stages of one LLF run share: mesh, seeds, samplers, and the graders of the world."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from aa_jax import models
from aa_jax.data.example import Example
from aa_jax.data.processor import Processor
from aa_jax.llf.respond import respond
from aa_jax.models.chameleon.tokenizer import own_image_encoder
from aa_jax.sampling import make_sampler
from aa_jax.sharding import shardings


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Static lengths in tokens (text and media): the longest prompt and response of each kind."""

    answer_prompt: int
    critique_prompt: int
    refine_prompt: int
    answer: int
    feedback: int


@dataclasses.dataclass(eq=False)
class Lab:
    """Shared settings of a run.

    Attributes:
      workdir: run directory.
      mesh: device mesh.
      seed: of the whole run; every use derives its own.
      lengths: static lengths.
      batch_rows: requests per sampling batch.
      temperature: of answers (y and y*), so that pairs are on-policy.
      feedback_temperature: of critiques. 0 writes the likeliest feedback: a model trained on many
        erring annotators then says what most of them would.
      top_p: nucleus mass.
      wording: of the LLF prompts, see `aa_jax.data.llf_prompts`.
      dtype: compute type of the models.
      param_dtype: type their parameters are stored in.
      remat: what the backward pass keeps, see `models.build`. Making a layer's activations again is
        cheaper than moving them through memory on a CPU, and the usual choice elsewhere.
    """

    workdir: Path
    mesh: jax.sharding.Mesh
    seed: int
    lengths: Lengths
    batch_rows: int = 256
    temperature: float = 1.0
    feedback_temperature: float = 0.0
    top_p: float = 1.0
    wording: Mapping[str, str] | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "full"

    # Two: the initial model and one beside it, so that large ones do not pile up in memory.
    @functools.lru_cache(maxsize=2)  # noqa: B019  one Lab lives as long as the process
    def load(self, folder: str) -> tuple[models.Model, dict, Processor]:
        """Model, parameters (sharded over the mesh) and processor of a checkpoint folder."""
        model, params = models.load(
            folder, dtype=self.dtype, param_dtype=self.param_dtype, remat=self.remat,
            shardings=self.places,
        )  # fmt: skip
        # Only a model that writes images has an encoder; with it, those it reads are tokens too.
        encode = own_image_encoder(model, params)
        return model, params, Processor.from_pretrained(folder, image_encoder=encode)

    def places(self, model: models.Model) -> Any:
        """Where the parameters of a model lie."""
        return shardings(model.axes(), model.abstract(), self.mesh)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def sampler(self, folder: str, max_new_tokens: int, temperature: float) -> Callable:
        """One compiled sampler; `folder` says whose architecture and tokenizer."""
        model, _, processor = self.load(folder)
        return make_sampler(
            model,
            max_new_tokens=max_new_tokens,
            eos_ids=processor.stop_ids,
            pad_id=processor.pad_id,
            temperature=temperature,
            top_p=self.top_p if temperature else 1.0,
        )

    def stream(self, name: str) -> int:
        """A seed of its own for every use, from the run's seed and the use's name."""
        words = np.frombuffer(name.encode(), np.uint8).tolist()
        return int(np.random.SeedSequence([self.seed, *words]).generate_state(1)[0])

    def answer(
        self,
        path: Path,
        prompts: Sequence[Example],
        *,
        kind: str,
        params: dict,
        base: str,
        greedy: bool = False,
        title: str | None = None,
    ) -> list[dict]:
        """Samples one text per prompt into a JSONL file.

        Args:
          path: the file; complete lines in it are kept.
          prompts: prompt-only Examples.
          kind: "answer", "critique" or "refine": which lengths hold.
          params: parameters of a model of `base`'s architecture.
          base: a checkpoint folder with that architecture and tokenizer.
          greedy: temperature 0.
          title: for the progress bar; default the file's name.
        """
        critique = kind == "critique"
        new = self.lengths.feedback if critique else self.lengths.answer
        temperature = self.feedback_temperature if critique else self.temperature
        return respond(
            path,
            prompts,
            params=params,
            sampler=self.sampler(base, new, 0.0 if greedy else temperature),
            processor=self.load(base)[2],
            prompt_length=getattr(self.lengths, f"{kind}_prompt"),
            batch_rows=self.batch_rows,
            mesh=self.mesh,
            seed=self.stream(str(path.relative_to(self.workdir))),
            title=title or path.stem,
        )
