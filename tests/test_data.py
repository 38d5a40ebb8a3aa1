"""Data: label-free prompts, disjoint splits, loaders, and clear messages for bad files."""

import gzip
import json
from dataclasses import dataclass
from errno import EACCES
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from iqstar.data import HHRLHF, JSONL, BeaverTails, EvalBatches, RepeatedBatches, Sample
from iqstar.data.hh_rlhf import parse_dialogue
from iqstar.data.reading import find_files, read_file
from iqstar.data.turns import make_prompt, split_key
from iqstar.errors import InputError
from iqstar.evaluation import in_order
from iqstar.mdp import Message, Prompt, PromptBatch

DATA = Path(__file__).parents[2] / "shared" / "data"
HH = DATA / "hh_rlhf" / "harmless-base_test_a.jsonl.gz"
BEAVER = DATA / "beavertails" / "30k_test_a.jsonl.gz"
real_files = pytest.mark.skipif(not HH.exists(), reason=f"the real data is not at {DATA}")


def read(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ask(text: str) -> Prompt:
    return Prompt(messages=(Message(role="user", content=text),))


def sides(data: JSONL) -> tuple[list, list]:
    data.setup()
    return [p.messages for p in data.train_prompts], [p.messages for p in data.heldout_prompts]


# ---- prompts


def test_a_dialogue_is_split_at_its_last_assistant_turn():
    text = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Say\n\nHuman: hey\n\nAssistant: Hey, hey."
    dialogue = parse_dialogue(text)
    assert [(m.role, m.content) for m in dialogue.turns] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Say"),
        ("user", "hey"),
    ]
    assert dialogue.reply == "Hey, hey."
    # Turns of one role are joined: chat templates want the roles to alternate.
    assert make_prompt(dialogue.turns).messages[-1].content == "Say\n\nhey"


@pytest.mark.parametrize("rows_like", ["Yes", "No"])
def test_no_response_character_leaks_into_the_prompt(tmp_path, rows_like):
    stem = "\n\nHuman: Is it?\n\nAssistant:"
    rows = [{"chosen": f"{stem} {rows_like}!", "rejected": f"{stem} {rows_like}."}]
    train, heldout = sides(HHRLHF(path=write(tmp_path / "a.jsonl", rows), val_prompts=1))
    assert train == []
    assert heldout == [(Message(role="user", content="Is it?"),)]


