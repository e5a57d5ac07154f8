"""The playground: its files over HTTP, and in a real Chromium before a played engine."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import AsyncIterator
from html.parser import HTMLParser

import pytest
from playwright.async_api import Browser, Locator, Page, Route, async_playwright, expect

from engine.messages import AbortRequest, AddRequest, EngineOutput, TokenLogprobs
from engine.request import FinishReason
from engine.scaling import RopeScaling
from server.schemas import GenerateRequest
from tests.patience import PATIENCE
from tests.server.conftest import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
TOP = [(ord("e"), math.log(0.5)), (ord("a"), math.log(0.25)), (ord("\n"), math.log(0.125))]
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => channels(colour).slice(0, 3)
    .map((each) => each / 255)
    .map((each) => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4)
    .reduce((sum, each, at) => sum + each * [0.2126, 0.7152, 0.0722][at], 0);
  const opaque = (colour) => (channels(colour)[3] ?? 1) === 1;
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return opaque(colour) ? colour : ground(element.parentElement);
  };
  const worst = {};
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, :disabled")) continue;
    const both = [luminance(getComputedStyle(element).color), luminance(ground(element))];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) worst[element.outerHTML.slice(0, 80)] = contrast;
  }
  return worst;
}"""
"""WCAG 2.2's contrast of every text that is too faint."""


async def test_the_files_say_what_browsers_may_do_with_them(served: Served) -> None:
    for path, media_type in {
        "/": "text/html",
        "/static/page.js": "text/javascript",
        "/static/plot.js": "text/javascript",
        "/static/tokens.js": "text/javascript",
        "/static/page.css": "text/css",
        "/static/icon.svg": "image/svg+xml",
    }.items():
        response = await served.http.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(media_type)
        assert response.headers["cache-control"] == "no-cache"
        assert "script-src 'self';" in response.headers["content-security-policy"]
        known = {"If-None-Match": response.headers["etag"]}
        assert (await served.http.get(path, headers=known)).status_code == 304
        assert (await served.http.head(path)).status_code == 200
    assert (await served.http.get("/static/../app.py")).status_code == 404
    assert (await served.http.get("/static/other.js")).status_code == 404
    assert (await served.http.post("/")).status_code == 405


class Inputs(HTMLParser):
    """The placeholders of named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.placeholders: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "input" and given.get("name"):
            self.placeholders[str(given["name"])] = str(given["placeholder"])


async def test_placeholders_are_the_defaults(served: Served) -> None:
    inputs = Inputs()
    inputs.feed((await served.http.get("/")).text)
    for name, shown in inputs.placeholders.items():
        if name in ("rope.factor", "stop"):
            continue
        default = GenerateRequest.model_fields[name].default
        assert shown in ("no limit", "drawn") if default is None else float(shown) == default, name


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield launched
        await launched.close()


@pytest.fixture
async def page(browser: Browser, served: Served) -> AsyncIterator[Page]:
    """The playground, opened; whatever the browser complains of fails the test."""
    faults: list[str] = []
    opened = await browser.new_page()
    opened.set_default_timeout(1000 * PATIENCE)
    opened.on("pageerror", lambda error: faults.append(str(error)))
    # Chromium itself notes each answer that is an error, as the tests of errors want.
    opened.on(
        "console",
        lambda message: (
            faults.append(message.text)
            if message.type in ("error", "warning") and "status of 4" not in message.text
            else None
        ),
    )
    await opened.goto(f"http://127.0.0.1:{served.port}/")
    await opened.get_by_label("max_tokens").fill("48")  # the played engine has a small context
    yield opened
    await opened.close()
    assert not faults


def prompt(page: Page) -> Locator:
    return page.get_by_role("textbox", name="Prompt", exact=True)


async def ask(page: Page, served: Served, text: str = "ab") -> AddRequest:
    """Type and press Ctrl+Enter; what the engine is asked then."""
    await prompt(page).fill(text)
    await page.keyboard.press("Control+Enter")
    return await served.fake.expect(AddRequest)


async def say(
    served: Served,
    request: AddRequest,
    text: bytes,
    *,
    start: int = 0,
    logprob: float = math.log(0.5),
    end: FinishReason | None = None,
) -> None:
    """Tokens with their log-probabilities."""
    for at, byte in enumerate(text, start):
        reason = end if at == start + len(text) - 1 else None
        scores = TokenLogprobs(logprob, TOP)
        await served.fake.step(EngineOutput(request.request_id, at, byte, reason, scores, 0.1, 0))


async def score(served: Served, request: AddRequest, logprob: float) -> None:
    """The same for every token of a text."""
    assert request.targets is not None
    scores = [TokenLogprobs(logprob, []) for _ in request.targets.token_ids]
    await served.fake.step(
        EngineOutput(request.request_id, 0, 0, FinishReason.LENGTH, None, 0.0, 0, scores)
    )


async def ask_both(page: Page, served: Served, text: str = "ab") -> list[AddRequest]:
    """Where two rotations are compared: the prompt's scores, and what is asked then."""
    for request in [await ask(page, served, text), await served.fake.expect(AddRequest)]:
        await score(served, request, math.log(0.5 if request.params.rope is None else 0.1))
    both = [await served.fake.expect(AddRequest) for _ in range(2)]
    return sorted(both, key=lambda each: each.params.rope is not None)


