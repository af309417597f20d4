"""The digits world: handwritten digits, layered instructions, and an oracle that knows the truth.

No download. Tasks (:mod:`tasks`), answers (:mod:`responses`), feedback (:mod:`feedback`), grading
(:mod:`oracle`) and annotators (:mod:`annotators`) do not know how the digits reach the model; what
is shown is made in :mod:`images` and carried by ``Scene``. Rows, prompts and the processor folder
make it a dataset and a checkpoint folder like any other.
"""

from aa_jax.data.digits.annotators import (
    AGREEMENT,
    Annotator,
    Pair,
    accuracy,
    agreement,
    calibrated,
    demonstration_pairs,
)
from aa_jax.data.digits.examples import (
    MIX,
    EvaluationPrompts,
    Example,
    SftExamples,
    evaluation_prompts,
    sft_examples,
)
from aa_jax.data.digits.feedback import (
    Action,
    Diagnosis,
    Feedback,
    parse_feedback,
    parse_refinement,
    random_feedback,
)
from aa_jax.data.digits.images import Digits, load_digits, png_bytes, render_strip
from aa_jax.data.digits.oracle import (
    DIMENSIONS,
    INFORMATIVE,
    Grade,
    apply_refinement,
    feedback_accuracy,
    grade,
    overall,
    prefer,
    true_feedback,
)
from aa_jax.data.digits.responses import (
    Item,
    Response,
    parse,
    perfect_response,
    render,
    sample_response,
)
from aa_jax.data.digits.rows import (
    preference_columns,
    preference_row,
    preference_rows,
    sft_rows,
    write_parquet,
)
from aa_jax.data.digits.scenes import Scene, sample_scene
from aa_jax.data.digits.tasks import FACTS, FORMS, Task, parse_question, sample_task
from aa_jax.data.digits.tokenizer import vocabulary, write_processor

__all__ = [
    "AGREEMENT",
    "Action",
    "Annotator",
    "DIMENSIONS",
    "Diagnosis",
    "Digits",
    "EvaluationPrompts",
    "Example",
    "FACTS",
    "FORMS",
    "Feedback",
    "Grade",
    "INFORMATIVE",
    "Item",
    "MIX",
    "Pair",
    "Response",
    "Scene",
    "SftExamples",
    "Task",
    "accuracy",
    "agreement",
    "apply_refinement",
    "calibrated",
    "demonstration_pairs",
    "evaluation_prompts",
    "feedback_accuracy",
    "grade",
    "load_digits",
    "overall",
    "parse",
    "parse_feedback",
    "parse_question",
    "parse_refinement",
    "perfect_response",
    "png_bytes",
    "prefer",
    "preference_columns",
    "preference_row",
    "preference_rows",
    "random_feedback",
    "render",
    "render_strip",
    "sample_response",
    "sample_scene",
    "sample_task",
    "sft_examples",
    "sft_rows",
    "true_feedback",
    "vocabulary",
    "write_parquet",
    "write_processor",
]
