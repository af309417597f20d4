"""Learning from language feedback on a dataset and a checkpoint of your own.

The initial model M_θ is the checkpoint; the dataset has preferences with critiques (and, in the
real `PKU-Alignment/align-anything`, refinements). What the digits world can measure against its
oracle is judged here by held-out preferences: how often the trained model ranks a human pair right.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aa_jax import hosts
from aa_jax.data.dataset import Dataset
from aa_jax.data.example import Example
from aa_jax.data.processor import Processor
from aa_jax.data.tokens import encode_example
from aa_jax.errors import ConfigError, DataError
from aa_jax.llf import pipeline
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.llf.prompts import Lazy, critique_prompts, refine_prompts
from aa_jax.llf.stages import Stage, run_stages, summary
from aa_jax.models.hf import read_config
from aa_jax.runs import load_dataset
from aa_jax.sharding.mesh import make_mesh
from aa_jax.training.metrics import read_metrics, series

FEEDBACK = "feedback/model"


def run(
    workdir: str | Path,
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    feedback: Mapping[str, Any],
    dpo: Mapping[str, Any],
    prompts: Mapping[str, Any] | None = None,
    eval_data: Mapping[str, Any] | None = None,
    wording: Mapping[str, str] | None = None,
    lengths: Mapping[str, int] | None = None,
    sampling: Mapping[str, Any] | None = None,
    pairs: int | None = None,
    baseline: bool = False,
    mesh: Mapping[str, int] | None = None,
    seed: int = 0,
    stage: str | None = None,
) -> dict[str, dict]:
    """Runs (or continues) the pipeline; every argument is a section or key of the config.

    Args:
      workdir: run directory.
      model: `path` of the initial model's Hugging Face folder, and `dtype`, `param_dtype`, `remat`.
      data: keyword arguments of `runs.load_dataset`: preferences with language feedback.
      feedback: keyword arguments of `recipes.train` for the feedback model.
      dpo: keyword arguments of `pipeline.train_arms` (`lrs`, `optim`, `objective`, ...).
      prompts: where the prompts that are answered come from; what it leaves out is as in `data`.
      eval_data: held-out preferences, likewise; needed to choose between several `lrs`.
      wording: of the prompts for critique and refinement, see `aa_jax.data.llf_prompts`.
      lengths: `answer` and `feedback`, the tokens sampled at most (512 each); and, if the measured
        ones shall not hold, `answer_prompt`, `critique_prompt`, `refine_prompt`.
      sampling: `batch_rows`, `temperature`, `feedback_temperature`, `top_p`.
      pairs: pairs to use at most.
      baseline: a second arm, DPO on as many pairs with the dataset's own labels.
      mesh: sizes for `make_mesh`; default: all devices over data.
      seed: of everything.
      stage: run just this stage.

    Returns:
      stage name -> summary.

    Raises:
      ConfigError: several learning rates and nothing to choose by.
    """
    if len(dpo["lrs"]) > 1 and not eval_data:
        raise ConfigError(
            f"dpo.lrs has {len(dpo['lrs'])} learning rates: name held-out preferences in eval_data "
            "by which one is chosen, or give a single one."
        )
    workdir = Path(workdir)
    options = dict(model)
    base = str(options.pop("path"))
    processor = Processor.from_pretrained(base)
    pairs_file = workdir / "improve/pairs.parquet"

    @functools.cache
    def asked() -> Dataset:
        chosen = {**data, **(prompts or {})}
        return load_dataset("prompt", processor, **chosen)

    @functools.cache
    def lab() -> Lab:
        fitting = measure_lengths(asked(), processor, wording, **(lengths or {}))
        check_context(fitting, base)
        return Lab(
            workdir=workdir, mesh=make_mesh(**(mesh or {})), seed=seed, wording=wording,
            lengths=fitting, **options, **(sampling or {}),
        )  # fmt: skip

    def feedback_stage(folder: Path) -> dict:
        examples = load_dataset("feedback", processor, **data, wording=wording)
        return pipeline.train_model(
            folder, lab(), "feedback", base=base, examples=examples, **feedback
        )

    def improve_stage(folder: Path) -> dict:
        shown = decoded(asked())
        first = lab().answer(
            folder / "response.jsonl", shown, kind="answer", params=lab().load(base)[1], base=base
        )
        _, refined = pipeline.self_improve(
            folder, lab(), shown, first, base=base, feedback_model=str(workdir / FEEDBACK)
        )
        files = Lazy(len(shown), lambda i: asked().example(i, decoded=False))
        return pipeline.make_pairs(pairs_file, files, first, refined, pairs)[1]

    def dpo_stage(folder: Path) -> dict:
        arms = {"llf": improved_pairs(pairs_file, processor, data.get("limits"))}
        if baseline:
            labelled = load_dataset("preference", processor, **data, keep=len(arms["llf"]))
            if len(labelled) < len(arms["llf"]):
                arms["llf"] = improved_pairs(
                    pairs_file, processor, data.get("limits"), keep=len(labelled)
                )
            arms["binary"] = labelled
        training = dict(dpo)
        if eval_data:
            training["eval_examples"] = load_dataset(
                "preference", processor, **{**data, **eval_data}
            )
        figures = pipeline.train_arms(
            folder, lab(), base=base, arms=arms, judge=functools.partial(held_out, workdir),
            best="accuracy", **training,
        )  # fmt: skip
        if hosts.index() == 0:
            point_to_model(workdir, pipeline.cell_model(folder, "llf", figures["chosen"]["llf"]))
        return figures

    def report_stage(folder: Path) -> dict:
        from aa_jax.llf.dataset_report import write

        found = {name: summary(workdir, name) for name in ("feedback", "improve", "dpo")}
        alone = hosts.index() == 0
        return hosts.first(write(workdir, found, decoded(asked()), wording) if alone else None)

    stages = [
        Stage("feedback", "feedback model: SFT on critiques", feedback_stage),
        Stage("improve", "self-improvement: y, critique, y*", improve_stage, ("feedback",)),
        Stage("dpo", "DPO on y* > y", dpo_stage, ("improve",)),
        Stage("report", "report.html", report_stage, ("dpo",)),
    ]
    return run_stages(workdir, stages, only=stage)


def decoded(prompts: Dataset) -> Sequence[Example]:
    """The prompts with their images, decoded on access."""
    return Lazy(len(prompts), prompts.example)


def improved_pairs(
    path: Path, processor: Processor, limits: Mapping[str, Any] | None, keep: int | None = None
) -> Dataset:
    """The pairs y* ≻ y of a run, read like any other dataset."""
    import pyarrow.parquet

    has_image = "image" in pyarrow.parquet.read_schema(path).names
    template = "AA_TI2T_LLF" if has_image else "AA_T2T_LLF"
    return load_dataset(
        "preference", processor, path=str(path), template=template, limits=limits, keep=keep
    )


def held_out(workdir: Path, cell: Path) -> dict[str, float]:
    """Last figures on held-out preferences of a trained cell; nan where there are none."""
    stage = str(cell.relative_to(workdir)).replace("/", ".")
    rows = read_metrics(workdir, stage=stage)
    figures = {}
    for name in ("accuracy", "loss"):
        values = series(rows, f"eval/{name}")[1]
        figures[name] = float(values[-1]) if len(values) else float("nan")
    return figures


def point_to_model(workdir: Path, target: str) -> None:
    """`workdir/model` leads to the chosen model."""
    link = workdir / "model"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(Path(target).relative_to(workdir), target_is_directory=True)


def measure_lengths(
    prompts: Dataset,
    processor: Processor,
    wording: Mapping[str, str] | None,
    *,
    answer: int = 512,
    feedback: int = 512,
    **given: int,
) -> Lengths:
    """Static lengths that hold every prompt, and every answer and critique shown with it.

    Args:
      prompts: the prompts, with their sizes.
      processor: of the model.
      wording: of the prompts for critique and refinement.
      answer: tokens of an answer at most.
      feedback: tokens of a critique with its refinement at most.
      **given: other fields of `Lengths`, instead of what is measured.

    Raises:
      DataError: no prompt could be measured.
      ConfigError: an unknown length.
    """
    known = Lengths.__dataclass_fields__
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"lengths has {', '.join(unknown)}; there are {', '.join(known)}.")
    if not prompts.sizes:
        raise DataError("the prompts have no lengths: read them with a processor.")
    longest = max(size.prompt for size in prompts.sizes)
    probe, word = [prompts.example(0)], [{"text": "word"}]
    plain = prompts.sizes[0].prompt

    def around(made: Sequence[Example]) -> int:
        return len(encode_example(made[0], processor).prompt) - plain

    # Text that was sampled may come back as a few more tokens than it was sampled as.
    answer_room, feedback_room = (round(1.1 * n) + 8 for n in (answer, feedback))
    measured = {
        "answer_prompt": longest,
        "critique_prompt": longest + around(critique_prompts(probe, word, wording)) + answer_room,
        "refine_prompt": longest + around(refine_prompts(probe, word, word, wording))
        + answer_room + feedback_room,
    }  # fmt: skip
    rounded = {name: -(-n // 16) * 16 for name, n in measured.items()}
    return Lengths(**{**rounded, "answer": answer, "feedback": feedback, **given})


def check_context(lengths: Lengths, folder: str) -> None:
    """Refuses lengths the model was not made for.

    Raises:
      ConfigError: a prompt with its response is longer than the model's context.
    """
    config = read_config(folder)
    context = config.get("text_config", config).get("max_position_embeddings")
    needs = {
        "answer": lengths.answer_prompt + lengths.answer,
        "critique": lengths.critique_prompt + lengths.feedback,
        "refinement": lengths.refine_prompt + lengths.answer,
    }
    what = max(needs, key=needs.__getitem__)
    if context and needs[what] > context:
        raise ConfigError(
            f"the {what} of the longest prompt may take {needs[what]} tokens, but {folder} has a "
            f"context of {context}. Lower lengths.answer and lengths.feedback (now "
            f"{lengths.answer} and {lengths.feedback}), or drop long prompts with "
            f"prompts.limits.max_prompt_length (now the longest is {lengths.answer_prompt})."
        )
