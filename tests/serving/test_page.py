"""The page at /: what it is sent with, and what people do with it in a real browser."""

import re
import shutil
import threading
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
from server_clients import eventually

from griffin_offload import GriffinModel

KEY = "sk-a-secret"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LONG_MS = 120_000


def test_the_page_is_one_file_that_asks_nobody_else(tiny):
    answer = tiny.http.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    for kind in ("script", "style"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[f"{kind}-src"])
        assert len(re.findall(f"<{kind}", answer.text)) == 1
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert tiny.http.head("/").text == ""
    assert "://" not in answer.text
    assert not re.search(
        r"(src|href)=\"(?!#|data:,)|url\(|@import|innerHTML|insertAdjacent|style=|onclick=\"", answer.text
    )
    assert answer.text == files("griffin_offload.serving").joinpath("page.html").read_text(encoding="utf-8")


def test_no_page_and_a_page_of_another_server(chatty, serve_one, tiny):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 1}
    with serve_one(chatty, page=False) as bare:
        assert bare.http.get("/").json()["error"]["code"] == "not_found"
        assert bare.post(body, headers={"origin": bare.url}).status_code == 403
    assert tiny.post(body, headers={"origin": tiny.url}).status_code == 200
    for other in ("http://127.0.0.1:1", tiny.url.replace("127.0.0.1", "localhost"), "null"):
        assert tiny.post(body, headers={"origin": other}).json()["error"]["code"] == "origin_not_allowed"


def test_what_a_model_is_told_to_be(tiny, model: GriffinModel):
    """The figures under /v1/models/{id}, and those of an answer by layer."""
    body = {"model": "tiny", "prompt": "the cat sat on the mat and", "max_tokens": 3, "temperature": 0}
    told = tiny.post(body).json()["griffin"]
    kept = told["activation_kept_by_layer"]
    assert len(kept) == len(model.plan.kept)
    assert sum(kept) / len(kept) == pytest.approx(told["activation_kept"], abs=1e-3)
    found = tiny.http.get("/v1/models/tiny").json()
    assert found["id"] == "tiny"
    figures = found["griffin"]
    assert figures["plan"] == model.plan.to_json()
    assert figures["limits"] == {"prompt_tokens": 199, "output_tokens": 199, "context_tokens": 200}
    assert figures["peak_bytes"] <= figures["plan"]["budget_bytes"]
    assert (figures["loaded"], figures["chat"], figures["defaults"]["exact"]) == (True, True, False)
    model.generate(model.tokenizer(body["prompt"], return_tensors="pt")["input_ids"], max_new_tokens=3)
    for index, (row, block) in enumerate(zip(figures["residents"]["layers"], model.engine.blocks, strict=True)):
        parts = [[] for _ in row]
        for neuron in range(block.neurons):
            parts[neuron * len(row) // block.neurons].append(neuron in model.selected[index].tolist())
        assert row == [round(100 * sum(part) / len(part)) for part in parts]


def test_a_stream_that_tells_how_far_it_is(tiny, model: GriffinModel):
    body = {"model": "tiny", "prompt": "where does the little river go", "max_tokens": 3, "stream": True}
    lines = tiny.post(body | {"return_progress": True, "seed": 5}).text
    layers = len(model.plan.kept)
    assert re.findall(r'"layers_done":(\d+),"layers":(\d+)', lines) == [
        (f"{i + 1}", f"{layers}") for i in range(layers)
    ]
    counted = [int(tokens) for tokens in re.findall(r'"griffin":{"tokens":(\d)}', lines)]
    assert counted == sorted(counted)
    assert 0 < max(counted) <= 3
    assert "griffin" not in tiny.post(body | {"seed": 5}).text
    refused = tiny.post({**body, "stream": False, "return_progress": True})
    assert refused.json()["error"]["param"] == "return_progress"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser) -> Iterator[Any]:
    """`visit(url)`: a page of a new window, of which every error is one of the test."""
    context = browser.new_context(viewport={"width": 900, "height": 500})
    context.set_default_timeout(LONG_MS)
    wrong: list[str] = []

    def open_page(url: str) -> Any:
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Security Policy" in said.text else None)
        page.goto(url)
        return page

    yield open_page
    context.close()
    assert not wrong


def ask(page: Any, text: str) -> None:
    page.get_by_label("Your message", exact=False).first.fill(text)
    page.keyboard.press("Enter")


def answered(page: Any) -> str:
    page.get_by_role("button", name="Stop").wait_for(state="hidden")
    return page.locator("article.assistant .text").last.inner_text()


