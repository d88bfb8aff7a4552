"""docs/experiment.md and its pictures: what was measured and predicted of the method's paper, claim by claim.

    make report    # python benchmarks/report.py

Reads the JSON of benchmarks/results and nothing else; the same results make the same bytes. A test makes the page again
and compares it with the committed one. Parts: report_data.py (rows, numbers as text), report_claims.py (the table of
claims), report_sections.py (what is below it), report_pictures.py.
"""

import argparse
from pathlib import Path

import report_claims
import report_pictures
import report_sections
from report_data import Results

ROOT = Path(__file__).resolve().parents[1]


def document(results: Results) -> str:
    head = [
        "# The experiment of the method's paper",
        "<!-- made by `make report` from benchmarks/results: change those, or benchmarks/report*.py -->",
        "The paper reports one experiment: 16 GPUs, one baseline, two figures. This page puts each of its claims "
        "beside what this package measured on a CPU at small sizes, and what is predicted for 16 H100 at the paper's "
        "size. Three kinds of numbers are kept apart:",
        "- **measured**: timed, or counted by an interface or a recorder, in runs of 4 Gloo ranks on 2 CPU cores;\n"
        "- **predicted**: one rank's operators and collectives, recorded at full size on tensors without memory, "
        "priced by the rates of an H100. These are assumed: no kernel was timed on a GPU;\n"
        "- **calculated**: arithmetic of sizes, or of the paper's own figures.",
        "\"Ours\" is exact: every layout was compared with the unsplit model before it was timed. A grid (n, m) has "
        "n head groups and m slices. \"Taken literally\" is the paper's text as it stands, where slices do not meet "
        "before softmax.",
    ]  # fmt: skip
    parts = [report_sections.experiment(results), "## Claims", report_claims.claims(results)]
    parts += [make(results) for make in report_sections.SECTIONS]
    return "\n\n".join([*head, *parts]) + "\n"


def write(results: Results, folder: Path) -> None:
    text = document(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.md").write_text(text)
    report_pictures.draw(results, folder / "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of experiment.md and pictures/")
    args = parser.parse_args()
    write(Results.read(ROOT / "benchmarks/results"), args.out)
    print(args.out / "experiment.md")


if __name__ == "__main__":
    main()
