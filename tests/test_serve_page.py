"""The page in a real headless Chromium, in front of the real server with the pack that ships."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright (the dev extra)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium: apt-get install chromium"),
    pytest.mark.xdist_group("page"),  # one server, where the run is distributed by group
]

GLACIAL = {"term": "glacial", "context": "a glacial wind swept the valley"}
INVOLVE = {"term": "involve", "context": "The situation was rather involved"}
HOSTILE = '<img src=x onerror="window.hit = 1">'
# Keeps every state of the definition in window.seen.
RECORDER = """
window.seen = [];
addEventListener("DOMContentLoaded", () => {
  const output = document.getElementById("definition");
  new MutationObserver(() => seen.push(output.textContent)).observe(output, { childList: true, subtree: true });
});
"""
# Lets one event of a streamed definition through in each quarter of a second.
BRAKE = """
const quick = window.fetch;
window.fetch = async (path, options) => {
  const response = await quick(path, options);
  if (path !== "define") return response;
  const slow = new TransformStream({ async transform(text, controller) {
    for (const event of text.split(/(?<=\\n\\n)/)) {
      controller.enqueue(event);
      await new Promise((done) => setTimeout(done, 250));
    }
  } });
  const text = new TextDecoderStream(), bytes = new TextEncoderStream();
  return new Response(response.body.pipeThrough(text).pipeThrough(slow).pipeThrough(bytes), response);
};
"""
# The texts whose contrast with what is behind them is below 4.5, as [text, contrast].
FAINT = """
() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, .unseen, option")) continue;
    const [dark, light] = [getComputedStyle(element).color, null].map((c) => luminance(c ? parts(c) : ground(element)))
      .sort((a, b) => a - b);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) faint.push([element.textContent, contrast]);
  }
  return faint;
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `lora-lexicon serve` with the pack that ships."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [str(Path(sys.executable).parent / "lora-lexicon"), "serve", "tiny", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:  # it listens once it has loaded the model
                urlopen(f"{address}/domains", timeout=120).close()
                break
            except URLError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def errors() -> list[str]:
    """What the browser's console complains of. A test that causes a complaint takes it out."""
    return []


