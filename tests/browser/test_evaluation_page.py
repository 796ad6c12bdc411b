"""The evaluation's page in a real browser: filtered, sorted by loss, searched, enlarged, without errors and without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from distilled_t5.evaluate.measured import Measured, exact
from distilled_t5.evaluate.page import data_uri, page, row
from distilled_t5.evaluate.questions import Question
from distilled_t5.evaluate.results import Report, losses, measured_scores, picture_losses, shares
from distilled_t5.tests.support.accessibility import serious_faults
from distilled_t5.world.captions import draw_prompt
from distilled_t5.world.pictures import CELL_PX, render
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect

ROOT = Path(__file__).resolve().parent.parent.parent
ENCODERS = ["teacher", "velocity", "embedding"]
COUNT = 6
SCORES = {
    "word": {"readback": {"teacher": [1.0] * 6, "velocity": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0], "embedding": [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]}},
    "position": {
        "readback": {"teacher": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0], "velocity": [1.0] * 6, "embedding": [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]}
    },
}
EVIL = 'a sign that says "<b>BAT</b>"'


def written_page(folder: Path) -> Path:
    """A page of the miniature's own pictures: what a teacher would paint, and two students that mistake some prompts for others."""
    asked: dict[str, list[Question]] = {task: [] for task in SCORES}
    for task, questions in asked.items():
        for index in range(COUNT):
            scene, caption = draw_prompt(1, index, "train", task)
            right, wrong = render(scene, CELL_PX), render(draw_prompt(2, index, "train", task)[0], CELL_PX)
            for encoder in ENCODERS:
                shown = right if SCORES[task]["readback"][encoder][index] else wrong
                Image.fromarray((shown * 255).astype("uint8")).save(folder / f"{encoder}-{task}-{index}.png")
            questions.append(Question(task, index, EVIL if (task, index) == ("word", 3) else caption, index, " ".join(scene.words) or None))
    lost = picture_losses(SCORES, "teacher", ENCODERS[1:])

    def file_of(encoder: str, question: Question) -> Path:
        return folder / f"{encoder}-{question.task}-{question.index}.png"

    rows = [row(question, SCORES, lost, ENCODERS, file_of, 256) for questions in asked.values() for question in questions]
    ranks, sizes = {"teacher": 38, "velocity": 36, "embedding": 3}, {"teacher": 10_000_000, "velocity": 2_000_000, "embedding": 2_000_000}
    probes = {
        "collapse": {"effective rank": {name: Measured(rank, 210, rank - 1, rank + 1) for name, rank in ranks.items()}},
        "cost": {"resident bytes": {name: exact(size) for name, size in sizes.items()}},
    }
    kept = shares(SCORES, "teacher", ENCODERS[1:])
    report = Report("miniature", ENCODERS, measured_scores(SCORES), losses(SCORES, "teacher"), probes, kept)
    Image.new("RGB", (64, 64), "white").save(folder / "map.png")
    path, maps = folder / "page.html", {"teacher and velocity": data_uri((folder / "map.png").read_bytes(), "png")}
    html = page(report, rows, maps, {"provenance": "A test's page.", "chosen": "All 12 prompts.", "small": True})
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture
def shown(browser_context: BrowserContext, tmp_path: Path) -> Iterator[Page]:
    """The page, opened from its file; errors on it, and whatever it asks for, fail the test."""
    tab = browser_context.new_page()
    seen: list[str] = []
    tab.on("pageerror", lambda error: seen.append(error.message))
    tab.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("request", lambda request: None if request.url.startswith(("data:", "file:")) else seen.append(request.url))
    tab.goto(written_page(tmp_path).as_uri())
    yield tab
    tab.screenshot(path=ROOT / ".dev" / "screenshots" / "evaluation-page.png", full_page=True)
    tab.close()
    assert seen == []


def rows_of(tab: Page) -> Locator:
    return tab.locator("#rows > li")


def order_of(tab: Page) -> list[str]:
    return rows_of(tab).evaluate_all("rows => rows.map(row => `${row.dataset.task} ${row.dataset.index}`)")


