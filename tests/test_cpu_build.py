"""Where the C++ kernels are kept, how they attach to the ops, and what is said when they do not serve."""

import hashlib
import logging
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

from innerq_compile import ops
from innerq_compile.kernels import cpu
from innerq_compile.kernels.cpu import attach, build
from innerq_compile.numerics.config import InnerQConfig
from innerq_compile.numerics.layout import allocate_state


@pytest.fixture(scope="module")
def library():
    """The path of the native library, built."""
    try:
        return Path(build.load()._name)
    except build.BuildError as error:
        pytest.skip(str(error))


ENTRANCES = {
    "the cache's module": """
        from innerq_compile.cache.innerq_cache import InnerQCache
        from transformers import LlamaConfig
        cache = InnerQCache(LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=2), max_cache_len=64)
        cache.update(torch.zeros(1, 2, 5, 32), torch.zeros(1, 2, 5, 32), 0)
    """,
    "the ops": """
        import innerq_compile.ops
        from innerq_compile.numerics.config import InnerQConfig
        from innerq_compile.numerics.layout import allocate_state
        size = dict(batch_size=1, num_kv_heads=2, head_dim=32, capacity=64)
        state = allocate_state(InnerQConfig(), **size, dtype=torch.float32, device="cpu")
        assert "innerq_compile.kernels.cpu" not in sys.modules and "transformers" not in sys.modules
        torch.ops.innerq.dequantize_kv(*state, 64, InnerQConfig().spec)
    """,
}


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_every_entrance_gets_the_kernels_with_the_first_call(library, entrance):
    code = "\n".join(line.strip() for line in ENTRANCES[entrance].splitlines())
    program = (
        f"import sys, torch\n{code}\nassert torch._C._dispatch_has_kernel_for_dispatch_key('innerq::append_kv', 'CPU')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def load_again(monkeypatch, library):
    """Loads the native library as a new process would; what it builds is a copy of the one that is there."""
    built = []

    def copy(compiler, flags, path):
        built.append(path)
        shutil.copy(library, path)
        path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())

    monkeypatch.setattr(build, "_build", copy)
    loaded = build._load.__wrapped__("native", ())
    return loaded, built


def damage(path, how):
    data, digest = path.read_bytes(), path.with_suffix(".sha256")
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    if how == "of another machine":
        path.write_bytes(b"\x7fELF" + bytes(1000))
        digest.write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    if how == "without its checksum":
        digest.unlink()


@pytest.mark.parametrize("how", ["cut short", "of another machine", "without its checksum"])
def test_a_library_that_does_not_load_is_built_again_once(library, tmp_path, monkeypatch, how):
    monkeypatch.setenv("INNERQ_CACHE_DIR", str(tmp_path))
    fingerprint = build._fingerprint(build.find_compiler(), (*build.FLAGS, *build.NATIVE))
    path = tmp_path / f"innerq_cpu_{fingerprint}.so"
    for end in (".so", ".sha256"):
        shutil.copy(library.with_suffix(end), path.with_suffix(end))
    damage(path, how)  # before anything loads it: the loader knows a file again by its name
    loaded, built = load_again(monkeypatch, library)
    assert built == [path] and loaded.innerq_register
    assert not load_again(monkeypatch, library)[1]


def test_a_library_that_still_does_not_load_when_built_again_is_an_error(library, tmp_path, monkeypatch):
    monkeypatch.setenv("INNERQ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_build", lambda compiler, flags, path: path.write_text("no library"))
    with pytest.raises(build.BuildError, match="cannot be stored or loaded"):
        build._load.__wrapped__("native", ())


def test_the_fingerprint_holds_compiler_and_libc(library, monkeypatch):
    compiler = build.find_compiler()
    before = build._fingerprint(compiler, ())
    assert before == build._fingerprint(compiler, ()) != build._fingerprint((*compiler, "-pipe"), ())
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "1.0"))
    assert build._fingerprint(compiler, ()) != before


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder of its own, and no variable that names a cache."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("INNERQ_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "tmp"


def mode_of(folder):
    return stat.S_IMODE(folder.stat().st_mode)


