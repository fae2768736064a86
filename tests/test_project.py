"""What surrounds the code: container, make targets, metadata, layers."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgekd
from edgekd.recipe import PRESETS

ROOT = Path(__file__).parent.parent


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined and `ARG` defaults filled in."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]
    for name, default in (each[1].split("=", 1) for each in found if each[0] == "ARG"):
        found = [(word, rest.replace(f"${{{name}}}", default)) for word, rest in found]
    return found


def arguments(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def last_stage() -> dict[str, str]:
    words = [word for word, _ in instructions()]
    return dict(instructions()[len(words) - words[::-1].index("FROM") :])


def project() -> dict:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# Container


def test_images_are_built_in_stages_from_pinned_bases():
    bases = [rest.split()[0] for rest in arguments("FROM")]
    assert len(bases) >= 2
    for base in bases:
        tag = base.partition(":")[2]
        assert tag, f"{base} has no tag"
        assert "latest" not in tag
        assert "slim" in tag


def test_the_container_runs_edgekd_as_an_ordinary_user():
    stage = last_stage()
    assert stage["ENTRYPOINT"] == '["edgekd"]'
    assert stage["USER"].split(":")[0] not in ("", "root", "0")
    assert stage["WORKDIR"] != "/"


def test_the_container_gets_the_files_it_copies_and_no_others():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for rest in arguments("COPY") if "--from" not in rest for name in rest.split()[:-1]}
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert copied <= kept
    assert {"edgekd", "targets", "pyproject.toml", "LICENSE", "README.md"} <= copied
    assert set(project()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]) <= copied


# Make


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "set -eu" in script.read_text()
    assert script.read_text().rstrip().endswith("make test")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("demo", ["edgekd demo --out runs/demo"]),
        ("lint", ["ruff check", "ruff format --check", "mypy", "lint-imports"]),
        ("test", ["ruff check", "python -m pytest"]),
        ("test-all", ["ruff check", "pytest -m 'not device' --cov"]),
        ("bench", ["bench/"]),
        ("clean", ["rm -rf"]),
        ("help", ["make"]),
    ],
)
def test_make_targets_do_what_they_are_called(target, commands):
    plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for command in commands:
        assert command in plan


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sets_up_the_environment_when_the_project_has_changed():
    command = ["make", "-n", "demo", "--what-if=pyproject.toml"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert plan.index("pip install") < plan.index("edgekd demo")
    assert "'.[dev]'" in plan


# Package


def test_one_version():
    assert project()["project"]["version"] == edgekd.__version__


def test_everything_imported_is_declared():
    extras = project()["project"]["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    required = project()["project"]["dependencies"]
    declared = {re.split(r"[<>=~\[; ]", line)[0].lower() for line in (*required, *optional)}
    providers = importlib.metadata.packages_distributions()
    missing = {}
    for path in sorted((ROOT / "edgekd").rglob("*.py")):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            distributions = {each.lower() for each in providers.get(name, [name.replace("_", "-")])}
            if name not in sys.stdlib_module_names and name != "edgekd" and not distributions & declared:
                missing[name] = str(path.relative_to(ROOT))
    assert missing == {}


def test_what_an_extra_brings_is_imported_only_when_it_is_used():
    code = (
        "import sys, pkgutil, importlib, edgekd\n"
        "skip = ('__main__', 'worker', 'runner', '_demo')\n"
        "for module in pkgutil.walk_packages(edgekd.__path__, 'edgekd.'):\n"
        "    if not module.name.endswith(skip):\n        importlib.import_module(module.name)\n"
        "print({'openvino', 'onnxruntime_qnn', 'litert_torch', 'ethosu', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_what_the_package_ships_is_there():
    included = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"profiles": "edgekd/_profiles", "targets": "edgekd/_targets"}
    assert list((ROOT / "targets").glob("*.yaml"))
    assert {path.stem for path in (ROOT / "edgekd/recipes").glob("*.yaml")} == set(PRESETS)
    assert (ROOT / "edgekd/py.typed").exists()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_warnings_are_errors_and_slow_tests_are_left_out():
    options = project()["tool"]["pytest"]["ini_options"]
    assert options["filterwarnings"][0] == "error"
    assert "not slow and not device" in options["addopts"]


def test_no_module_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "edgekd").rglob("*.py")}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 330} == {}
