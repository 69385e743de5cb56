"""Draw app.png and app_runs.png from the page that runs at an address. Needs playwright and Chromium.

  python -m mutor_img.app --checkpoint runs/mnist/mutor2d --runs=runs --cfg-scale=2.3 --cfg-schedule linear --top-p .98
  python docs/draw_app.py http://127.0.0.1:7860 mnist/mutor2d
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent


def draw_samples(page: Page) -> None:
    """Draw the samples that the page makes first."""
    page.locator("#count input[type=number]").fill("30")
    page.click("#generate")
    page.wait_for_function("document.querySelector('#status').innerText.includes('images in')")
    page.wait_for_timeout(1000)  # the progress bar fades
    page.screenshot(path=DOCS / "app.png", full_page=True)


def draw_runs(page: Page, run: str) -> None:
    """Draw the browser of runs with one of them chosen."""
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_selector("#runs td")
    page.locator("#run input").click()
    page.get_by_role("option", name=run, exact=True).click()
    page.wait_for_selector("#run-curves img")
    page.locator("#run input").blur()
    page.wait_for_timeout(1000)
    page.screenshot(path=DOCS / "app_runs.png", full_page=True)


with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1360, "height": 790})
    page.set_default_timeout(300_000)
    page.goto(sys.argv[1])
    draw_samples(page)
    draw_runs(page, sys.argv[2])
    chromium.close()
