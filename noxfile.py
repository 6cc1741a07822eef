"""Every check of minutes: ``nox``; one of them: ``nox -s types``. Longer ones run only by name: ``nox --list``.

``make test``, ``make lint`` and ``make types`` come here. ``lint``, ``types`` and ``shell`` use the environment that
nox runs in, because a second torch takes minutes. ``core`` and ``package`` make environments of their own, because
what is missing there is the point.
"""

import os
import re
import shutil
from pathlib import Path

import nox


nox.options.default_venv_backend = "none"  # `--force-venv-backend venv` isolates
# The asserts of all tests are rewritten once, and not by every worker of every run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

LOCK = Path("requirements.lock").resolve()
IMPORTED = re.compile(r"^\s*(?:from|import)\s+([\w.]+)", re.MULTILINE)
BEYOND_THE_CORE = re.compile(r"(torch|megatron|mimogrid\.shell|mimogrid\.adapters)\b")
WORKERS = ("--numprocesses", "2", "--dist", "worksteal", "--durations", "20", "-m", "not gpu")
TWICE_AS_MANY = (*WORKERS, "--numprocesses", "4")
"""For tests that start ranks: a worker often waits for one that is late, stopped or killed, and others go on."""
A_WORLD = "tests/shell/runtime/test_parity.py::test_a_layout_is_the_model[enc(2,2,1)@0 lm(2,2,1)@4]"
SCHEMAS = ("kubernetes-validate==1.37.0", "kubeflow-trainer-api==2.3.0", "pyyaml==6.0.4")
RAY = "ray[train]==2.60.0"
SCALE = "MIMOGRID_TEST_SCALE"


@nox.session
def lint(session: nox.Session) -> None:
    """Format, style, spelling and layering."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("codespell")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check types: mypy on the package, pyright (strict) on the core."""
    session.run("mypy")
    session.run("pyright")


@nox.session(default=False)
def site(session: nox.Session) -> None:
    """Build the documentation as a site, `build/site/index.html`; a dead link is an error."""
    pages = Path(session.create_tmp()) / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    # Links of the pages lead to code, too. Links of the package (src/) lead to what is copied already.
    pages.mkdir()
    for name in ("docs", "core", "shell", "adapters", "benchmarks", "examples", "tests"):
        shutil.copytree(name, pages / name, ignore=shutil.ignore_patterns("__pycache__"))
    for page in (*Path().glob("*.md"), *map(Path, ("Dockerfile", "pyproject.toml", "LICENSE"))):
        shutil.copy(page, pages)
    shutil.move(pages / "docs/site/index.md", pages)
    target = str(Path("build/site").resolve())
    options = ("-q", "--fail-on-warning", "--fresh-env", "-c", "docs/site")
    session.run("sphinx-build", *options, *session.posargs, str(pages), target, env={"PYTHONPATH": "src"})
    session.log(f"{target}/index.html")


@nox.session(default=False)
def quick(session: nox.Session) -> None:
    """Run the core's tests with fewer draws, and one world: half a minute."""
    session.run("pytest", *WORKERS, A_WORLD, "tests/core", "src/mimogrid/core", env={SCALE: "0.2"})


@nox.session(default=False)
def nightly(session: nox.Session) -> None:
    """Run every case of the fixed lists, eight times as many draws, and the GPU benchmark on the CPU."""
    everything = ("tests", "tests/gpu/test_gpu_benchmark.py", "src/mimogrid/core", "src/mimogrid/shell")
    session.run("pytest", *TWICE_AS_MANY, *(session.posargs or everything), env={SCALE: "8"})


@nox.session(venv_backend="venv", reuse_venv=True)
def core(session: nox.Session) -> None:
    """Run the core's tests, those files that import neither torch nor the shell, where there is no torch."""
    session.install("--constraint", str(LOCK), "attrs", "hypothesis", "pytest", "pytest-xdist")
    session.run("python", "-c", "import importlib.util as u; assert u.find_spec('torch') is None")
    alone = ("-p", "no:cacheprovider", *session.posargs, "src/mimogrid/core")
    session.run("pytest", *WORKERS, *alone, *_files_of_the_core(session))


