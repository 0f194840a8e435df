"""Kernels that come compiled in the wheel: which library is taken, and that building stays the fallback."""

import ctypes
import shutil

import pytest
import torch

from innerq_compile.kernels.cpu import build, prebuilt

V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "FOLDER", tmp_path)
    monkeypatch.delenv("INNERQ_CPU_ISA", raising=False)
    monkeypatch.delenv("INNERQ_CXXFLAGS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        (set(), []),
        ({"avx2"}, []),
        (V3, ["avx2"]),
        (V3 | {"avx_vnni"}, ["avxvnni", "avx2"]),
        (V4, ["avx2"]),  # without VNNI the 512-bit path does not exist
        (V4 | {"avx512_vnni", "avx_vnni"}, ["avx512", "avxvnni", "avx2"]),
    ],
)
def test_only_what_the_cpu_can_run_is_loaded_and_the_fastest_first(flags, paths):
    assert prebuilt.runnable(flags) == paths
    assert set(prebuilt.NEEDS) <= set(build.ISA_FLAGS)


def test_a_library_of_another_torch_or_one_that_does_not_load_is_left_alone(folder, monkeypatch):
    monkeypatch.setattr(prebuilt, "cpu_flags", lambda: frozenset(V3))
    (folder / "innerq_cpu_avx2_torch1.0.so").write_bytes(b"never read")
    assert prebuilt.load() is None
    (folder / prebuilt.file_name("avx2")).write_bytes(b"no library")
    assert prebuilt.load() is None


def test_no_compiler_is_needed_where_the_wheel_brings_the_kernels(folder, monkeypatch):
    if build.NATIVE != ("-march=native",) or not prebuilt.runnable(prebuilt.cpu_flags()):
        pytest.skip("the wheel brings nothing for this machine")
    built = build.load("native")._name
    shutil.copy(built, folder / prebuilt.file_name(prebuilt.runnable(prebuilt.cpu_flags())[0]))
    monkeypatch.setenv("CXX", "no-such-compiler")
    library = build.load()
    assert library._name.startswith(str(folder))
    assert isinstance(library, ctypes.CDLL) and library.innerq_register
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.load("plain", ("-DINNERQ_TEST",))  # nothing of the wheel serves other flags


def test_the_name_holds_the_versions_that_the_library_is_tied_to():
    major, minor = torch.__version__.split(".")[:2]
    assert prebuilt.file_name("avx2") == f"innerq_cpu_avx2_torch{major}.{minor}.so"
