"""The page: in one piece, small, with nothing in it that a name could break; and in a real Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_zoo import factors, write_adapter, write_base
from chromium import Browser, present
from safetensors.torch import save_file

import loramerge as lm
from loramerge.analysis.page import compact, embedded, page

HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "</script x=<b>bold</b",
    "<img src=x onerror=alert(1)>",
    "{{data}} {{script}} $& \\u003c",
    "<!--<script>",
    "\u2028line\u2029 \u202e \x1b[31m",
    "a'b\"c&amp;",
)
RANKS = {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.mlp.up_proj": 9, "model.layers.1.self_attn.q_proj": 2}

in_chromium = pytest.mark.skipif(not present(), reason="no Chromium with its driver here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, their base, and the page of them."""
    folder = tmp_path_factory.mktemp("page")
    write_base(folder / "base")
    for seed in (1, 2):
        write_adapter(folder / f"lora-{seed}", factors(seed, RANKS))
    lm.analyze([folder / "lora-1", folder / "lora-2"], base=folder / "base", html=folder / "page.html")
    return folder


def hostile_adapter(folder: Path) -> Path:
    """Modules whose names are markup."""
    folder.mkdir()
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for name in HOSTILE:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(3, 8, generator=g)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(5, 3, generator=g)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["x"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class _Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str | None]] = {}
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)
        if tag == "script":
            self.scripts.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, text: str) -> None:
        if self._inside:
            self.scripts[-1] += text


