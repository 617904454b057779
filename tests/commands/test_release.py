"""Test the package installed from its wheel, without a clone."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lstm_jax
from conftest import make_once
from lstm_jax.run import workdir

ROOT = Path(__file__).parents[2]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside of a clone, and assert that it succeeds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution, as for a release."""
    pytest.importorskip("build", reason="build is not installed (extra 'dev')")

    def build(directory: Path) -> None:
        directory.mkdir()
        command = [sys.executable, "-m", "build", "--outdir", str(directory), str(ROOT)]
        result = run(*command, cwd=directory)
        # Warnings of `build` are in capitals. Others are about this machine, such as
        # "byte-compiling is disabled".
        assert not re.findall(r".*WARNING.*|.*DeprecationWarning.*", result.stdout + result.stderr)

    directory = make_once("dist", tmp_path_factory, build)
    assert len(list(directory.glob("lstm_jax-*.tar.gz"))) == 1
    (path,) = directory.glob("*.whl")
    return path


@pytest.mark.process
def test_the_wheel_holds_every_module_and_experiment_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"lstm_jax-{lstm_jax.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (license_file,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
        assert b"Apache License" in archive.read(license_file)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lstm_jax").rglob("*.py")}
    others = ("data/standard_texts.toml", "export/page.html", "ops/lstm.c", "ops/platform.h")
    modules |= {f"lstm_jax/{name}" for name in ("py.typed", *others)}
    pretrained = (ROOT / "lstm_jax" / "pretrained").glob("*/*")
    modules |= {str(path.relative_to(ROOT)) for path in pretrained}
    paths = (ROOT / "experiments").rglob("*.py")
    experiments = {f"lstm_jax/{path.relative_to(ROOT)}" for path in paths}
    assert names == modules | experiments


@pytest.mark.process
def test_the_first_command_works_where_the_wheel_is_installed(
    wheel: Path, text_file: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = str(environment / "bin" / "python")
    install = [sys.executable, "-m", "pip", "--python", python, "install"]
    run(*install, "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    # Use the dependencies of this environment. Python ignores editable installs there, because it
    # reads no .pth files in a directory that a .pth file adds.
    (site,) = environment.glob("lib/*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import lstm_jax; print(lstm_jax.__file__)", cwd=empty).stdout
    assert Path(where.strip()).is_relative_to(environment.resolve())
    train = [python, "-m", "lstm_jax.main", "--config", "experiments/quick.py"]
    sizes = ["--config.model.hidden_size=16", "--config.batches.window_length=32"]
    run(*train, *sizes, f"--config.data.path={text_file}", "--config.max_steps=1", cwd=empty)
    assert (empty / "runs" / "quick" / workdir.CHECKPOINTS / "1").is_dir()
    sample = [python, "-m", "lstm_jax.sample", "--workdir", "runs/quick", "--length=20"]
    assert len(run(*sample, cwd=empty).stdout) == 21


def test_the_changelog_and_the_citation_have_the_version_of_the_package() -> None:
    assert f'version = "{lstm_jax.__version__}"' not in (ROOT / "pyproject.toml").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## (\S+?),? ", changelog, re.MULTILINE)
    assert latest is not None and latest[1] == lstm_jax.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {lstm_jax.__version__}\n" in citation


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_constraints_have_an_allowed_version_of_each_requirement(name: str) -> None:
    lines = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(package): version for package, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = ("bpe", "examples", "sweep")
    extras = [project["optional-dependencies"][extra] for extra in names]
    own, *dev = project["optional-dependencies"]["dev"]
    assert own == f"lstm-jax[{','.join(names)}]"
    for requirement in map(Requirement, [*project["dependencies"], *sum(extras, dev)]):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_the_workflow_runs_the_oldest_and_the_newest_python_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert project["requires-python"] == f">={versions[0]}"
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    assert re.findall(r'python: "(.*)"', workflow) == [versions[0], versions[-1]]
