"""Pictures of the server's page, in real headless Chromium: light, dark, narrow, in the middle of an answer, an error.

    python benchmarks/page_pictures.py --max-gpu-mem 10MB --density 0.5 --quantize none --out benchmarks/results/page

Needs Playwright and a Chromium of the system; what is not named here is for `griffin-offload serve`.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

WIDE, NARROW = {"width": 1180, "height": 820}, {"width": 390, "height": 780}
LONG_MS = 300_000


def ask(page: Any, text: str) -> None:
    page.locator("#question").fill(text)
    page.keyboard.press("Enter")


def take(context: Any, url: str, out: Path, name: str, question: str, server: subprocess.Popen[str]) -> None:
    """Pictures of one window; the server is ended for the one of an error."""
    context.set_default_timeout(LONG_MS)
    page = context.new_page()
    page.goto(url)
    page.locator("#model", has_text="budget").wait_for()
    if name == "narrow":
        page.screenshot(path=out / "narrow-empty.png")
    page.get_by_text("Settings", exact=True).click()
    for label, value in (("Longest answer", "120"), ("Temperature", "0"), ("Repetition penalty", "1.1")):
        page.get_by_label(label).fill(value)
    if name == "dark":
        page.locator("#settings").scroll_into_view_if_needed()
    else:
        page.get_by_text("Settings", exact=True).click()
    ask(page, question)
    page.locator("#rate", has_text="second").wait_for()
    if name == "light":
        page.screenshot(path=out / "streaming.png")
    page.locator("#stop").wait_for(state="hidden")
    page.wait_for_timeout(500)  # figures are asked for when the answer is over
    page.screenshot(path=out / f"{name}.png")
    if name == "narrow":
        page.get_by_text("Memory and speed").click()
        page.screenshot(path=out / "narrow-figures.png")
        server.terminate()
        server.wait(60)
        page.get_by_text("Memory and speed").click()
        ask(page, "And then?")
        page.get_by_role("alert").wait_for()
        page.screenshot(path=out / "error.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIRECTORY")
    parser.add_argument("--question", default="Once upon a time there was a little fox who", metavar="TEXT")
    arguments, serving = parser.parse_known_args()
    from playwright.sync_api import sync_playwright

    arguments.out.mkdir(parents=True, exist_ok=True)
    program = "import sys; from griffin_offload.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--json", "--quiet", *serving]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None, "it is a pipe"
        url = json.loads(server.stdout.readline())["url"]
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, scheme, size in (("light", "light", WIDE), ("dark", "dark", WIDE), ("narrow", "light", NARROW)):
                context = browser.new_context(viewport=size, color_scheme=scheme)
                take(context, url, arguments.out, name, arguments.question, server)
                context.close()
            browser.close()
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
