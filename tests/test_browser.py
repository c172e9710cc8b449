"""Runs and reports in a real browser, by `make test-browser`: what a bare `mlflow ui` shows, and where numbers lead.

SCREENSHOTS=folder keeps the pictures, which are to be looked at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import PROGRAM, Page
from conftest import TESTS, TOY_TASK, ToyProject
from test_faults import answers, wait_for

from fwp_lightning.results import read_store
from fwp_lightning.sweep import run_sweep
from fwp_lightning.tracking import Origin

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; run: apt-get install chromium"),
]
REPORT = TESTS.parent / "reports" / "output" / "index.html"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with Page(tmp_path / "browser") as found:
        found.look()
        yield found


def element(kind: str, text: str) -> str:
    """The first element of a kind that says no more than a text."""
    return f"[...document.querySelectorAll({kind!r})].find(found => found.innerText.trim() == {text!r})"


# --- MLflow's pages --------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(tracked: ToyProject) -> ToyProject:
    """A project whose six runs a sweep has trained."""
    origin = Origin(command="fwp sweep toy", imports=(str(TOY_TASK),))
    assert run_sweep(tracked.runs(), tracked.project, origin, jobs=1) == 0
    return tracked


@pytest.fixture
def ui(swept: ToyProject) -> Iterator[str]:
    """The address of a bare `mlflow ui`; its port is free and one worker is enough, all else is MLflow's own choice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    with (swept.root / "ui.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=swept.root, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(port), 300)
        yield f"http://127.0.0.1:{port}/#"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def stored(swept: ToyProject, client: Any) -> dict[str, Any]:
    """The runs of the store by name."""
    return {client.get_run(run.run_id).info.run_name: run for run in read_store(client)}


def test_runs_are_listed_grouped_charted_and_compared(
    ui: str, page: Page, stored: dict[str, Any], client: Any, pictures: Path
) -> None:
    home = client.get_experiment_by_name("toy").experiment_id
    assert len(stored) == 6

    page.open(f"{ui}/experiments")
    page.wait_for_texts("toy", "Runs of")
    page.screenshot(pictures / "experiments.png")

    page.open(f"{ui}/experiments/{home}/runs")
    said = page.wait_for_texts("6 matching runs", *stored)
    # what the experiment is, with the table so far, and how each run came to be
    assert "Runs of experiments/toy.yaml" in said
    assert "plain\tsmoke\treleased\t2/2\t0" in said
    assert "fwp sweep toy" in said
    page.screenshot(pictures / "runs.png")

    # charts are drawn where they are in the window
    page.look(height=4000)
    page.open(f"{ui}/experiments/{home}/runs?compareRunsMode=CHART")
    page.wait_for_texts("valid/loss", "train/loss", "best/valid_loss", "final/valid_loss", *stored)
    # six evaluations of a run are a line
    page.wait_for(f"[...document.querySelectorAll('svg')].some({DRAWN})")
    page.screenshot(pictures / "charts.png")
    page.look()

    names = ["toy/plain/n_keys=2/seed1", "toy/tanh/n_keys=10/seed1"]
    first, second = (stored[name] for name in names)
    page.open(f'{ui}/compare-runs?runs=["{first.run_id}","{second.run_id}"]&experiments=["{home}"]')
    said = page.wait_for_texts(*names, "final/valid_loss", first.run_key, second.run_key)
    for value in (run.metrics["final/valid_loss"] for run in (first, second)):
        assert f"{value:.3f}".rstrip("0") in said
    assert "attention.kind\tidentity\ttanh" in said
    page.screenshot(pictures / "compared.png")

    page.open(f"{ui}/experiments/{home}/runs/{first.run_id}")
    said = page.wait_for_texts(names[0], "Finished", "final/valid_loss", "attention.kind", "config_sha256", "ToyData")
    assert "fwp sweep toy" in said
    page.screenshot(pictures / "run.png")

    page.open(f"{ui}/experiments/{home}/runs/{first.run_id}/system-metrics")
    page.wait_for_texts("cpu_utilization_percentage", "system_memory_usage_megabytes")
    page.screenshot(pictures / "system.png")

    page.open(f"{ui}/experiments/{home}/runs")
    page.wait_for_texts("6 matching runs")
    page.click(element("button", "Group by"))
    page.click(element("[role^=menuitem]", "row"))
    page.wait_for_texts("Group: plain", "Group: tanh", "Group: steep", *stored)
    page.screenshot(pictures / "groups.png")


DRAWN = "svg => svg.querySelectorAll('.scatterlayer .js-line').length"


# --- the report page -------------------------------------------------------------------------------------------------


def test_every_number_of_the_committed_report_leads_to_its_runs(page: Page, pictures: Path) -> None:
    page.open(REPORT.as_uri())
    page.wait_for("document.readyState == 'complete'")
    page.screenshot(pictures / "report.png")
    lost = """[...document.querySelectorAll('a[href^="#"]')].map(link => link.getAttribute('href').slice(1))
              .filter(name => !document.getElementById(name))"""
    assert page.value(lost) == []
    anchors = page.value("[...document.querySelectorAll('article')].map(article => article.id)")
    assert anchors
    followed = 0
    for anchor in anchors:
        number = f"""[...document.getElementById('{anchor}').querySelectorAll('td a[href^="#runs-"]')]
                     .find(link => link.checkVisibility())"""
        # the numbers of a large figure are folded away
        if not page.value(f"Boolean({number})"):
            page.click(f"document.getElementById('{anchor}').querySelector('details:not([open]) summary')")
        name = page.value(f"({number}).getAttribute('href').slice(1)")
        page.click(number)
        page.wait_for(f"location.hash == '#{name}'")
        # it is in the window, stands out and names its runs
        page.wait_for(f"({BOX})('{name}').top >= 0 && ({BOX})('{name}').top < innerHeight")
        assert page.value(f"({COLOUR})('{name}')") == "rgb(255, 243, 196)"
        assert name.removeprefix("runs-") in page.value(f"document.getElementById('{name}').innerText")
        followed += 1
    assert followed == len(anchors)
    page.screenshot(pictures / "followed.png")


BOX = "name => document.getElementById(name).getBoundingClientRect()"
COLOUR = "name => getComputedStyle(document.getElementById(name).querySelector('td')).backgroundColor"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_committed_report_fits_a_phone(page: Page, pictures: Path, dark: bool) -> None:
    page.look(width=390, height=844, dark=dark)
    page.open(REPORT.as_uri())
    page.wait_for("document.readyState == 'complete'")
    # wide tables scroll within themselves
    assert page.value("document.documentElement.scrollWidth") == 390
    assert page.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(23, 27, 31)" if dark else "rgb(255, 255, 255)"
    )
    page.screenshot(pictures / f"phone_{'dark' if dark else 'light'}.png")
    page.value("document.querySelector('article').scrollIntoView({behavior: 'instant'})")
    page.screenshot(pictures / f"phone_{'dark' if dark else 'light'}_entry.png")