@pytest.mark.slow
def test_an_answer_comes_is_stopped_and_survives_a_reload(visit, chatty, serve_one, gate: threading.Semaphore):
    with serve_one(chatty) as server:
        page = visit(server.url)
        page.get_by_text("Ask something.").wait_for()
        gate.release(4)
        ask(page, "where does the river go")
        page.get_by_text("Answering …").wait_for()
        eventually(lambda: len(page.locator("article.assistant .text").inner_text()) > 3)
        partial = page.locator("article.assistant .text").inner_text()
        assert page.get_by_role("log").get_attribute("aria-busy") == "true"
        page.get_by_role("button", name="Stop").click()
        assert answered(page).strip().startswith(partial.strip()[:3])
        page.get_by_text("Stopped.").wait_for()
        eventually(lambda: server.metric("running_requests") == 0)
        gate.release(10_000)
        page.reload()
        assert page.locator("article .text").first.inner_text() == "where does the river go"
        assert page.get_by_text("stopped", exact=True).count() == 1
        page.get_by_role("button", name="Edit").first.click()
        page.locator("article textarea").fill("the cat sat on the mat")
        page.get_by_role("button", name="Send again").click()
        page.get_by_text(re.compile("The answer is complete|was cut at")).wait_for()
        assert page.locator("article").count() == 2
        told = page.get_by_label("Settings and figures").inner_text()
        for words in ("Budget", "KV cache", "Slots for streaming", "Activation kept", "Neurons on the device"):
            assert words in told
        rate = page.get_by_label("Last answer").inner_text()
        page.reload()
        page.get_by_label("Last answer").get_by_text("Activation kept").wait_for()
        assert page.get_by_label("Last answer").inner_text() == rate


@pytest.mark.slow
def test_errors_are_told_in_words(visit, chatty, serve_one):
    with serve_one(chatty, max_output_tokens=5) as server:
        page = visit(server.url)
        page.get_by_text("Settings", exact=True).click()
        page.get_by_label("Longest answer").fill("6")
        ask(page, "hello")
        page.get_by_role("alert").get_by_text("max_tokens is 6, 5 are allowed").wait_for()
        page.get_by_label("Longest answer").fill("4")
        page.get_by_label("Repetition penalty").fill("1.1")
        page.get_by_label("Temperature").fill("0")
        page.get_by_role("button", name="Try again").click()
        assert answered(page)
        page.get_by_label("Exact").select_option("on")
        page.get_by_role("button", name="Again").last.click()
        page.get_by_text("verified by the full model").wait_for()
    ask(page, "is anybody there")
    page.get_by_role("alert").get_by_text("cannot be reached").wait_for()
    assert page.get_by_text("is anybody there").count() == 1


@pytest.mark.slow
def test_a_long_answer_of_hostile_text(visit, chatty, serve_one, script, gate, model: GriffinModel):
    text = "<img src=x onerror=alert(1)>\n\n```\n<b>a</b>\n```\n\n" + "the cat\n\n" * 20
    tokens = model.tokenizer(text)["input_ids"]
    script(tokens)
    with serve_one(chatty, {"ctx_size": len(tokens) + 100}) as server:
        page = visit(server.url)
        gate.release(len(tokens) - 10)
        ask(page, "a long one")
        eventually(lambda: page.locator("article.assistant p").count() > 15)
        log = page.locator("#log")
        at_end = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 60"
        eventually(lambda: log.evaluate(at_end))
        log.evaluate("log => log.scrollTop = 0")
        page.get_by_role("button", name="Newest").wait_for()
        gate.release(10_000)
        shown = answered(page)
        assert log.evaluate("log => log.scrollTop") == 0
        assert shown.startswith("<img src=x onerror=alert(1)>")
        assert page.locator("article.assistant pre").inner_text() == "<b>a</b>"
        assert page.locator("article img, article b").count() == 0
        page.get_by_role("button", name="Newest").click()
        assert log.evaluate(at_end)


@pytest.mark.slow
def test_a_key_is_asked_for(visit, chatty, serve_one):
    with serve_one(chatty, api_key=KEY) as server:
        page = visit(server.url)
        for key in ("sk-another", KEY):
            page.get_by_label("API key").fill(key)
            page.keyboard.press("Enter")
            if key != KEY:
                page.get_by_text("does not take this key").wait_for()
        page.get_by_text("Ask something.").wait_for()
        page.locator("dialog").wait_for(state="hidden")
        ask(page, "the cat")
        assert answered(page)
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
