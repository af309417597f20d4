"""The table of recipes: how examples become batches × which loss × which model roles."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aa_jax import losses, objectives
from aa_jax.errors import ConfigError
from aa_jax.losses.unpaired import needs_kl
from aa_jax.models import Model, heads


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One row of `RECIPES`.

    Attributes:
      task: how a dataset row is read, see `aa_jax.data.dataset.Dataset`.
      layout: of the batch, see `aa_jax.data.collate`.
      objective: `(model, **options) -> objective`.
      reference: `options -> bool`, whether the loss compares with the log-probs of the initial
        model.
      twin: `options -> name`, under which the batch holds a twin of every example ("mismatched":
        its prompt with the response of another, "plain": its response without the judgment in the
        prompt), or None.
      extras: `options -> names` of columns of the examples' meta data that the loss reads.
      head: `(model, key, options) -> parameters` of a head: those that train are a score model's,
        {"model", "score_head"}.
    """

    task: str
    layout: str
    objective: Callable[..., Callable]
    reference: Callable[[Mapping[str, Any]], bool] = lambda options: False
    twin: Callable[[Mapping[str, Any]], str | None] = lambda options: None
    extras: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda options: ()
    head: Callable[..., Any] | None = None


def _score_head(model: Model, key: Any, options: Mapping[str, Any]) -> Any:
    return heads.init_score_head(model, key)


def _dimensions(options: Mapping[str, Any]) -> Sequence[str]:
    return options.get("dimensions", objectives.GRADED)


_PREFERENCE = Recipe(
    "preference",
    "preference",
    objectives.preference,
    reference=lambda options: losses.needs_reference(options.get("variant", "sigmoid")),
)

RECIPES: dict[str, Recipe] = {
    "sft": Recipe("supervised", "supervised", objectives.sft),
    "feedback": Recipe("feedback", "supervised", objectives.sft),
    "preference": _PREFERENCE,
    "dpo": _PREFERENCE,
    "kto": Recipe(
        "unpaired",
        "supervised",
        objectives.kto,
        reference=lambda options: True,
        twin=lambda options: "mismatched" if needs_kl(options.get("variant", "kto")) else None,
        extras=lambda options: ("label",),
    ),
    "cut": Recipe(
        "judgment",
        "supervised",
        objectives.cut,
        twin=lambda options: "plain",
        extras=lambda options: ("negative",),
    ),
    "reward": Recipe("preference", "preference", objectives.reward, head=_score_head),
    "cost": Recipe(
        "preference",
        "preference",
        objectives.cost,
        extras=lambda options: ("signs",),
        head=_score_head,
    ),
    "graded": Recipe(
        "graded",
        "supervised",
        objectives.graded,
        extras=lambda options: tuple(f"{name}_rate" for name in _dimensions(options)),
        head=lambda model, key, options: heads.init_grade_head(
            model, key, len(_dimensions(options))
        ),
    ),
}


def find_recipe(name: str) -> Recipe:
    """A recipe by name.

    Raises:
      ConfigError: there is none of that name; lists those there are.
    """
    if name not in RECIPES:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}.")
    return RECIPES[name]
