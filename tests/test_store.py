"""A run folder is whole at every moment, whoever is killed when."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgekd import files
from edgekd.errors import StoreError
from edgekd.files import (
    canonical_json,
    list_files,
    publish,
    require_place,
    sha256_file,
    sha256_folder,
    sha256_json,
    write_json,
)
from edgekd.store import MANIFEST, STAGE, RunFolder

KEY = sha256_json({"stage": "search"})
OTHER = sha256_json({"stage": "other"})


def make(folder: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def finished(run: RunFolder, key: str = KEY, text: str = "weights"):
    stage = run.stage(1, "search", key)
    run.begin(stage)
    draft = make(run.draft(stage), {"config.json": "{}", "deep/model.safetensors": text})
    return run.commit(stage, draft, {"seconds": 1.5})


def tree(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_files(folder, ())}


# Hashes


def test_json_hash_depends_on_values_and_not_on_order_or_spacing():
    assert sha256_json({"a": 1, "b": [1.5, "é"]}) == sha256_json({"b": [1.5, "é"], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})
    assert canonical_json({"b": 1, "a": None}) == '{"a":null,"b":1}'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_hash_refuses_numbers_that_json_lacks(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_json([value])


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_folder_hash_depends_on_names_and_contents_only(tmp_path):
    contents = {"a": "1", "b/c": "2"}
    one, two = make(tmp_path / "one", contents), make(tmp_path / "two", dict(reversed(contents.items())))
    os.utime(one / "a", (0, 0))
    (two / "a").chmod(0o600)
    make(two, {".git/config": "x", "b/__pycache__/c.pyc": "y"})
    assert sha256_folder(one) == sha256_folder(two)
    for change in ({"a": "2"}, {"new": ""}):
        assert sha256_folder(make(tmp_path / f"changed-{len(change)}-{'new' in change}", {**contents, **change})) != (
            sha256_folder(one)
        )


def test_hash_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"cannot read .*nothing: no such file or folder"):
        sha256_file(tmp_path / "nothing")


# Atomic writes


def test_written_json_reads_back_and_leaves_nothing_else(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, None, "é"]})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"a": [1, None, "é"]}
    assert list_files(tmp_path, ()) == ["x.json"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left on the device"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "no permission"),
    ],
)
def test_a_write_that_fails_keeps_the_old_file_and_says_why(tmp_path, monkeypatch, number, reason):
    write_json(tmp_path / "x.json", "old")

    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(StoreError, match=rf"cannot write .*x\.json: {reason}"):
        write_json(tmp_path / "x.json", "new")
    assert tree(tmp_path) == {"x.json": b'"old"\n'}


def test_publish_moves_and_replaces_only_what_carries_the_marker(tmp_path):
    final = tmp_path / "bundle"
    publish(make(tmp_path / "draft", {"edgekd.json": "1"}), final, marker="edgekd.json")
    publish(make(tmp_path / "draft", {"edgekd.json": "2"}), final, marker="edgekd.json")
    assert tree(tmp_path) == {"bundle/edgekd.json": b"2"}
    with pytest.raises(StoreError, match=r"will not replace .*bundle: edgekd did not write it"):
        publish(make(tmp_path / "draft", {"other": "3"}), final, marker="other")
    assert tree(final) == {"edgekd.json": b"2"}


def test_publish_that_fails_half_way_puts_the_old_folder_back(tmp_path, monkeypatch):
    final = make(tmp_path / "bundle", {"edgekd.json": "1"})
    draft = make(tmp_path / "draft", {"edgekd.json": "2"})
    rename = os.rename

    def fail(source, destination):
        if source == draft:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(StoreError, match=r"cannot write .*bundle: no space left on the device"):
        publish(draft, final, marker="edgekd.json")
    assert tree(final) == {"edgekd.json": b"1"}


def test_publish_clears_what_a_killed_publish_left(tmp_path):
    make(tmp_path / ".bundle.old-1234", {"edgekd.json": "1"})
    publish(make(tmp_path / "draft", {"edgekd.json": "2"}), tmp_path / "bundle")
    assert tree(tmp_path) == {"bundle/edgekd.json": b"2"}


def test_publish_refuses_a_file_and_a_link(tmp_path):
    (tmp_path / "final").write_text("mine")
    with pytest.raises(StoreError, match="it is a file or a link"):
        publish(make(tmp_path / "draft", {"a": ""}), tmp_path / "final", marker="a")
    (tmp_path / "link").symlink_to(make(tmp_path / "elsewhere", {"a": "mine"}))
    with pytest.raises(StoreError, match="it is a file or a link"):
        publish(tmp_path / "draft", tmp_path / "link", marker="a")
    assert tree(tmp_path / "elsewhere") == {"a": b"mine"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "it is a file or a link, not a folder"),
        ("link", "it is a file or a link, not a folder"),
        ("file/out", "file is not a folder"),
        ("file/deep/out", "file is not a folder"),
        ("nowhere/out", "nowhere is not a folder"),
        ("theirs", "will not replace theirs: no record; choose another --out"),
        (".", "it holds the folder you are in"),
        ("..", "it holds the folder you are in"),
    ],
)
def test_a_place_that_cannot_be_published_to_is_refused_beforehand(tmp_path, monkeypatch, place, message):
    inside = tmp_path / "above" / "inside"
    make(inside / "theirs", {"a": ""})
    make(inside.parent, {"record": ""})
    (inside / "record").touch()
    (inside / "file").touch()
    (inside / "link").symlink_to(make(tmp_path / "elsewhere", {"record": ""}))
    (inside / "nowhere").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(inside)
    with pytest.raises(StoreError, match=message):
        require_place(Path(place), marker="record", why="no record")


def test_a_new_an_empty_and_an_own_place_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "own", {"record": "", "more": ""})
    (tmp_path / "empty").mkdir()
    for place in ("new", "deep/down/new", "empty", "own", tmp_path / "new"):
        require_place(Path(place), marker="record", why="no record")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "own"]


# Run folders


def test_a_stage_is_complete_once_committed_and_only_for_its_key(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert not run.stage(1, "search", KEY).complete
    finished(run)
    again = RunFolder(tmp_path / "run").stage(1, "search", KEY)
    assert again.complete
    assert again.entry == {"seconds": 1.5}
    other = run.stage(1, "search", OTHER)
    assert (other.complete, other.entry) == (False, None)
    assert "its settings or inputs have changed" in (other.notice or "")


@pytest.mark.parametrize(
    ("name", "text", "notice"),
    [
        ("deep/model.safetensors", "weightS", "deep/model.safetensors is not as the stage left it"),
        ("deep/model.safetensors", "short", "deep/model.safetensors is not as the stage left it"),
        ("config.json", None, "config.json is not as the stage left it"),
        (STAGE, "{", "stage.json is missing or damaged"),
        (STAGE, "[]", "stage.json is missing or damaged"),
        (STAGE, '{"key": 1}', "stage.json is missing or damaged"),
        (STAGE, '{"key": "k", "entry": {}, "outputs": {"a": 1}}', "stage.json is missing or damaged"),
        (STAGE, None, "stage.json is missing or damaged"),
    ],
)
def test_a_damaged_stage_runs_again_with_a_notice(tmp_path, name, text, notice):
    run = RunFolder(tmp_path / "run")
    path = finished(run).path / name
    path.unlink()
    if text is not None:
        path.write_text(text)
    stage = run.stage(1, "search", KEY)
    assert not stage.complete
    assert stage.notice == f"01-search: {notice}; the stage runs again"
    assert finished(run).complete
    assert run.stage(1, "search", KEY).complete


def test_scratch_survives_for_its_key_and_goes_with_the_commit(tmp_path):
    run = RunFolder(tmp_path / "run")
    make(run.begin(run.stage(1, "search", KEY)), {"checkpoint": "step 7"})
    again = RunFolder(tmp_path / "run")
    assert tree(again.begin(again.stage(1, "search", KEY))) == {"checkpoint": b"step 7"}
    assert tree(again.begin(again.stage(1, "search", OTHER))) == {}
    make(again.begin(again.stage(1, "search", KEY)), {"checkpoint": "step 1"})
    stage = finished(again)
    assert not stage.work.exists()


def test_the_manifest_is_there_only_while_all_is_finished(tmp_path):
    run = RunFolder(tmp_path / "run")
    finished(run)
    assert json.loads(run.finish({"schema": 1}).read_text()) == {"schema": 1}
    assert not (run.path / ".work").exists()
    run.begin(run.stage(2, "prune", KEY))
    assert not (run.path / MANIFEST).exists()


def test_fresh_forgets_stages_and_keeps_what_is_not_ours(tmp_path):
    run = RunFolder(tmp_path / "run")
    finished(run)
    run.finish({})
    mine = {"notes.txt": "mine", "02-mine/thesis.txt": "mine", "search/a": "mine", "bundle/model.onnx": "built"}
    make(run.path, {**mine, ".cache/latency-1.json": "measured"})
    run.fresh()
    assert {name: text.decode() for name, text in tree(run.path).items() if name != ".edgekd-run"} == mine


def test_a_users_file_in_a_stage_folder_is_never_removed(tmp_path):
    run = RunFolder(tmp_path / "run")
    make(finished(run).path, {"thesis.txt": "mine"})
    for attempt in (run.fresh, lambda: finished(run, OTHER)):
        with pytest.raises(StoreError, match=r"01-search: edgekd did not write thesis\.txt; move it away"):
            attempt()
    assert (run.path / "01-search/thesis.txt").read_text() == "mine"
    (run.path / "01-search" / STAGE).write_text("{")
    finished(run, OTHER)
    assert (run.path / "01-search.damaged-1/thesis.txt").read_text() == "mine"


def test_a_folder_of_somebody_else_is_refused_untouched(tmp_path):
    home = make(tmp_path / "home", {"thesis.txt": "mine"})
    with pytest.raises(StoreError, match="it is not empty and not a run of edgekd; choose another --out"):
        RunFolder(home)
    with pytest.raises(StoreError, match=r"as a run folder: it is a file"):
        RunFolder(home / "thesis.txt")
    with pytest.raises(StoreError, match="a part of the path is a file"):
        RunFolder(home / "thesis.txt" / "run")
    assert tree(tmp_path) == {"home/thesis.txt": b"mine"}


def test_a_folder_that_cannot_be_made_or_written_says_why(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StoreError, match=r"cannot write the run folder .*run: no permission"):
            RunFolder(tmp_path / "run")
    assert tree(tmp_path) == {}
    RunFolder(tmp_path / "run")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StoreError, match=r"cannot write the run folder .*run: no permission"):
        RunFolder(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="no permission"):
            RunFolder(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_two_processes_cannot_hold_one_run(tmp_path):
    holder = f"""
        import sys
        from edgekd.store import RunFolder
        with RunFolder({str(tmp_path / "run")!r}).lock():
            print("held", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(holder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        run = RunFolder(tmp_path / "run")
        with pytest.raises(StoreError, match=f"is in use by process {process.pid}; wait for it"), run.lock():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with run.lock():
        pass
    with run.lock():
        pass


def test_an_error_inside_the_lock_passes_through_and_frees_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(FileNotFoundError), run.lock():
        (tmp_path / "nothing").read_text()
    with run.lock():
        pass


# Kills its child at the first, second, third… change of the file system, and checks after each what is left.
KILLER = """
import itertools, os, signal, sys
from pathlib import Path
from edgekd.store import RunFolder

root = Path(sys.argv[1])
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

def work(run, key, text):
    with run.lock():
        stage = run.stage(1, "search", key)
        if not stage.complete:
            (run.begin(stage) / "checkpoint").write_text("half")
            draft = run.draft(stage)
            (draft / "model.safetensors").write_text(text)
            (draft / "config.json").write_text("{}")
            run.commit(stage, draft, {})
        run.finish({"key": key})

def killed_at(count, path):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    left = itertools.count(count, -1)
    def hook(event, args):
        changes = event in EVENTS or (event == "open" and isinstance(args[1], str) and args[1][:1] in "wxa")
        if changes and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    work(RunFolder(path), "new", "new")
    os._exit(0)

for count in itertools.count():
    path = root / str(count)
    work(RunFolder(path), "old", "old")
    killed = killed_at(count, path)
    run = RunFolder(path)
    old, new = run.stage(1, "search", "old"), run.stage(1, "search", "new")
    if (path / "manifest.json").exists():
        assert old.complete or new.complete, count
    if new.complete:
        assert (new.path / "model.safetensors").read_text() == "new", count
    work(RunFolder(path), "new", "new")
    assert RunFolder(path).stage(1, "search", "new").complete, count
    names = sorted(item.name for item in path.iterdir())
    assert names == [".edgekd-run", "01-search", "manifest.json"], (count, names)
    if not killed:
        break
print("killed", count)
"""


def test_a_kill_at_any_change_leaves_old_or_new_and_running_again_ends_the_same(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[1]) > 15