@real_files
def test_hh_prompts_end_with_the_human_and_alternate():
    data = HHRLHF(path=str(HH))
    data.setup("fit")
    for prompt in [*data.train_prompts, *data.heldout_prompts]:
        roles = [m.role for m in prompt.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


@real_files
@pytest.mark.parametrize("first_turn_only", [False, True])
def test_hh_is_label_free(tmp_path, first_turn_only):
    """Method §7.8: other final responses give the same prompts, order and split, bit for bit."""
    marker = "\n\nAssistant:"
    rows = [
        {side: text.rpartition(marker)[0] + marker + new for side, text in row.items()}
        for row, new in zip(read(HH), [" Sure.", "", " I won't.\n\nHuman: x"] * 400, strict=False)
    ]
    options = {"first_turn_only": first_turn_only, "min_prompt_chars": 10, "max_prompt_chars": 150}
    before = HHRLHF(path=str(HH), **options)
    after = HHRLHF(path=write(tmp_path / "other.jsonl", rows), **options)
    assert sides(before) == sides(after)
    assert before.report == after.report
    first, second = before.train_dataloader(), after.train_dataloader()
    assert [[p.messages for p in b.prompts] for b in first] == [
        [p.messages for p in b.prompts] for b in second
    ]


@real_files
def test_beavertails_is_label_free(tmp_path):
    rows = read(BEAVER)
    turned = [
        {**row, "is_safe": other["is_safe"], "category": other["category"], "response": "Hm."}
        for row, other in zip(rows, rows[::-1], strict=True)
    ]
    path = write(tmp_path / "turned.jsonl", turned)
    assert sides(BeaverTails(path=str(BEAVER))) == sides(BeaverTails(path=path))


@real_files
def test_filters_bound_the_text_that_is_kept_and_count_what_they_skip():
    data = HHRLHF(path=str(HH), first_turn_only=True, min_prompt_chars=10, max_prompt_chars=150)
    data.setup()
    kept = [*data.train_prompts, *data.heldout_prompts]
    assert {len(p.messages) for p in kept} == {1}
    assert {10 <= len(p.messages[0].content) <= 150 for p in kept} == {True}
    report = data.report
    assert report.rows == 1181 == len(kept) + sum(report.skipped.values())
    assert report.cut > 800
    assert set(report.skipped) >= {"duplicate prompt", "over max_prompt_chars=150"}


def test_the_kept_response_answers_the_kept_prompt(tmp_path):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    path = write(tmp_path / "a.jsonl", [row])
    for first_turn_only, messages, response in [(False, 3, "d"), (True, 1, "b")]:
        data = JSONL(path=path, val_prompts=None, first_turn_only=first_turn_only)
        data.setup()
        (prompt,) = data.heldout_prompts
        assert (len(prompt.messages), prompt.response) == (messages, response)


def test_parquet_json_and_folders_read_alike(tmp_path):
    from datasets import Dataset

    rows = [{"prompt": f"question {i}", "response": "x"} for i in range(10)]
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    Dataset.from_list(rows[:5]).to_parquet(str(tmp_path / "folder" / "a.parquet"))
    (tmp_path / "folder" / "b.json").write_text(json.dumps(rows[5:8]), encoding="utf-8")
    with gzip.open(tmp_path / "folder" / "deep" / "c.jsonl.gz", "wt") as handle:
        handle.write("\n".join(json.dumps(row) for row in rows[8:]) + "\n\n")
    (tmp_path / "folder" / "LICENSE").write_text("not data", encoding="utf-8")
    path = write(tmp_path / "all.jsonl", rows)
    folder = JSONL(path=str(tmp_path / "folder"), val_prompts=3)
    assert sides(folder) == sides(JSONL(path=path, val_prompts=3))


def test_files_need_no_cache_that_can_be_written_to(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    rows = [{"prompt": f"question {i}"} for i in range(4)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    train, heldout = sides(JSONL(path=str(tmp_path / "a.json"), val_prompts=1))
    assert (len(train), len(heldout)) == (3, 1)


# ---- splits


def test_a_prompt_may_be_a_list_of_messages(tmp_path):
    """As in the prompt-only and conversational data sets that TRL reads."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    named = JSONL(path=write(tmp_path / "a.jsonl", [{"messages": turns}]), val_prompts=None)
    other = JSONL(path=write(tmp_path / "b.jsonl", [{"prompt": turns}]), val_prompts=None)
    assert sides(other) == sides(named)
    assert [m.role for m in other.heldout_prompts[0].messages] == ["system", "user"]


def test_splits_are_disjoint_and_keep_a_conversation_on_one_side(tmp_path):
    rows = []
    for i in range(60):
        opening = f"Opening {i % 30}"
        longer = f"\n\nHuman: {opening}\n\nAssistant: Yes?\n\nHuman: And {i}?\n\nAssistant: No."
        shorter = f"\n\nHuman: {opening.upper()} \n\nAssistant: Yes?"
        rows += [{"chosen": text, "rejected": text} for text in (longer, shorter)]
    data = HHRLHF(path=write(tmp_path / "a.jsonl", rows), val_prompts=10)
    train, heldout = sides(data)
    assert len(heldout) == 10
    assert {m[0].content.casefold() for m in train}.isdisjoint(
        m[0].content.casefold() for m in heldout
    )
    assert len(train) + len(heldout) + sum(data.report.skipped.values()) == 120


def test_the_split_depends_on_the_seed_only_and_grows():
    prompts = [ask(f"question {i}") for i in range(50)]
    keys = [split_key(p, 0) for p in prompts]
    assert len(set(keys)) == 50
    assert keys == [split_key(p, 0) for p in prompts]
    assert keys != [split_key(p, 1) for p in prompts]


@pytest.mark.parametrize(
    ("rows", "given", "heldout"),
    [
        (200, {}, 64),
        (128, {}, 64),
        (100, {}, 50),
        (33, {}, 17),
        (1, {}, 1),
        (100, {"val_prompts": 64}, 64),
        (100, {"val_prompts": None}, 100),
    ],
)
def test_at_most_half_is_held_out_unless_a_number_is_given(tmp_path, rows, given, heldout):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(rows)])
    train, held = sides(JSONL(path=path, **given))
    assert (len(train), len(held)) == (rows - heldout, heldout)
    assert held == sides(JSONL(path=path, val_prompts=heldout))[1]


def test_limit_bounds_training_only():
    data = Sample(limit=20, val_prompts=30)
    train, heldout = sides(data)
    assert (len(train), len(heldout)) == (20, 30)
    assert data.report.skipped["over limit"] == 116


def test_the_sample_is_what_it_says():
    data = Sample()
    train, heldout = sides(data)
    assert (len(train), len(heldout)) == (136, 64)
    assert set(train).isdisjoint(heldout)
    assert data.report.skipped == {}
    texts = [m[0].content for m in train + heldout]
    assert all(10 <= len(text) <= 200 for text in texts)


# ---- loaders


def test_batches_are_repeated_for_every_training_step():
    loader = RepeatedBatches([ask(str(i)) for i in range(10)], 4, lambda n: n // 2)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [(b.step, b.steps, b.last) for b in batches] == [
        (0, 2, False),
        (1, 2, False),
        (0, 2, True),
        (1, 2, True),
    ]
    assert batches[0].prompts == batches[1].prompts != batches[2].prompts


def test_a_last_smaller_batch_is_kept_on_request():
    loader = RepeatedBatches([ask(str(i)) for i in range(10)], 4, lambda n: n, drop_last=False)
    assert len(loader) == 10
    assert [len(b.prompts) for b in loader if b.step == 0] == [4, 4, 2]


def test_every_epoch_has_an_order_of_its_own_and_repeats_it():
    prompts = [ask(str(i)) for i in range(12)]
    loader, again = RepeatedBatches(prompts, 4), RepeatedBatches(prompts, 4)
    epochs = [list(loader), list(loader)]
    assert epochs[0] != epochs[1]
    again.sampler.set_epoch(1)
    assert list(again) == epochs[1]
    assert next(iter(RepeatedBatches(prompts, 4, shuffle=False))).prompts == tuple(prompts[:4])


@pytest.mark.parametrize("stop", [1, 3, 6, 7, 11])
def test_the_loader_resumes_where_it_stopped(stop):
    prompts = [ask(str(i)) for i in range(12)]

    def make() -> RepeatedBatches:
        return RepeatedBatches(prompts, 4, lambda n: 2, seed=3)

    whole = make()
    expected = [*whole, *whole]
    first, taken = make(), []
    while len(taken) < stop:
        for batch in first:
            taken.append(batch)
            if len(taken) == stop:
                break
    second = make()
    second.load_state_dict(first.state_dict())
    rest = list(second)
    if len(taken) + len(rest) < len(expected):
        rest += list(second)
    assert taken + rest == expected


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_prompts_and_step_together(drop_last):
    prompts = [ask(str(i)) for i in range(23)]
    loaders = [
        RepeatedBatches(prompts, 3, lambda n: 2, drop_last=drop_last, rank=r, world_size=4)
        for r in range(4)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    seen = [p for loader in loaders for b in loader if b.step == 0 for p in b.prompts]
    if drop_last:
        assert len(seen) == len(set(seen)) == 12
    else:
        assert len(seen) == 24
        assert set(seen) == set(prompts)


@pytest.mark.parametrize("total", [0, 1, 3, 4, 5, 9, 64, 65, 130])
@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_evaluation_shards_evenly_without_duplicates(total, world_size, batch_size):
    prompts = [ask(str(i)) for i in range(total)]
    loaders = [EvalBatches(prompts, batch_size, r, world_size) for r in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [b for loader in loaders for b in loader]
    assert all(0 < len(b.prompts) <= max(batch_size, 2) for b in batches)
    seen = [p for b in batches for p in b.prompts]
    assert set(seen) == set(prompts)
    assert len(seen) == total or total < world_size
    shares = [[p for b in loader for p in b.prompts] for loader in loaders]
    assert in_order(shares, 1)[:total] == prompts
    assert in_order([[q for p in s for q in (p, p)] for s in shares], 2)[: 2 * total : 2] == prompts
    assert [b.last for b in loaders[0]] == [False] * (len(loaders[0]) - 1) + [True] * (total > 0)
    assert list(loaders[0]) == list(loaders[0])


# ---- with a trainer


class Recorder(LightningModule):
    """Writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list = []

    def count_prompt_tokens(self, prompt: Prompt) -> int:
        return len(prompt.messages[0].content.split())

    def training_steps(self, num_prompts: int) -> int:
        return num_prompts // 4

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        **options,
    )


def test_the_module_measures_prompts_and_sets_the_steps(tmp_path):
    module, data = Recorder(), Sample(batch_size=32, max_prompt_tokens=12)
    trainer(tmp_path, enable_checkpointing=False).fit(module, data)
    assert data.report.skipped["over max_prompt_tokens=12"] > 0
    seen = [p for b in module.seen for p in b.prompts]
    assert max(map(module.count_prompt_tokens, seen)) == 12
    assert len(module.seen) == 2 * (len(data.train_prompts) // 32) * 8
    assert [b.step for b in module.seen[:9]] == [0, 1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize("stop", [3, 8, 32, 33, 50])  # an epoch has 32 steps
def test_a_run_resumes_on_the_next_batch(tmp_path, stop):
    save = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, enable_checkpointing=False).fit(whole, Sample(batch_size=32))
    trainer(tmp_path, callbacks=[save], max_steps=stop).fit(first, Sample(batch_size=32))
    trainer(tmp_path, enable_checkpointing=False).fit(
        second, Sample(batch_size=32), ckpt_path=str(tmp_path / f"step={stop}.ckpt")
    )
    assert first.seen == whole.seen[:stop]
    assert second.seen == whole.seen[stop:]


@dataclass
class FakeTrainer:
    """A place among the ranks."""

    global_rank: int
    world_size: int
    lightning_module: None = None


def test_the_module_shards_by_the_trainers_rank():
    seen = []
    for rank in range(2):
        data = Sample(batch_size=8, eval_batch_size=8)
        data.trainer = FakeTrainer(global_rank=rank, world_size=2)
        data.setup("fit")
        assert (len(data.train_dataloader()), len(data.val_dataloader())) == (8, 4)
        seen += [p for b in data.val_dataloader() for p in b.prompts]
    assert len(seen) == len(set(seen)) == 64


# ---- bad input

GOOD = "\n\nHuman: Hi\n\nAssistant: Hello."


@pytest.mark.parametrize(
    ("cls", "lines", "expected"),
    [
        (JSONL, ['{"prompt": "a"}', "", '{"prompt": "b"', '{"prompt": "c"}'], r"a\.jsonl:3: malf"),
        (JSONL, ['{"prompt": "a"}', "[1]"], r"a\.jsonl:2: not a JSON object"),
        (JSONL, ['{"prompt": "a"}', "", '{"prompt": "  "}'], r"a\.jsonl:3: the prompt is empty"),
        (JSONL, ['{"prompt": "a"}', '{"prompt": 3}'], r"a\.jsonl:2: prompt must be text"),
        (JSONL, ['{"prompt": ["a"]}'], r"a\.jsonl:1: prompt must be text or a list of \{role, "),
        (JSONL, ['{"messages": [{"role": "bot", "content": "a"}]}'], r"a\.jsonl:1: unknown role"),
        (
            JSONL,
            ['{"question": "a", "n": 1}'],
            r"a\.jsonl:1.*found n, question.*prompt or messages",
        ),
        (JSONL, [""], r"a\.jsonl:1: the file has no rows"),
        (HHRLHF, [json.dumps({"chosen": GOOD})], r"a\.jsonl:1.*expects chosen \+ rejected"),
        (
            HHRLHF,
            [
                json.dumps({"chosen": GOOD, "rejected": GOOD}),
                json.dumps({"chosen": "\n\nHuman: Hi", "rejected": GOOD}),
            ],
            r"a\.jsonl:2: no assistant turn",
        ),
        (
            HHRLHF,
            [json.dumps({"chosen": "\n\nHuman: \n\nAssistant: Hi", "rejected": GOOD})],
            r"a\.jsonl:1: the prompt is empty",
        ),
        (BeaverTails, ['{"prompt": "a", "response": "b"}'], r"a\.jsonl:1.*unknown column layout"),
    ],
)
def test_a_bad_line_is_named(tmp_path, cls, lines, expected):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=expected):
        cls(path=str(path)).setup("fit")


def test_a_damaged_archive_is_named(tmp_path):
    data = gzip.compress(b'{"prompt": "abcdefghijklmnopqrstuvwxyz"}\n' * 3)
    (tmp_path / "a.jsonl.gz").write_bytes(data[:-12])
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:\d+: damaged file"):
        JSONL(path=str(tmp_path / "a.jsonl.gz")).setup("fit")


def test_an_archive_with_wrong_bytes_is_named(tmp_path):
    """Zlib has an error of its own for them, which is no OSError."""
    data = bytearray(gzip.compress(b'{"prompt": "abcdefghijklmnopqrstuvwxyz"}\n' * 3))
    data[10:20] = b"\xff" * 10  # right behind the header
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz:1: damaged file"):
        JSONL(path=str(tmp_path / "a.jsonl.gz")).setup("fit")


def test_half_an_emoji_is_named(tmp_path):
    """JSON may spell it, but no tokenizer takes it; a whole pair of escapes is text."""
    whole, half = '{"prompt": "nice \\ud83d\\ude00"}', '{"prompt": "nice \\uD83D"}'
    (tmp_path / "a.jsonl").write_text(f"{whole}\n{half}\n", encoding="utf-8")
    rows = read_file(tmp_path / "a.jsonl")
    assert next(rows).values["prompt"] == "nice 😀"
    with pytest.raises(InputError, match=r"a\.jsonl:2: half of a pair of surrogates"):
        next(rows)


@pytest.mark.parametrize("indent", [1, 4])
def test_one_json_document_is_no_line(tmp_path, indent):
    (tmp_path / "a.jsonl").write_text(json.dumps([{"prompt": "a"}], indent=indent))
    with pytest.raises(
        InputError, match=r"a\.jsonl:1: one JSON value over .* name the file \.json"
    ):
        list(read_file(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"prompt": "a", "n": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["digits", "brackets"],
)
def test_json_beyond_the_parsers_limits_is_named(tmp_path, line, what):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(InputError, match=rf"a\.jsonl:2: malformed JSON: {what}"):
        list(read_file(tmp_path / "a.jsonl"))


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(self, *_, **__):
        raise PermissionError(EACCES, "Permission denied", str(self))

    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        with pytest.raises(InputError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
            list(read_file(file))
    monkeypatch.setattr(Path, "is_dir", denied)  # of a folder that may not be searched
    with pytest.raises(InputError, match=r"data\.path: .*a\.jsonl cannot be read"):
        find_files(str(file))


def test_a_column_may_appear_late(tmp_path):
    """The library fixes the columns at its first block, of 10 MB."""
    early = {"prompt": "Why?", "response": "x" * 1000}
    late = {"prompt": "How?", "response": "So.", "complete": False}
    with (tmp_path / "a.jsonl").open("w", encoding="utf-8") as file:
        for row in [*([early] * 11_000), late]:
            file.write(json.dumps(row) + "\n")
    rows = list(read_file(tmp_path / "a.jsonl"))
    assert rows[-1].values == late
    assert rows[-1].place.endswith("a.jsonl:11001")


def test_rows_that_look_like_a_tool_s_traces_are_read_as_they_are(tmp_path):
    row = {"id": "1", "source": "log", "model": "m", "system_prompt": "Be kind."}
    row["messages"] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "a.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (read,) = read_file(tmp_path / "a.json")
    assert read.values["messages"] == row["messages"]


def test_bad_paths_name_the_key(tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    for path in [str(tmp_path / "nowhere.jsonl"), str(tmp_path), str(tmp_path / "notes.txt"), []]:
        with pytest.raises(InputError, match=r"^data\.path"):
            JSONL(path=path).setup("fit")
    with pytest.raises(InputError, match=r"nowhere\.jsonl; give an existing one$"):
        JSONL(path="nowhere.jsonl").setup("fit")
    with pytest.raises(InputError, match=r"out to read Anthropic/hh-rlhf from the hub$"):
        HHRLHF(path="nowhere.jsonl").setup("fit")
    with pytest.raises(InputError, match=r"data\.path: JSONL needs"):
        JSONL().setup("fit")
    with pytest.raises(InputError, match=r"data\.path: Sample reads its own"):
        Sample(path="x").setup("fit")


def test_an_unreachable_hub_gives_the_remedy(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(InputError, match=r"Anthropic/hh-rlhf.*set data\.path"):
        HHRLHF().setup("fit")


def test_odd_rows_of_the_hub_are_counted_not_fatal(monkeypatch):
    rows = [{"chosen": "\n\nHuman: Hi", "rejected": GOOD}, {"chosen": GOOD, "rejected": GOOD}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: rows)
    data = HHRLHF(val_prompts=1)
    data.setup("validate")
    assert data.report.skipped == {"malformed row": 1}


def test_too_few_prompts_name_the_key(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(5)])
    data = JSONL(path=path)
    data.setup("predict")
    assert sum(len(b.prompts) for b in data.predict_dataloader()) == 3
    with pytest.raises(InputError, match=r"data\.val_prompts"):
        JSONL(path=path, val_prompts=5).setup("fit")
    data = JSONL(path=path, val_prompts=1)
    data.setup("fit")
    with pytest.raises(InputError, match=r"data\.batch_size: 4 training prompts"):
        data.train_dataloader()
    with pytest.raises(InputError, match=r"data\.subset .* set it to null"):
        JSONL(path=path, subset="x").setup("fit")
    with pytest.raises(InputError, match=r"data\.subset .* set it to null"):
        HHRLHF(path=path, subset="harmless-base").setup("fit")
    with pytest.raises(InputError, match=r"data\.limit: 0 is too small"):
        JSONL(path=path, limit=0).setup("fit")


def resumed(taken: int, old: tuple[int, int], new: tuple[int, int]) -> PromptBatch:
    """The first batch of a run that goes on with other processes: (batch size, processes)."""

    def loader(batch_size: int, processes: int) -> RepeatedBatches:
        def steps(prompts: int) -> int:
            return -(-prompts // 4)  # micro-batches of 4

        return RepeatedBatches(
            [ask(str(i)) for i in range(32)],
            batch_size,
            steps,
            shuffle=False,
            world_size=processes,
        )

    first = loader(*old)
    batches = iter(first)
    for _ in range(taken):
        next(batches)
    second = loader(*new)
    second.load_state_dict(first.state_dict())
    return next(iter(second))


@pytest.mark.parametrize(
    ("taken", "old", "new", "start"),
    [
        (4, (8, 1), (4, 2), 16),  # two batches of two steps → two batches of one step
        (3, (8, 1), (4, 2), 8),  # one and a half: the half is trained on again
        (2, (4, 2), (8, 1), 16),
        (1, (4, 1), (8, 1), 0),  # half of the new, larger batch
        (3, (8, 1), (8, 1), 8),  # nothing changed: the second step of the second batch
    ],
)
def test_an_epoch_goes_on_with_another_number_of_processes(taken, old, new, start):
    """Rank 0 of n takes every n-th prompt: it starts with the first one not trained on."""
    batch = resumed(taken, old, new)
    assert batch.prompts[0].messages[0].content == str(start)
    assert batch.step == (1 if old == new else 0)


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    (tmp_path / "p1.jsonl").write_text('{"prompt": "another file"}\n')
    (tmp_path / "p[1].jsonl").write_text('{"prompt": "this one"}\n')
    rows = list(JSONL(path=str(tmp_path / "p[1].jsonl")).rows())
    assert [row.values["prompt"] for row in rows] == ["this one"]
