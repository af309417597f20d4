"""The HTML file: complete, self-contained, well-formed, escaped, readable without eyes."""

import base64
import hashlib
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from aa_jax import report
from aa_jax.errors import DataError, MediaError
from aa_jax.report.html import el, prose
from aa_jax.report.style import CSS

VOID = {"img", "meta", "br", "input"}
ENVIRONMENT = {"device": "8 × test", "CPU cores": "2", "aa_jax": "0.1", "jax": "0.10"}


class Page(html.parser.HTMLParser):
    """Checks nesting while reading; collects elements and visible text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def write(tmp_path, sections, **kwargs):
    kwargs = {"environment": ENVIRONMENT, "command": "python launch/llf.py", **kwargs}
    path = report.write_report(tmp_path, "A <title> & more", sections, **kwargs)
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture
def full(tmp_path, sections):
    (tmp_path / "config.json").write_text(json.dumps({"optim": {"lr": 1e-6}, "steps": 2000}))
    return write(tmp_path, sections, summary="It **works**.", wall_seconds=512)


def test_header_and_appendix(full):
    source, page = full
    text = " ".join(page.text)
    for words in (
        "A <title> & more", "python launch/llf.py", "8 × test, 2 CPU cores", "8 min 32 s", "UTC",
        "aa_jax 0.1, jax 0.10", "Configuration", "optim.lr", "1e-06", "Environment",
    ):  # fmt: skip
        assert words in text
    assert "<strong>works</strong>" in source


def test_nothing_is_loaded_from_outside(full):
    source, page = full
    for attrs in page.all("img", "audio", "video", "source", "script", "link", "iframe", "object"):
        assert attrs.get("src", "data:").startswith("data:")
        assert "href" not in attrs
    assert "url(" not in source and "@import" not in source
    links = [attrs["href"] for attrs in page.all("a")]
    assert all(link.startswith(("#", "https://arxiv.org/")) for link in links)


def test_policy_admits_only_our_script(full):
    source, page = full
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    (script,) = re.findall(r"<script>(.*?)</script>", source, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_everything_is_escaped(full):
    source, page = full
    assert "<script>alert(1)" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in source
    assert "no critique <b>&" in page.text
    assert len(page.all("script")) == 1 and not page.all("b>")


def test_accessible(full):
    _, page = full
    assert page.all("html")[0]["lang"] == "en"
    images = page.all("img")
    assert len(images) == 3 and all(image["alt"] for image in images)
    assert images[0]["alt"] == "image of sample 1"
    assert [a["alt"] for a in images[1:]] == [
        "image of sample 2, 1 of 3",
        "image of sample 2, 2 of 3",
    ]
    assert page.all("audio")[0]["aria-label"] == "the tones of 7 and 8"
    charts = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(charts) == 4
    assert "Line chart, Preference accuracy" in charts[1]["aria-label"]
    assert "LLF from 0.5 to 0.873" in charts[1]["aria-label"]
    assert all("aria-hidden" in a for a in page.all("svg") if a not in charts)
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))


def test_contents_link_to_sections(full):
    _, page = full
    ids = [attrs["id"] for attrs in page.all("section")]
    assert len(ids) == len(set(ids))
    assert [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")] == ids


def test_series_differ_by_more_than_colour(full):
    source, page = full
    styles = [a["class"] for a in page.all("path") if a["class"].startswith("line ")]
    assert {"line s0", "line s1", "line s2", "line s3", "line s4"} <= set(styles)
    dashes = re.findall(r"\.line\.s\d\{stroke-dasharray:([^}]+)\}", source)
    assert len(dashes) == len(set(dashes)) == 7  # the eighth, s0, is solid


def test_curve_coordinates(tmp_path):
    curve = report.Curves("c", {"a": ([0, 5, 10], [0.0, 1.0, 2.0])}, smooth=1)
    source, page = write(tmp_path, [curve])
    (line,) = [a["d"] for a in page.all("path") if a["class"] == "line s0" and len(a["d"]) > 10]
    # y runs from 0 to 2.1 (five per cent of air), x from 0 to 10, on a drawing of 1000 x 1000.
    assert line == "M0.0 1000.0L500.0 523.8L1000.0 47.6"


def test_gaps_break_the_line_and_lone_points_are_dots(tmp_path):
    y = np.r_[np.ones(30), np.nan, 2.0, np.nan, np.ones(30)]
    curve = report.Curves("c", {"a": (np.arange(y.size), y)}, smooth=1)
    source, page = write(tmp_path, [curve])
    (line,) = [a["d"] for a in page.all("path") if a["class"] == "line s0" and len(a["d"]) > 10]
    assert line.count("M") == 3
    (dots,) = [a["d"] for a in page.all("path") if a["class"] == "dots s0"]
    assert dots.count("h.01") == 1
    assert "a: 2 points cannot be drawn." in " ".join(page.text)


def test_bars_place_intervals_and_say_what_they_mean(tmp_path):
    bars = report.Bars(
        "b",
        [report.Bar("up", 0.8, 0.7, 0.9), report.Bar("down", 0.2, 0.1, 0.3),
         report.Bar("even", 0.5, 0.4, 0.6), report.Bar("bare", 0.25)],
        reference=0.5, percent=True,
    )  # fmt: skip
    _, page = write(tmp_path, [bars])
    styles = [(a["class"], a["style"]) for a in page.all("i")]
    assert ("fill", "left:0.00%;width:80.00%") in styles
    assert ("whisker", "left:70.00%;width:20.00%") in styles
    assert styles.count(("mark", "left:50.00%")) == 4
    spoken = [a["aria-label"] for a in page.all("span") if "aria-label" in a]
    assert spoken == ["above the reference", "below the reference"]
    assert [a.get("class") for a in page.all("li")][-5:] == ["above", "below", "even", None, "axis"]
    assert "70.0\u00a0% to 90.0\u00a0%" in " ".join(page.text)


def test_small_images_are_enlarged_by_whole_numbers(tmp_path):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    wide = Image.new("RGB", (40, 8))
    samples = report.Samples("s", ["i", "j"], [[image, wide]])
    _, page = write(tmp_path, [samples])
    small, strip = page.all("img")
    assert (small["width"], small["height"], small["class"]) == ("112", "112", "pixels")
    assert (strip["width"], strip["height"]) == ("240", "48")
    data = base64.b64decode(small["src"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_large_images_are_reduced(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((2000, 1000), 50).convert("RGB").save(buffer, "PNG")
    _, page = write(tmp_path, [report.Samples("s", ["photo"], [[buffer.getvalue()]])])
    (image,) = page.all("img")
    assert image["src"].startswith("data:image/jpeg")
    data = base64.b64decode(image["src"].split(",")[1])
    assert Image.open(io.BytesIO(data)).size == (768, 384)
    assert len(data) < buffer.tell() / 4


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"plain text", "no image, audio or video"), (b"\x89PNG broken", "cannot be decoded")],
)
def test_unreadable_media(tmp_path, data, words):
    samples = report.Samples("s", ["clip"], [[data]])
    with pytest.raises(MediaError, match=words):
        write(tmp_path, [samples])
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("head", "tag", "mime"),
    [
        (b"RIFF....WAVEfmt ", "audio", "audio/wav"),
        (b"OggS", "audio", "audio/ogg"),
        (b"ID3", "audio", "audio/mpeg"),
        (b"....ftypisom", "video", "video/mp4"),
        (b"\x1aE\xdf\xa3", "video", "video/webm"),
    ],
)
def test_audio_and_video(tmp_path, head, tag, mime):
    _, page = write(tmp_path, [report.Samples("s", ["clip"], [[head + b"data"]])])
    (clip,) = page.all(tag)
    assert clip["src"].startswith(f"data:{mime};base64,") and "controls" in clip


def test_numeric_columns_are_found_and_sortable(tmp_path):
    rows = [
        ["a1", 1, "2.31 [2.2, 2.4]", "\u22121.5 %", True],
        ["2b", None, "50 (by definition)", "3e-4", False],
    ]
    _, page = write(tmp_path, [report.Table("t", list("abcde"), rows)])
    heads = [attrs for attrs in page.all("th") if attrs["scope"] == "col"]
    assert [attrs.get("class") for attrs in heads] == [None, "number", "number", "number", None]
    values = [attrs.get("data-value") for attrs in page.all("td")][:10]
    assert values == [None, "1.0", "2.31", "-1.5", None, None, None, "50.0", "0.0003", None]


def test_rows_must_fit_their_columns(tmp_path):
    for kind in (report.Table, report.Samples):
        with pytest.raises(DataError, match="row 1 has 1 cells for 2 columns"):
            write(tmp_path, [kind("t", ["a", "b"], [[1, 2], [3]])])
    with pytest.raises(DataError, match="no section dict; it has Text"):
        report.page._render({})


def test_empty_sections_say_so(tmp_path):
    source, page = write(
        tmp_path,
        [
            report.Curves("c", {"a": ([], [])}),
            report.Curves("d", {"a": ([1], [float("nan")])}),
            report.Curves("e", {}),
            report.Bars("b", []),
            report.Samples("s", ["a"], []),
            report.Table("t", ["a"], []),
        ],
    )
    text = " ".join(page.text)
    assert text.count("No finite values to draw.") == 4 and "No samples." in text


def test_degenerate_curves_draw(tmp_path):
    curves = [
        report.Curves("one point", {"a": ([3], [0.0])}),
        report.Curves("constant", {"a": ([1, 2], [5.0, 5.0])}),
        report.Curves("log", {"a": ([0, 1, 10], [-1.0, 1e-9, 1e9])}, log_x=True, log_y=True),
        report.Curves("log constant", {"a": ([1, 2], [5.0, 5.0])}, log_y=True),
        report.Curves("negative", {"a": ([-2, -1], [-5.0, -6.0])}),
        report.Curves("many", {f"s{i}": ([0, 1], [i, i]) for i in range(12)}),
        report.Curves("half a band", {"a": ([0, 1], [1.0, np.nan], [0.5, np.nan], [2.0, np.nan])}),
    ]
    source, _ = write(tmp_path, curves)
    assert "No finite values" not in source
    assert "nan" not in re.sub(r">nan<", "", source)


def test_report_is_replaced_in_one_step(tmp_path):
    write(tmp_path, [report.Text("the old words")])
    source, _ = write(tmp_path, [report.Text("the new words")])
    assert "the new words" in source and "the old words" not in source
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_environment_and_command_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch/llf.py", "--config=a b.py"])
    _, page = write(tmp_path, [], environment=None, command=None)
    assert "python launch/llf.py '--config=a b.py'" in page.text
    monkeypatch.setattr("sys.argv", ["/usr/lib/ipykernel_launcher.py", "-f", "/home/x/secret.json"])
    _, page = write(tmp_path, [], environment=None, command=None)
    assert "Command" not in page.text


@pytest.mark.parametrize(
    ("text", "markup"),
    [
        ("a\n\nb", "<p>a</p><p>b</p>"),
        ("a\nb", "<p>a b</p>"),
        ("a:\n- x\n- y\nz", "<p>a:</p><ul><li>x</li><li>y</li></ul><p>z</p>"),
        ("### T\nx", "<h3>T</h3><p>x</p>"),
        ("**b** *i* `c*d*`", "<p><strong>b</strong> <em>i</em> <code>c*d*</code></p>"),
        ("2 * 3 * 4", "<p>2 * 3 * 4</p>"),
        ("`<b>`<i>", "<p><code>&lt;b&gt;</code>&lt;i&gt;</p>"),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>"),
        ("[x](https://a.b)", '<p><a href="https://a.b" rel="noreferrer">x</a></p>'),
        ('[x](https://a.b"onclick=1)',
         '<p><a href="https://a.b&quot;onclick=1" rel="noreferrer">x</a></p>'),
    ],
)  # fmt: skip
def test_prose(text, markup):
    assert prose(text) == markup


def test_elements():
    assert el("td", 1 < 2, "<&", class_="a", hidden=None) == '<td class="a">True&lt;&amp;</td>'
    assert el("img", alt='"', loading=True) == '<img alt="&quot;" loading>'


def luminance(colour):
    """Relative luminance, WCAG 2.2."""
    colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_every_theme():
    blocks = re.findall(r":root\{([^}]*)\}", CSS)
    assert len(blocks) == 3  # light, dark, print
    for block in blocks:
        colours = dict(re.findall(r"--(\w+):(#\w+)", block))
        for names, backgrounds, least in (
            (("ink", "soft", "link"), ("page", "card"), 4.5),  # WCAG 1.4.3, text
            (("ink",), ("mark",), 4.5),
            ((*(f"s{i}" for i in range(8)), "good", "bad", "accent", "even"), ("page",), 3.0),
        ):
            for name in names:
                for background in backgrounds:
                    pair = sorted((luminance(colours[name]), luminance(colours[background])))
                    ratio = (pair[1] + 0.05) / (pair[0] + 0.05)
                    assert ratio >= least, (name, background, ratio)