def test_teacher_and_students_stand_side_by_side_and_every_picture_shows(shown):
    expect(shown).to_have_title("Distilled T5: miniature")
    expect(rows_of(shown)).to_have_count(2 * COUNT)
    expect(rows_of(shown).first.locator("figcaption strong")).to_have_text(ENCODERS)
    expect(rows_of(shown).locator("figcaption span")).to_have_text(["\u2212100 percentage points"] * 4 + ["+100 percentage points"])
    tops = rows_of(shown).first.locator("figure").evaluate_all("all => all.map(one => one.getBoundingClientRect().top)")
    assert len(set(tops)) == 1
    shown.evaluate("() => document.querySelectorAll('#rows img').forEach(one => { one.loading = 'eager' })")
    shown.wait_for_function("() => [...document.querySelectorAll('#rows img')].every(one => one.complete && one.naturalWidth === 96)")


def test_it_leads_with_the_answer_and_a_chart_of_shares_and_shows_images_in_the_first_screen(shown):
    shown.set_viewport_size({"width": 1600, "height": 1000})
    answers = shown.get_by_role("region", name="Share of the teacher")
    expect(answers.locator("p").first).to_have_text(re.compile(r"^velocity keeps 100\s% of the teacher \("))
    lines = answers.get_by_role("list").last.get_by_role("listitem")
    expect(lines).to_have_text([re.compile("all tasks.*73 % "), re.compile("word.*67 % "), re.compile("position.*80 % ")])
    dots = lines.locator(".dot").evaluate_all("dots => dots.map(dot => dot.getBoundingClientRect().left)")
    assert dots[1] < dots[0] < dots[2]
    assert rows_of(shown).first.locator("img").first.evaluate("image => image.getBoundingClientRect().bottom") < 1000


def test_tables_and_the_index_of_numbers_are_folded_and_the_first_column_stays(shown):
    expect(shown.get_by_role("table")).to_have_count(0)
    shown.get_by_text("All numbers, in tables").click()
    expect(shown.get_by_role("table")).to_have_count(4)
    expect(shown.get_by_role("row", name="embedding").first).to_contain_text("66.7")
    expect(shown.get_by_role("table").last).to_contain_text("memory, MB")
    expect(shown.get_by_role("table").last).to_contain_text("10.0")
    shown.set_viewport_size({"width": 390, "height": 844})
    scrolled = shown.get_by_role("region", name="Scores")
    name = scrolled.get_by_role("rowheader").first
    before = name.bounding_box()
    scrolled.evaluate("area => { area.scrollLeft = 60 }")
    assert scrolled.evaluate("area => area.scrollLeft") > 0
    assert name.bounding_box() == before
    rights = shown.locator("#numbers .caption").evaluate_all("all => all.map(one => one.getBoundingClientRect().right)")
    assert len(rights) == 4 and max(rights) <= 390
    shown.get_by_text("What the numbers mean").click()
    expect(shown.get_by_role("term")).to_have_text(["share of the teacher", "lost", "correct", "memory", "effective rank"])
    shown.get_by_text("Maps of the embeddings").click()
    expect(shown.get_by_role("img", name="t-SNE map: teacher and velocity")).to_be_visible()


@pytest.mark.parametrize("size", [(1600, 1000), (390, 844)], ids=["wide", "phone"])
def test_axe_finds_no_serious_fault(shown, size):
    shown.set_viewport_size({"width": size[0], "height": size[1]})
    for folded in shown.locator("summary").all():
        folded.click()
    assert serious_faults(shown) == []
    rows_of(shown).first.get_by_role("button").nth(1).click()
    assert serious_faults(shown) == []
    shown.evaluate("() => { document.querySelector('#large img').removeAttribute('alt') }")
    assert any("image-alt" in fault for fault in serious_faults(shown)), "a fault is found where there is one"


def test_it_opens_sorted_by_where_the_first_student_loses_most(shown):
    assert order_of(shown)[0] == "word 2"
    assert order_of(shown)[-1] == "position 0", "there the student is right and the teacher wrong"
    expect(rows_of(shown).first.locator(".worse")).to_have_count(1)
    expect(rows_of(shown).last.locator(".better")).to_have_count(1)


