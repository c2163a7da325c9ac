"""The page of `nvamp inspect` in a browser."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page

from benchmarks.inspect_page import chromium
from nvamp.functional import token_weights
from nvamp.objectives import NVAMP, Batch, parse
from nvamp.objectives.statistics import statistics as statistics_of
from nvamp.study.inspect.page import Inspected, write_page
from nvamp.study.inspect.score import Inspection, Scores, Tokens, inspect_text, tokenize
from nvamp.study.inspect.weights import weigh
from nvamp.study.losses import MODES, parse_losses
from tests.study.axe import violations
from tests.study.conftest import small_llama, words

HOSTILE = (
    "</script><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>\n"
    "<!--<script> &lt; &amp; ${1} `{{ 1 }}` \\u003c 'a' \"b\"\r\n"
    "\ttab, 😀 é 日本 שלום \u202egnp\u202c \x00\x07\x7f \u2028 \u200d \ufeff e\u0301\n\n\nend"
)


# NVAMP in its modes, which has sliders, and losses that have none.
OTHERS = ("ce", "tail:share=0.1", "dft", "entropy:kind=mile")
LOSSES = parse_losses((*MODES, *OTHERS))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Opened(NamedTuple):
    page: Page
    said: list[str]  # on the console
    requests: list[str]


class Made(NamedTuple):
    """A page and what is on it."""

    found: Inspection
    path: Path


def opened(browser: Browser, path: Path, **options: Any) -> Opened:
    page = browser.new_page(**{"viewport": {"width": 1200, "height": 800}, **options})
    page.set_default_timeout(20_000)
    said: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return Opened(page, said, requests)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A random Llama that is sure enough of itself for its losses to differ."""
    torch.manual_seed(0)
    return small_llama(tokenizer, positions=32, initializer_range=0.5)


