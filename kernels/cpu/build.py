"""Builds the C++ kernels with the user's compiler on first use and keeps the library in a cache folder.

Plain C++; only ops.cpp includes torch's headers, few and without optimization, so that the build takes seconds. Nothing
here runs at import.

Environment:
    CXX: compiler to use; otherwise the first of g++, clang++, c++ that is installed.
    INNERQ_CACHE_DIR: where libraries are kept (default: ``$XDG_CACHE_HOME/innerq`` or ``~/.cache/innerq``). What lies
        there is executed, so a folder that others can write to, or that belongs to neither this user nor root, is not
        used; a private one under the temporary folder is, after a warning.
    INNERQ_CXXFLAGS: further compiler flags, such as a sanitizer's.
    INNERQ_CPU_ISA: ``native`` (default), or a lower path of :data:`ISA_FLAGS`, for tests and comparisons.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE_DIR = Path(__file__).resolve().parent

TORCH = Path(torch.__file__).parent

FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")

SOURCES: dict[str, tuple[str, ...]] = {
    "ops.cpp": ("-O1", "-DNDEBUG", f"-I{TORCH / 'include'}"),
    # Codes must be bit-exact, so the quantizer may not fuse a product into a sum.
    "append_kv.cpp": ("-ffp-contract=off",),
    "decode_attention.cpp": ("-ffp-contract=fast",),
    "tiles.cpp": ("-ffp-contract=fast",),
}
"""Source file, the slowest to compile first, -> flags of its own."""

LINK_FLAGS = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")

NATIVE = ("-mcpu=native",) if platform.machine().lower() in ("arm64", "aarch64") else ("-march=native",)

ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "native": NATIVE,
    "avx512": ("-march=x86-64-v4", "-mavx512vnni"),
    "avxvnni": ("-march=x86-64-v3", "-mavxvnni"),
    "avx2": ("-march=x86-64-v3",),
    "plain": ("-DINNERQ_PLAIN",),
}
"""Name of an instruction set path -> compiler flags. The sources choose by the macros that these flags set."""


class BuildError(RuntimeError):
    """The kernels cannot be built here; the message says why."""


def load(isa: str | None = None, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernels for an instruction set path: the wheel's own, else built unless the cache has them.

    Raises:
        BuildError: No compiler, a failed build, or a library that does not load.
    """
    isa = isa or os.environ.get("INNERQ_CPU_ISA", "native")
    if isa not in ISA_FLAGS:
        raise BuildError(f"INNERQ_CPU_ISA must be one of {', '.join(ISA_FLAGS)}, got {isa!r}")
    flags = (*shlex.split(os.environ.get("INNERQ_CXXFLAGS", "")), *extra_flags)
    if isa == "native" and not flags:
        from innerq_compile.kernels.cpu import prebuilt

        library = prebuilt.load()
        if library is not None:
            return library
    return _load(isa, flags)


def compile_library(isa: str, path: Path) -> None:
    """Compiles the kernels for an instruction set path, whatever this machine's CPU is, into a file.

    Raises:
        BuildError: No compiler, or a failed build.
    """
    _build(find_compiler(), (*FLAGS, *ISA_FLAGS[isa]), path)