def test_sorting_by_another_student_and_as_asked(shown):
    order = shown.get_by_label("Order")
    order.select_option("embedding")
    assert order_of(shown)[:3] == ["word 0", "word 5", "position 3"]
    order.select_option(label="as asked")
    assert order_of(shown) == [f"{task} {index}" for task in SCORES for index in range(COUNT)]


def test_filtering_by_task_and_searching_for_words(shown):
    shown.get_by_label("Task").select_option("position")
    expect(rows_of(shown)).to_have_count(COUNT)
    assert {name.split()[0] for name in order_of(shown)} == {"position"}
    expect(shown.get_by_role("status")).to_have_text("6 of 12 prompts")
    shown.get_by_label("Task").select_option(label="all")
    shown.get_by_label("Words in the prompt").fill("says bat")
    expect(rows_of(shown)).to_have_count(1)
    expect(rows_of(shown).locator(".prompt")).to_have_text(EVIL)
    shown.get_by_label("Words in the prompt").fill("zebra")
    expect(rows_of(shown)).to_have_count(0)
    expect(shown.get_by_role("status")).to_have_text("0 of 12 prompts")


def test_a_picture_is_enlarged_by_the_keyboard_and_closed_again(shown):
    button = rows_of(shown).first.get_by_role("button").first
    button.focus()
    shown.keyboard.press("Enter")
    dialog = shown.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog.get_by_role("slider")).to_have_value("50")
    expect(dialog).to_contain_text("Drag across the image, or move the slider")
    expect(dialog.get_by_role("img").last).to_have_attribute("alt", "teacher: " + rows_of(shown).first.locator(".prompt").inner_text())
    shown.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(button).to_be_focused()


def test_two_images_are_wiped_between_and_the_next_and_the_previous_prompt_follow_the_order_shown(shown):
    rows_of(shown).first.get_by_role("button").nth(2).click()
    dialog = shown.get_by_role("dialog")
    left, right = dialog.locator("#left"), dialog.locator("#right")
    prompts = rows_of(shown).locator(".prompt").all_text_contents()
    expect(left).to_have_attribute("alt", f"teacher: {prompts[0]}")
    expect(right).to_have_attribute("alt", f"embedding: {prompts[0]}")

    def shown_share() -> float:
        """The share of the width that the left image takes."""
        return left.evaluate("image => 100 - Number(getComputedStyle(image).clipPath.match(/ ([0-9.]+)%/)?.[1] ?? 0)")

    assert shown_share() == 50
    dialog.get_by_role("slider").fill("20")
    assert shown_share() == 20
    box = dialog.locator("#wipe").bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 50)
    shown.mouse.down()
    shown.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 50)
    shown.mouse.up()
    assert shown_share() == pytest.approx(75, abs=1)
    dialog.get_by_role("button", name="Next").click()
    expect(left).to_have_attribute("alt", f"teacher: {prompts[1]}")
    expect(dialog).to_contain_text("2 of 12")
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("ArrowLeft")
    expect(left).to_have_attribute("alt", f"teacher: {prompts[-1]}")
    dialog.get_by_label("Right").select_option("velocity")
    expect(right).to_have_attribute("alt", f"velocity: {prompts[-1]}")
    dialog.get_by_label("Right").select_option("teacher")
    expect(dialog.get_by_role("slider")).to_be_hidden()


def test_on_a_narrow_screen_nothing_is_wider_than_the_page(shown):
    """Also when the window was wide before: a row that left the screen remembers how large it was."""
    shown.set_viewport_size({"width": 1600, "height": 1000})
    for shown_row in rows_of(shown).all():
        shown_row.scroll_into_view_if_needed()
        shown.evaluate("() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    shown.evaluate("() => scrollTo(0, 0)")
    shown.set_viewport_size({"width": 360, "height": 800})
    assert shown.evaluate("() => document.documentElement.scrollWidth") == 360
    shown.emulate_media(color_scheme="dark")
    paper = shown.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(22, 24, 28)"