async def test_what_is_typed_is_asked_and_streams(page: Page, served: Served) -> None:
    await page.get_by_label("max_tokens").fill("7")
    await page.get_by_label("temperature").fill(".25")
    await page.get_by_label("top_k").fill("40")
    await page.get_by_label("min_p").fill("0.1")
    await page.get_by_label("repetition_penalty").fill("1.5")
    await page.get_by_label("seed", exact=True).fill(str(2**63 - 1))  # more than a double holds
    request = await ask(page, served, "Say:\n")
    params = request.params
    assert request.prompt_token_ids == list(b"Say:\n")
    assert (params.max_tokens, params.temperature, params.top_k) == (7, 0.25, 40)
    assert (params.min_p, params.repetition_penalty, params.seed) == (0.1, 1.5, 2**63 - 1)
    assert (params.top_p, params.presence_penalty, params.rope) == (1, 0, None)
    assert params.logprobs == 5
    output = page.locator(".output")
    await say(served, request, b"he")
    await expect(output).to_have_text("Say:\nhe", use_inner_text=True)  # while it goes on
    await expect(page.get_by_role("status")).to_have_text("generating")
    await expect(page.get_by_role("button", name="Generate")).to_be_disabled()
    await say(served, request, b"llo", start=2, end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text("finished: length")
    await expect(output).to_have_text("Say:\nhello", use_inner_text=True)
    await expect(page.locator("[data-figure=prompt]")).to_have_text("5")
    await expect(page.locator("[data-figure=completion]")).to_have_text("5")
    await expect(page.locator("[data-figure=cached]")).to_have_text("0")
    await expect(page.locator("[data-figure=first]")).to_contain_text(" ms")
    await expect(page.locator("[data-figure=speed]")).to_have_text(re.compile(r"^\d+$"))
    await expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    await expect(page.get_by_role("button", name="Generate")).to_be_enabled()


async def test_the_model_is_named(page: Page) -> None:
    await expect(page.locator("#serves")).to_have_text("fake context 64 tokens")


@pytest.mark.parametrize(
    ("typed", "stop"),
    [(" dog", (" dog",)), ('["\\n", "x"]', ("\n", "x")), ("[", ("[",)), ("[1]", None)],
)
async def test_stop_is_a_text_or_json(
    page: Page, served: Served, typed: str, stop: tuple[str, ...] | None
) -> None:
    await page.get_by_label("stop", exact=True).fill(typed)
    if stop is None:
        await prompt(page).press("Control+Enter")
        await expect(page.locator("[name=stop]")).to_be_focused()
        await expect(page.get_by_role("alert")).to_contain_text("got [1]")
        return
    request = await ask(page, served)
    assert request.params.stop == stop
    await say(served, request, b"e", end=FinishReason.STOP)
    await expect(page.get_by_role("status")).to_have_text("finished: stop")


async def test_what_the_output_must_be(page: Page, served: Served) -> None:
    box = page.get_by_label("grammar", exact=True)
    await expect(box).to_be_hidden()
    kind = page.get_by_label("must be")
    asked = []
    for option in ("json", "json_schema", "regex", "choice"):
        await kind.select_option(option)
        if option == "regex":
            await box.fill(r"\d\d")
        if option == "choice":
            await expect(box).to_have_value(r"\d\d")  # what was typed stays
            await box.fill("red\n\nblue")
        request = await ask(page, served)
        assert request.params.grammar is not None
        asked.append((request.params.grammar.kind, request.params.grammar.text))
        await say(served, request, b"e", end=FinishReason.STOP)
        await expect(page.get_by_role("status")).to_have_text("finished: stop")
    assert asked == [
        ("json_schema", '{"type": "object"}'),
        ("json_schema", '{"type": "object", "properties": {"name": {"type": "string"}}}'),
        ("regex", r"\d\d"),
        ("choice", '["red", "blue"]'),
    ]
    await kind.select_option("json_schema")
    await box.fill("{")
    await prompt(page).press("Control+Enter")
    await expect(box).to_be_focused()
    await expect(page.get_by_role("alert")).to_contain_text("response_format.json_schema")


async def test_several_choices_stand_below_each_other(page: Page, served: Served) -> None:
    await page.get_by_label("n", exact=True).fill("2")
    first = await ask(page, served)
    second = await served.fake.expect(AddRequest)
    assert [first.choice, second.choice] == [0, 1]
    await say(served, second, b"ea", end=FinishReason.STOP)
    await say(served, first, b"abc", end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text("finished: length, stop")
    await expect(page.locator(".output")).to_have_text(["ababc", "ea"])
    await expect(page.locator("[data-figure=completion]")).to_have_text("5")
    await page.locator(".output").nth(1).focus()
    await page.keyboard.press("End")
    last = page.locator(".output").nth(1).locator(".token").last
    await expect(last).to_be_focused()
    await expect(last).to_have_accessible_description("token 97 at 2", timeout=1)


@pytest.mark.parametrize("way", ["key", "button"])
async def test_stop_ends_the_request(page: Page, served: Served, way: str) -> None:
    request = await ask(page, served)
    await say(served, request, b"one")
    await expect(page.locator(".output .token")).to_have_count(3)
    if way == "key":
        await page.keyboard.press("Escape")
    else:
        await page.get_by_role("button", name="Stop").click()
    await served.fake.expect(AbortRequest)
    await expect(page.get_by_role("status")).to_have_text("stopped after 3 tokens")
    await expect(page.get_by_role("alert")).to_be_hidden()
    again = await ask(page, served)
    await say(served, again, b"x", end=FinishReason.STOP)
    await expect(page.get_by_role("status")).to_have_text("finished: stop")


async def test_alternatives_by_pointer_and_by_keyboard(page: Page, served: Served) -> None:
    request = await ask(page, served)
    await say(served, request, b"ea")
    await say(served, request, b"z", start=2, logprob=math.log(0.004), end=FinishReason.LENGTH)
    tokens = page.locator(".output .token")
    await expect(tokens).to_have_count(3)
    assert [await each.get_attribute("data-level") for each in await tokens.all()] == [
        *("0", "0"),  # 50 % is not below it
        "4",
    ]
    tip = page.get_by_role("tooltip")
    await expect(tip).to_be_hidden()
    await tokens.first.hover()
    await expect(tip.get_by_role("row")).to_have_text(["e50.0 %", "a25.0 %", "↵12.5 %"])
    await expect(tip.locator(".taken")).to_have_text("e50.0 %")
    await prompt(page).hover()
    await expect(tip).to_be_hidden()
    await page.locator(".output").focus()
    for key in ("ArrowRight", "ArrowRight", "End"):
        await page.keyboard.press(key)
    await expect(tokens.nth(2)).to_be_focused()
    await expect(tip.get_by_role("row")).to_have_text(["z0.40 %", "e50.0 %", "a25.0 %", "↵12.5 %"])
    await expect(tokens.nth(2)).to_have_accessible_description("token 122 at 3", timeout=1)
    await page.keyboard.press("Escape")
    await expect(tip).to_be_hidden()


async def test_what_a_model_writes_is_no_html(page: Page, served: Served) -> None:
    written = b"<img src=x onerror=\"document.title='bad'\"><b>&amp;"
    request = await ask(page, served, "<i>p</i>")
    await say(served, request, written, end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text("finished: length")
    await expect(page.locator(".output")).to_have_text(f"<i>p</i>{written.decode()}")
    assert await page.locator(".output :is(img, b, i)").count() == 0
    assert await page.title() == "Ropeway playground"


async def test_half_a_character_shows_once_it_is_whole(page: Page, served: Served) -> None:
    request = await ask(page, served)
    await say(served, request, "é".encode(), end=FinishReason.LENGTH)
    tokens = page.locator(".output .token")
    await expect(tokens).to_have_text(["", "é"])
    await expect(tokens.first).to_have_class("token part")


@pytest.mark.parametrize(
    ("field", "typed", "message"),
    [
        ("max_tokens", "0", "max_tokens must be at least 1 and at most 2147483647, got 0"),
        ("temperature", "warm", 'temperature should be a valid number, got "warm"'),
        ("max_tokens", "99", "prompt (2 tokens) and max_tokens (99) need more than the context"),
    ],
)
async def test_errors_stand_at_their_field(
    page: Page, served: Served, field: str, typed: str, message: str
) -> None:
    await prompt(page).fill("ab")
    await page.get_by_label(field).fill(typed)
    await page.get_by_role("button", name="Generate").click()
    await expect(page.get_by_role("alert")).to_contain_text(message)
    await expect(page.get_by_role("alert")).to_contain_text(field)
    guilty = page.locator(f"[name={field}]")
    await expect(guilty).to_have_accessible_description(re.compile(re.escape(message)))
    await expect(guilty).to_be_focused()
    await expect(guilty).to_have_attribute("aria-invalid", "true")
    await guilty.fill("3")
    request = await ask(page, served)  # and everything is as before
    await expect(page.locator("[aria-invalid]")).to_have_count(0)
    await say(served, request, b"x", end=FinishReason.LENGTH)
    await expect(page.get_by_role("alert")).to_be_hidden()


async def test_a_stream_that_failed_says_so(page: Page, served: Served) -> None:
    request = await ask(page, served)
    await say(served, request, b"so")
    await expect(page.locator(".output .token")).to_have_count(2)
    await served.fake.die()
    await expect(page.get_by_role("alert")).to_contain_text("engine process died")
    await expect(page.get_by_role("status")).to_have_text("")
    await expect(page.get_by_role("button", name="Generate")).to_be_enabled()


async def test_a_key_is_asked_for_where_one_is_needed(page: Page, served: Served) -> None:
    key = page.get_by_label("API key")
    await expect(key).to_be_hidden()

    async def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer secret":
            await route.continue_()
            return
        error = {"code": "missing_api_key", "message": "this server needs a key", "field": None}
        await route.fulfill(status=401, json={"error": error})

    await page.route("**/generate", guard)
    await prompt(page).fill("ab")
    await page.keyboard.press("Control+Enter")
    await expect(page.get_by_role("alert")).to_have_text("this server needs a key")
    await expect(key).to_be_focused()
    await page.keyboard.type("secret")
    await page.keyboard.press("Enter")
    request = await served.fake.expect(AddRequest)
    await say(served, request, b"x", end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text("finished: length")


async def test_two_rotations_and_their_perplexity(page: Page, served: Served) -> None:
    await page.get_by_label("Compare two rotations").check()
    own, stretched = await ask_both(page, served)
    assert own.params.rope is None
    assert stretched.params.rope == RopeScaling(type="ntk", factor=4)
    assert own.params.seed == stretched.params.seed
    await say(served, own, b"aa", logprob=math.log(0.5))
    await say(served, own, b"aa", start=2, logprob=math.log(0.125), end=FinishReason.LENGTH)
    await say(served, stretched, b"bbbb", logprob=math.log(0.1), end=FinishReason.LENGTH)
    await expect(page.get_by_role("heading", level=2)).to_have_text(
        [re.compile(r"own rotation$"), re.compile(r"^ntk . 4$")]
    )
    await expect(page.locator(".output")).to_have_text(["abaaaa", "abbbbb"])
    reading = page.locator("#reading")
    await expect(reading).to_contain_text("own rotation: 3.5")  # (2 * 2 * 2 * 8 * 8) ** (1 / 5)
    await expect(reading).to_contain_text(" 4: 10.0")
    curves = page.locator("#chart polyline")
    await expect(curves).to_have_count(2)
    shapes = [await each.get_attribute("points") or "" for each in await curves.all()]
    heights = [[float(point.split(",")[1]) for point in each.split()] for each in shapes]
    # the prompt's one score, and the answer: 2, 2, 2, then more (y points down); ten stays ten
    assert len(heights[0]) == len(heights[1]) == 5
    assert heights[0][0] == heights[0][1] == heights[0][2] > heights[0][3] > heights[0][4]
    assert heights[0][4] > heights[1][0]
    assert len(set(heights[1])) == 1
    await expect(page.locator("#chart .mark")).to_have_count(1)  # where the answer begins


async def test_the_models_context_is_marked_where_it_is_passed(page: Page, served: Served) -> None:
    await page.get_by_label("Compare two rotations").check()
    await page.get_by_label("rope.type").first.select_option("linear")
    await page.get_by_label("factor").first.fill("2")
    both = await ask_both(page, served, "x" * 30)
    for request in both:
        await say(served, request, b"a" * 34)
    await expect(page.locator(".output .token")).to_have_count(68)
    await expect(page.locator("#chart text", has_text="the model's context")).to_have_count(0)
    for request in both:
        await say(served, request, b"a" * 2, start=34, end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text(["finished: length"] * 2)
    label = page.locator("#chart text", has_text="the model's context")
    await expect(label).to_have_count(1)  # 29 scores and 36 tokens: 65 of 64
    mark = page.locator("#chart .mark").nth(1)
    place = float(await mark.get_attribute("x1") or 0)
    end = await page.locator("#chart polyline").first.get_attribute("points")
    assert end is not None
    xs = [float(point.split(",")[0]) for point in end.split()]
    assert place == pytest.approx(xs[63], abs=0.1)


async def test_the_guilty_rotation_is_marked(page: Page, served: Served) -> None:
    await page.get_by_label("Compare two rotations").check()
    factors = page.get_by_label("factor")
    await factors.nth(1).fill("0.5")
    await score(served, await ask(page, served), -1.0)
    own = await served.fake.expect(AddRequest)
    await expect(page.locator(".run").nth(1).get_by_role("alert")).to_contain_text(
        "rope.factor must be at least 1, got 0.5"
    )
    await expect(factors.nth(1)).to_be_focused()
    await expect(factors.nth(0)).not_to_have_attribute("aria-invalid", "true")
    await say(served, own, b"x", end=FinishReason.LENGTH)
    await expect(page.get_by_role("status").first).to_have_text("finished: length")


@pytest.mark.parametrize("width", [320, 375, 700])
async def test_a_phone_needs_no_sideways_scrolling(page: Page, served: Served, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 640})
    await page.get_by_label("Compare two rotations").check()
    for request in await ask_both(page, served, "x" * 12):
        await say(served, request, b"W" * 40, end=FinishReason.LENGTH)
    await expect(page.get_by_role("status")).to_have_text(["finished: length"] * 2)
    await page.locator(".output .token").nth(39).hover()
    assert await page.evaluate(OVERFLOW) <= 0
    boxes = [await each.bounding_box() for each in await page.locator(".run").all()]
    first, second = boxes
    assert first is not None
    assert second is not None
    assert first["x"] == second["x"]  # one column
    assert second["y"] >= first["y"] + first["height"]


async def test_the_keyboard_reaches_everything(page: Page) -> None:
    await prompt(page).focus()
    reached = []
    for _ in range(18):
        await page.keyboard.press("Tab")
        focused = page.locator(":focus")
        width = await focused.evaluate("element => getComputedStyle(element).outlineWidth")
        assert width != "0px"
        identity = "element => element.name || element.id || element.localName"
        reached.append(await focused.evaluate(identity))
    begin = ["generate", "compare", "summary", "max_tokens", "temperature", "top_k", "top_p"]
    assert reached[: len(begin)] == begin
    assert "overflow" in reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_texts_stand_out(page: Page, served: Served, scheme: str) -> None:
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    request = await ask(page, served)
    for at, share in enumerate((0.9, 0.4, 0.1, 0.04, 0.001)):
        await say(served, request, b"x", start=at, logprob=math.log(share))
    await page.locator(".output .token").nth(4).hover()
    await expect(page.get_by_role("tooltip")).to_be_visible()
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(19, 22, 24)") == (scheme == "dark")
    assert await page.evaluate(CONTRASTS) == {}
