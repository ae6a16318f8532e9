"""The README's picture: the demo command, its answer and its figures as a terminal shows them.

python docs/terminal_picture.py [RUNS]      runs the command RUNS times (5), and draws the fastest run: docs/run.svg

Everything but the seconds is the same every time. Draw it on a machine that does nothing else.
"""

import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

COMMAND = "griffin-offload run --device cpu --max-gpu-mem 6.35MB --quantize none"
_WIDTH = 104
_THEME = TerminalTheme((24, 26, 31), (216, 218, 224), [(216, 218, 224)] * 8, [(216, 218, 224)] * 8)
_GREEN, _DIM, _BLUE = "#8fd18f", "#8b90a0", "#8ab8ff"
# Without rich's own window and its font from the net: a picture in a README must not ask for anything.
_SVG = """<svg class="rich-terminal" viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, DejaVu Sans Mono, monospace; font-size: {char_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
<rect fill="#181a1f" width="{terminal_width}" height="{terminal_height}" rx="8" />
<g transform="translate(12, 8)"><g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def run() -> tuple[str, str]:
    """What the command printed: its answer, and what stands around it."""
    found = subprocess.run(
        [sys.executable, "-m", "griffin_offload", *COMMAND.split()[1:]], capture_output=True, text=True, check=True
    )
    return found.stdout.strip(), found.stderr


def tokens_per_s(around: str) -> float:
    """The rate of decoding among the figures."""
    return float(re.findall(r"\((?:([\d.]+)) tok/s\)", around)[-1])


def screen(answer: str, around: str) -> list[Text]:
    """The lines of a terminal: the command, the prompt, the answer, the figures."""
    prompt, figures = around.split("prefill", 1)
    label, told = prompt.strip().split(maxsplit=1)
    question = Text.assemble((f"{label}   ", _BLUE), (told, _DIM), (f" {answer}", "bold"))
    lines = [Text.assemble(label_and_rest(line)) for line in f"prefill{figures}".strip().splitlines()]
    return [Text.assemble(("$ ", _GREEN), COMMAND), Text(), question, Text(), *lines, Text()]


def label_and_rest(line: str) -> Text:
    """A line of figures, its first word in another colour."""
    label, rest = line.split(" ", 1)
    return Text.assemble((label, _BLUE), " ", rest)


def draw(lines: list[Text]) -> str:
    """An SVG of the lines; the same for the same lines."""
    console = Console(record=True, width=_WIDTH, file=StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(line, soft_wrap=False)
    return console.export_svg(theme=_THEME, code_format=_SVG, unique_id="run", title="")


def main() -> None:
    runs = [run() for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)]
    answer, around = max(runs, key=lambda found: tokens_per_s(found[1]))
    path = Path(__file__).parent / "run.svg"
    path.write_text(re.sub(r"[ \t]+\n", "\n", draw(screen(answer, around))))
    print(f"{path.name}: {path.stat().st_size} bytes, {tokens_per_s(around)} tok/s")


if __name__ == "__main__":
    main()
