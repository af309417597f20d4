"""The stages of learning from language feedback on the digits world, from nothing to a report."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aa_jax import hosts, models
from aa_jax.data import digits, sources, templates
from aa_jax.data.digits import prompts as wording
from aa_jax.errors import ConfigError
from aa_jax.eval.statistics import paired_difference, win_rate
from aa_jax.llf import digits_world as world
from aa_jax.llf import pipeline
from aa_jax.llf.lab import Lab, Lengths
from aa_jax.llf.prompts import Lazy, critique_prompts, refine_prompts
from aa_jax.llf.respond import read_lines
from aa_jax.llf.stages import Stage, run_stages, summary, write_json
from aa_jax.llf.start import pretrain_tower
from aa_jax.sharding.mesh import make_mesh

BASE = "sft/model"
# Rates of `digits.sample_response` for answers as good as they can be.
NO_FLAWS = dict.fromkeys(
    ("omit", "wrong", "sum_wrong", "redundant", "wrong_form", "omit_third", "ignore_short"), 0.0
)
FEEDBACK = "feedback/model"
# Further ways to make the pairs: stage name -> title.
VARIANTS = {
    "verified": "pairs whose y* the feedback model finds less wrong than y",
    "likeliest": "y* decoded greedily instead of at the temperature of y",
}


def run(
    workdir: str | Path,
    *,
    seed: int = 0,
    mesh: Mapping[str, int] | None = None,
    max_digits: int = 3,
    lengths: Mapping[str, int] | None = None,
    sampling: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    tower: Mapping[str, Any] | None = None,
    pretrain: Mapping[str, Any] | None = None,
    pretrain_examples: int = 24_000,
    pretrain_revisions: float = 0.4,
    sft: Mapping[str, Any] | None = None,
    demonstrations: Mapping[str, Any] | None = None,
    annotator: str = "bounded",
    preference_prompts: int = 3200,
    feedback_prompts: int = 3200,
    pairs: int | None = 2000,
    feedback: Mapping[str, Any] | None = None,
    dpo: Mapping[str, Any] | None = None,
    validation_prompts: int = 512,
    test_prompts: int = 1024,
    shares: Sequence[float] = (),
    variants: Sequence[str] = (),
    stage: str | None = None,
) -> dict[str, dict]:
    """Runs (or continues) the pipeline; every argument is a section or key of the config.

    Args:
      workdir: run directory.
      seed: of everything.
      mesh: sizes for `make_mesh`; default: all devices over data.
      max_digits: digits per strip, 1 to 5.
      lengths: static lengths, see `Lengths`.
      sampling: `batch_rows`, `temperature`, `feedback_temperature`, `top_p`.
      model: keyword arguments of `llava_config`.
      tower: `steps`, `batch_rows`, `lr` of the tower's pre-training.
      pretrain: keyword arguments of `recipes.train` for the base model, which learns from answers
        without flaws what pre-trained models bring along: to read digits and to reckon.
      pretrain_examples: number of examples for it.
      pretrain_revisions: share of them that revise a flawed answer exactly as told, in half of them
        told at random: to copy and to edit is another thing pre-trained models bring along.
      sft: keyword arguments of `recipes.train` for the initial model.
      demonstrations: keyword arguments of `digits.sft_examples`.
      annotator: "bounded" or "flips".
      preference_prompts: prompts for which annotators compare and criticise two answers.
      feedback_prompts: further prompts for which y, c and y* are sampled.
      pairs: pairs per DPO arm; None takes what the smaller arm has.
      feedback: keyword arguments of `recipes.train` for the feedback model.
      dpo: keyword arguments of `pipeline.train_arms` (`lrs`, `optim`, `objective`, ...).
      validation_prompts: prompts on which learning rates are chosen.
      test_prompts: held-out prompts, answered once.
      shares: further feedback models trained on these shares of the language feedback, with as
        many updates as the full one, each with its pairs and DPO arm (Figure 5 of the paper).
      variants: further ways to make the pairs, each with its DPO arm; keys of `VARIANTS`.
      stage: run just this stage.

    Returns:
      stage name -> summary.
    """
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ConfigError(f"variants has {unknown}; there are {', '.join(VARIANTS)}.")
    hosts.only_one("the digits experiment")
    workdir = Path(workdir)
    lab = Lab(
        workdir=workdir,
        mesh=make_mesh(**(mesh or {})),
        seed=seed,
        lengths=Lengths(**{**default_lengths(max_digits), **(lengths or {})}),
        wording=wording.WORDING,
        **(sampling or {}),
    )
    path = str(workdir)

    def records(split: str, count: int, offset: int = 0) -> Sequence:
        """`count` prompts of a split; offsets keep the uses of one split apart."""
        every = digits.evaluation_prompts(offset + count, seed, split, max_digits=max_digits)
        return Lazy(count, lambda i: every[offset + i])

    preference_records = records("train", preference_prompts)
    feedback_records = records("train", feedback_prompts, preference_prompts)
    validation = records("validation", validation_prompts)
    test = records("test", test_prompts)
    base, feedback_model = f"{path}/{BASE}", f"{path}/{FEEDBACK}"

    def answer(file: Path, of: Sequence, folder: str, greedy: bool = False) -> list[dict]:
        return lab.answer(
            file, world.prompt_examples(of), kind="answer",
            params=lab.load(folder)[1], base=base, greedy=greedy,
        )  # fmt: skip

    def tower_stage(folder: Path) -> dict:
        return pretrain_tower(
            folder / "model", workdir=workdir, mesh=lab.mesh, max_digits=max_digits,
            seed=lab.stream("tower"), model=model or {}, **(tower or {}),
        )  # fmt: skip

    def learn(folder: Path, start: str, shown: Sequence, training: Mapping) -> dict:
        examples = Lazy(len(shown), lambda i: shown[i].to_data_example((shown[i].target,)))
        return pipeline.train_model(
            folder, lab, "sft", base=f"{path}/{start}/model", examples=examples, **training
        )

    def shown_examples(use: str, count: int, **options: Any) -> Sequence:
        return digits.sft_examples(count, lab.stream(use), max_digits=max_digits, **options)

    def pretrain_stage(folder: Path) -> dict:
        revisions = round(pretrain_revisions * pretrain_examples)
        answers = pretrain_examples - revisions
        clean = shown_examples("clean", answers, mix={"answer": 1.0}, flaws=NO_FLAWS)
        told = shown_examples("told", revisions, mix={"revise": 1.0}, follow=1.0)
        both = Lazy(pretrain_examples, lambda i: clean[i] if i < answers else told[i - answers])
        return learn(folder, "tower", both, pretrain or {})

    def sft_stage(folder: Path) -> dict:
        options = {"n": 24_000, **(demonstrations or {})}
        shown = shown_examples("demonstrations", options.pop("n"), **options)
        figures = learn(folder, "pretrain", shown, sft or {})
        first = answer(folder / "validation.jsonl", validation, base)
        table = world.scores(validation, first)
        write_json(folder / "validation_scores.json", table)
        return {**figures, "mean": sum(table["mean"]) / len(table["mean"])}

    def collect_stage(folder: Path) -> dict:
        first, second = (
            answer(folder / f"response_{k}.jsonl", preference_records, base) for k in (1, 2)
        )
        return world.annotate(
            folder / "preferences.parquet", preference_records, first, second,
            annotator=annotator, source="initial", seed=lab.stream("annotators"), limit=pairs,
        )  # fmt: skip

    def feedback_stage(folder: Path, share: float = 1.0) -> dict:
        options = dict(feedback or {})
        if share < 1:  # less data, not less training
            options |= {"epochs": None, "steps": summary(workdir, "feedback")["steps"]}
        return pipeline.train_feedback_model(
            folder, lab, base=base, preferences=f"{path}/collect/preferences.parquet",
            template="AA_TI2T", share=share, **options,
        )  # fmt: skip

    def improve_stage(folder: Path, critic: str = feedback_model) -> dict:
        prompts = world.prompt_examples(feedback_records)
        # All feedback models criticise the same answers.
        first = answer(workdir / "improve/response.jsonl", feedback_records, base)
        said, refined = pipeline.self_improve(
            folder, lab, prompts, first, base=base, feedback_model=critic
        )
        made, counts = pipeline.make_pairs(folder / "pairs.parquet", prompts, first, refined, pairs)
        return {
            **counts,
            "truly": world.pair_truth(feedback_records, made),
            "feedback": world.feedback_quality(feedback_records, first, said),
        }

    def verified_stage(folder: Path) -> dict:
        prompts = world.prompt_examples(feedback_records)
        first, said, refined = improved("response", "critique", "refine")
        again = lab.answer(
            folder / "critique.jsonl", critique_prompts(prompts, refined, lab.wording),
            kind="critique", params=lab.load(feedback_model)[1], base=base,
        )  # fmt: skip
        before, after = ([world.complaints(c["text"]) for c in part] for part in (said, again))
        made, counts = pipeline.make_pairs(
            folder / "pairs.parquet", prompts, first, refined, pairs,
            keep=lambda i: after[i] < before[i],
        )  # fmt: skip
        return {**counts, "truly": world.pair_truth(feedback_records, made)}

    def likeliest_stage(folder: Path) -> dict:
        prompts = world.prompt_examples(feedback_records)
        first, said = improved("response", "critique")
        refined = lab.answer(
            folder / "refine.jsonl", refine_prompts(prompts, first, said, lab.wording),
            kind="refine", params=lab.load(base)[1], base=base, greedy=True,
        )  # fmt: skip
        made, counts = pipeline.make_pairs(folder / "pairs.parquet", prompts, first, refined, pairs)
        return {**counts, "truly": world.pair_truth(feedback_records, made)}

    def improved(*names: str) -> list[list[dict]]:
        return [read_lines(workdir / "improve" / f"{name}.jsonl") for name in names]

    def dpo_stage(folder: Path) -> dict:
        baseline = world.read_scores(workdir / "sft/validation_scores.json")

        def judge(cell: Path) -> dict:
            params = models.load(str(cell / "model"), dtype=lab.dtype)[1]
            prompts = world.prompt_examples(validation)
            found = lab.answer(
                cell / "validation.jsonl", prompts, kind="answer", params=params, base=base
            )
            line = world.summarise(world.scores(validation, found), baseline)
            return {"mean": line["mean"].estimate, "win_rate": line["win_rate"].estimate}

        return pipeline.train_arms(
            folder, lab, base=base, arms=arms(workdir, shares, variants), judge=judge, best="mean",
            **(dpo or {}),
        )  # fmt: skip

    def evaluate_stage(folder: Path) -> dict:
        return evaluate(folder, lab, test, base, feedback_model)

    def report_stage(folder: Path) -> dict:
        from aa_jax.llf.digits_report import write

        return write(workdir, test)

    variant_stages = {"verified": verified_stage, "likeliest": likeliest_stage}
    stages = [
        Stage("tower", "vision tower: learn to see single digits", tower_stage),
        Stage("pretrain", "base model: to read and to reckon", pretrain_stage, ("tower",)),
        Stage("sft", "initial model: SFT on imperfect demonstrations", sft_stage, ("pretrain",)),
        Stage("collect", "annotators compare and criticise its answers", collect_stage, ("sft",)),
        Stage("feedback", "feedback model: SFT on critiques", feedback_stage, ("collect",)),
        Stage("improve", "self-improvement: y, critique, y*", improve_stage, ("feedback",)),
        *(Stage(name, VARIANTS[name], variant_stages[name], ("improve",)) for name in variants),
        *(
            made
            for share in shares
            for made in _share_stages(share, path, feedback_stage, improve_stage)
        ),
        Stage("dpo", "DPO on binary pairs and on y* > y", dpo_stage, ("improve",)),
        Stage("evaluate", "held-out images, judged by the oracle", evaluate_stage, ("dpo",)),
        Stage("report", "report.html", report_stage, ("evaluate",)),
    ]
    return run_stages(workdir, stages, only=stage)


def percent(share: float) -> str:
    """A share as it stands in the names of stages and arms: 0.25 -> "25"."""
    return f"{100 * share:g}"


def _share_stages(share: float, path: str, train: Callable, improve: Callable) -> list[Stage]:
    """The two stages of a feedback model that saw a share of the feedback."""
    name = percent(share)
    trained, improved = f"feedback_{name}", f"improve_{name}"
    return [
        Stage(trained, f"feedback model on {name} % of the critiques",
              lambda folder: train(folder, share), ("improve",)),
        Stage(improved, f"self-improvement with it ({name} %)",
              lambda folder: improve(folder, f"{path}/{trained}/model"), (trained,)),
    ]  # fmt: skip


def default_lengths(max_digits: int) -> dict[str, int]:
    """Lengths that hold the world's texts, with room for what a model writes by mistake."""
    patches, more = max_digits**2, 2 * max(0, max_digits - 3)
    return {
        "answer_prompt": 21 + patches,
        "critique_prompt": 55 + patches + more,
        "refine_prompt": 87 + patches + more,
        "answer": 28 + more,
        "feedback": 40,
    }