@functools.cache
def _load(isa: str, extra_flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = find_compiler()
    flags = (*FLAGS, *ISA_FLAGS[isa], *extra_flags)
    path = library_path(f"innerq_cpu_{_fingerprint(compiler, flags)}.so")
    try:
        with contextlib.suppress(OSError):
            return _open(path)
        # It is not there, or what is there does not load: cut short, or made for another machine.
        with _only_builder(path):
            with contextlib.suppress(OSError):
                return _open(path)  # another process has built it meanwhile
            _build(compiler, flags, path)
            return _open(path)
    except OSError as error:
        raise BuildError(f"the kernel library cannot be stored or loaded: {error}") from error


def _open(path: Path) -> ctypes.CDLL:
    """Loads a library that :func:`_build` finished; the loader may crash on one that was cut short.

    Raises:
        OSError: There is none, it is not what was built, or the loader refuses it.
    """
    if path.with_suffix(".sha256").read_text() != hashlib.sha256(path.read_bytes()).hexdigest():
        raise OSError(f"{path} is damaged")
    return ctypes.CDLL(str(path))


def find_compiler() -> tuple[str, ...]:
    """The compiler as a command: ``CXX`` if set, else the first one installed.

    Raises:
        BuildError: There is none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        command = tuple(shlex.split(chosen))
        if not command or not shutil.which(command[0]):
            raise BuildError(f"the compiler that CXX names is not installed: {chosen!r}")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return (name,)
    raise BuildError("no C++ compiler is installed (looked for g++, clang++, c++; CXX names another)")


def library_path(name: str) -> Path:
    """Where a library lies, or is to be built: in :func:`cache_dir`.

    In a private temporary folder, after a warning, where that cannot be used or there is no home directory, as for the
    arbitrary user ids of containers.
    """
    try:
        folder = cache_dir()
        reason = _unusable(folder, name)
    except RuntimeError as error:
        reason = str(error).rstrip(".")
    if not reason:
        return folder / name
    user = os.getuid() if hasattr(os, "getuid") else "user"
    fallback = Path(tempfile.gettempdir()) / f"innerq-{user}"
    if _unusable(fallback, name):
        fallback = Path(tempfile.mkdtemp(prefix="innerq-"))
    warnings.warn(
        f"innerq: the built CPU kernels are kept in {fallback}, because {reason}. Set the environment variable "
        "INNERQ_CACHE_DIR to a folder that only you can write to.",
        stacklevel=6,
    )
    return fallback / name


def cache_dir() -> Path:
    """Folder of the built libraries (see the module's docstring).

    Raises:
        RuntimeError: No environment variable names one, and the user has no home directory.
    """
    chosen = os.environ.get("INNERQ_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "innerq"


def _unusable(folder: Path, name: str) -> str | None:
    """Why a library may not be loaded from a folder, which is made if it is missing, or cannot be built in it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        return f"{folder} cannot be used: {error.strerror}"
    if hasattr(os, "getuid"):
        if found.st_uid not in (os.getuid(), 0):
            return f"{folder} belongs to another user (uid {found.st_uid})"
        if found.st_mode & 0o022:
            return f"others can write to {folder} (chmod go-w {folder} forbids it)"
    if not (folder / name).exists() and not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to"
    return None


def _fingerprint(compiler: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """Hash of everything that decides the library's content: sources, flags, compiler, libc, torch and CPU."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((compiler, flags, SOURCES, LINK_FLAGS, torch.__version__, platform.libc_ver())).encode())
    digest.update(_run((*compiler, "--version")).encode())
    # What "native" means: a cache on a shared disk may serve several machines.
    native = _run((*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull))
    digest.update(native.encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Lets other processes that want the same library wait for it, where the file system has locks."""
    with open(path.with_suffix(".lock"), "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # POSIX only

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(compiler: tuple[str, ...], flags: tuple[str, ...], path: Path) -> None:
    """Compiles the sources side by side, links, and renames into place, so nobody ever sees half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:

        def compile_one(item: tuple[str, tuple[str, ...]]) -> str:
            name, own_flags = item
            target = f"{folder}/{name}.o"
            _run((*compiler, *flags, *own_flags, "-c", str(SOURCE_DIR / name), "-o", target))
            return target

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, SOURCES.items()))
        library, digest = Path(folder, path.name), Path(folder, "sha256")
        _run((*compiler, *flags, "-shared", *objects, *LINK_FLAGS, "-o", str(library)))
        digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        os.replace(library, path)
        os.replace(digest, path.with_suffix(".sha256"))


def _run(command: tuple[str, ...]) -> str:
    """Output of a compiler call.

    Raises:
        BuildError: With the first line of the complaint that names an error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise BuildError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[-1])}")
    return done.stdout


def torch_omp_parallel() -> ctypes.c_void_p:
    """Entry of the OpenMP runtime that torch has loaded, looked up through torch's own library.

    Linking one of our own could bring a second runtime, with a second set of threads, into the process.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        return ctypes.cast(ctypes.CDLL(str(TORCH / "lib" / f"libtorch_cpu.{suffix}")).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p(None)
