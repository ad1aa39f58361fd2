"""C++ sources are built once for a processor, by one process, and what cannot be built is said in one line."""

import multiprocessing
import os
import pwd

import pytest

from mole_mega.platform import compiler
from mole_mega.platform.compiler import CannotCompileError

SOURCE = 'extern "C" int answer() { return 42; }\n'

pytestmark = pytest.mark.skipif(compiler.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def libraries(tmp_path):
    return sorted((tmp_path / "cache" / "mole_mega").glob("*.so"))


def test_a_source_is_built_once(source, tmp_path, monkeypatch):
    assert compiler.load(source).answer() == 42
    (library,) = libraries(tmp_path)
    built = library.stat().st_mtime_ns
    monkeypatch.setattr(compiler, "_build", None)  # would fail if it were called
    assert compiler.load(source).answer() == 42
    assert library.stat().st_mtime_ns == built


def test_another_source_and_another_processor_are_built_anew(source, tmp_path, monkeypatch):
    compiler.load(source)
    source.write_text(SOURCE.replace("42", "43"))
    assert compiler.load(source).answer() == 43
    monkeypatch.setattr(compiler, "_processor", lambda: "another one")
    compiler.load(source)
    assert len(libraries(tmp_path)) == 3


def test_a_mistake_is_one_line_and_leaves_nothing(source, tmp_path):
    source.write_text("int answer( {")
    with pytest.raises(CannotCompileError, match=r"exit code 1: .*error") as found:
        compiler.load(source)
    assert "\n" not in str(found.value)
    assert not libraries(tmp_path)


def test_no_compiler_is_said(source, monkeypatch):
    monkeypatch.setattr(compiler, "find_compiler", lambda: None)
    with pytest.raises(CannotCompileError, match=r"no C\+\+ compiler \(g\+\+ or c\+\+\) in PATH"):
        compiler.load(source)


def test_another_system_is_said(source, monkeypatch):
    monkeypatch.setattr(compiler.platform, "system", lambda: "Darwin")
    with pytest.raises(CannotCompileError, match="not for Darwin"):
        compiler.load(source)


def test_a_place_that_cannot_be_written_is_replaced(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.load(source).answer() == 42


def test_a_user_without_a_home_gets_a_place_too(source, monkeypatch):
    def no_entry(uid):
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)  # a container's user that /etc/passwd does not know
    assert compiler.load(source).answer() == 42


@pytest.mark.parametrize("left", [0, 100])
def test_a_library_that_was_cut_short_is_built_again(source, tmp_path, left):
    # built by another process: a library that this one has open it does not read again
    context = multiprocessing.get_context("fork")
    first = context.Process(target=answer, args=(source, os.environ["XDG_CACHE_HOME"], context.Queue()))
    first.start()
    first.join()
    (library,) = libraries(tmp_path)
    library.write_bytes(library.read_bytes()[:left])
    assert compiler.load(source).answer() == 42


def answer(path, cache, queue):
    os.environ["XDG_CACHE_HOME"] = cache
    queue.put(compiler.load(path).answer())


def test_processes_that_want_it_at_once_build_one(source, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    starters = [context.Process(target=answer, args=(source, os.environ["XDG_CACHE_HOME"], queue)) for _ in range(4)]
    for process in starters:
        process.start()
    assert [queue.get(timeout=60) for _ in starters] == [42] * 4
    for process in starters:
        process.join()
    assert len(libraries(tmp_path)) == 1
    assert not list((tmp_path / "cache" / "mole_mega").glob("*.part"))
