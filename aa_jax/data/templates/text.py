"""Templates of text-to-text sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from aa_jax.data.example import Message, message
from aa_jax.data.templates.base import Columns, Side, Template, column, text_column

# The annotation columns go by several names across the card revisions of the dataset.
CRITIQUES: tuple[Columns, Columns] = tuple(
    tuple(
        pattern.format(k)
        for pattern in (
            "text_critique_{}",
            "text_{}_feedback",
            "text_feedback_{}",
            "critique_{}",
            "feedback_{}",
            "response_{}_feedback",
            "response_{}_critique",
        )
    )
    for k in (1, 2)
)
REFINEMENTS: tuple[Columns, Columns] = tuple(
    tuple(pattern.format(k) for pattern in ("text_refinement_{}", "refinement_{}")) for k in (1, 2)
)
QUESTION: Columns = ("question", "prompt")
PAIR_12 = (Side(("response_1",)), Side(("response_2",)))
PAIR_01 = (Side(("response_0",)), Side(("response_1",)))
CHOSEN_REJECTED = (Side(("chosen",)), Side(("rejected",)))

# Every text-answer subset of align-anything: two responses, a label in {1, 2}, feedback for each.
AA_TEXT = dict(
    question=QUESTION,
    response=Side(("response", "answer")),
    pair=PAIR_12,
    label=("overall_response",),
    critiques=CRITIQUES,
    refinements=REFINEMENTS,
    meta=("overall_response", "overall_textfeedback"),
)

# Self-improvement output: a response, feedback on it, and the refined response, y* over y.
LLF = dict(
    question=QUESTION,
    pair=(Side(("refinement", "refined_response")), Side(("response", "output_text"))),
    critiques=(("critique", "feedback"),),
    critiqued=(Side(("response", "output_text")),),
)

MATH_SYSTEM = (
    "You solve mathematical problems by reasoning step by step. First think inside <think> "
    "</think>, then give only the final answer in LaTeX, wrapped in $...$, inside <answer> "
    "</answer>. Your output starts with <think> and ends with </answer>, like this: "
    "<think> Since $1+1=2$, the answer is $2$. </think><answer> $2$ </answer>"
)


@dataclasses.dataclass(frozen=True)
class Instruction(Template):
    """Alpaca: an instruction with an optional input."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        parts = text_column(row, ("instruction",), "prompt"), text_column(row, ("input",))
        return " ".join(part for part in parts if part.strip())


@dataclasses.dataclass(frozen=True)
class Correction(Template):
    """Aligner: question and answer in, corrected answer out."""

    def prompt_text(self, row: Mapping[str, Any]) -> str:
        question, answer = (text_column(row, (name,), "prompt") for name in ("question", "answer"))
        return f"##QUESTION: {question} ##ANSWER: {answer}"

    def _response(self, row, side, media) -> Message:
        response = super()._response(row, side, media)
        return message("assistant", f"##CORRECTION: {response.text}")


@dataclasses.dataclass(frozen=True)
class Thoughts(Template):
    """O1-style: a list of thoughts, then the answer.

    Attributes:
      marks: (begin, between, end) of the thoughts.
    """

    marks: tuple[str, str, str] = ("<think>", "", "</think>")

    def _response(self, row, side, media) -> Message:
        begin, between, end = self.marks
        thoughts = []
        for thought in column(row, ("thoughts",), "reasoning"):
            title = f"**{thought['title']}**\n" if thought.get("title") else ""
            thoughts.append(f"{title}{thought['content']}\n{between}\n")
        answer = super()._response(row, side, media)
        return message("assistant", f"{begin}{''.join(thoughts)}{end}{answer.text}")


@dataclasses.dataclass(frozen=True)
class SafeOrNot(Template):
    """PKU-SafeRLHF for cost models: the *less safe* response first, as the cost ranks it higher.

    ``meta["signs"]`` = 1 for an unsafe response, -1 for a safe one (Safe RLHF, section 3.1).
    """

    def order(self, row: Mapping[str, Any]) -> tuple[int, int]:
        safer, other = super().order(row)
        return other, safer

    def extra(self, row: Mapping[str, Any], order: tuple[int, int] | None) -> dict[str, Any]:
        if order is None:
            return super().extra(row, order)
        safe = [column(row, (f"is_response_{i}_safe",), "safety label") for i in order]
        return {**super().extra(row, order), "signs": tuple(-1.0 if s else 1.0 for s in safe)}


TEXT_TEMPLATES: dict[str, Template] = {
    "AA_T2T": Template(**AA_TEXT),
    "AA_T2T_LLF": Template(**LLF),
    "PKUSafeRLHF": Template(
        pair=PAIR_01,
        label=("better_response_id",),
        labels=(0, 1),
        meta=("is_response_0_safe", "is_response_1_safe", "safer_response_id"),
    ),
    "PKUSafeRLHF_Cost": SafeOrNot(pair=PAIR_01, label=("safer_response_id",), labels=(0, 1)),
    "Alpaca": Instruction(response=Side(("output",))),
    "Aligner": Correction(response=Side(("correction",))),
    "O1_T2T": Thoughts(response=Side(("answer",))),
    "Math-Zero-RL": Template(
        question=("prompt", "question"),
        response=Side(("answer",)),
        system=MATH_SYSTEM,
        meta=("answer", "level"),
    ),
    "TLDR": Template(
        question=("content", "prompt"),
        response=Side(("summary",)),
        clean="Please summarize the following text: {}".format,
    ),
    "GSM8K": Template(question=("question",), response=Side(("answer",)), meta=("answer",)),
    "chosen_rejected": Template(
        question=QUESTION, response=Side(("response", "chosen")), pair=CHOSEN_REJECTED
    ),
}
