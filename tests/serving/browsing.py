"""The page in a real Chromium, and what its visit must never do."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Page, Request, Response, expect, sync_playwright

expect.set_options(timeout=6_000)  # the machine may be busy with other tests
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MODULES = "/page/"
COLOURS = {"runOnly": ["color-contrast"]}  # all that can be otherwise in the dark


def screenshot_folder(otherwise: Path) -> Path:
    """Where pictures of the page go: what `BDH_SCREENSHOTS` names, or a folder of the test."""
    folder = Path(os.environ.get("BDH_SCREENSHOTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium of this machine."""
    found = [path for name in CHROMIUM if (path := shutil.which(name))]
    if not found:
        pytest.fail("the page's tests need Chromium, and there is none; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One visitor of a server's page, with a storage of its own.

    Attributes:
        page: What it sees.
        requests: The bodies of what it sent to /v1, as text, by path.
        mistakes: What a page must never do: errors of scripts, breaches of the policy, requests to elsewhere.
    """

    def __init__(self, context: BrowserContext, url: str, shots: Path, ready: bool):
        self.url = url
        self.context = context
        self.shots = shots
        self.requests: list[tuple[str, str]] = []
        self.mistakes: list[str] = []
        self.page: Page = context.new_page()
        self.page.on("request", self._asked)
        self.page.on("response", self._answered)
        self.page.on("pageerror", lambda error: self.mistakes.append(f"error: {error}"))
        self.page.on("console", lambda told: self._told(told.text))
        self.page.goto(self.url)
        if ready:
            self._wait_for_models()

    def open(self, mode: str = "chat") -> None:
        """Loads the page again."""
        self.page.goto(f"{self.url}/#{mode}")
        self.page.reload()  # another mode alone would load nothing
        self._wait_for_models()

    def set(self, **settings: object) -> None:
        """Fills the form of settings; "" empties a field."""
        self.page.get_by_role("button", name="Settings").click()
        for name, value in settings.items():
            field = self.page.locator(f"#settings [name={name}]")
            if isinstance(value, bool):
                field.set_checked(value)
            else:
                field.fill(str(value))
        self.page.get_by_role("button", name="Done").click()

    def say(self, text: str, wait: bool = True) -> None:
        """Sends a message, and waits for the end of the answer, which must not fail."""
        answers = self.page.locator("#log .assistant")
        count = answers.count()
        self.page.get_by_role("textbox", name="Message").fill(text)
        self.page.keyboard.press("Enter")
        if wait:
            expect(answers).to_have_count(count + 1)
            self.wait()

    def wait(self) -> None:
        """Waits for the end of what is being written."""
        expect(self.page.locator(".stop")).to_have_count(0)

    @property
    def answers(self) -> list[str]:
        """The texts of all answers, from the page's text nodes."""
        return self.page.locator("#log .assistant .text").all_text_contents()

    def accessible(self, state: str) -> list[str]:
        """What axe finds in this state that is serious or critical, in light and dark. Also takes pictures of it."""
        wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        found = [f"{state}: the page is {wide} pixels too wide"] if wide > 0 else []
        for scheme, options in (("light", {}), ("dark", COLOURS)):
            self.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            self.page.screenshot(path=self.shots / f"{state}-{scheme}.png")
            for violation in Axe().run(self.page, options=options).response["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    where = [node["target"] for node in violation["nodes"]]
                    found.append(f"{state} {scheme}: {violation['id']} at {where}")
        return found

    def _wait_for_models(self) -> None:
        expect(self.page.locator("#model option").first).to_be_attached()

    def _asked(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.mistakes.append(f"a request to {request.url}")
        _, _, path = request.url.partition("/v1/")
        if path:
            self.requests.append((f"{request.method} {path}", request.post_data or ""))

    def _answered(self, response: Response) -> None:
        if MODULES in response.url and not response.ok and response.status != 304:
            self.mistakes.append(f"{response.url} is answered with {response.status}")

    def _told(self, text: str) -> None:
        if "Content Security Policy" in text or "Uncaught" in text:
            self.mistakes.append(text)
