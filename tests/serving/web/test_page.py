"""The page: its files, and what a visitor in a real browser sees of a real server."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from bdh.serving.web.routes import FOLDER, POLICY, files
from tests.serving.browsing import Visit, chromium, screenshot_folder
from tests.serving.running import Running, running

OPEN = "(one token after another, ){2000}"  # for others to end
Visitor = Callable[..., Visit]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as it:
        yield it


@pytest.fixture
def visitor(browser: Browser, server: Running, tmp_path: Path) -> Iterator[Visitor]:
    """Opens the page as somebody new does. At the end of the test, nobody may have done what a page must not."""
    visits: list[Visit] = []

    def visit(url: str = server.url, width: int = 1280, ready: bool = True) -> Visit:
        context = browser.new_context(viewport={"width": width, "height": 800 if width > 1000 else 740})
        visits.append(Visit(context, url, screenshot_folder(tmp_path), ready))
        return visits[-1]

    yield visit
    for visit_ in visits:
        visit_.context.close()
    assert [mistake for visit_ in visits for mistake in visit_.mistakes] == []


# ----------------------------------------------------------------------------------------------------------- its files


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as it:
        yield it


def test_files_come_with_a_strict_policy_and_are_asked_for_again_without_being_sent_again(client: httpx.Client) -> None:
    index = client.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script" not in index.text.replace('<script type="module" src="page/main.js"></script>', "")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", index.text)
    for name in files():
        answer = client.get(f"/page/{name}")
        assert answer.content == (FOLDER / name).read_bytes()
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        tag = answer.headers["etag"]
        for known in (tag, f"W/{tag}", f'"another", {tag}'):
            again = client.get(f"/page/{name}", headers={"If-None-Match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.head("/").headers["content-length"] == str(len(index.content))
    assert "/page/{name}" not in client.get("/openapi.json").text


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "../page.py", "..%2fpage.py", "%2e%2e/page.py", "..%5cpage.py", "/etc/passwd", "main.js%00", ""],
)
def test_nothing_else_is_sent(client: httpx.Client, path: str) -> None:
    request = client.build_request("GET", "/")
    request.url = client.base_url.copy_with(raw_path=f"/page/{path}".encode())  # as it is: httpx would tidy it up
    answer = client.send(request)
    assert answer.status_code == 404
    assert answer.json()["error"]["message"]


def test_every_part_is_small_and_named_in_no_list_but_the_folder() -> None:
    assert all(len(path.read_text().splitlines()) < 350 for path in FOLDER.iterdir())
    used = set(re.findall(r'(?:"\./|page/)([\w.]+)"', "".join(path.read_text() for path in FOLDER.iterdir())))
    assert used | {"index.html"} == set(files())


# ------------------------------------------------------------------------------------------------------------ its parts


def test_events_are_the_same_wherever_the_stream_is_cut(visitor: Visitor) -> None:
    stream = 'data: {"a": "é☕"}\r\n\r\n: comment\nevent: x\ndata:1\ndata: 2\n\ndata: [DONE]\r\rdata: cut off'
    found = visitor().page.evaluate(
        """async (text) => {
          const { serverEvents } = await import("./page/sse.js");
          const bytes = new TextEncoder().encode(text);
          const all = new Set();
          for (let cut = 0; cut <= bytes.length; cut += 1) {
            const pieces = [bytes.slice(0, cut), bytes.slice(cut, cut + 1), bytes.slice(cut + 1)];
            const body = new ReadableStream({ start(to) { pieces.forEach((one) => to.enqueue(one)); to.close(); } });
            const events = [];
            for await (const event of serverEvents(body)) events.push([event.event, event.data]);
            all.add(JSON.stringify(events));
          }
          return [...all].map(JSON.parse);
        }""",
        stream,
    )
    assert found == [[["message", '{"a": "é☕"}'], ["x", "1\n2"], ["message", "[DONE]"]]]


def test_tokens_are_found_in_the_text_they_make_up(visitor: Visitor) -> None:
    pieces = [" na", "<0xC3>", "<0xAF>", "ve", " caf<0xC3>", "<0xA9>", " ", "<0xE2>", "<0x98>", "<0x95>", "!", "gone"]
    text = "naïve café ☕!"
    spans = visitor().page.evaluate(
        'async ([text, pieces]) => (await import("./page/highlight.js")).spans(text, pieces)', [text, pieces]
    )
    words = [text[start:end] for start, end in spans]
    assert words == ["na", "ï", "ï", "ve", " caf", "é", " ", "☕", "☕", "☕", "!", ""]


# -------------------------------------------------------------------------------------------------------------- talking


def test_chat_streams_answers_and_writes_the_last_one_again(visitor: Visitor) -> None:
    visit = visitor()
    visit.set(regex="[a-z]{12} naïve café ☕", seed=3)
    visit.say("Hello")
    (first,) = visit.answers
    assert re.fullmatch("[a-z]{12} naïve café ☕", first)
    about = visit.page.locator("#log .assistant .about")
    expect(about).to_have_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s · \d+ in the prompt"))
    expect(visit.page.locator("#spoken")).to_have_text(first)  # read out once, at the end
    visit.set(seed=4)
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.wait()
    (second,) = visit.answers
    assert second != first
    visit.set(seed=3)
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.wait()
    assert visit.answers == [first]
    visit.say("And now?")
    said = [json.loads(body)["messages"] for path, body in visit.requests if "chat/completions" in path]
    roles = ["user", "assistant", "user"]
    assert [message["role"] for message in said[-1]] == roles and said[-1][1]["content"] == first
    visit.open()
    expect(visit.page.locator("#log .message")).to_have_count(4)  # a reload forgets nothing


def test_stop_ends_the_work_and_keeps_what_there_is(visitor: Visitor, server: Running) -> None:
    visit = visitor()
    visit.set(regex=OPEN, max_tokens=20000)
    for stop in (lambda: visit.page.keyboard.press("Escape"), lambda: visit.page.locator("#chat-send").click()):
        visit.say("Go on and on", wait=False)
        expect(visit.page.locator("#log .assistant .text").last).to_contain_text("one token after another")
        expect(visit.page.locator("#chat-send")).to_have_text("Stop")
        stop()
        visit.wait()
        server.wait_until_idle()
        expect(visit.page.locator("#log .about").last).to_contain_text("stopped")
        assert visit.answers[-1].startswith("one token")
    assert server.metric("bdh_engine_running") == 0


def test_completion_writes_again_and_writes_on(visitor: Visitor) -> None:
    visit = visitor()
    visit.open("completion")
    visit.set(regex="( and [a-z]{5}){2}", seed=1)
    visit.page.get_by_role("textbox", name="Prompt").fill("Dragons")
    visit.page.keyboard.press("Enter")
    visit.wait()
    paper = visit.page.locator("#paper")
    expect(paper).to_have_text(re.compile("^Dragons( and [a-z]{5}){2}$"))
    first = paper.text_content()
    visit.set(seed=2)
    visit.page.get_by_role("button", name="Regenerate").click()
    visit.wait()
    expect(paper).not_to_have_text(str(first))
    second = paper.text_content()
    visit.page.get_by_role("button", name="Write on").click()
    visit.wait()
    prompts = [json.loads(body)["prompt"] for path, body in visit.requests if path.endswith("completions")]
    assert prompts == ["Dragons", "Dragons", second]


def test_settings_survive_a_reload_and_only_those_that_are_set_are_sent(visitor: Visitor) -> None:
    visit = visitor()
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 5, "seed": 12, "system": "Be brief."}
    visit.set(**given, stop="###\n\\n\\n", ignore_eos=True)
    visit.open()
    visit.say("Hello")
    sent = json.loads(visit.requests[-1][1])
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["stop"] == ["###", "\n\n"] and sent["ignore_eos"] is True and sent["brain"] is True
    assert {name: sent[name] for name in given if name != "system"} == {
        name: value for name, value in given.items() if name != "system"
    }
    visit.page.get_by_role("button", name="Settings").click()
    visit.page.get_by_role("button", name="Empty all").click()
    visit.page.keyboard.press("Escape")
    visit.say("Hello")
    fields = {"model", "messages", "stream", "stream_options", "brain", "max_tokens"}
    assert set(json.loads(visit.requests[-1][1])) == fields


def test_nothing_in_a_text_is_ever_more_than_text(visitor: Visitor) -> None:
    visit = visitor()
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>**[b](javascript:alert(1))**'
    visit.set(regex=re.escape(evil).replace("\\ ", " ").replace("\\-", "-"), system=evil)
    visit.say(evil)
    assert visit.answers == [evil]
    visit.page.locator("#tokens [role=option]").last.click()
    visit.page.locator("#details .link").first.click()
    expect(visit.page.locator("#details h3")).to_contain_text("Neuron")
    visit.page.get_by_text("as a table").click()
    visit.open("completion")
    visit.page.get_by_role("textbox", name="Prompt").fill(evil)
    visit.page.keyboard.press("Enter")
    visit.wait()
    expect(visit.page.locator("#paper")).to_have_text(evil + evil)
    assert visit.page.title() == "bdh"
    assert visit.page.locator("main img, main script, main a, #brain img").evaluate_all(
        "(all) => all.filter((one) => !one.closest('#chat-empty')).length"
    ) == 0  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- sessions


def test_a_session_is_saved_deleted_and_reopened(visitor: Visitor, server: Running) -> None:
    visit = visitor()
    visit.set(regex="[a-z]{8}", system="Be brief.")
    visit.page.get_by_role("button", name="New session").click()
    visit.say("Remember me")
    visit.say("Do you?")
    answers = visit.answers
    expect(visit.page.locator("#session-about")).to_contain_text("tokens read")
    sent = [json.loads(body) for path, body in visit.requests if path.endswith("/messages")]
    assert sent[-1]["content"] == "Do you?" and "messages" not in sent[-1]
    visit.page.get_by_role("button", name="Save").click()
    visit.page.get_by_role("textbox", name="Name").fill("dragon")
    visit.page.keyboard.press("Enter")
    saved = visit.page.get_by_role("button", name="Reopen dragon")
    expect(saved).to_be_visible()
    visit.open()  # goes on with the session it had
    expect(visit.page.locator("#log .message")).to_have_count(5)
    assert visit.answers == answers
    delete(visit.page)
    expect(visit.page.locator("#log .message")).to_have_count(0)
    saved.click()
    expect(visit.page.locator("#log .message")).to_have_count(5)
    assert visit.answers == answers
    visit.say("Still there?")
    assert len(visit.answers) == 3
    delete(visit.page)
    visit.page.get_by_role("button", name="Delete dragon").click()
    visit.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(saved).to_have_count(0)
    left = httpx.get(f"{server.url}/v1/sessions").json()
    assert left["data"] == left["saved"] == []


def test_a_stopped_answer_of_a_session_is_what_the_session_has_of_it_and_goes_on(
    visitor: Visitor, server: Running
) -> None:
    visit = visitor()
    visit.page.get_by_role("button", name="New session").click()
    visit.set(regex=OPEN, max_tokens=20000)
    visit.say("Go on", wait=False)
    expect(visit.page.locator("#log .assistant .text")).to_contain_text("one token after another")
    visit.page.keyboard.press("Escape")
    go_on = visit.page.get_by_role("button", name="Go on")
    expect(go_on).to_be_visible()
    (session,) = httpx.get(f"{server.url}/v1/sessions").json()["data"]
    told = httpx.get(f"{server.url}/v1/sessions/{session['id']}").json()["messages"][-1]["content"]
    assert visit.answers == [told]
    visit.set(regex=" to the end", max_tokens=50)
    go_on.click()
    expect(visit.page.locator("#log .assistant .text")).to_have_text(f"{told} to the end")
    visit.wait()
    delete(visit.page)


def delete(page: Page) -> None:
    """Deletes the session that is open."""
    page.locator("#delete-session").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("#session-bar")).to_be_hidden()


# ------------------------------------------------------------------------------------------------------------ the brain


def test_the_brain_view_fills_and_leads_from_tokens_to_neurons_and_back(visitor: Visitor) -> None:
    visit = visitor()
    page = visit.page
    visit.set(regex="naïve dragons", seed=1)
    visit.say("Hi")
    expect(page.locator("#brain-about")).to_have_text(re.compile(r"\d+ tokens, 2 layers"))
    assert colours(page) > 20
    expect(page.locator("#raster")).to_have_attribute("aria-label", re.compile(r"layer 1 \d+\.\d %"))
    options = page.locator("#tokens [role=option]")
    assert "".join(options.all_text_contents()).endswith("ve dragons")
    options.last.click()
    details = page.locator("#details")
    expect(details.locator("h3")).to_have_text(re.compile("Token .*“s”"))
    expect(details.locator("h4")).to_have_count(4)
    expect(options.last).to_have_attribute("aria-selected", "true")
    assert page.evaluate("CSS.highlights.get('token').size") == 1  # in the answer too
    details.get_by_role("radio", name="Layer 1").check()
    expect(page.locator("#tokens .marked").first).to_be_visible()
    details.locator(".bars").first.locator("button").first.click()
    expect(details.locator("h3")).to_have_text(re.compile(r"Neuron \d+"))
    expect(details).to_contain_text(re.compile(r"Layer 1, head \d\. It fired for \d+ of \d+ tokens"))
    details.locator(".bars button").first.click()
    expect(details.locator("h3")).to_have_text(re.compile("Token"))
    page.locator("#log .assistant .text").click(position={"x": 6, "y": 10})  # on the first letter of the answer
    expect(details.locator("h3")).to_have_text(re.compile("“n”"))
    page.locator("#raster").click(position={"x": 2, "y": 20})
    expect(options.first).to_have_attribute("aria-selected", "true")
    page.get_by_text("as a table").click()
    expect(page.locator("#share-table tbody tr")).to_have_count(options.count())


def test_the_brain_view_tells_what_heads_retain_and_how_strongly_they_write(
    visitor: Visitor, gated_server: Running
) -> None:
    visit = visitor(gated_server.url)
    visit.set(regex="naïve dragons", seed=1)
    visit.say("Hi")
    visit.page.locator("#tokens [role=option]").last.click()
    details = visit.page.locator("#details")
    expect(details).to_contain_text(re.compile(r"Synapses retained, by head: \d\d(\.\d+)? %, 100 %\."))
    expect(details).to_contain_text(re.compile(r"Write strength, by head: \d+(\.\d+)? %, \d+(\.\d+)? %\."))


def test_the_brain_view_can_be_switched_off_and_looks_into_older_answers(visitor: Visitor) -> None:
    visit = visitor()
    visit.set(regex="[a-z]{10}")
    visit.say("Hi")
    tokens = visit.page.locator("#tokens [role=option]").all_text_contents()
    visit.page.get_by_role("button", name="Brain view").click()
    visit.say("Hi again")
    assert "brain" not in json.loads(visit.requests[-1][1])
    expect(visit.page.locator("#brain")).to_be_hidden()
    visit.page.get_by_role("button", name="Look inside").click()
    expect(visit.page.locator("#tokens [role=option]")).to_have_count(len(tokens))
    assert visit.page.locator("#tokens [role=option]").all_text_contents() == tokens


def colours(page: Page) -> int:
    """How many colours the raster has."""
    count: int = page.locator("#raster").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return new Set(new Uint32Array(data.buffer)).size;
        }"""
    )
    return count