@pytest.fixture(scope="module")
def made(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    text = "\n".join(words(seed, 12) for seed in range(60)) + "\n😀 x\n"
    found = inspect_text(model, tokenizer, text, LOSSES)
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page([Inspected("model", found)], "text", path)
    return Made(found, path)


@pytest.fixture
def shown(browser: Browser, made: Made) -> Iterator[Opened]:
    it = opened(browser, made.path)
    yield it
    assert it.said == []
    assert it.requests == [made.path.as_uri()]
    it.page.close()


def choose(page: Page, view: str) -> None:
    page.get_by_role("radio", name=view, exact=True).check(force=True)


def card(page: Page) -> str:
    return page.locator("#card").inner_text() if page.locator("#card").is_visible() else ""


def number(shown: str) -> float:
    return float(shown.replace("−", "-"))


def weights_on(page: Page, loss: str) -> torch.Tensor:
    """The weights of all tokens, relative to cross-entropy, with the coefficients that the page has now."""
    script = "name => Array.from(nvamp.nll, (_, i) => nvamp.weight(i, nvamp.losses.get(name)))"
    return torch.tensor(page.evaluate(script, loss), dtype=torch.float64)


def assert_weights(page: Page, loss: str, expected: torch.Tensor) -> None:
    """The page has the weights to the precision of float32."""
    torch.testing.assert_close(weights_on(page, loss), expected * len(expected), rtol=1e-6, atol=1e-6)


def colours(page: Page) -> list[str]:
    return page.evaluate(
        "[...document.querySelectorAll('#rows span')].map(s => getComputedStyle(s).backgroundColor)"
    )


def lightness(colour: str) -> float:
    found = re.match(r"oklch\(([\d.]+)", colour)
    assert found, colour
    return float(found[1])


def test_the_switch_recolours_the_text(shown: Opened) -> None:
    views: dict[str, list[str]] = {}
    for view in ("nll", "z", *(f"weight, {loss.name}" for loss in LOSSES)):
        choose(shown.page, view)
        views[view] = colours(shown.page)
    assert len(set(map(tuple, views.values()))) == len(views) - 1  # "detached" and "ce" are alike
    # All tokens weigh the same in these, but the largest loss in "scalar".
    scored = slice(1, None)
    assert len(set(views["weight, nvamp:gradient=detached"][scored])) == 1
    assert len(set(views["weight, nvamp"][scored])) == 2
    assert len(set(views["weight, tail:share=0.1"][scored])) == 2
    assert len(set(views["weight, nvamp:gradient=token"])) > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_more_is_further_from_the_page(browser: Browser, made: Made, scheme: str) -> None:
    page = opened(browser, made.path, color_scheme=scheme).page
    choose(page, "nll")
    drawn = page.evaluate("[...document.querySelectorAll('#rows span')].map(s => Number(s.dataset.i))")
    pairs = sorted(
        (made.found.scores.nll[i - 1], lightness(colour))
        for i, colour in zip(drawn, colours(page), strict=True)
        if i
    )
    steps = np.diff([light for _, light in pairs])
    assert (steps <= 0).all() if scheme == "light" else (steps >= 0).all()
    assert abs(pairs[0][1] - pairs[-1][1]) > 0.3
    page.close()


@pytest.mark.parametrize("loss", MODES)
def test_weights_are_those_of_the_library(shown: Opened, made: Made, loss: str) -> None:
    page, gradient = shown.page, NVAMP.gradient if "=" not in loss else loss.partition("=")[2]
    choose(page, f"weight, {loss}")
    assert page.locator("#loss").inner_text() == loss
    nll = torch.tensor(page.evaluate("Array.from(nvamp.nll)"), dtype=torch.float64)
    assert nll.float().tolist() == made.found.scores.nll.tolist()
    coefficients: dict[str, Any] = {"gradient": gradient}
    largest = int(nll.argmax())
    for moves in ({}, {"alpha": 1.5}, {"beta": 0.25, "gamma": 0.04}, {"alpha": 0.0, "beta": 0.0}):
        for name, value in moves.items():
            page.get_by_role("slider", name=name).fill(str(value))
        coefficients |= moves
        expected = token_weights(NVAMP(**coefficients), nll)
        assert_weights(page, loss, expected)
        for i in (largest, 3, 17):
            page.evaluate("i => nvamp.goTo(i)", i + 1)
            w, times_n = re.search(rf"^{loss}\t(\S+)\t(\S+)$", card(page), re.MULTILINE).groups()  # type: ignore[union-attr]
            assert number(w) == pytest.approx(float(expected[i]), rel=1e-3, abs=1e-9)
            assert number(times_n) == pytest.approx(float(expected[i]) * len(nll), abs=6e-4)
        assert number(page.locator("#heaviest tbody tr td").nth(3).inner_text()) == pytest.approx(
            float(expected.max()) * len(nll), abs=6e-4
        )


def test_the_table_begins_with_the_most_weight(shown: Opened, made: Made) -> None:
    page, nll = shown.page, made.found.scores.nll
    for loss in ("nvamp:gradient=token", "nvamp", "dft"):
        choose(page, f"weight, {loss}")
        weights = weights_on(page, loss).tolist()
        order = sorted(range(len(nll)), key=lambda i: (weights[i], nll[i]), reverse=True)
        rows = page.locator("#heaviest tbody tr").evaluate_all(
            "rows => rows.map(row => Number(row.dataset.i))"
        )
        assert rows == [i + 1 for i in order[:20]]


@pytest.mark.parametrize("loss", OTHERS)
def test_a_loss_without_coefficients_has_no_sliders(shown: Opened, made: Made, loss: str) -> None:
    page, scores = shown.page, made.found.scores
    choose(page, f"weight, {loss}")
    nll, index = torch.from_numpy(scores.nll).double(), [one.name for one in LOSSES].index(loss)
    entropy = torch.from_numpy(scores.entropy[:, index]).double()
    valid = torch.ones_like(nll, dtype=torch.bool)
    value = parse(loss).evaluate(Batch(nll, valid, entropy=entropy)).loss
    assert_weights(page, loss, token_weights(parse(loss), nll, entropy=entropy))
    assert page.locator("#value").inner_text() == f"L = {value:.4f} nats"
    assert page.get_by_role("slider").count() == 0
    assert not page.get_by_role("button", name="Reset").is_visible()
    choose(page, "weight, nvamp")
    assert page.get_by_role("slider").count() == 3


def test_every_loss_has_coefficients_of_its_own(
    browser: Browser, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    smoothed = "nvamp:gamma=0.04,tail=0.05,label_smoothing=0.1"
    found = inspect_text(model, tokenizer, words(1, 300), parse_losses(("nvamp:beta=10", smoothed)))
    write_page([Inspected("model", found)], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html").page
    ell = torch.from_numpy(found.scores.ell[:, 1].copy()).double()
    choose(page, f"weight, {smoothed}")
    assert page.get_by_role("spinbutton", name="gamma").input_value() == "0.04"
    assert_weights(page, smoothed, token_weights(NVAMP(gamma=0.04, tail=0.05), ell))
    page.get_by_role("slider", name="gamma").fill("0.02")
    assert_weights(page, smoothed, token_weights(NVAMP(gamma=0.02, tail=0.05), ell))
    choose(page, "weight, nvamp:beta=10")
    assert page.get_by_role("spinbutton", name="gamma").input_value() == "0.001"
    assert page.get_by_role("slider", name="beta").input_value() == "10"  # beyond the usual range
    choose(page, "nll")
    assert page.locator("#loss").inner_text() == "nvamp:beta=10"  # the last one
    choose(page, f"weight, {smoothed}")
    assert page.get_by_role("spinbutton", name="gamma").input_value() == "0.02"
    page.close()


@pytest.mark.parametrize(
    ("losses", "view"),
    [(("ce", "nvamp", "tail", "dft"), "tail"), (("ce", "nvamp"), "nll"), (("dft", "nvamp"), "dft")],
)
def test_the_page_opens_with_weights_that_differ(
    browser: Browser, model: Any, tokenizer: Any, tmp_path: Path, losses: tuple[str, ...], view: str
) -> None:
    found = inspect_text(model, tokenizer, words(1, 300), parse_losses(losses))
    write_page([Inspected("model", found)], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html").page
    assert page.evaluate("document.querySelector('input:checked').value") == view
    assert page.locator("#loss").inner_text() == (losses[0] if view == "nll" else view)
    page.close()


def test_a_number_may_go_beyond_its_slider(shown: Opened, made: Made) -> None:
    page, loss = shown.page, "nvamp:gradient=token"
    page.get_by_role("spinbutton", name="gamma").fill("7.5")
    nll = torch.from_numpy(made.found.scores.nll).double()
    expected = token_weights(NVAMP(gamma=7.5, gradient="token"), nll)
    assert_weights(page, loss, expected)
    value = NVAMP(gamma=7.5).evaluate(Batch(nll, torch.ones_like(nll, dtype=torch.bool))).loss
    assert page.locator("#value").inner_text() == f"L = {value:.4f} nats"
    field, told = page.get_by_role("spinbutton", name="gamma"), page.locator("#wrong")
    field.fill("")
    assert_weights(page, loss, expected)
    assert told.inner_text() == "gamma is not a number: the page still shows 7.5"
    assert field.get_attribute("aria-invalid") == "true"
    field.blur()
    assert (field.input_value(), told.inner_text()) == ("7.5", "")
    field.fill("")
    page.get_by_role("button", name="Reset").click()
    assert_weights(page, loss, token_weights(NVAMP(gradient="token"), nll))
    assert page.get_by_role("spinbutton", name="gamma").input_value() == "0.001"


def test_hovering_shows_what_the_model_says(shown: Opened, made: Made, model: Any, tokenizer: Any) -> None:
    page = shown.page
    ids = made.found.tokens.ids.tolist()
    s = made.found.statistics
    for i in (1, 5, 20):  # of the first window: their context is all that comes before
        page.locator(f"#t{i}").hover()
        said = card(page)
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double().softmax(-1)
        assert said.startswith(tokenizer.decode([ids[i]]).replace(" ", "␣").replace("\n", "↵") + "\n")
        assert f"token {i + 1} of {len(ids):,}\n" in said
        facts = dict(re.findall(r"^(probability|nll|z)\n(\S+)", said, re.MULTILINE))
        ell = -p[ids[i]].log()
        assert number(facts["probability"]) == pytest.approx(float(p[ids[i]]), rel=5e-3, abs=6e-5)
        assert number(facts["nll"]) == pytest.approx(float(ell), abs=6e-4)
        assert number(facts["z"]) == pytest.approx(float((ell - s.mean) / s.std), abs=6e-3)
        likeliest = p.topk(5)
        lines = said[said.index("likeliest here") :].split("\n")[1:6]
        for line, index, value in zip(
            lines, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True
        ):
            piece, shown_p = line.split("\t")
            assert piece == as_shown(made.found.pieces[index]).replace(" ", "␣").replace("\n", "↵")
            assert number(shown_p) == pytest.approx(value, rel=5e-3, abs=6e-5)
    page.locator("#t0").hover()
    assert "nothing predicts this token" in card(page)
    page.get_by_role("heading", level=1).hover()
    assert card(page) == ""


def test_parts_of_a_character_are_told(shown: Opened, made: Made) -> None:
    at = int(np.flatnonzero(made.found.tokens.ends == made.found.tokens.text.index("😀") + 1)[0])
    shown.page.evaluate("i => nvamp.goTo(i)", at)
    assert card(shown.page).startswith("\\xf0\ncovers “😀”")
    shown.page.keyboard.press("ArrowRight")
    assert card(shown.page).startswith("\\x9f\npart of “😀”")


def active(page: Page) -> int:
    """The token that the keyboard is at; it has to be in the page, marked, and the card be of it."""
    name = page.locator("#text").get_attribute("aria-activedescendant") or ""
    span = page.locator(f"#{name}")
    assert span.get_attribute("aria-selected") == "true"
    assert "probability" in (span.get_attribute("aria-label") or "") or name == "t0"
    index = int(name[1:])
    assert f"token {index + 1:,} of" in card(page)
    assert page.locator(".active").first.get_attribute("data-i") == str(index)
    return index


def test_the_keyboard_does_it_all(shown: Opened, made: Made) -> None:
    page, last = shown.page, len(made.found.tokens.ids) - 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.value") == "nvamp:gradient=token"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("nvamp.state.view") == "nvamp:gradient=detached"
    page.keyboard.press("Tab")
    assert active(page) == 0
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert active(page) == 3
    page.keyboard.press("ArrowLeft")
    assert active(page) == 2
    page.keyboard.press("ArrowDown")
    below = active(page)
    rows = page.evaluate("nvamp.rows.token")
    assert rows[1] <= below < rows[2]
    page.keyboard.press("ArrowUp")
    assert active(page) == 2
    page.keyboard.press("End")
    assert active(page) == last
    page.keyboard.press("ArrowRight")
    assert active(page) == last
    page.keyboard.press("PageUp")
    assert active(page) < last
    page.keyboard.press("Home")
    assert active(page) == 0
    page.keyboard.press("Escape")
    assert card(page) == ""
    outline = page.evaluate("getComputedStyle(document.getElementById('text')).outlineStyle")
    assert outline == "solid"

    row = page.locator("#heaviest tbody tr").nth(2)
    row.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert active(page) == int(row.get_attribute("data-i") or -1)
    page.locator("#heaviest tbody tr").nth(4).click()
    assert active(page) == int(page.locator("#heaviest tbody tr").nth(4).get_attribute("data-i") or -1)


def test_controls_and_figures_have_names(shown: Opened, made: Made) -> None:
    page, s = shown.page, made.found.statistics
    for name in ("alpha", "beta", "gamma"):
        assert page.get_by_role("slider", name=name).count() == 1
        assert page.get_by_role("spinbutton", name=name).count() == 1
    plot = page.locator("#histogram")
    assert f"mean {s.mean:.3f}, sigma {s.std:.3f}, largest {s.max:.3f} nats" in (
        plot.get_attribute("aria-label") or ""
    )
    assert f"mean {s.mean:.2f}" in plot.inner_html()
    assert f"max {s.max:.2f}" in plot.inner_html()
    assert "+1σ" in plot.inner_html()
    header = " ".join(page.locator("header").inner_text().split())
    assert (
        f"mean nll {s.mean:.3f} nats, σ {s.std:.3f}, dispersion d {s.dispersion:.3f}, largest {s.max:.2f}"
        in header
    )


def test_a_click_stays_where_it_is(shown: Opened) -> None:
    page = shown.page
    page.evaluate("nvamp.goTo(0)")
    page.locator("#heaviest button").first.focus()
    page.evaluate("document.getElementById('text').scrollTop = 1e6")
    page.wait_for_function("document.getElementById('t' + nvamp.nll.length)")
    top = page.evaluate("document.getElementById('text').scrollTop")
    assert top > 0
    span = page.locator("#rows .row").nth(-4).locator("span").first
    span.click()
    assert active(page) == int(span.get_attribute("data-i") or -1)
    assert page.evaluate("document.getElementById('text').scrollTop") == top


def as_shown(text: str) -> str:
    """What the page makes of characters that have no shape; newlines stand at the end of rows."""

    shapeless = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2028\u2029\ufeff]"
    return re.sub(shapeless, lambda m: f"⟨U+{ord(m[0]):04X}⟩", text.replace("\r", "⟨\\r⟩"))


def test_text_is_shown_and_never_run(browser: Browser, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    found = inspect_text(model, tokenizer, HOSTILE, LOSSES)
    pieces = {index: f"</script><b>{piece}" for index, piece in found.pieces.items()}
    hostile = Inspected("<img src=x onerror=alert(1)>", found._replace(pieces=pieces))
    write_page([hostile], "</title><script>1</script>", path)
    page, said, requests = opened(browser, path)
    rows = page.locator("#rows .row").evaluate_all(
        "rows => rows.map(row => row.textContent + (row.querySelector('.newline') ? '\\n' : ''))"
    )
    assert "".join(rows) == as_shown(HOSTILE)
    assert page.get_by_role("heading", level=1).inner_text() == (
        "</title><script>1</script> under <img src=x onerror=alert(1)>"
    )
    assert page.title() == "nvamp inspect: </title><script>1</script> under <img src=x onerror=alert(1)>"
    for i in range(len(found.tokens.ids)):
        page.evaluate("i => nvamp.goTo(i)", i)
        assert card(page).startswith("</script><b>")
    assert page.locator("img, b").count() == 0
    assert page.locator("script").count() == 2
    assert said == []
    assert requests == [path.as_uri()]
    # What is not the page's own script is not run, even where it gets in.
    with page.expect_console_message(lambda message: "Content Security Policy" in message.text):
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')"
        )
    assert page.title() != "1"
    blocked = [line for line in said if "Content Security Policy" in line]
    assert said == blocked
    assert len(blocked) >= 1
    page.close()


def plain_statistics(nll: Any) -> Any:
    """The statistics of losses [tokens] float32, in float64."""
    ell = torch.from_numpy(nll).double()
    return statistics_of(Batch(ell, torch.ones_like(ell, dtype=torch.bool)))


def test_a_text_of_two_tokens(browser: Browser, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    found = inspect_text(model, tokenizer, "loss mean", LOSSES)
    assert len(found.tokens.ids) == 2
    # A model that is sure: no loss at all.
    for nll in (found.scores.nll, np.zeros(1, np.float32)):
        changed = {
            "scores": found.scores._replace(nll=nll),
            "statistics": plain_statistics(nll),
            "weights": [weigh(loss.spec, nll, nll) for loss in LOSSES],
        }
        write_page([Inspected("m", found._replace(**changed))], "t", path)
        page, said, _ = opened(browser, path)
        for view in ("nll", "z", *(f"weight, {loss.name}" for loss in LOSSES)):
            choose(page, view)
        page.evaluate("nvamp.goTo(1)")
        assert active(page) == 1
        assert "z\n+0.00" in card(page)
        assert "NaN" not in page.locator("main").inner_html()
        assert said == []
        page.close()


def long_page(tokenizer: Any, path: Path, tokens: int) -> Inspection:
    """A page of many tokens, with made-up losses."""
    rng = np.random.default_rng(0)
    text = "\n".join(words(seed, 40) for seed in range(tokens // 40))
    found = tokenize(tokenizer, text)
    ids, ends = found.ids[:tokens], found.ends[:tokens]
    nll = rng.gamma(2, 2, len(ids) - 1).astype(np.float32)
    alternatives = rng.integers(0, len(tokenizer), (len(nll), 5))
    alternative_nll = np.sort(rng.gamma(2, 2, (len(nll), 5))).astype(np.float32)
    scores = Scores(nll, alternatives, alternative_nll, nll[:, None], nll[:, None])
    weights = [weigh(loss.spec, nll, nll) for loss in parse_losses(MODES)]
    pieces = {index: tokenizer.decode([index]) for index in range(len(tokenizer))}
    tokens = Tokens(text[: ends[-1]], ids, ends)
    inspection = Inspection(tokens, scores, pieces, 64, plain_statistics(nll), weights)
    write_page([Inspected("model", inspection)], "text", path)
    return inspection


def test_a_long_text_is_drawn_in_part(browser: Browser, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    found = long_page(tokenizer, path, 100_000)
    count = len(found.tokens.ids)
    assert count == 100_000
    page, said, requests = opened(browser, path)

    def nodes() -> int:
        return page.evaluate("document.querySelectorAll('*').length")

    assert nodes() < 4000
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert nodes() > 20_000
    said_on_paper = re.search(
        r"Printed are the first ([\d,]+) of 100,000 tokens", page.locator("#printed").text_content()
    )
    assert said_on_paper
    assert 19_900 < int(said_on_paper[1].replace(",", "")) <= 20_000
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert nodes() < 4000
    page.locator("#text").focus()
    page.keyboard.press("End")
    last = page.locator(f"#t{count - 1}")
    assert last.is_visible()
    assert last.inner_text() == found.tokens.text[found.tokens.ends[-2] :]
    assert nodes() < 4000
    height = page.evaluate("document.getElementById('text').scrollHeight")
    page.evaluate("y => document.getElementById('text').scrollTop = y", height / 2)
    page.wait_for_function(f"nvamp.rows.to < {0.6 * height / 23}")  # the end was drawn before
    assert card(page) == ""  # the token it was of is out of sight
    spans = page.locator("#rows span")
    drawn = spans.evaluate_all("spans => spans.map(span => Number(span.dataset.i))")
    assert 0.4 * count < drawn[0] < drawn[-1] < 0.6 * count
    assert sorted(set(drawn)) == list(range(drawn[0], drawn[-1] + 1))  # none is missing
    begin, end = found.tokens.ends[drawn[0] - 1], found.tokens.ends[drawn[-1]]
    assert "".join(spans.all_inner_texts()) in found.tokens.text[begin:end].replace("\n", "")
    assert nodes() < 4000
    nll = torch.from_numpy(found.scores.nll).double()
    for loss in MODES:
        assert_weights(page, loss, token_weights(parse(loss), nll))
    assert said == []
    assert requests == [path.as_uri()]
    page.close()


def test_a_narrow_page_needs_no_scrolling_sideways(browser: Browser, made: Made) -> None:
    page = opened(browser, made.path, viewport={"width": 380, "height": 700}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    assert page.evaluate("(t => t.scrollWidth - t.clientWidth)(document.getElementById('text'))") <= 0
    page.evaluate("nvamp.goTo(50)")
    before = active(page)
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_function("nvamp.rows.columns > 60")
    assert page.locator(f"#t{before}").is_visible()
    page.close()


def test_nothing_wraps_away_on_a_phone(browser: Browser, made: Made) -> None:
    page = opened(browser, made.path, viewport={"width": 390, "height": 844}).page
    labels = page.locator("#views label")
    assert labels.count() == len(LOSSES) + 2
    for index in range(labels.count()):
        box = labels.nth(index).bounding_box()
        assert box
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    page.close()


NAMES = ("ce, seed 0", "dft, seed 0", "nvamp, seed 0")


@pytest.fixture(scope="module")
def several(
    made: Made, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Inspection]]:
    """The page of a text under three models of a study, and what is on it."""
    found = [made.found]
    for seed in (1, 2):
        torch.manual_seed(seed)
        other = small_llama(tokenizer, positions=32, initializer_range=0.5)
        found.append(inspect_text(other, tokenizer, made.found.tokens.text, LOSSES))
    path = tmp_path_factory.mktemp("several") / "page.html"
    inspected = [
        Inspected(name, it, name.partition(",")[0], "../my%20study/report.html")
        for name, it in zip(NAMES, found, strict=True)
    ]
    write_page(inspected, "text", path)
    return path, found


def test_several_models_are_side_by_side(browser: Browser, several: tuple[Path, list[Inspection]]) -> None:
    path, found = several
    page, said, _ = opened(browser, path)
    nll = [it.scores.nll for it in found]
    difference = nll[1] - nll[0]
    assert page.evaluate("nvamp.state.view") == "difference"
    order = np.argsort(-np.abs(difference), kind="stable")[:20] + 1
    rows = page.locator("#heaviest tbody tr").evaluate_all("rows => rows.map(row => Number(row.dataset.i))")
    assert rows == order.tolist()
    cells = page.locator("#heaviest tbody tr").first.locator("td").all_inner_texts()
    assert number(cells[2]) == pytest.approx(difference[order[0] - 1], abs=6e-4)
    page.evaluate("nvamp.goTo(17)")
    for name, ell in zip(NAMES, nll, strict=True):
        shown, delta = re.search(rf"^{name}\t(\S+)\t(\S+)$", card(page), re.MULTILINE).groups()  # type: ignore[union-attr]
        assert number(shown) == pytest.approx(ell[16], abs=6e-4)
        assert number(delta) == pytest.approx(ell[16] - nll[0][16], abs=6e-4)
        assert f"{name} {ell[16]:.3f}" in (page.locator("#t17").get_attribute("aria-label") or "")
    heading = page.locator(".models tbody tr").nth(2).locator("td").all_inner_texts()
    assert number(heading[1]) == pytest.approx(nll[2].mean() - nll[0].mean(), abs=2e-3)

    before = colours(page)
    choose(page, "dft, seed 0")
    assert before == colours(page)
    choose(page, "nvamp, seed 0")
    assert before != colours(page)
    assert page.evaluate("Array.from(nvamp.nll)") == nll[2].tolist()
    assert page.locator(".largest").first.get_attribute("data-i") == str(nll[2].argmax() + 1)
    choose(page, "ce, seed 0")  # it differs from itself nowhere
    assert page.evaluate("nvamp.state.view") == "nll"
    assert page.get_by_role("radio", name="difference").is_disabled()
    choose(page, "weight, nvamp")
    page.get_by_role("slider", name="alpha").fill("1.5")
    choose(page, "dft, seed 0")
    assert page.get_by_role("spinbutton", name="alpha").input_value() == "1.5"  # for all models
    expected = token_weights(NVAMP(alpha=1.5), torch.from_numpy(nll[1]).double())
    assert_weights(page, "nvamp", expected)
    page.get_by_role("button", name="Reset").click()
    choose(page, "ce, seed 0")
    assert page.get_by_role("spinbutton", name="alpha").input_value() == "1"
    assert page.get_by_role("link", name="Report of the study").evaluate_all(
        "links => links.map(a => a.getAttribute('href'))"
    ) == ["../my%20study/report.html"]
    assert said == []
    page.close()


@pytest.mark.parametrize("trained", ["nvamp:gradient=token", "nvamp", "dft"])
def test_the_page_opens_with_the_loss_that_the_model_was_trained_with(
    browser: Browser, made: Made, tmp_path: Path, trained: str
) -> None:
    write_page([Inspected("model", made.found, trained)], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html").page
    assert page.evaluate("document.querySelector('input:checked').value") == trained
    assert page.locator("#loss").inner_text() == trained
    assert page.locator("#alike").count() == (trained == "nvamp")  # it says why the text has one colour
    page.close()


@pytest.mark.parametrize(
    ("scheme", "width", "models", "view"),
    [
        ("light", 1400, 1, "nll"),
        ("dark", 390, 1, "weight, nvamp"),
        ("dark", 1400, 2, "difference"),
        ("light", 390, 2, "z"),
    ],
)
def test_axe_finds_nothing(
    browser: Browser,
    model: Any,
    tokenizer: Any,
    tmp_path: Path,
    scheme: str,
    width: int,
    models: int,
    view: str,
) -> None:
    found = inspect_text(model, tokenizer, words(1, 40) + "\n\t😀\n", LOSSES)
    inspected = [Inspected(name, found, None, "report.html") for name in NAMES[:models]]
    write_page(inspected, "text", tmp_path / "page.html")
    viewport = {"width": width, "height": 844}
    page = opened(browser, tmp_path / "page.html", color_scheme=scheme, viewport=viewport).page
    page.locator("summary").click()
    choose(page, view)
    page.evaluate("nvamp.goTo(5)")
    assert violations(page) == []
    page.close()


CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const luminance = (colour) => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    return [...document.querySelectorAll("#rows span:not(.unscored)")].map((span) => {
        const { color, backgroundColor } = getComputedStyle(span);
        const [a, b] = [luminance(color), luminance(backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_from_every_colour(browser: Browser, made: Made, scheme: str) -> None:
    page = opened(browser, made.path, color_scheme=scheme).page
    for view in ("nll", "z"):  # one hue, and both
        choose(page, view)
        assert min(page.evaluate(CONTRASTS)) >= 4.5
    page.close()


def test_tokens_without_letters_have_names(
    browser: Browser, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    found = inspect_text(model, tokenizer, "a\n\t  \u00a0b 😀", LOSSES)
    write_page([Inspected("model", found)], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html").page
    names = page.locator("#rows span").evaluate_all(
        "spans => spans.map(span => span.getAttribute('aria-label') ?? span.textContent)"
    )
    assert all(name.strip() for name in names)
    said = ", ".join(names)
    for name in ("newline", "tab", "space", "U+00A0", "part of 😀"):
        assert name in said
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_paper_has_the_whole_text_in_light_colours(browser: Browser, made: Made, scheme: str) -> None:
    page = opened(browser, made.path, color_scheme=scheme).page
    choose(page, "nll")
    page.evaluate("document.getElementById('text').scrollTop = 100")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    spans = page.locator("#rows span")
    assert "".join(spans.all_text_contents()) == made.found.tokens.text.replace("\n", "")
    assert page.locator("#printed").inner_text() == "Colour: nll."
    assert page.evaluate("getComputedStyle(document.getElementById('t5')).printColorAdjust") == "exact"
    pairs = [lightness(colour) for colour in colours(page)[1:]]
    assert np.corrcoef(pairs, made.found.scores.nll)[0, 1] < -0.9  # more is darker
    edges = page.locator("#rows .row").evaluate_all(
        "rows => rows.map(row => [row.getBoundingClientRect().top, row.getBoundingClientRect().bottom])"
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(edges))
    assert min(end - begin for begin, end in edges) >= 15  # a line of 11 pixels, with its colour
    below = page.evaluate("document.querySelector('aside').getBoundingClientRect().top")
    assert edges[-1][1] <= below
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("nvamp.rows.to < nvamp.rows.token.length")
    page.close()


@pytest.mark.parametrize("scale", [1e-4, 0.003, 1, 7, 900])
def test_the_axis_fits_the_losses(browser: Browser, made: Made, tmp_path: Path, scale: float) -> None:
    nll = (made.found.scores.nll / made.found.scores.nll.max() * scale).astype(np.float32)
    changed = {"scores": made.found.scores._replace(nll=nll), "statistics": plain_statistics(nll)}
    write_page([Inspected("model", made.found._replace(**changed))], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html").page
    ticks = page.locator("#histogram .tick")
    values = [float(tick) for tick in ticks.all_text_contents()]
    assert 4 <= len(values) <= 10
    np.testing.assert_allclose(np.diff(values), values[1], rtol=1e-6)
    assert 0 <= scale - values[-1] < values[1]
    inside = "parts => parts.every(part => part.getBBox().x >= 0 && part.getBBox().x + part.getBBox().width <= 360)"
    assert page.locator("#histogram text").evaluate_all(inside)
    page.close()


@pytest.mark.parametrize("width", [1400, 390])
def test_a_long_token_does_not_run_into_its_numbers(
    browser: Browser, made: Made, tmp_path: Path, width: int
) -> None:
    nll = np.array([3, 1], np.float32)
    long = "antidisestablishmentarianism" * 10
    tokens = Tokens(f"a{long} b", np.array([0, 1, 2]), np.array([1, 1 + len(long), 3 + len(long)]))
    zeros = np.zeros((2, 5))
    scores = Scores(nll, zeros.astype(np.int64) + 1, zeros.astype(np.float32), nll[:, None], nll[:, None])
    weights = [weigh(loss.spec, nll, nll) for loss in parse_losses(MODES)]
    found = Inspection(tokens, scores, {0: "a", 1: long, 2: " b"}, 64, plain_statistics(nll), weights)
    write_page([Inspected("model", found)], "text", tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 844}).page
    page.evaluate("nvamp.goTo(1)")
    for first in (page.locator("#heaviest button").first, page.locator("#card td.token").first):
        box = first.bounding_box()
        number_box = first.locator("xpath=ancestor-or-self::td/following-sibling::td[1]").bounding_box()
        assert box
        assert number_box
        assert box["x"] + box["width"] <= number_box["x"] + 0.5
        assert number_box["x"] + number_box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
