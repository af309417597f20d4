"""The plans that were made, as the Markdown table of docs/plan.md.

python benchmarks/plan_table.py                    # of benchmarks/results/plan.json
python benchmarks/plan_table.py plans.json         # of what launch/plan.py --out wrote
"""

import argparse
import json
from pathlib import Path

from aa_jax.plan.tables import markdown

RESULTS = Path(__file__).parent / "results" / "plan.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS)
    print(markdown(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
