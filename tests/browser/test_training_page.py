"""The training page in a real browser: opened from its file and over `train watch`, on a desktop and a phone, without errors."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from distilled_t5.tests.support.accessibility import serious_faults
from distilled_t5.tests.support.runs import STAGES, made_up_run
from distilled_t5.train import page as page_module
from distilled_t5.train.page import RunPage, starting
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.watch import open_server
from playwright.sync_api import BrowserContext, Page, expect

ROOT = Path(__file__).resolve().parent.parent.parent
DESKTOP, PHONE = {"width": 1600, "height": 1000}, {"width": 390, "height": 844}
CHARTS = [
    "Loss of stage embedding-first: embedding gap",
    "Loss of stage follow-the-steps: velocity gap",
    "Held-out loss by noise level",
    "Learning rate",
    "Throughput, prompts per second",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return made_up_run(tmp_path_factory.mktemp("training") / "run")


@pytest.fixture
def run(finished: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of a finished run, which the test may change."""
    return RunDirectory(shutil.copytree(finished.path, tmp_path / "run"))


@pytest.fixture
def tab(request: pytest.FixtureRequest, browser_context: BrowserContext) -> Iterator[Page]:
    """A new tab; errors on it, and whatever it requests from another place than its own, fail the test."""
    tab = browser_context.new_page()
    seen: list[str] = []
    tab.on("pageerror", lambda error: seen.append(error.message))
    tab.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("request", lambda asked: None if asked.url.startswith(("data:", "file:", "http://127.0.0.1:")) else seen.append(asked.url))
    yield tab
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.removeprefix("test_").lower()).strip("-")
    tab.screenshot(path=ROOT / ".dev" / "screenshots" / f"training-{name}.png", full_page=True)
    tab.close()
    assert seen == []


def written_now(run: RunDirectory, step: int, left_s: float | None) -> None:
    """Write the run's page as it is while the run trains."""
    RunPage(run, load_recipe("smoke", STAGES)).write(step, left_s)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_double_click_shows_state_curves_images_and_recipe_and_nothing_is_wider_than_the_screen(tab, run, size):
    written_now(run, 100 - 35, 3720.0)
    tab.set_viewport_size(size)
    tab.goto(run.page.as_uri())
    expect(tab).to_have_title("65 % distilled_t5_smoke")
    expect(tab.get_by_role("heading", level=1)).to_have_text("distilled_t5_smoke recipe smoke")
    expect(tab.locator("#state")).to_have_text("Training:about 1 h 2 min left")
    expect(tab.locator("#stage")).to_have_text("Step 65 of 100, stage 2 of 2: follow-the-steps, step 25 of 60")
    expect(tab.locator(".chart h3")).to_have_text([f"{title}log scale" for title in CHARTS[:3]] + CHARTS[3:])
    for title in CHARTS:
        expect(tab.get_by_role("img", name=title)).to_be_visible()
    assert tab.locator(".chart path").evaluate_all("paths => paths.every(path => path.getTotalLength() > 50)")
    expect(tab.locator("#picture-name")).to_have_text("preview at step 100, 4 of 4")
    tab.wait_for_function("() => document.getElementById('picture').naturalWidth === 384")
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    tab.get_by_text("Recipe", exact=True).last.click()
    expect(tab.locator("#recipe")).to_contain_text('name = "smoke"')
    assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator(".chart text").evaluate_all("all => all.every(one => one.getBoundingClientRect().height > 10)"), "legible"


def test_the_strip_is_scrubbed_and_a_reload_shows_the_same_image(tab, run):
    tab.goto(run.page.as_uri())
    name, slider = tab.locator("#picture-name"), tab.get_by_role("slider", name="Sample")
    expect(tab.get_by_role("button", name="Later sample")).to_be_disabled()
    tab.get_by_role("button", name="Earlier sample").click()
    expect(name).to_have_text("preview at step 75, 3 of 4")
    slider.focus()
    slider.press("Home")
    expect(name).to_have_text("preview at step 25, 1 of 4")
    tab.get_by_text("Recipe", exact=True).last.click()
    tab.get_by_role("button", name="Later sample").click()
    tab.get_by_role("button", name="Earlier sample").click()
    assert tab.locator("#picture").get_attribute("src") == "samples/step-000025-preview.jpg"
    tab.reload()
    expect(name).to_have_text("preview at step 25, 1 of 4")
    expect(tab.locator("#recipe-details")).to_have_attribute("open", "")


def test_the_only_sample_has_no_slider(tab, run):
    for later in sorted(run.samples.iterdir())[1:]:
        later.unlink()
    written_now(run, 40, 60.0)
    tab.goto(run.page.as_uri())
    expect(tab.locator("#picture-name")).to_have_text("preview at step 25, the only sample so far")
    expect(tab.locator("#picture")).to_be_visible()
    expect(tab.get_by_role("slider", name="Sample")).to_be_hidden()


def test_the_pointer_reads_the_curves(tab, run):
    tab.goto(run.page.as_uri())
    chart = tab.locator(".chart", has_text="Learning rate")
    expect(chart.locator("figcaption")).to_contain_text("step 100")
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg").bounding_box()
    assert box is not None
    tab.mouse.move(box["x"] + 53, box["y"] + 50)
    expect(chart.locator("figcaption")).to_contain_text("step 1")
    expect(chart.locator("figcaption")).to_contain_text("9.9e-4")


def test_a_run_that_ended_says_how_and_one_that_was_killed_is_noticed(tab, run):
    tab.goto(run.page.as_uri())
    expect(tab.locator("#state")).to_have_text("Finished.The encoder is written.")
    page = RunPage(run, load_recipe("smoke", STAGES))
    page.state, page.failure = "failed", "The loss is <b>lost</b>.\nWhat to do: start again."
    page.write(65, None)
    tab.reload()
    expect(tab.locator("#failure")).to_have_text(page.failure, use_inner_text=True)
    written_now(run, 65, 60.0)
    html = run.page.read_text(encoding="utf-8")
    run.page.write_text(re.sub(r'"written": (\d+)', lambda at: f'"written": {int(at[1]) - 3600}', html), encoding="utf-8")
    tab.reload()
    expect(tab.locator("#written")).to_have_text(
        "Not updated for 1 h: the run may have been killed. Continue it with --resume, in ComfyUI with Run."
    )


def test_the_page_that_is_served_follows_the_run_from_its_end_to_its_resume(tab, run, monkeypatch):
    monkeypatch.setattr(page_module, "INTERVAL_S", 2.0)
    written = run.page.read_text(encoding="utf-8")
    assert '"interval": 10.0' in written
    run.page.write_text(written.replace('"interval": 10.0', '"interval": 2.0'), encoding="utf-8")
    with open_server(str(run.path), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tab.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            tab.wait_for_function("() => document.getElementById('picture').naturalWidth === 384")
            expect(tab.locator("#state")).to_have_text("Finished.The encoder is written.")
            with starting(run):
                expect(tab.locator("#state")).to_have_text("Starting:the models are being loaded.", timeout=15_000)
            written_now(run, 70, 60.0)
            expect(tab).to_have_title("70 % distilled_t5_smoke")
        finally:
            server.shutdown()
            thread.join()


def test_axe_finds_no_serious_fault(tab, run, monkeypatch):
    monkeypatch.setattr(page_module, "INTERVAL_S", 3600)  # a reload would end what axe does
    written_now(run, 65, 3720.0)
    tab.goto(run.page.as_uri())
    assert serious_faults(tab) == []
