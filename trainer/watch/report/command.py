"""`stepline report`: reads runs, writes one HTML file, and a picture of the same plots where it is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path

from stepline.trainer.errors import UserError
from stepline.trainer.files import write_whole
from stepline.trainer.watch.report.page import render
from stepline.trainer.watch.report.read import read_run


def run_report(folders: Sequence[Path], output: Path | None, png: bool, as_json: bool) -> Path:
    """Writes the report of one run, or of several beside each other, and says where; returns its path.

    output: by default RUN/report.html for one run, report.html in the current folder for several. png: the same plots
    as a picture beside it. Raises UserError for a folder that is no run or has no metrics, the same run twice, and an
    output that cannot be written.
    """
    names = run_names(folders)
    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    elif output.suffix not in (".html", ".htm"):
        raise UserError(f"--output is {output}; its name must end in .html")
    elif output.is_dir():
        raise UserError(f"{output} is a folder; give --output the name of a file")
    if png:
        from stepline.trainer.watch.report.picture import draw, need_matplotlib

        need_matplotlib()
    try:
        runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); a report needs it") from error
    written = [output]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, render(runs))
        if png:
            written.append(draw(runs, output.with_suffix(".png")))
    except OSError as error:
        reason = f"{output.parent} is a file" if output.parent.is_file() else error.strerror
        raise UserError(f"{output} cannot be written ({reason}); choose another --output") from error
    if as_json:
        found = {"report": str(output), "runs": [str(folder) for folder in folders]}
        print(json.dumps(found | ({"png": str(written[1])} if png else {})))
    else:
        for path in written:
            print(f"{path.stat().st_size / 1e6:.1f} MB written to {path}")
    return output


def run_names(folders: Sequence[Path]) -> list[str]:
    """What the runs are called: their folders' names, with as many parents as it takes to tell them apart.

    Raises UserError where a run is there twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise UserError(f"{folders[i]} is given twice; give each run once")
    names = ["/".join(path.parts[-1:]) for path in resolved]
    for depth in range(2, max(len(path.parts) for path in resolved) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "/".join(path.parts[-depth:]) if names.count(name) > 1 else name
            for path, name in zip(resolved, names, strict=True)
        ]
    return names
