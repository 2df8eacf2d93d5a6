"""Takes the pictures of docs/serving.md, of the page that a running `fastgpt serve` shows.

    fastgpt train --preset shakespeare-char-cpu --data shakespeare --out runs/shakespeare --max-steps 3000
    fastgpt serve --checkpoint runs/shakespeare
    python tests/serve/pictures.py http://127.0.0.1:8000 docs/images        # in another terminal

It needs Playwright, Chromium and Pillow.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FRAGMENT = "prompt=KING+HENRY.+&max_tokens=260&seed=7"
SCREENS: dict[str, dict[str, Any]] = {
    "wide": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
}


def take(browser: Any, address: str, name: str, out: Path) -> None:
    """Generate a text, point at one of its tokens, show an attention map, and write serve-NAME.png."""
    context = browser.new_context(**SCREENS[name])
    page = context.new_page()
    page.goto(f"{address}/#{FRAGMENT}")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Copy text").wait_for()
    page.get_by_label("Colour tokens by probability").check()
    page.locator("#map svg").wait_for()
    page.get_by_label("Layer", exact=True).select_option("2")
    page.get_by_label("Head", exact=True).select_option("3")
    page.get_by_role("application", name="Attention map of layer 2, head 3").wait_for()
    token = page.locator("#output .token").nth(45)
    token.hover() if name == "wide" else token.tap()
    page.get_by_role("dialog").wait_for()
    if name == "phone":
        page.get_by_role("heading", name="Text").scroll_into_view_if_needed()
    write(page.screenshot(full_page=name == "wide"), out / f"serve-{name}.png")
    context.close()


def write(picture: bytes, file: Path) -> None:
    """With the 256 colours that the picture needs most: a third of the bytes."""
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    address, out = sys.argv[1].rstrip("/"), Path(sys.argv[2])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in SCREENS:
            take(browser, address, name, out)
        browser.close()
