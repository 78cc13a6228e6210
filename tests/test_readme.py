"""The code in README.md and docs/ runs as printed: each section's blocks in order, in one namespace."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import lpgd
from lpgd.gradients import GradientMethod

ROOT = Path(__file__).parent.parent
README, NODES, METHODS = ROOT / "README.md", ROOT / "docs" / "nodes.md", ROOT / "docs" / "methods.md"
PAGES = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "extending.md")]
FENCE = re.compile(r"^\s*(`{3,})\s*(\S*)")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$")
NOT_RUN = re.compile(r"^<!-- not run: \S.* -->$")


@dataclass
class Section:
    """A heading and its python blocks, each with the number of the line above its first."""

    heading: str
    blocks: list[tuple[int, str]] = field(default_factory=list)

    def run(self, filename: str) -> None:
        """Execute the blocks; a failure's traceback names the line in the file."""
        torch.manual_seed(0)  # random costs meet a kink, about which there is a warning, once in thirty times
        namespace = {"__name__": "__main__"}
        for line, code in self.blocks:
            exec(compile("\n" * line + code, filename, "exec", dont_inherit=True), namespace)


def read_sections(text: str) -> list[Section]:
    """The sections of a Markdown text that have python blocks to run.

    A block is not run if the line above it, blank ones aside, is ``<!-- not run: REASON -->``.

    Raises:
        ValueError: a block is not closed, or a marker has no python block just below it.
    """
    sections = [Section("(top)")]
    lines = text.splitlines()
    marker = 0
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = FENCE.match(line)
        if marker and line.strip() and (fence is None or fence[2] != "python"):
            raise ValueError(f"line {marker}: no python block stands just below this 'not run' marker.")
        if fence:
            start = number
            while number < len(lines) and lines[number].strip() != fence[1]:
                number += 1
            if number == len(lines):
                raise ValueError(f"line {start}: the block that starts here is not closed by {fence[1]}.")
            if fence[2] == "python" and not marker:
                sections[-1].blocks.append((start, textwrap.dedent("\n".join(lines[start:number]) + "\n")))
            marker = 0
            number += 1
        elif heading := HEADING.match(line):
            sections.append(Section(heading[1]))
        elif NOT_RUN.match(line.strip()):
            marker = number
    if marker:
        raise ValueError(f"line {marker}: no python block stands just below this 'not run' marker.")
    return [section for section in sections if section.blocks]


SECTIONS = [(page, section) for page in PAGES for section in read_sections(page.read_text(encoding="utf-8"))]


def test_pages_have_code() -> None:
    assert {README, NODES, METHODS} <= {page for page, _ in SECTIONS}


@pytest.mark.parametrize(
    ("page", "section"), [pytest.param(*pair, id=f"{pair[0].stem}, {pair[1].heading}") for pair in SECTIONS]
)
def test_a_section_runs(page: Path, section: Section, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section.run(str(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_pages_link_to_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_node_is_described() -> None:
    text, changes = NODES.read_text(encoding="utf-8"), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in lpgd.nodes.__all__:
        assert f"| `{name}(" in text or f"| `nodes.{name}(" in text or f"`nodes.{name}(X, U)`" in text, name
        assert f"`{name}`" in changes, name


def test_every_gradient_method_is_described() -> None:
    text = METHODS.read_text(encoding="utf-8")
    methods = [
        name for name, thing in vars(lpgd).items() if isinstance(thing, type) and issubclass(thing, GradientMethod)
    ]
    assert len(methods) > 7
    for name in methods:
        assert f"`{name}(" in text, name


EXAMPLE = """\
# One

```python
x = 1
# not a heading
```
```bash
exit 1
```
<!-- not run: it needs two GPUs -->

```python
x = 1 / 0
```
```python
x += 1
assert x == 2
```

## Two

```python
assert "x" not in globals()
1 / 0
```

## Three

No code.
"""


def test_sections_of_an_example() -> None:
    one, two = read_sections(EXAMPLE)
    assert (one.heading, two.heading) == ("One", "Two")
    assert one.blocks == [(3, "x = 1\n# not a heading\n"), (15, "x += 1\nassert x == 2\n")]
    one.run("example")
    with pytest.raises(ZeroDivisionError) as error:
        two.run("example")
    assert error.traceback[-1].lineno == EXAMPLE.splitlines().index("1 / 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# One\n```python\nx = 1\n", "line 2: the block that starts here is not closed"),
        ("<!-- not run: slow -->\nText.\n```python\nx = 1\n```\n", "line 1: no python block"),
        ("<!-- not run: slow -->\n```bash\nls\n```\n", "line 1: no python block"),
        ("<!-- not run: slow -->\n", "line 1: no python block"),
    ],
)
def test_malformed_markdown_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sections(text)