def arms(
    workdir: Path, shares: Sequence[float] = (), variants: Sequence[str] = ()
) -> dict[str, Sequence]:
    """The preference examples of each DPO arm, read through the real dataset's templates.

    All arms are cut to as many pairs as the smallest has.
    """
    files = {
        "binary": ("AA_TI2T", "collect/preferences.parquet"),
        "llf": ("AA_TI2T_LLF", "improve/pairs.parquet"),
    }
    for name in variants:
        files[f"llf_{name}"] = ("AA_TI2T_LLF", f"{name}/pairs.parquet")
    for name in map(percent, shares):
        files[f"llf_{name}"] = ("AA_TI2T_LLF", f"improve_{name}/pairs.parquet")
    result = {}
    for arm, (template, file) in files.items():
        rows = sources.open_source(str(workdir / file))
        result[arm] = [templates.TEMPLATES[template].preference(row) for row in rows]
    count = min(map(len, result.values()))
    return {arm: examples[:count] for arm, examples in result.items()}


def evaluate(folder: Path, lab: Lab, test: Sequence, base: str, feedback_model: str) -> dict:
    """Answers the test prompts once per arm and grades them.

    Writes one JSON table of per-prompt scores per row of the result table (`scores/<row>.json`).

    Returns:
      row -> scores with intervals (mean, dimensions, words, win rate against the initial model).
    """
    prompts = world.prompt_examples(test)
    chosen = summary(lab.workdir, "dpo")["chosen"]
    folders = {"initial": base}
    for arm, lr in chosen.items():
        folders[arm] = pipeline.cell_model(lab.workdir / "dpo", arm, lr)
    answers: dict[str, list[dict]] = {}
    for name, model in folders.items():
        params = lab.load(model)[1]
        for greedy in (False, True):
            row = f"{name}_greedy" if greedy else name
            answers[row] = lab.answer(
                folder / f"{row}.jsonl", prompts, kind="answer",
                params=params, base=base, greedy=greedy,
            )  # fmt: skip
    for name, critic in (("trained", feedback_model), ("untrained", base)):
        _, answers[f"improved_{name}"] = pipeline.self_improve(
            folder, lab, prompts, answers["initial"],
            base=base, feedback_model=critic, name=f"_{name}",
        )  # fmt: skip
    (folder / "scores").mkdir(exist_ok=True)
    tables = {row: world.scores(test, found) for row, found in answers.items()}
    for row, table in tables.items():
        write_json(folder / "scores" / f"{row}.json", table)
    result = {}
    for row, table in tables.items():
        against = tables["initial_greedy" if row.endswith("_greedy") else "initial"]
        result[row] = {k: list(v) for k, v in world.summarise(table, against).items()}
    # The two arms against each other on the same prompts: sharper than two separate intervals.
    for suffix in ("", "_greedy"):
        first, second = (np.array(tables[f"{arm}{suffix}"]["mean"]) for arm in ("llf", "binary"))
        result[f"llf_against_binary{suffix}"] = {
            "mean_difference": list(paired_difference(first, second)),
            "win_rate": list(win_rate(first, second)),
        }
    return result
