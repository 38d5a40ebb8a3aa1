"""The file that ``iqstar score`` writes and ``iqstar fit`` reads: credits of fixed responses.

Parquet, one row a response: ``prompt`` (its messages), ``response_ids``, ``reference`` (log π_ref)
and ``credit`` (A*/β, in nats) of each of its tokens, ``truncated``. The schema's metadata have,
under ``iqstar``, JSON that says what the numbers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iqstar.assignment import MicroBatch
from iqstar.atomic import sync_file, written_beside
from iqstar.errors import InputError
from iqstar.mdp import Prompt

KEY = "model.rollout.init_args.path"
FORMAT = 1
"""Of the file; another one is refused."""
ROWS = 1024
"""Responses in a row group."""
AGAIN = "write it again, with iqstar score"


def write_credits(
    path: Path, micro_batches: Iterable[MicroBatch], about: Mapping[str, Any]
) -> tuple[int, int]:
    """Writes credits as they come; the file is there when all are in it, and whole.

    Args:
        path: The file; one that is there is replaced.
        micro_batches: Scored responses, at least one.
        about: What the credits depend on, as plain JSON values.

    Returns:
        Number of responses and of tokens.
    """
    rows = chain.from_iterable(map(_rows, micro_batches))
    responses = tokens = 0
    with written_beside(path) as part:
        first = next(rows)
        schema = _schema(pa.from_numpy_dtype(first["credit"].dtype)).with_metadata(
            {"iqstar": json.dumps({"format": FORMAT, **about}, ensure_ascii=False)}
        )
        rows = chain([first], rows)
        with pq.ParquetWriter(part, schema, write_page_checksum=True) as writer:
            while group := list(islice(rows, ROWS)):
                writer.write_table(pa.Table.from_pylist(group, schema))
                responses += len(group)
                tokens += sum(len(row["response_ids"]) for row in group)
        sync_file(part)
    return responses, tokens


class CreditFile:
    """Credits of responses, by prompt.

    Args:
        path: What :func:`write_credits` wrote.

    Attributes:
        about: What the credits depend on.

    Raises:
        InputError: If there is no such file, it is damaged, or something else.
    """

    about: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise InputError(f"{KEY}: {path} is a folder; give a file that iqstar score wrote")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except FileNotFoundError as error:
            raise InputError(
                f"{KEY}: there is no file {path}; write it with iqstar score --output {path}"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{KEY}: {path} is damaged ({error}); {AGAIN}") from error
        about = (table.schema.metadata or {}).get(b"iqstar")
        if about is None:
            raise InputError(f"{KEY}: {path} holds no credits; give what iqstar score wrote")
        self.about = json.loads(about)
        if self.about["format"] != FORMAT:
            raise InputError(
                f"{KEY}: {path} has the format {self.about['format']} of iqstar "
                f"{self.about.get('version')}, this version reads {FORMAT}; {AGAIN}"
            )
        self._columns = _checked(table, path)
        prompts = table["prompt"].to_pylist()
        self._place = {
            tuple((m["role"], m["content"]) for m in prompt): i for i, prompt in enumerate(prompts)
        }

    def __len__(self) -> int:
        return len(self._place)

    def of(self, prompt: Prompt, response: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Log π_ref and credit of the tokens of a response, or of its beginning.

        Args:
            prompt: What it responds to.
            response: Its token ids.

        Raises:
            InputError: If the prompt is not in the file, or with another response.
        """
        shown = repr(prompt.messages[-1].content[:60])
        place = self._place.get(tuple((m.role, m.content) for m in prompt.messages))
        if place is None:
            raise InputError(
                f"{KEY}: {self.path} has no credits for the prompt {shown}; score the data of this "
                "run (iqstar score with the same data settings and max_new_tokens, since longer "
                "responses leave less room for prompts, no --limit), or set data.limit to "
                "the --limit that the file was made with. Held-out prompts are never in it: "
                "predict with DatasetRollout"
            )
        ids, reference, credit = (column[place].values.to_numpy() for column in self._columns)
        length = len(response)
        if ids[:length].tolist() != list(response):
            raise InputError(
                f"{KEY}: the response to {shown} is another one in {self.path}; the data or the "
                f"chat template has changed since it was written: {AGAIN}"
            )
        return reference[:length], credit[:length]


def _schema(number: pa.DataType) -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("prompt", pa.list_(message)),
            ("response_ids", pa.list_(pa.int32())),
            ("reference", pa.list_(number)),
            ("credit", pa.list_(number)),
            ("truncated", pa.bool_()),
        ]
    )


def _rows(micro: MicroBatch) -> Iterator[dict[str, Any]]:
    lengths = micro.rollout.lengths.tolist()
    columns = zip(
        micro.rollout.prompts,
        *(
            values.cpu().split(lengths)
            for values in (micro.tokens.actions, micro.tokens.reference, micro.tokens.credit)
        ),
        micro.rollout.truncated.tolist(),
        strict=True,
    )
    for prompt, ids, reference, credit, truncated in columns:
        if not (credit.isfinite() & reference.isfinite()).all():
            raise InputError(
                "model.estimator: the credit of the response to "
                f"{prompt.messages[-1].content[:60]!r} is not finite; use trainer.precision: "
                "32-true, a weaker estimator, or leave it out of the data"
            )
        yield {
            "prompt": prompt.turns,
            "response_ids": ids.numpy(),
            "reference": reference.numpy(),
            "credit": credit.numpy(),
            "truncated": truncated,
        }


def _checked(table: pa.Table, path: Path) -> tuple[pa.ListArray, ...]:
    """The columns of a number for each token."""
    known = [_schema(number) for number in (pa.float32(), pa.float64())]
    if table.schema.remove_metadata() in known:
        names = ("response_ids", "reference", "credit")
        columns = tuple(table[name].combine_chunks() for name in names)
        lengths = [pc.list_value_length(column) for column in columns]
        if lengths[0] == lengths[1] == lengths[2] and all(c.null_count == 0 for c in columns):
            return columns
    raise InputError(f"{KEY}: {path} is damaged (its columns are not credits); {AGAIN}")