def test_names_stay_text(tmp_path: Path) -> None:
    lm.analyze(hostile_adapter(tmp_path / "<b>&<script>"), html=tmp_path / "page.html")
    found = _Elements((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert len(found.scripts) == 2 and not {"img", "b"} & set(found.tags)
    names = {row["name"] for row in json.loads(found.scripts[0])["modules"]}
    assert names == set(HOSTILE)


def test_the_page_asks_the_network_for_nothing(folder: Path) -> None:
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    found = _Elements(text)
    assert found.attributes["href"] == ["data:,", "#modules"]
    assert "src" not in found.attributes and "srcset" not in found.attributes
    assert "fetch(" not in text and "XMLHttpRequest" not in text and "innerHTML" not in text
    policy = next(c for c in found.attributes["content"] if c and "default-src" in c)
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_numbers_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError):
        embedded([float("nan")])


def big_document(modules: int, adapters: int, rank: int) -> dict[str, Any]:
    """As an analysis of large adapters with a base gives it; noise, which no number format makes small."""
    g = torch.Generator().manual_seed(0)
    grid = list(range(1, 25))
    noise: list[list[float]] = torch.rand(24, 24, generator=g, dtype=torch.float64).tolist()

    def table() -> list[list[float]]:
        return noise  # bytes in the page, whatever they are

    def update() -> dict[str, Any]:
        values = torch.rand(rank, generator=g, dtype=torch.float64).sort(descending=True).values.tolist()
        line = {"rank": 1, "update": values[0], "base": values[1], "random": values[2]}
        return {
            "stored_rank": rank,
            "rank_90": 3,
            "entropy_rank": values[0],
            "norm": values[1],
            "singular_values": values,
            "relative_norm": values[2],
            "amplification": {"factor": values[3], "over_chance": values[4], "table": [line] * 7},
            "retention": {"keep": values[5]},
            "base_directions": {"i": grid, "j": grid, "left": table(), "right": table()},
        }

    pairs = [(a, b) for a in range(adapters) for b in range(a + 1, adapters)]
    rows = [
        {
            "module": f"model.layers.{k // 7}.some_block.some_projection_{k % 7}",
            "shape": [4096, 11008],
            "updates": [update() for _ in range(adapters)],
            "pairs": [
                {
                    **{"a": a, "b": b, "cosine": 0.123456, "cancelled": 0.3, "sign_conflict": 0.5},
                    "phi": {
                        s: {"i": grid, "j": grid, "phi": table(), "dimension": 4096}
                        for s in ("left", "right", "A", "B")
                    },
                }
                for a, b in pairs
            ],
        }
        for k in range(modules)
    ]
    return {"adapters": [None] * adapters, "base": {}, "pairs": [{"a": a, "b": b} for a, b in pairs], "modules": rows}


@pytest.mark.parametrize("adapters", [2, 3])
def test_224_modules_stay_below_3_mb(adapters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    document = big_document(224, adapters, 64)
    from loramerge.analysis import page as module

    for name in ("_adapter", "_base", "_pair", "_skipped"):
        monkeypatch.setattr(module, name, lambda data: [])
    document["adapters"] = [{"source": f"lora-{k}"} for k in range(adapters)]
    document["summary"] = []
    text = page(document, "0")
    assert 500_000 < len(text.encode()) < 3_000_000
    tables = compact(document)["modules"][5]["phi"]
    assert all(len(t["left"]["i"]) >= 10 for t in tables)


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module", params=[(1280, False), (400, True)], ids=["wide, light", "narrow, dark"])
def browser(request: pytest.FixtureRequest, folder: Path) -> Iterator[Browser]:
    width, dark = request.param
    with Browser(width, 900, dark) as browser:
        yield browser


@in_chromium
def test_it_opens_from_disk_without_a_word_in_the_console(browser: Browser, folder: Path, tmp_path: Path) -> None:
    browser.open(folder / "page.html")
    assert browser.log() == []
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    # Nothing is wider than the window but what scrolls by itself.
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    dark = browser.run("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark is browser.dark
    count = "return [document.querySelectorAll('#table tbody tr').length, document.querySelectorAll('canvas').length]"
    rows, heats = browser.run(count)
    assert (rows, heats) == (len(RANKS), 4 + 4 + 2 * 2)
    # Pictures are drawn: more than one colour in the first heat map.
    pixels = browser.run(
        "var c = document.querySelector('canvas'), seen = {};"
        "var d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "for (var k = 0; k < d.length; k += 4) { seen[[d[k], d[k + 1], d[k + 2]].join()] = 1; }"
        "return Object.keys(seen).length"
    )
    assert pixels > 10
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


@in_chromium
def test_the_table_sorts_by_keyboard(browser: Browser, folder: Path) -> None:
    browser.open(folder / "page.html")
    column = "return Array.from(document.querySelectorAll('#table tbody tr')).map(r => Number(r.cells[3].textContent))"
    sort = "return document.querySelectorAll('#table thead th')[3].getAttribute('aria-sort')"
    browser.run("document.getElementById('filter').focus()")
    browser.press("Tab", "Tab", "Tab", "Tab", "Tab")  # the region that scrolls, then four headers
    assert browser.run("return document.activeElement.textContent") == "size 1"
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press("Enter")
    assert browser.run(sort) == "descending"
    falling = browser.run(column)
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == len(RANKS)
    browser.press("Enter")
    assert browser.run(sort) == "ascending"
    assert browser.run(column) == falling[::-1]
    marked = browser.run("return document.querySelectorAll('#table [aria-sort]').length")
    assert (marked, browser.log()) == (1, [])


@in_chromium
def test_modules_are_chosen_and_read_out_by_keyboard(browser: Browser, folder: Path) -> None:
    browser.open(folder / "page.html")
    name = "return document.querySelector('#module h3').textContent"
    before = browser.run(name)
    browser.run("document.querySelector('#map button[tabindex=\"0\"]').focus()")
    browser.press("Right", "Down", "Enter")
    after = browser.run(name)
    assert before in RANKS and after in RANKS
    assert browser.run("return document.querySelector('#map [aria-pressed=true]').title").startswith(after)
    browser.run("document.querySelector('#table tbody tr:last-child button').focus()")
    browser.press("Enter")
    assert browser.run("return document.activeElement.id") == "h-module"
    assert browser.run(name) == browser.run(
        "return document.querySelector('#table tbody tr:last-child button').textContent"
    )
    browser.run("document.querySelector('#pairs canvas').focus()")
    browser.press("Left", "Down")
    told = browser.run("return document.querySelector('#pairs .readout').textContent")
    assert re.fullmatch(r"i = 8, j = 8: 0\.\d{3} \(chance 0\.\d+\)", told), told
    assert browser.log() == []


@in_chromium
def test_the_theme_can_be_changed_and_names_filtered(browser: Browser, folder: Path) -> None:
    browser.open(folder / "page.html")
    back = "return getComputedStyle(document.body).backgroundColor"
    was = browser.run(back)
    browser.run("document.getElementById('theme').focus()")
    browser.press("Enter")
    assert browser.run(back) != was
    assert browser.run("return document.getElementById('theme').textContent") == ("Dark" if browser.dark else "Light")
    browser.run("document.getElementById('filter').focus()")
    browser.press(*"mlp")
    assert browser.run("return document.getElementById('shown').textContent") == "1 of 3 modules"
    assert browser.log() == []


@in_chromium
def test_hostile_names_are_shown_and_do_nothing(browser: Browser, tmp_path: Path) -> None:
    lm.analyze(hostile_adapter(tmp_path / "lora"), html=tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    names = browser.run("return Array.from(document.querySelectorAll('#table td:first-child')).map(c => c.textContent)")
    assert set(names) == set(HOSTILE)
    assert browser.run("return document.title").startswith("What ")
    assert browser.run("return document.querySelectorAll('main img, main script').length") == 0
    assert browser.log() == []


@in_chromium
def test_it_prints_in_light_colours(browser: Browser, folder: Path) -> None:
    browser.open(folder / "page.html")
    made = browser.cdp("Page.printToPDF", printBackground=True)
    assert len(made["data"]) > 10_000 and browser.log() == []
    browser.cdp("Emulation.setEmulatedMedia", media="print")
    assert browser.run("return getComputedStyle(document.getElementById('theme')).display") == "none"
    browser.cdp("Emulation.setEmulatedMedia", media="")
