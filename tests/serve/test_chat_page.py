"""The chat page in headless Chromium, as a person uses it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import served, slow_down
from tiny import save_tiny

from litft.infer.load import ChatModel, load_for_inference

pytestmark = pytest.mark.browser
SHOTS = os.environ.get("LITFT_SCREENSHOTS")
"""A folder for pictures to look at."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    bundle = load_for_inference(save_tiny(tmp_path_factory.mktemp("page") / "tiny", "llama"), device="cpu")
    bundle.stop_ids = set()  # answers go on to their limit
    return bundle


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A page, and everything that went wrong or left the server on it."""

    def __init__(self, browser: Any, url: str, width: int, scheme: str = "light", script: str = "") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
        self.problems: list[str] = []
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda r: None if r.url.startswith((url, "data:")) else self.problems.append(r.url))
        self.page.add_init_script(script)
        self.page.goto(url)

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")

    def answers(self) -> list[str]:
        return self.page.locator(".assistant .text").all_inner_texts()

    def until_idle(self) -> None:
        self.page.locator("#send").wait_for(state="visible", timeout=30_000)

    def sideways(self) -> int:
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SHOTS}/{name}.png")


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_a_question_is_answered(browser: Any, bundle: ChatModel, width: int, scheme: str) -> None:
    with served(bundle, max_tokens=80) as (server, url):
        slow_down(server, 0.01)  # so that there is a time in which it can be stopped
        view = Page(browser, url, width, scheme)
        view.page.get_by_text("tiny", exact=True).first.wait_for()
        view.shot(f"{width}-{scheme}-empty")
        view.ask("Why is the river wide? " + "x" * 120)
        view.page.locator("#stop").wait_for(state="visible")
        view.until_idle()
        view.ask("<b>bold</b><img src=x onerror=alert(1)>")
        view.page.locator(".assistant").nth(1).wait_for()
        view.until_idle()
        assert len(view.answers()) == 2 and all(view.answers())
        assert view.page.locator(".user .text").all_inner_texts()[1].startswith("<b>bold</b>")
        assert view.page.locator("main img, main b").count() == 0
        assert view.sideways() <= 0
        view.page.get_by_role("button", name="Settings").click()
        view.shot(f"{width}-{scheme}")
        assert view.sideways() <= 0
        assert view.problems == []
        view.page.close()


def test_the_answer_is_the_one_the_interface_gives(browser: Any, bundle: ChatModel) -> None:
    import httpx

    with served(bundle, max_tokens=40) as (_, url):
        view = Page(browser, url, 800)
        view.page.get_by_role("button", name="Settings").click()
        view.page.get_by_label("System prompt").fill("Be brief.")
        view.page.get_by_label("Temperature").fill("0")
        view.ask("why?")
        view.page.locator(".assistant .note").filter(has_text="cut at").wait_for()
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
        body = {"messages": messages, "temperature": 0}
        whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]["message"]
        assert view.page.locator(".assistant .text").first.evaluate("e => e.textContent") == whole["content"]
        assert view.problems == []


def test_who_asks_before_the_page_knows_its_model_is_answered(browser: Any, bundle: ChatModel) -> None:
    late = """const real = window.fetch, later = new Promise(go => setTimeout(go, 1500));
      window.fetch = (url, ...more) => (url === "/v1/models" ? later : Promise.resolve())
        .then(() => real(url, ...more))"""
    with served(bundle, max_tokens=8) as (_, url):
        view = Page(browser, url, 800, script=late)
        view.ask("why?")
        view.page.get_by_text("cut at").wait_for()
        assert view.problems == [] and view.page.locator(".user .text").count() == 1


def test_stop_and_clear(browser: Any, bundle: ChatModel) -> None:
    with served(bundle) as (server, url):
        slow_down(server)
        view = Page(browser, url, 800)
        view.ask("why?")
        view.page.locator(".assistant .text").filter(has_text=re.compile(".{20}", re.S)).wait_for()
        view.page.get_by_role("button", name="Stop").click()
        view.page.get_by_text("stopped").wait_for()
        view.until_idle()
        view.page.wait_for_timeout(300)
        assert (server.worker.finished, server.worker.engine.rows) == ({"cancelled": 1}, [])
        view.page.get_by_role("button", name="Clear").click()
        assert view.answers() == [] and view.page.get_by_text("Write something").is_visible()
        assert view.problems == []


def test_a_key_is_asked_for(browser: Any, bundle: ChatModel) -> None:
    with served(bundle, api_key="secret", max_tokens=8) as (_, url):
        view = Page(browser, url, 360)
        view.page.get_by_label("This server needs an API key").fill("wrong")
        view.page.get_by_role("button", name="Use").click()
        view.page.get_by_label("refused that key").fill("secret")
        view.shot("360-key")
        view.page.get_by_role("button", name="Use").click()
        view.page.locator("#ask-key").wait_for(state="hidden")
        view.ask("why?")
        view.page.get_by_text("cut at").wait_for()
        assert all("401" in problem for problem in view.problems) and len(view.problems) == 2  # the browser's own words
