"""The chat page in a real browser: types, streams, stops, reloads; by keyboard; light and dark, small and large.

Needs Debian's `chromium` (or OCTAVO_CHROMIUM=path) and `pip install playwright`. Screenshots go to OCTAVO_SCREENSHOTS, if that
names a folder.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from octavo import demo
from octavo.checkpoint import convert

from .conversation import chat_model
from .server import serving

CHROMIUM = os.environ.get("OCTAVO_CHROMIUM") or shutil.which("chromium")
REQUIRED = bool(os.environ.get("OCTAVO_REQUIRE_BROWSER"))
if not REQUIRED:
    pytest.importorskip(
        "playwright", reason="the page is tried in a browser by playwright, which is not installed"
    )
from playwright.sync_api import expect, sync_playwright  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="there is no chromium"),
]
WAIT = 60_000
expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("page") / "spanish-8bit")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(folder, "--engine", "transformers", log=log) as server:
        yield server


@pytest.fixture
def page(browser, server):
    """A page that fails the test if it asks for anything but its own server, or a script fails."""
    context = browser.new_context(viewport={"width": 1100, "height": 760})
    page = context.new_page()
    page.set_default_timeout(WAIT)
    problems = []
    page.on(
        "request", lambda asked: asked.url.startswith((server.url, "data:")) or problems.append(asked.url)
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: said.type == "error" and problems.append(said.text))
    page.goto(server.url)
    expect(page.get_by_role("heading", level=1)).to_have_text("spanish-8bit")
    yield page
    context.close()
    # A refused request, which the page shows, is an error to the console, too.
    assert [problem for problem in problems if "400 (Bad Request)" not in problem] == []


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def set_longest(page, tokens, **others):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    for label, value in others.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Done").click()


def shoot(page, name):
    where = os.environ.get("OCTAVO_SCREENSHOTS")
    if where:
        page.screenshot(path=Path(where) / f"{name}.png")


def test_types_and_streams(page):
    set_longest(page, 40)
    ask(page, "El sentido de la vida es")
    answer = page.locator("article.assistant")
    expect(answer.locator(".text")).not_to_be_empty()
    expect(answer.locator(".speed")).to_have_text(
        re.compile(r"^40 tokens, [\d.]+ tokens/s, first after [\d.]+ s, cut")
    )
    assert page.get_by_text("transformers 5.").is_visible()
    expect(page.get_by_label("Message")).to_be_focused()
    shoot(page, "desktop-light")


def test_stops_and_goes_on(page):
    set_longest(page, 450, Temperature="0")
    ask(page, "El sentido de la vida es")
    answer = page.locator("article.assistant").last
    expect(answer.locator(".text")).not_to_have_text("")
    assert page.locator("main").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".speed")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    set_longest(page, 5)
    for count in (2, 3):
        ask(page, "Y ahora")
        expect(page.locator("article.assistant .speed")).to_have_count(count)
        expect(page.locator("article.assistant .speed").last).to_contain_text("5 tokens")


def test_escape_stops(page):
    set_longest(page, 450, Temperature="0")
    ask(page, "El sentido de la vida es")
    expect(page.locator("article.assistant .text")).not_to_have_text("")
    page.keyboard.press("Escape")
    expect(page.locator("article.assistant .speed")).to_contain_text("stopped")


def test_reloads(page):
    set_longest(page, 8, Seed="3")
    ask(page, "Hola")
    expect(page.locator("article.assistant .speed")).to_be_visible()
    before = page.locator("main").inner_text()
    page.reload()
    expect(page.locator("article")).to_have_count(2)
    assert page.locator("main").inner_text() == before
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Seed").input_value() == "3"
    page.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)


def test_text_is_never_markup(page):
    set_longest(page, 4)
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    ask(page, attack)
    expect(page.locator("article.assistant .speed")).to_be_visible()
    expect(page.locator("article.user .text")).to_have_text(attack)
    assert page.locator("main img, main script, main b").count() == 0


def test_by_keyboard_and_screen_reader(page):
    names = []
    page.get_by_label("Message").focus()
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''")
        )
    assert {"Send", "New chat", "Settings"} <= {name.strip() for name in names}
    for control in page.locator("button:visible, textarea:visible, input:visible").all():
        assert control.evaluate("e => (e.labels?.length ?? 0) > 0 || e.innerText.trim() || e.ariaLabel"), (
            control
        )
    assert page.locator("main").get_attribute("role") == "log"
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_an_error_is_shown(page):
    ask(page, "muy largo " * 600)
    expect(page.get_by_role("alert")).to_contain_text("context is 512 tokens")
    set_longest(page, 4)
    ask(page, "Hola")
    expect(page.locator("article.assistant .speed")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("device", "size"), [("desktop", (1100, 760)), ("phone", (360, 680))])
def test_looks(browser, server, scheme, device, size):
    """Nothing sticks out, and text has the contrast that WCAG asks for (4.5)."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(server.url)
    set_longest(page, 60)
    for text in ("El sentido de la vida es", "una-palabra-sin-espacios-" * 12):
        ask(page, text)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")
    for selector in ("h1", "header p", "article.user .text", "article .speed", "#send", "#settings"):
        assert page.locator(selector).first.evaluate(CONTRAST) >= 4.5, selector
    shoot(page, f"{device}-{scheme}")
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog").bounding_box()
    assert dialog["x"] >= 0 and dialog["x"] + dialog["width"] <= size[0]
    shoot(page, f"{device}-{scheme}-settings")
    context.close()


# The contrast of an element's text with what is behind it, by WCAG's formula.
CONTRAST = """element => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    let behind = element;
    while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const a = light(parts(getComputedStyle(element).color)), b = light(parts(getComputedStyle(behind).backgroundColor));
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_a_key_is_asked_for(browser, folder, tmp_path):
    arguments = (folder, "--engine", "transformers")
    with serving(*arguments, log=tmp_path / "log", OCTAVO_API_KEY="secret-key") as server:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(server.url)
        expect(page.get_by_role("dialog")).to_be_visible()
        expect(page.get_by_label("API key")).to_be_focused()
        page.get_by_label("API key").fill("secret-key")
        page.get_by_label("Longest answer").fill("4")
        page.get_by_role("button", name="Done").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("spanish-8bit")
        ask(page, "Hola")
        expect(page.locator("article.assistant .speed")).to_contain_text("4 tokens")
        context.close()


def test_a_model_that_continues_texts(browser, tmp_path):
    convert(demo.MODEL, tmp_path / "plain")
    with serving(tmp_path / "plain", "--engine", "transformers", log=tmp_path / "log") as server:
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.goto(server.url)
        expect(page.get_by_text("This model continues texts")).to_be_visible()
        set_longest(page, 6, Temperature="0")
        page.get_by_label("Text to continue").fill("El sentido de la vida es")
        page.keyboard.press("Enter")
        expect(page.locator("article.assistant .speed")).to_contain_text("6 tokens")
        expect(page.locator("article.assistant .text")).to_have_text(
            re.compile("^El sentido de la vida es la vida")
        )
        context.close()
