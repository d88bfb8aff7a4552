"""What the README and docs/ show, as a reader would type it: Python is run on 4 ranks, a page's blocks as one program;
commands of ours are run where they start no job of their own; links and pages exist.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from harness.programs import environment
from nbclient import NotebookClient

import two_level_mha

pytestmark = pytest.mark.cpu_only("its programs run on Gloo")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KINDS = {"python", "sh", "text", "console"}  # text: what a program prints
OURS = re.compile(r"^(?:python -m two_level_mha|two-level-mha) (info|plan|predict)\b")


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


def name_of(page: Path) -> str:
    return page.stem


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    ours = environment(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, env=ours, cwd=folder)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_fenced(page):
    """Localises: a block that nothing runs and no reader can copy: indented, or of a kind that is not one of KINDS."""
    text = page.read_text()
    assert {kind for kind, _ in BLOCK.findall(text)} <= KINDS
    indented = re.findall(r"(?<=\n\n)    (?! )\S.*", BLOCK.sub("", text))
    assert not [line for line in indented if not re.match(r"    ([-*\d]|\|)", line)], indented


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python(page, tmp_path):
    """Localises: a snippet that does not run as it is shown, after those before it on its page."""
    program = tmp_path / "program.py"
    end = "\nimport torch.distributed as dist\ndist.barrier()\ndist.destroy_process_group()\n"
    program.write_text("\n".join(blocks(page, "python")) + end)
    result = run(["-m", "torch.distributed.run", "--nproc-per-node", "4", str(program)], tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


COMMANDS = {
    line.partition("  #")[0].strip()
    for page in PAGES
    for text in [*blocks(page, "sh"), *blocks(page, "console")]
    for line in text.replace("\\\n", " ").splitlines()
    if OURS.match(line.removeprefix("$ "))
}


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands(command, tmp_path):
    """Localises: an option that a page still shows."""
    words = shlex.split(command.removeprefix("$ "))
    words = words[1:] if words[0] == "two-level-mha" else words[3:]
    result = run(["-m", "two_level_mha", *words], tmp_path)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    """Localises: a page, picture or heading that is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        if anchor and to.suffix == ".md":
            assert anchor in anchors(to), target


def test_the_reference_is_whole():
    """Localises: a public name that the page does not have, or has without an example that uses it."""
    text = (ROOT / "docs" / "reference.md").read_text()
    found = re.findall(r"^::: two_level_mha\.(\w+)\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in found) == sorted(two_level_mha.__all__)
    uses = {"Plan": "plan", "Option": "plan.pick", "RankFailure": "RankFailure"}
    assert not [name for name, example in found if uses.get(name, f"tlm.{name}") not in example]


def test_quickstart():
    """Localises: the first program that a user runs."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", str(ROOT / "examples" / "quickstart.py")]
    result = run(command, ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    assert float(re.search(r"largest difference: (\S+)", result.stdout)[1]) <= 1e-6


def test_parallel_style():
    """Localises: the example of torch's parallelize_module, or that module with another torch."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "4", str(ROOT / "examples" / "parallel_style.py")]
    result = run(command, ROOT)
    assert result.returncode == 0, result.stderr[-4000:]
    assert float(re.search(r"after one step: (\S+)", result.stdout)[1]) <= 1e-5


@pytest.mark.slow
def test_notebook(tmp_path):
    """Localises: a cell that fails; the ranks that it starts."""
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"))
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert float(re.search(r"largest difference: (\S+)", said)[1]) <= 1e-6
    assert "the same tokens: True" in said


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
