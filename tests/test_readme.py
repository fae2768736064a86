from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edgekd
from edgekd.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Every `edgekd …` line or inline code of a page that gives arguments."""
    text = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(rf"^(?: +|(?=edgekd (?:{'|'.join(COMMANDS)})\b))(edgekd [^\n`|]+)$", text, re.MULTILINE)
    return [*lines, *re.findall(r"`(edgekd [a-z]+ [^`\n]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_edgekd_understands(page):
    for line in commands(page.read_text(encoding="utf-8")):
        name, *arguments = shlex.split(line.split("#")[0].replace("…", ""))[1:]
        if name.startswith("-") or "|" in line or name.isupper():
            continue
        assert name in COMMANDS, line
        command = main.get_command(click.Context(main), name)
        try:
            command.make_context(name, arguments)
        except click.MissingParameter:
            pass  # a page may speak of a command without all it needs
        except click.UsageError as error:
            pytest.fail(f"{page.name}: {line}: {error.message}")


def test_the_readme_shows_commands():
    assert len(commands(README)) >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_python_of_the_readme_uses_what_there_is():
    calls = re.findall(r"edgekd\.(\w+)\(([^\n]*)\)", README)
    assert {name for name, _ in calls} == set(edgekd.__all__)
    for name, arguments in calls:
        keywords = set(re.findall(r"(\w+)=", arguments))
        parameters = inspect.signature(getattr(edgekd, name)).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        assert open_ended or keywords <= set(parameters)


@pytest.mark.slow
def test_the_demo_runs_and_its_bundle_loads(tmp_path):
    command = [sys.executable, "-m", "edgekd", "demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 5), done.stderr
    bundle = json.loads(done.stdout)["bundles"]["local"]
    assert edgekd.evaluate(bundle, data="sklearn:digits")["value"] > 0.8