# --------------------------------------------------------------------------------------------------------- for everyone


def test_a_keyboard_is_enough(visitor: Visitor) -> None:
    visit = visitor()
    page = visit.page
    visit.set(regex="[a-z]{20}")

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"the focus on {selector} cannot be seen"
                return
        pytest.fail(f"no way leads to {selector}")

    tab_to("#chat-input")
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    visit.wait()
    expect(page.locator("#log .user .text")).to_have_text("First\nsecond")
    tab_to("#tokens")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tokens [aria-selected=true]")).to_have_count(1)
    expect(page.locator("#details h3")).to_be_visible()
    tab_to("#details .link")
    page.keyboard.press("Enter")
    expect(page.locator("#details h3")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#details h3")).to_have_text(re.compile("Token"))


@pytest.mark.parametrize("width", [1280, 360])
def test_axe_has_nothing_serious_to_say(visitor: Visitor, width: int) -> None:
    visit = visitor(width=width)
    page, name = visit.page, f"page-{width}"
    found = visit.accessible(f"{name}-empty")
    visit.set(regex="([a-z]{4,9} ){5}", seed=1)
    visit.say("Tell me about dragons")
    if width < 1000:
        found += visit.accessible(f"{name}-strip")
        page.get_by_role("button", name="Open", exact=True).click()
    page.locator("#tokens [role=option]").last.click()
    expect(page.locator("#details h4")).to_have_count(4)
    page.get_by_text("as a table").click()
    found += visit.accessible(f"{name}-token")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    found += visit.accessible(f"{name}-settings")
    page.keyboard.press("Escape")
    if width < 1000:
        page.get_by_role("button", name="Conversations and models").click()
        found += visit.accessible(f"{name}-drawer")
        page.keyboard.press("Escape")
    page.get_by_role("link", name="Completion").click()
    visit.set(regex="(")
    page.get_by_role("textbox", name="Prompt").fill("Once")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("cannot be followed")
    found += visit.accessible(f"{name}-completion")
    assert found == []


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_what_goes_wrong_is_told_in_a_line(visitor: Visitor, export: Path, tmp_path: Path) -> None:
    limits = ("--serve.limits.requests_per_minute", "9", "--serve.requests.seconds", "1", "--serve.brain.enabled", "no")
    secret = "a-secret-for-tests"
    with running(tmp_path, "--model", f"tiny={export}", *limits, BDH_API_KEYS=f"me:{secret}") as guarded:
        visit = visitor(guarded.url, ready=False)
        page = visit.page
        page.get_by_role("textbox", name="API key").fill(secret)
        page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(1)
        alert = page.get_by_role("alert")
        visit.set(regex=OPEN, max_tokens=60000)
        visit.say("Look", wait=False)
        expect(alert).to_contain_text("The brain view is off now: try again.")
        visit.say("Too long")
        expect(alert).to_have_text(re.compile("The answer was not complete after 1 seconds"))
        assert visit.answers[-1].startswith("one token")  # what there is of it stays
        visit.open()  # the tab keeps the key
        visit.set(regex="[a-z]", temperature=1)
        for _ in range(9):
            if alert.is_visible():
                break
            visit.say("Again", wait=False)
            visit.wait()
        expect(alert).to_have_text(re.compile(r"Try again in \d+ s\."))
        expect(page.get_by_role("textbox", name="Message")).to_have_value("Again")  # to be sent once more
        assert guarded.stop() == 0
        page.keyboard.press("Enter")
        expect(alert).to_have_text(re.compile("The server cannot be reached"))