@pytest.fixture
def open_page(browser: Any, server: str, errors: list[str]) -> Iterator[Callable[..., Any]]:
    """Opens the page in a fresh context; in the end nothing was complained of or fetched from elsewhere."""
    contexts, fetched = [], []

    def open_one(query: dict[str, str] | None = None, script: str = "", **context: Any) -> Any:
        contexts.append(browser.new_context(base_url=server, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto("/?" + urlencode(query) if query else "/")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in fetched if not url.startswith(server + "/")] == []


def post(server: str, path: str, body: dict[str, Any]) -> Any:
    request = Request(server + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=30) as response:
        return json.load(response)


def ask(page: Any, term: str, context: str = "") -> None:
    page.get_by_label("Term", exact=True).fill(term)
    page.get_by_label("A sentence that uses it").fill(context)
    page.get_by_role("button", name="Define").click()


def said(page: Any, text: str) -> None:
    """Waits until the status says so."""
    playwright.expect(page.locator("#status")).to_have_text(text)


def answered(page: Any, term: str) -> str:
    """The definition, once it is whole."""
    playwright.expect(page.get_by_role("heading", name=term, exact=True)).to_be_visible()
    said(page, "Done.")
    return page.locator("#definition").text_content()


def test_a_definition_streams_in_with_its_domain_and_certainty(open_page: Callable, server: str) -> None:
    page = open_page(script=RECORDER)
    ask(page, **GLACIAL)
    shown = answered(page, "glacial")
    (expected,) = post(server, "/define", GLACIAL)["definitions"]
    found = post(server, "/route", GLACIAL)
    assert shown == expected["definition"] != ""
    seen = list(dict.fromkeys(page.evaluate("seen")))
    assert len(seen) > 3, "it came at once"
    assert all(expected["definition"].startswith(text.strip()) for text in seen)
    assert page.locator("#byline").text_content() == f"Written by {expected['domain']}"
    certainty = page.locator("#certainty").text_content()
    first, second = found["domains"][:2]
    assert f"{found['margin']:.2f} ahead of {second['name']}" in certainty
    assert f"({first['similarity']:.2f})" in certainty
    assert "clear" in certainty
    rows = page.locator("#rows tr")
    assert rows.count() == len(found["domains"])
    assert rows.first.inner_text().split() == [first["name"], f"{first['similarity']:.2f}", f"{first['weight']:.2f}"]


def test_the_others_answer_on_request(open_page: Callable, server: str) -> None:
    page = open_page(GLACIAL)
    own = answered(page, "glacial")
    assert page.locator("#others li").count() == 0
    page.locator("#compare summary").click()
    (expected,) = post(server, "/define", {**GLACIAL, "all_domains": True})["definitions"]
    others = page.get_by_role("list", name="The other domains’ answers").get_by_role("listitem")
    playwright.expect(others).to_have_count(len(expected["others"]))
    for item, other in zip(others.all(), expected["others"], strict=True):
        assert item.locator(".domain").text_content() == other["domain"]
        assert item.locator("p").text_content() == other["definition"]
        assert ("the same words" in item.text_content()) == (other["definition"] == own)


def test_a_chosen_domain_writes(open_page: Callable, server: str) -> None:
    page = open_page()
    page.get_by_label("Written by").select_option("make-cause")
    ask(page, **GLACIAL)
    shown = answered(page, "glacial")
    assert shown == post(server, "/define", {**GLACIAL, "domain": "make-cause"})["definitions"][0]["definition"]
    assert page.locator("#byline").text_content() == "Written by make-cause, as you asked"
    assert "The router would choose relating-characteristic" in page.locator("#certainty").text_content()


def test_the_map_holds_every_domain_and_the_query(open_page: Callable, server: str) -> None:
    page = open_page()
    names = [domain["name"] for domain in json.load(urlopen(f"{server}/domains"))["domains"]]
    plane = page.get_by_role("img", name="Map of the domains")
    playwright.expect(plane).to_be_visible()
    assert plane.locator(".query").count() == 0
    ask(page, **GLACIAL)
    answered(page, "glacial")
    marks = [page.locator(f"#plane .centroid[data-domain='{name}']") for name in names]
    assert [mark.count() for mark in marks] == [1] * len(names)
    looks = {(mark.get_attribute("class"), mark.get_attribute("d")) for mark in marks}
    assert len({outline for _, outline in looks}) == len(names), "told apart without colour"
    assert plane.locator(".query").count() == 1
    assert "glacial" in plane.text_content()
    box = plane.bounding_box()
    for mark in [*marks, plane.locator(".query")]:
        own = mark.bounding_box()
        assert box["x"] < own["x"] < box["x"] + box["width"] - own["width"]
        assert box["y"] < own["y"] < box["y"] + box["height"] - own["height"]
    assert "“glacial” lies nearest to relating-characteristic" in page.locator("#map-words").text_content()


def test_a_link_answers_and_the_back_button_goes_back(open_page: Callable) -> None:
    page = open_page(GLACIAL)
    first = answered(page, "glacial")
    assert page.title() == "glacial · lora-lexicon"
    ask(page, **INVOLVE)
    assert answered(page, "involve") != first
    assert page.url.endswith("?" + urlencode(INVOLVE))
    page.go_back()
    assert answered(page, "glacial") == first
    assert page.get_by_label("A sentence that uses it").input_value() == GLACIAL["context"]


def test_hostile_text_is_inert(open_page: Callable) -> None:
    page = open_page({"term": HOSTILE, "context": f"</p><script>window.hit = 1</script>{HOSTILE}", "domain": HOSTILE})
    answered(page, HOSTILE)
    page.locator("#compare summary").click()
    playwright.expect(page.locator("#others li").first).to_be_visible()
    assert page.locator("img").count() == 0
    answer = {"term": "x", "context": "", "definition": HOSTILE, "domain": HOSTILE, "warnings": [HOSTILE]}
    events = [("start", {"domain": HOSTILE}), ("token", {"text": HOSTILE}), ("end", answer), ("done", {})]
    body = "".join(f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n" for name, data in events)
    page.route("**/define", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "x")
    assert answered(page, "x") == HOSTILE
    assert page.locator("#byline").text_content() == f"Written by {HOSTILE}"
    assert page.get_by_role("list", name="Warnings").text_content() == HOSTILE
    assert page.locator("img, main script").count() == 0
    assert page.evaluate("window.hit") is None


def test_errors_are_told_kindly(open_page: Callable, errors: list[str]) -> None:
    page = open_page()
    ask(page, " ")
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_have_text("Please type a term first.")
    term = page.get_by_label("Term", exact=True)
    playwright.expect(term).to_be_focused()
    assert term.get_attribute("aria-invalid") == "true"
    ask(page, "x" * 1000)
    playwright.expect(alert).to_contain_text("1000 characters")
    assert all("status of 422" in error for error in errors)
    errors.clear()
    page.route("**/define", lambda route: route.abort())
    ask(page, "apple")
    playwright.expect(alert).to_contain_text("cannot be reached")
    page.unroute("**/define")
    events = 'event: start\ndata: {"index": 0, "domain": "base"}\n\n'
    page.route("**/define", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    ask(page, "apple")
    playwright.expect(alert).to_contain_text("broke off")
    page.unroute("**/define")
    ask(page, "apple")
    assert answered(page, "apple")
    playwright.expect(alert).to_be_hidden()
    assert all("ERR_FAILED" in error for error in errors)
    errors.clear()


def test_warnings_are_shown(open_page: Callable, server: str) -> None:
    odd = {"term": "glacial", "context": "nothing of the kind"}
    page = open_page(odd)
    answered(page, "glacial")
    warnings = post(server, "/define", odd)["definitions"][0]["warnings"]
    assert page.get_by_role("list", name="Warnings").get_by_role("listitem").all_text_contents() == warnings != []


def test_stop_ends_an_answer(open_page: Callable) -> None:
    page = open_page(script=BRAKE)
    ask(page, **GLACIAL)
    playwright.expect(page.locator("#definition")).not_to_be_empty()
    stop = page.get_by_role("button", name="Stop")
    stop.focus()
    page.keyboard.press("Enter")
    said(page, "Stopped.")
    part = page.locator("#definition").text_content()
    playwright.expect(stop).to_be_hidden()
    playwright.expect(page.get_by_role("button", name="Define")).to_be_focused()
    page.wait_for_timeout(400)
    assert page.locator("#definition").text_content() == part


def test_stop_aborts_the_request(open_page: Callable) -> None:
    page = open_page()
    page.route("**/define", lambda route: None)  # an answer that never begins
    with page.expect_event("requestfailed") as failed:
        ask(page, **GLACIAL)
        page.get_by_role("button", name="Stop").click()
    assert failed.value.url.endswith("/define")
    said(page, "Stopped.")
    page.unroute("**/define")
    ask(page, **GLACIAL)
    assert answered(page, "glacial")


def test_a_token_is_asked_for_and_kept(open_page: Callable, errors: list[str]) -> None:
    page = open_page()
    sent = []

    def guard(route: Any) -> None:
        sent.append(route.request.headers.get("authorization"))
        refusal = {"error": {"type": "wrong_token", "message": "a token is needed"}}
        route.continue_() if sent[-1] == "Bearer secret" else route.fulfill(status=401, json=refusal)

    for path in ("**/domains", "**/define", "**/route"):
        page.route(path, guard)
    page.goto("/?" + urlencode(GLACIAL))
    field = page.get_by_label("Access token")
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_have_text("This service asks for a token.")
    field.fill("wrong")
    page.get_by_role("button", name="Use this token").click()
    playwright.expect(alert).to_have_text("This token is not accepted.")
    field.fill("secret")
    page.get_by_role("button", name="Use this token").click()
    assert answered(page, "glacial")
    playwright.expect(field).to_be_hidden()
    page.reload()
    assert answered(page, "glacial")
    assert sent[:2] == [None, "Bearer wrong"]
    assert set(sent[2:]) == {"Bearer secret"}
    assert all("status of 401" in error for error in errors)
    errors.clear()


def test_a_model_without_a_router(open_page: Callable) -> None:
    page = open_page()
    page.route(
        "**/domains", lambda route: route.fulfill(json={"model": "b", "kind": "base", "domains": [], "map": None})
    )
    answer = {"definition": "a word", "domain": "base", "similarity": None, "margin": None, "warnings": []}
    events = f'event: start\ndata: {{"domain": "base"}}\n\nevent: end\ndata: {json.dumps(answer)}\n\n'
    page.route("**/define", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    page.goto("/?term=apple")
    assert answered(page, "apple") == "a word"
    assert page.locator("#byline").text_content() == "Written by the base, without an expert"
    for absent in ("#router", "#certainty", "#compare", "#error"):
        playwright.expect(page.locator(absent)).to_be_hidden()


def test_what_a_learned_router_says_is_called_a_score(open_page: Callable, server: str) -> None:
    page, found = open_page(), post(server, "/route", GLACIAL)
    assert found["router"] == "centroid"
    for own, score in zip(found["domains"], (2.5, 1.25, -0.5, -5.0), strict=True):
        own["similarity"] = score
    first, second = found["domains"][:2]
    found |= {"router": "linear", "margin": 1.25}
    page.route("**/route", lambda route: route.fulfill(json=found))
    ask(page, **GLACIAL)
    assert answered(page, "glacial")
    playwright.expect(page.locator("#similarities caption")).to_have_text(
        "Score of each domain, by a learned router (linear)"
    )
    certainty = page.locator("#certainty").text_content()
    assert f"the highest score, 1.25 ahead of {second['name']}; score (2.50)." in certainty
    assert f"highest for {first['name']}" in page.locator("#map-words").text_content()
    bars = page.locator("#rows rect").evaluate_all("(all) => all.map((one) => Number(one.getAttribute('width')))")
    assert bars == [0.5, 0.25, 0.1, 1]
    page.locator("#meaning summary").click()
    playwright.expect(page.get_by_text("is no cosine")).to_be_visible()
    assert "imilarity" not in page.locator("#router").inner_text()
    page.unroute("**/route")
    ask(page, **INVOLVE)
    assert answered(page, "involve")
    playwright.expect(page.locator("#similarities caption")).to_contain_text("Similarity")
    playwright.expect(page.get_by_text("is no cosine")).to_be_hidden()


def test_the_keyboard_is_enough(open_page: Callable) -> None:
    page = open_page()
    playwright.expect(page.locator("#plane .centroid").first).to_be_visible()

    def tab_to(selector: str) -> None:
        for _ in range(12):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            if page.locator(selector).evaluate("(element) => element === document.activeElement"):
                return
        pytest.fail(f"{selector} is not reached")

    tab_to("#term")
    page.keyboard.type("glacial")
    tab_to("#context")
    page.keyboard.type(GLACIAL["context"])
    page.keyboard.press("Enter")
    assert answered(page, "glacial")
    tab_to("#compare summary")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#others li").first).to_be_visible()
    tab_to("#meaning summary")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_text("the same for every model")).to_be_visible()


def test_every_control_has_a_name(open_page: Callable) -> None:
    page = open_page(GLACIAL)
    answered(page, "glacial")
    page.evaluate("for (const element of document.querySelectorAll('[hidden]')) element.hidden = false")
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = (
        "button",
        "textbox",
        "combobox",
        "link",
        "option",
        "image",
        "table",
        "list",
        "article",
        "region",
        "form",
    )
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    found = {role: [name for own, name in named if own == role] for role in controls}
    assert len(found["button"]) >= 3
    assert len(found["textbox"]) == 3
    for role in ("button", "textbox", "combobox", "link", "image", "article", "region"):
        assert all(found[role]), found
    assert [role for role, _ in named].count("heading") == 3
    assert page.locator("#definition").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("width", [1200, 360])
def test_axe_finds_nothing(open_page: Callable, width: int) -> None:
    """The rules of axe-core, on the page with all that it may show, and on the reference."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python (dev extra)")
    page = open_page(GLACIAL, viewport={"width": width, "height": 800})
    answered(page, "glacial")
    page.locator("#compare summary").click()
    playwright.expect(page.locator("#others li").first).to_be_visible()
    page.locator("#meaning summary").click()
    page.evaluate("for (const id of ['error', 'entrance', 'stop']) document.getElementById(id).hidden = false")
    for _ in range(2):
        found = axe.Axe().run(page).response
        assert [(own["id"], own["nodes"][0]["html"]) for own in found["violations"]] == []
        assert len(found["passes"]) > 10, "it looked at something"
        page.goto("/docs")


def test_text_is_readable_by_day_and_by_night(open_page: Callable) -> None:
    page = open_page(GLACIAL)
    answered(page, "glacial")
    page.locator("#compare summary").click()
    playwright.expect(page.locator("#others li").first).to_be_visible()
    page.locator("#meaning summary").click()
    page.evaluate("for (const id of ['error', 'entrance', 'stop']) document.getElementById(id).hidden = false")
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(FAINT) == []
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2


def test_a_phone_scrolls_one_way(open_page: Callable) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    for query in (GLACIAL, {"term": "glacial" * 20, "context": "winter" * 40}):
        ask(page, **query)
        answered(page, query["term"])
        page.locator("#compare summary").click()
        playwright.expect(page.locator("#others li").first).to_be_visible()
        for width in (360, 320):
            page.set_viewport_size({"width": width, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") == width
        heights = page.evaluate(
            "[...document.querySelectorAll('button, input, select, textarea')]"
            ".filter((element) => element.checkVisibility()).map((element) => element.getBoundingClientRect().height)"
        )
        assert min(heights) >= 44, "large enough for a finger"


def test_what_is_typed_before_the_page_is_ready_stays(open_page: Callable) -> None:
    page = open_page()
    waiting: list[Any] = []
    page.route("**/domains", lambda route: waiting.append(route))
    with page.expect_request("**/domains"):
        page.reload()
    page.get_by_label("Term", exact=True).fill("glacial")
    playwright.expect(page.locator("#model")).to_be_empty()
    waiting[0].continue_()
    playwright.expect(page.locator("#model")).to_have_text("Here: tiny, 4 domains.")
    page.unroute("**/domains")
    page.get_by_role("button", name="Define").click()
    assert answered(page, "glacial")


def test_two_columns_on_a_wide_screen(open_page: Callable) -> None:
    page = open_page(viewport={"width": 1200, "height": 800})
    form, router = page.locator("#ask").bounding_box(), page.locator("#router").bounding_box()
    assert form["x"] + form["width"] < router["x"]
    assert abs(form["y"] - router["y"]) < 1
