"""The wheel, in an environment with what it requires and nothing else, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from elastic.settings import agent_environment
from tests.conftest import Leftovers

ROOT = Path(__file__).parents[2]
EXTRA = "etcd"
EXTRAS = ("prometheus_client", "tensorboard", "wandb", "mlflow", "opentelemetry", "transformers", "accelerate", "lightning")
DEMO_S = 200
TINY = ["--layers", "3", "--dim", "32", "--heads", "2", "--seq", "32", "--batch", "16", "--micro-batch", "2"]

pytestmark = pytest.mark.long


def called(*command: str | Path, cwd: Path, timeout: float = 100, environment: dict[str, str] | None = None) -> str:
    """Runs a command without this suite's paths. Returns its output."""
    plain = {name: value for name, value in (environment or os.environ).items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=plain, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def required(names: list[str], found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Returns the installed distributions that these requirements need, directly or not."""
    for text in names:
        wanted = Requirement(text)
        extras = ["", *wanted.extras]
        if wanted.marker is not None and not any(wanted.marker.evaluate({"extra": extra}) for extra in ["", EXTRA]):
            continue
        distribution = metadata.distribution(wanted.name)
        assert wanted.specifier.contains(distribution.version, prereleases=True), f"{text}, and there is {distribution.version}"
        if wanted.name not in found:
            found[wanted.name] = distribution
            inner = [Requirement(each) for each in distribution.requires or []]
            kept = [each for each in inner if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)]
            required([f"{each.name}{each.specifier}" for each in kept], found)
    return found


def files(distribution: metadata.Distribution) -> Iterator[tuple[Path, Path]]:
    """Where the parts of a distribution lie (top-level entries of site-packages, and commands), each with its place in the environment."""
    site = Path(str(distribution.locate_file("")))
    for top in {Path(str(each)).parts[0] for each in distribution.files or [] if not str(each).startswith("..")}:
        yield site / top, Path("site") / top
    for each in distribution.files or []:
        if str(each).startswith("../../../bin/"):
            yield site / str(each), Path("bin") / Path(str(each)).name


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, installed by pip. What it requires is linked from here, as far as the wheel names it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "tests")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    called(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    place = folder / "environment"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    called(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (place / "lib").glob("python*/site-packages")
    needs = next(metadata.distributions(name="elastic-exact", path=[str(site)])).requires or []
    for distribution in required(needs, {}).values():
        for path, below in files(distribution):
            target = site / below.name if below.parts[0] == "site" else place / below
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path)
    shutil.rmtree(source)
    return place


def test_it_says_its_version_and_is_typed(installed: Path, tmp_path: Path) -> None:
    asked = "import elastic, pathlib; home = pathlib.Path(elastic.__file__).parent; print(home, (home / 'py.typed').exists())"
    home, typed = called(installed / "bin" / "python", "-c", asked, cwd=tmp_path).split()
    assert Path(home).is_relative_to(installed)
    assert typed == "True"
    plugged = "from importlib.metadata import entry_points; print(entry_points(group='torchrun.handlers')['etcd-v3'].load().__name__)"
    assert called(installed / "bin" / "python", "-c", plugged, cwd=tmp_path).strip() == "etcd_v3"
    assert called(installed / "bin" / "elastic", "version", cwd=tmp_path).strip() == metadata.version("elastic-exact")


def test_every_module_can_be_imported(installed: Path, tmp_path: Path) -> None:
    """So nothing is imported that is not required, but where an extra is for it."""
    asked = (
        "import importlib, pkgutil, elastic\n"
        "for each in pkgutil.walk_packages(elastic.__path__, 'elastic.'):\n"
        "    if not each.name.endswith(('__main__', 'pytest_plugin')) and '.chaos.through_proxy' not in each.name:\n"
        "        try:\n"
        "            importlib.import_module(each.name)\n"
        "            print(each.name)\n"
        "        except ModuleNotFoundError as error:\n"
        f"            assert error.name.partition('.')[0] in {EXTRAS}, error\n"
    )
    names = called(installed / "bin" / "python", "-W", "ignore", "-c", asked, cwd=tmp_path, environment=agent_environment()).split()
    assert {"elastic.worker.trainer", "elastic.checkpoint.reader", "elastic.snapshot.replication", "elastic.cli.run"} <= set(names)


def test_the_demo_runs_away_from_the_checkout(installed: Path, tmp_path: Path, leftovers: Leftovers) -> None:
    for name in ("demo.py", "gpt.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    shown = called(installed / "bin" / "python", "demo.py", *TINY, cwd=tmp_path, timeout=DEMO_S)
    assert "digests EQUAL" in shown
