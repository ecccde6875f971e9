"""The page in a real Chromium: what it shows, how it is used, and what a run can never make it do."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Browser, Page, expect

from bdh.report.page import FOLDER, SCRIPTS, render
from bdh.report.runs import read_runs
from tests.serving.browsing import chromium, screenshot_folder

EVIL = "</script><img src=x onerror=alert(1)><script>window.bad = 1</script>"


def make_run(folder: Path, steps: int, layers: int, rate: float) -> Path:
    """A run as `bdh train` leaves it, with a name, settings, figures and samples that would like to be HTML."""
    folder.mkdir()
    records: list[dict[str, object]] = []
    for step in range(10, steps + 1, 10):
        clock = {"tokens": step * 100, "seconds": step * rate}
        loss = 1 + 4 / (1 + step / 50)
        records.append({"step": step, **clock, "loss": loss, "gradient_norm": 1.0, EVIL: 1.0, "constructor": 2.0})
        if step % 100 == 0:
            layer = {f"{kind}/layer_{i}": 0.1 * (i + 1) for kind in ("active_x", "state_norm") for i in range(layers)}
            records.append(
                {"step": step, "tokens": step * 100, "validation_loss": loss + rate, "accuracy": 0.5, **layer}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(json.dumps({"run_dir": EVIL, "model": {"n_layer": layers, "n_embd": 8}}))
    samples = "".join(
        f"## Step {step}\n\n    at {step} {EVIL}\n\n    second\n\n" for step in range(100, steps + 1, 100)
    )
    (folder / "samples.md").write_text(samples)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / "<b>first", 1000, 3, 0.5), make_run(folder / "second", 600, 2, 0.1)]
    (folder / "report.html").write_text(render(read_runs(runs), "today"))
    return folder / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    mistakes: list[str] = []
    page.on("pageerror", lambda error: mistakes.append(str(error)))
    page.on("console", lambda message: mistakes.append(message.text))
    page.on("dialog", lambda dialog: mistakes.append(dialog.message))
    page.on("request", lambda request: mistakes.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(report.as_uri())
    yield page
    assert mistakes == []
    context.close()


def test_it_shows_runs_and_runs_nothing_of_theirs(page: Page, report: Path) -> None:
    assert page.title() == "<b>first, second - bdh report"
    best = page.get_by_role("region", name="Best figures")
    expect(best.get_by_role("columnheader")).to_have_text(["<b>first", "second"])
    expect(best.get_by_role("row").filter(has_text="Validation loss")).to_contain_text("1.408best")  # 1 + 4/13 + 0.1
    settings = page.get_by_role("region", name="Settings")
    expect(settings.get_by_role("row")).to_have_count(2)  # only n_layer differs
    page.get_by_label("all settings").check()
    expect(settings.get_by_role("row")).to_have_count(4)
    expect(settings).to_contain_text(EVIL)
    expect(page.locator(".samples")).to_contain_text(f"at 1000 {EVIL}")
    assert page.evaluate("window.bad") is None and page.locator("img").count() == 0
    text = report.read_text()
    ours = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert EVIL not in text and not re.search(r"\b(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)", ours)
    assert len(re.findall("<script", text)) == 2


def test_curves_zoom_by_mouse_wheel_and_keyboard(page: Page) -> None:
    chart = page.locator("figure", has=page.get_by_role("heading", name="Loss", exact=True))
    plot, tip, shown_all = chart.locator("svg"), chart.locator(".tip"), chart.get_by_role("button", name="Show all")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    expect(tip).to_contain_text("second, validation")
    whole = chart.locator(".tick").all_text_contents()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 90, steps=3)
    page.mouse.up()
    expect(shown_all).to_be_visible()
    assert chart.locator(".tick").all_text_contents() != whole
    shown_all.click()
    expect(shown_all).to_be_hidden()
    assert chart.locator(".tick").all_text_contents() == whole
    expect(plot).to_be_focused()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 80)
    page.mouse.wheel(0, -200)
    expect(shown_all).to_be_visible()
    page.keyboard.press("0")
    expect(shown_all).to_be_hidden()
    page.keyboard.press("End")
    expect(chart.locator("output")).to_contain_text("step 1,000: ")
    expect(chart.locator("output")).to_contain_text("<b>first, training 1.1905")
    page.keyboard.press("ArrowLeft")
    expect(chart.locator("output")).to_contain_text("step 990: ")
    page.keyboard.press("+")
    expect(shown_all).to_be_visible()


def test_what_is_chosen_changes_all_curves(page: Page) -> None:
    chart = page.locator("figure", has=page.get_by_role("heading", name="Loss", exact=True))
    path = chart.locator("path.line").first
    before = path.get_attribute("d")
    page.get_by_label("Smoothing").focus()
    page.keyboard.press("End")
    expect(path).not_to_have_attribute("d", before or "")
    page.keyboard.press("Home")
    expect(path).to_have_attribute("d", before or "")
    page.get_by_label("Over").select_option("seconds")
    expect(chart.locator(".axis-title")).to_have_text("time")
    expect(chart.locator(".tick").last).to_have_text(re.compile("min|s"))
    page.get_by_label("log scale").check()
    expect(path).not_to_have_attribute("d", before or "")
    page.locator(".controls").get_by_label("second").uncheck()
    expect(chart.locator("path.line")).to_have_count(2)


def test_samples_and_neurons_by_step(page: Page) -> None:
    page.get_by_role("button", name="Samples up to step: the one before").click()
    expect(page.locator(".samples section").first).to_contain_text("at 900")
    expect(page.locator(".samples section").last).to_contain_text("at 600")
    active = page.locator("figure", has=page.get_by_role("heading", name="Active neurons X")).first
    expect(active.locator("circle.dot")).to_have_count(5)  # three layers and two
    slider = page.get_by_label("By layer, at step", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "step 100")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_it_fits_and_everyone_can_read_it(
    browser: Browser, report: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(report.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    page.wait_for_function("document.querySelectorAll('details svg path.line').length > 3")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.screenshot(path=screenshot_folder(tmp_path) / f"report-{scheme}-{width}.png", full_page=True)
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found] == []
    context.close()


def test_its_parts_are_small_and_all_used() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*SCRIPTS, "report.html", "report.css"}
    assert all(len(path.read_text().splitlines()) < 350 for path in FOLDER.iterdir())
