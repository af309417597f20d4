"""Charts as pictures."""

import numpy as np
import pytest
from PIL import Image

from aa_jax import report


@pytest.mark.parametrize("kind", [report.Curves, report.Bars])
def test_charts_become_pictures(tmp_path, sections, kind):
    parts = [part for s in sections for part in getattr(s, "sections", [s])]
    for number, chart in enumerate(part for part in parts if isinstance(part, kind)):
        path = report.save_png(chart, tmp_path / f"{number}.png", size=(4.0, 2.0))
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape == (400, 800, 3)
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels.std() > 5
