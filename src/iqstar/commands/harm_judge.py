"""``iqstar harm-judge``: trains the harm judge on the safety labels of BeaverTails.

Example:
    ``iqstar harm-judge --data BEAVERTAILS.jsonl.gz --safe HH_HELPFUL.jsonl.gz --output harm.npz``
"""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import Namespace
from pathlib import Path

from iqstar import __version__
from iqstar.commands.options import OptionParser, path
from iqstar.data.labelled import Kind, LabelledItem, read_labelled
from iqstar.data.reading import find_files
from iqstar.errors import InputError
from iqstar.judges.harm import HarmJudge, split_of
from iqstar.judges.harm_training import FOLDS, Example, cross_validate, train


def main(argv: list[str]) -> int:
    """Trains and measures a harm judge, and writes its file.

    Args:
        argv: The arguments after ``iqstar harm-judge``.

    Returns:
        The exit code, 0.

    Raises:
        InputError: If the arguments are wrong, scikit-learn is missing, the data cannot be used,
            or the file cannot be written.
    """
    options = _parse(argv)
    output = options.output
    if output.is_dir() or output.suffix != ".npz":
        raise InputError(f"--output: {options.output} must be a file that ends in .npz")
    labelled = [_example(i) for i in _read(options.data, "answers", "--data", options.split)]
    safe = [_example(i) for i in _read(options.safe, "pairs", "--safe", options.split)]
    areas = cross_validate(labelled, safe)
    info = {
        "iqstar": __version__,
        "data": _identities(options.data),
        "safe": _identities(options.safe),
        "split": options.split,
        "labelled": len(labelled),
        "labelled_safe": sum(e.safe for e in labelled),
        "further_safe": len(safe),
        "auroc": [round(area, 4) for area in areas],
    }
    model = train([*labelled, *safe], info)
    try:
        model.save(output)
    except OSError as error:
        raise InputError(
            f"--output: {output} cannot be written ({error.strerror or error}); choose another"
        ) from error
    sys.stdout.write(
        f"{len(labelled):,} labelled responses, {info['labelled_safe']:,} of them safe; "
        f"{len(safe):,} further safe ones; {len(model.prompts):,} prompts\n"
        f"AUROC {sum(areas) / len(areas):.3f} (mean of {FOLDS} folds by prompt, "
        f"{min(areas):.3f} to {max(areas):.3f})\n"
        f"Wrote {output}, version {HarmJudge(str(output)).version}\n"
    )
    return 0


def _example(item: LabelledItem) -> Example:
    """An answer with its label, or the chosen reply of a pair, which is taken to be safe."""
    first = item.responses[0]
    return Example(prompt=first, response=first.response or "", safe=item.safe is not False)


def _read(path: str | None, kind: Kind, flag: str, split: str | None) -> list[LabelledItem]:
    if path is None:
        return []
    try:
        found = read_labelled(path)
    except InputError as error:
        raise InputError(str(error).replace("--data", flag)) from error
    if found.kind != kind:
        wanted = {"answers": "prompt, response and is_safe", "pairs": "chosen and rejected"}[kind]
        raise InputError(f"{flag}: {path} has other rows than wanted; give rows of {wanted}")
    return [i for i in found.items if split is None or split_of(i.responses[0]) == split]


def _identities(path: str | None) -> dict[str, str]:
    """SHA-256 of each file, by its name in the folder: a folder's place says nothing elsewhere."""
    files = find_files(path) if path else []
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _parse(argv: list[str]) -> Namespace:
    parser = OptionParser(
        "harm-judge",
        "Trains the harm judge: the probability that a response is safe, from the "
        "words of prompt and response. It prints the AUROC of a cross-validation by prompt.",
    )
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="rows of prompt, response and is_safe")
    add("--safe", metavar="PATH", help="rows of chosen and rejected, whose chosen replies are safe")
    add("--output", type=path, required=True, metavar="FILE.npz", help="the file to write")
    add("--split", choices=("a", "b"), help="use half of the prompts, by a hash of how they open: "
        "judges of a and b share none")  # fmt: skip
    return parser.options(argv)
