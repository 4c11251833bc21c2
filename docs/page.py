"""Takes docs/page.png, the picture of the page in the README, of a service that runs here.

lora-lexicon serve tiny & python docs/page.py http://127.0.0.1:8000 docs/page.png
"""

import shutil
import sys
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

QUERY = {"term": "pietistic", "context": "the Pietistic movement"}  # held out: the model was not trained on it


def take(address: str, file: str) -> None:
    """Asks, waits for every domain's answer, and writes a PNG 1,200 pixels wide."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(f"{address}/?{urlencode(QUERY)}")
        page.locator("#compare summary").click()
        page.locator("#others li").first.wait_for()
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=file, full_page=True)
        browser.close()


if __name__ == "__main__":
    take(*sys.argv[1:])
