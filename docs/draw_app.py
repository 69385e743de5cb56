"""Draw app.png: open the page that runs at an address, generate, and take its picture. Needs playwright and Chromium.

    python -m mutor_img.app --checkpoint runs/mnist/mutor2d --compare runs/mnist/ntp
    python docs/draw_app.py http://127.0.0.1:7860
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).with_name("app.png")

with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1360, "height": 790})
    page.set_default_timeout(300_000)
    page.goto(sys.argv[1])
    page.locator("#count input[type=number]").fill("30")
    page.click("#generate")
    page.wait_for_function("document.querySelector('#status').innerText.includes('images in')")
    page.wait_for_timeout(1000)  # the progress bar fades
    page.screenshot(path=OUT, full_page=True)
    chromium.close()