def test_the_folder_is_made_private(temporary, monkeypatch):
    monkeypatch.setenv("HOME", str(temporary / "home"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = build.library_path("x.so")
    assert path == temporary / "home" / ".cache" / "innerq" / "x.so" and mode_of(path.parent) == 0o700


def give_away(folder, monkeypatch):
    if os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)


@pytest.mark.parametrize("mode", [0o770, 0o702, "another user's"])
def test_a_folder_that_others_can_write_to_is_not_used(temporary, monkeypatch, mode):
    folder = temporary / "shared"
    folder.mkdir()
    folder.chmod(0o700 if isinstance(mode, str) else mode)
    if isinstance(mode, str):
        give_away(folder, monkeypatch)
    monkeypatch.setenv("INNERQ_CACHE_DIR", str(folder))
    reason = "belongs to another user" if isinstance(mode, str) else "others can write to"
    with pytest.warns(UserWarning, match=f"{reason}.* INNERQ_CACHE_DIR") as caught:
        path = build.library_path("x.so")
    assert len(caught) == 1
    assert path.parent.is_relative_to(temporary) and path.parent != folder and mode_of(path.parent) == 0o700
    assert not list(folder.iterdir())


def test_without_home_and_passwd_entry_a_private_temporary_folder_is_used(temporary, monkeypatch):
    def no_entry(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    with pytest.warns(UserWarning, match="home directory.* INNERQ_CACHE_DIR"):
        path = build.library_path("x.so")
    assert path == temporary / f"innerq-{os.getuid()}" / "x.so" and mode_of(path.parent) == 0o700
    path.parent.chmod(0o777)  # as if somebody else had made it first
    with pytest.warns(UserWarning):
        other = build.library_path("x.so")
    assert other.parent != path.parent and mode_of(other.parent) == 0o700


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can become somebody else")
def test_a_user_without_a_name_and_a_home_gets_the_kernels(library, tmp_path):
    """As in a container that is run with an arbitrary user id; HOME is /, which is not the user's to write."""
    folder = tmp_path / "cache"
    shutil.copytree(library.parent, folder, ignore=lambda _, names: {n for n in names if library.stem not in n})
    program = (
        "import os, sys, tempfile, warnings\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "import torch; from innerq_compile import ops; from innerq_compile.kernels import cpu\n"
        "from innerq_compile.kernels.cpu import build\n"
        "build._build = lambda compiler, flags, path: [os.system(f'cp {sys.argv[1]}{end} {path.with_suffix(end)}')\n"
        "                                             for end in ('.so', '.sha256')]\n"
        "os.setgroups([]); os.setgid(12345); os.setuid(12345); tempfile.tempdir = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    assert cpu.unavailable() is None, cpu.unavailable()\n"
        "assert len(caught) == 1 and 'INNERQ_CACHE_DIR' in str(caught[0].message), [str(w.message) for w in caught]\n"
    )
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:3]:
        if parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-c", program, str(folder / library.stem)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def a_state(config, head_dim, dtype):
    size = {"batch_size": 1, "num_kv_heads": 1, "head_dim": head_dim, "capacity": 64}
    return allocate_state(config, **size, dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("options", "head_dim", "dtype", "reason"),
    [
        ({"group_size": 64, "sink": 31}, 64, torch.float32, "group_size 32, not 64"),
        ({"sink": 31}, 544, torch.float32, "up to 512, not 544"),
        ({"sink": 31}, 32, torch.float64, "float16"),
    ],
)
def test_a_cache_that_the_kernels_do_not_serve_is_told_once(library, caplog, options, head_dim, dtype, reason):
    config = InnerQConfig(**options)
    state = a_state(config, head_dim, dtype)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ops.dequantize_kv(*state, 64, config.spec)
    (message,) = [record.getMessage() for record in caplog.records if "slower" in record.getMessage()]
    assert reason in message


def test_a_served_cache_is_served_in_silence(library, caplog):
    config = InnerQConfig(sink=30)
    ops.dequantize_kv(*a_state(config, 64, torch.bfloat16), 64, config.spec)
    assert not caplog.records


def kernels_in(namespace):
    libraries.append(torch.library.Library(namespace, "DEF"))
    for name, default in ops.DEFAULTS.items():
        libraries[-1].define(str(getattr(ops, name)._schema).removeprefix("innerq::"))
        libraries[-1].impl(name, default, "CompositeExplicitAutograd")
    attach(namespace)
    return getattr(torch.ops, namespace)


libraries = []


def test_without_an_openmp_entry_a_call_starts_its_own_threads_and_says_so(library, monkeypatch):
    config, threads = InnerQConfig(), torch.get_num_threads()
    size = {"batch_size": 2, "num_kv_heads": 4, "head_dim": 32, "capacity": 1024}
    tokens = torch.randn(2, 4, 1000, 32, generator=torch.Generator().manual_seed(0))
    results = []
    try:
        for count in (1, 5):
            with monkeypatch.context() as patch:
                patch.setattr(build, "TORCH", Path("nowhere"))
                assert not build.torch_omp_parallel()
                kernels = kernels_in(f"innerq_test_threads_{count}")
                assert "threads started by every call" in cpu.description()
            torch.set_num_threads(count)
            state = allocate_state(config, **size, dtype=torch.float32, device="cpu")
            kernels.append_kv(tokens, tokens, *state, 1024, config.spec)
            out = kernels.decode_attention(tokens[:, :, :1], *state, None, 0.2, 1024, config.spec)
            results.append((*state, out))
    finally:
        torch.set_num_threads(threads)
        kernels_in("innerq_test_threads_as_before")
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_description_names_instruction_set_and_threads(library):
    assert cpu.description().startswith("C++ for ") and "OpenMP" in cpu.description()
