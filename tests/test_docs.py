"""What the documents point at exists."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "aa_jax/**/*.md", "kernels/**/*.md", "launch/**/*.md",
                    "configs/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)  # fmt: skip


def missing_targets(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    targets = [link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    missing = {target for target in targets if not (path.parent / target).exists()}
    named = r"\b(?:configs|launch|benchmarks|docs|kernels)/[\w/.-]+\.(?:py|md|ipynb|sh)\b"
    for target in re.findall(named, text):
        if not any((folder / target).exists() for folder in (ROOT, path.parent, ROOT / "aa_jax")):
            missing.add(target)
    return sorted(missing)


def test_links_and_named_files_exist():
    wrong = {path.relative_to(ROOT).as_posix(): missing_targets(path) for path in DOCUMENTS}
    assert not {path: missing for path, missing in wrong.items() if missing}