@nox.session
def shell(session: nox.Session) -> None:
    """Run the tests that `core` leaves: those that need torch."""
    others = [f"--ignore={file}" for file in _files_of_the_core(session)]
    session.run("pytest", *TWICE_AS_MANY, *others, *session.posargs, "tests", "src/mimogrid/shell")


def _files_of_the_core(session: nox.Session) -> list[str]:
    folders = [Path("tests", name) for name in ("core", "shell", "adapters")]
    found = sorted(file for folder in folders for file in folder.rglob("test_*.py"))
    files = [str(file) for file in found if _needs_only_core(file)]
    if not files:
        session.error("no file in tests/ is the core's alone")
    return files


def _needs_only_core(file: Path) -> bool:
    names = IMPORTED.findall(file.read_text(encoding="utf-8"))
    helpers = [Path("tests/support", f"{name}.py") for name in names]
    return not any(map(BEYOND_THE_CORE.match, names)) and all(
        _needs_only_core(helper) for helper in helpers if helper.exists()
    )


@nox.session(name="megatron-newest", default=False)
def megatron_newest(session: nox.Session) -> None:
    """Run the tests with the newest megatron-core, on any Python."""
    # The core needs no torch, and the pages are of the locked versions. Of warnings that are errors elsewhere
    # megatron-core gives many at import, and they are not ours to mend.
    others = ("--ignore", "tests/core", "--ignore", "tests/shell/cli/test_docs.py")
    tests = session.posargs or ["tests", "tests/gpu/test_gpu_benchmark.py"]
    session.run(
        "pytest", "-W", "default", *TWICE_AS_MANY, *others, *tests, env=_with_newest_megatron(session)
    )


@nox.session(name="bench-peer", default=False)
def bench_peer(session: nox.Session) -> None:
    """Time megatron-core's MimoModel and schedule beside ours, on this machine and simulated on H100s: minutes."""
    # megatron-core warns at import of what is not ours to mend.
    quiet = ("python", "-W", "ignore")
    arguments = session.posargs or ["--out", "benchmarks/results/peer.txt"]
    session.run(*quiet, "benchmarks/peer/peer.py", *arguments, env=_with_newest_megatron(session))
    if not session.posargs:
        out = ("--out", "benchmarks/results/peer_simulated.txt")
        session.run(*quiet, "benchmarks/peer/simulated.py", *out)


