"""The pages hold: code prints what they show, and what they name exists."""

import contextlib
import io
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "experiments" / "README.md",
    ROOT / "experiments" / "BENCHMARKS.md",
    ROOT / "jaxbce" / "CHANGELOG.md",
    ROOT / ".github" / "CONTRIBUTING.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```\n", re.DOTALL | re.M)
POINT = re.compile(r"\b(given|kink \d|random \d)\b")
ROUNDING = re.compile(r"\d\.\de-(0[7-9]|[1-9]\d)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def _comparable(line: str) -> tuple[str, list[str]]:
    """A line's words and its numbers.

    Errors of rounding, and at which point a leaf's error is worst, differ between
    machines: both are left out, as the README says.
    """
    line = ROUNDING.sub("small", POINT.sub("somewhere", line))
    words = " ".join(NUMBER.sub("#", line).split())
    return words, NUMBER.findall(line)


def _agree(shown: str, printed: str) -> bool:
    """Whether lines have the same words, and numbers up to two of the last digit."""
    (words, numbers), (other_words, other_numbers) = map(_comparable, (shown, printed))
    if words != other_words:
        return False
    return all(
        abs(float(a) - float(b)) <= 2 * _last_digit(a) + 1e-12
        for a, b in zip(numbers, other_numbers, strict=True)
    )


def _last_digit(number: str) -> float:
    """What one unit of the last digit shown is worth; 0 for a whole number."""
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals else 0.0


def _first_difference(shown: str, printed: str) -> str | None:
    """The first line shown that was not printed; "..." stands for any lines."""
    lines = iter(printed.rstrip("\n").split("\n"))
    skip = False
    for wanted in shown.rstrip("\n").split("\n"):
        if wanted == "...":
            skip = True
            continue
        candidates = lines if skip else itertools.islice(lines, 1)
        if not any(_agree(wanted, line) for line in candidates):
            return wanted
        skip = False
    left = "" if skip else next(lines, None)
    return None if not left else f"(not shown) {left}"


@pytest.mark.parametrize(
    ("shown", "printed", "difference"),
    [
        ("loss 0.0099\n", "loss 0.0098\n", None),
        ("loss 0.0099\n", "loss 0.0096\n", "loss 0.0099"),
        ("12 of 30\n", "13 of 30\n", "12 of 30"),
        ("a\n...\nd\n", "a\nb\nc\nd\n", None),
        ("a\n...\ne\n", "a\nb\nc\nd\n", "e"),
        ("a\nc\n", "a\nb\nc\n", "c"),
        ("a\n", "a\nb\n", "(not shown) b"),
        ("w kink 1  7.2e-04  WRONG\n", "w given   7.2e-04  WRONG\n", None),
        ("w kink 1  7.2e-04  WRONG\n", "w kink 1  7.5e-04  WRONG\n", "w kink 1"),
        ("w kink 1  2.2e-16  ok\n", "w kink 2  1.8e-16  ok\n", None),
        ("w kink 1  2.2e-16  ok\n", "w kink 1  2.2e-16  WRONG\n", "w kink 1"),
    ],
)
def test_a_difference_is_found(shown, printed, difference):
    found = _first_difference(shown, printed)
    assert (found or "").startswith(difference or "")
    assert (found is None) == (difference is None)


def test_the_readme_prints_what_it_shows(standard_promotion):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert len(blocks) == text.count("```python\n") == text.count("```text\n")
    namespace = {"__name__": "readme"}
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), namespace)
        difference = _first_difference(shown, printed.getvalue())
        assert difference is None, (difference, printed.getvalue())


def test_the_readme_is_short_and_has_both_commands():
    data = (ROOT / "README.md").read_bytes()
    assert len(data) <= 14_000
    lines = data.decode().split("\n")
    assert len(lines) - 1 <= 300  # nothing follows the last newline
    for name, ending in (
        ("main", "-m experiments.compare_gradients"),
        ("test", "-m pytest -n 2"),
    ):
        command = lines[lines.index(f"<!-- {name} command -->") + 1]
        assert command.startswith("    python3 -m venv .venv && ")
        assert command.endswith(ending)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target
    for path in re.findall(r"`((?:jaxbce|experiments|tests)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"python -m experiments\.(\w+)", text):
        assert (ROOT / "experiments" / f"{command}.py").exists(), command
