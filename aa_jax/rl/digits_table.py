"""The result table of `aa_jax.rl.digits_run` over several seeds."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aa_jax.errors import DataError
from aa_jax.eval.statistics import across_seeds, wins
from aa_jax.llf.stages import summary

COLUMNS = ("arm", "reward model's score", "KL, nats", "true mean, T = 1", "win rate %, T = 1",
           "win rate %, greedy")  # fmt: skip


def table(folders: Sequence[Path]) -> str:
    """Markdown: scores and KL per seed, the rest with 95 % intervals over seeds and prompts.

    How long answers are is counted in words or in digits drawn; runs with a cost have its mean.
    Arms that some of the runs lack are named below the table.

    Args:
      folders: run directories, one per seed, of the same config.

    Raises:
      DataError: a run that is not finished.
    """
    for folder in folders:
        if summary(folder, "evaluate_rl") is None:
            raise DataError(
                f"{folder} holds no finished run of launch/rl.py on the digits world; run the same "
                f"command with --workdir {folder} again to finish it."
            )
    found = [summary(folder, "evaluate_rl") for folder in folders]
    cells = [summary(folder, "rl") for folder in folders]

    def scores(folder: Path, row: str) -> dict[str, np.ndarray]:
        values = json.loads((folder / f"evaluate_rl/{row}_scores.json").read_text())
        return {name: np.array(column) for name, column in values.items()}

    def won(row: str, base: str) -> str:
        pairs = [(scores(f, row)["mean"], scores(f, base)["mean"]) for f in folders]
        return across_seeds([wins(a, b) for a, b in pairs]).format(1, 100)

    costs = "cost" in scores(folders[0], "initial")
    size, title = "words", "words"
    if "drawn" in scores(folders[0], "initial"):
        size, title = "drawn", "digits drawn"
    columns = (*COLUMNS, title, "mean cost, T = 1") if costs else (*COLUMNS, title)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    rows = list(dict.fromkeys(name for one in found for name in one))
    rows = [name for name in rows if not name.endswith("_greedy")]
    partly = [row for row in rows if any(row not in one for one in found)]
    for row in (row for row in rows if row not in partly):
        arm = row.removesuffix("_by_reward")
        by = "reward" if row != arm else "oracle"
        kls = [
            f"{cell['kl']:.1f}"
            for one in cells for cell in one["cells"]
            if cell["arm"] == arm and cell["lr"] == one["chosen"][by][arm]
        ]  # fmt: skip
        mean = across_seeds([scores(folder, row)["mean"] for folder in folders])
        length = np.mean([scores(folder, row)[size].mean() for folder in folders])
        paid = " / ".join(f"{one[row]['reward']:.2f}" for one in found)
        lines.append(
            f"| {row} | {paid} | {' / '.join(kls)} | {mean.format(3)} | {won(row, 'initial')} | "
            f"{won(row + '_greedy', 'initial_greedy')} | {length:.1f} |"
        )
        if costs:
            lines[-1] += f" {across_seeds([scores(f, row)['cost'] for f in folders]).format(3)} |"
    if partly:
        lines += ["", f"Not in every run, and left out: {', '.join(partly)}."]
    return "\n".join(lines)