def _with_newest_megatron(session: nox.Session) -> dict[str, str]:
    """Return what makes Python import the newest megatron-core of the lock, and its triton, before any other.

    Its wheel asks for Python 3.12 for one compiled file, which reads data sets of Megatron's. The rest is plain Python
    that 3.11 runs. So the wheels lie in a folder of their own that is ahead on the path.
    """
    folder = Path(session.cache_dir, "megatron-newest").resolve()
    wanted = [_locked(name) for name in ("megatron-core", "triton")]
    done = folder / "installed.txt"
    if not done.exists() or done.read_text(encoding="utf-8") != "\n".join(wanted):
        shutil.rmtree(folder, ignore_errors=True)
        megatron, triton = wanted
        install = ("python", "-m", "pip", "install", "--quiet", "--target", str(folder), "--no-deps")
        any_python = ("--python-version", "3.12", "--ignore-requires-python", "--only-binary", ":all:")
        session.run(*install, *any_python, megatron)
        session.run(*install, triton)
        done.write_text("\n".join(wanted), encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def _locked(name: str) -> str:
    """Return the newest pin of a package."""
    pins = re.findall(rf"^{name}==\S+", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return str(max(pins, key=lambda pin: [int(part) for part in re.findall(r"\d+", pin)]))


@nox.session(venv_backend="venv")
def package(session: nox.Session) -> None:
    """Build sdist and wheel, and use the wheel away from the checkout, without torch."""
    dist = Path(session.create_tmp()) / "dist"
    session.install("--constraint", str(LOCK), "build", "hatchling", "editables")
    # Without isolation, so that the locked hatchling builds; the wheel is made from the sdist.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), ".")
    (wheel,) = dist.glob("*.whl")
    session.install("--constraint", str(LOCK), str(wheel))
    session.chdir(dist)
    session.run("python", "-I", "-c", "import mimogrid.core, mimogrid.shell, mimogrid.adapters")
    session.run("python", "-I", "-m", "mimogrid", "--help")
    session.run("mimogrid", "--help")
    session.run("mimogrid", "env", "--json")
    session.run("mimogrid", "init", "--template", "text")  # from the examples in the wheel
    session.run("mimogrid", "check", "job.toml")
    session.run(
        "mimogrid", "simulate", "job.toml", "--html", "step.html"
    )  # from the page's files in the wheel


@nox.session(name="parity-long", default=False)
def parity_long(session: nox.Session) -> None:
    """Compare 2,000 random layouts with one process; takes some twenty minutes on two cores."""
    arguments = session.posargs or ["--layouts", "2000", "--summary", "docs/parity-long.md"]
    session.run("python", "tests/long/parity_long.py", *arguments, env={"PYTHONPATH": "tests/support"})


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the checks that need a CUDA device, and print what they measured (`gpu.json`)."""
    # The newest megatron-core warns at import of what is not ours to mend.
    session.run("pytest", "-W", "default", "-s", "tests/gpu/test_gpu.py", *session.posargs)


@nox.session(default=False)
def slurm(session: nox.Session) -> None:
    """Submit the shipped batch file to a real Slurm of two nodes on loopback; takes minutes, needs Slurm's daemons."""
    session.run("pytest", "-o", "faulthandler_timeout=1800", "tests/slurm/test_slurm.py", *session.posargs)


@nox.session(venv_backend="venv", default=False)
def kubernetes(session: nox.Session) -> None:
    """Check the manifests against the schemas of Kubernetes and Kubeflow Trainer."""
    session.install("--constraint", str(LOCK), "attrs", "hypothesis", "pytest", *SCHEMAS)
    session.run("pytest", "-p", "no:cacheprovider", "tests/kubernetes/test_manifests.py", *session.posargs)


@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def trackers(session: nox.Session) -> None:
    """Write to the real trackers, and read from what they kept; their packages bring some hundreds of megabytes."""
    session.install("--editable", ".[train,trackio,wandb,mlflow]", "hypothesis", "pytest>=9")
    # What other packages warn of at import is not ours to mend.
    session.run("pytest", "-W", "default", "tests/trackers/test_trackers.py", *session.posargs)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Open the interactive pages in a real browser, Debian's chromium, and act as a user would."""
    session.run("pytest", "-s", "tests/browser/test_pages.py", *session.posargs)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Disturb and interrupt two hundred runs and resume them; takes some twenty minutes on two cores."""
    arguments = session.posargs or ["--summary", "docs/faults-run.md"]
    session.run("python", "tests/long/faults.py", *arguments, env={"PYTHONPATH": "tests/support"})


@nox.session(default=False)
def chaos(session: nox.Session) -> None:
    """Let the nodes of a run come and go at random, for half an hour."""
    session.run("python", "tests/long/chaos.py", *session.posargs, env={"PYTHONPATH": "tests/support"})


@nox.session(venv_backend="venv", reuse_venv=True, default=False)
def ray(session: nox.Session) -> None:
    """Train jobs under Ray Train, on a local Ray world of four workers."""
    session.install("--constraint", str(LOCK), "--editable", ".[train]", RAY, "hypothesis", "pytest")
    # Ray warns at import of what it deprecates itself. Its workers are niced by default.
    arguments = ("-W", "default", "-o", "faulthandler_timeout=1800", "tests/ray", *session.posargs)
    session.run("pytest", *arguments, env={"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"})


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Give the commands that need no torch files and arguments that nobody would write, for twenty minutes."""
    # The seeds go on where the test of every day ends.
    arguments = session.posargs or ["1200", "1000"]
    session.run("python", "tests/long/fuzzing.py", *arguments, env={"PYTHONPATH": "src"})
    session.run("python", "tests/support/mangled.py", "1000", "50000", env={"PYTHONPATH": "src"})
