"""Stage 1: the grammar, the user's own prompts, and the file between the stages."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from t2v_energy.errors import UserError
from t2v_energy.prompts import (
    Prompt,
    Vocabulary,
    generate_prompts,
    load_prompts,
    load_vocabulary,
    read_prompts,
    write_prompts,
)

SHIPPED = Path(__file__).parents[1] / "config" / "prompts.yaml"
SEED = 20250922  # config/config.yaml
# Of the fifty texts, one a line: the same under every Python; it changes with the vocabulary only.
SHIPPED_SHA256 = "337de619514edd8dd55bcd1dde742eaa85ff6d5102eef6250f5958b5094decb5"

TINY: dict[str, Any] = {
    "kinds": {
        "animals": {"subject": ["a fox", "a hare"], "action": ["running"], "setting": ["in snow"]},
        "people": {"subject": ["a cook"], "action": ["running", "singing"], "setting": ["at home"]},
    },
    "light": ["at dawn", "at noon"],
    "camera": ["a wide shot"],
    "style": ["a cartoon"],
    "templates": ["{camera} of {subject} {action} {setting} {light}, like {style}."],
}  # animals: 2 subjects x 1 action x 2 lights; people: 1 x 2 x 2; eight in all


@pytest.fixture(scope="module")
def shipped() -> Vocabulary:
    return load_vocabulary(SHIPPED)


def words_of(prompt: Prompt) -> set[str]:
    return set(re.findall(r"[\w-]+", prompt.text.lower()))


def subject_of(prompt: Prompt, vocabulary: Vocabulary) -> str:
    subjects = [subject for kind in vocabulary.kinds.values() for subject in kind.subject]
    found = [s for s in subjects if re.search(rf"\b{re.escape(s)}\b", prompt.text, re.IGNORECASE)]
    return max(found, key=len)


# --- the grammar --------------------------------------------------------------------------------------------


def test_the_first_fifty_are_pinned(shipped: Vocabulary) -> None:
    text = "\n".join(prompt.text for prompt in generate_prompts(shipped, 50, SEED))
    assert hashlib.sha256(text.encode()).hexdigest() == SHIPPED_SHA256


def test_only_the_guaranteed_method_of_random_is_used(
    shipped: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python promises the same numbers for ever from `random()` alone, not from `shuffle` or `randrange`."""
    expected = generate_prompts(shipped, 50, SEED)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a method whose numbers may change with Python")

    for name in ("shuffle", "choice", "choices", "sample", "randrange", "randint", "getrandbits"):
        monkeypatch.setattr(random.Random, name, forbidden)
    assert generate_prompts(shipped, 50, SEED) == expected


def test_another_seed_gives_other_prompts(shipped: Vocabulary) -> None:
    first, second = (generate_prompts(shipped, 50, seed) for seed in (1, 2))
    assert not {p.text for p in first} & {p.text for p in second}
    assert {p.seed for p in first} == {1}
    assert {p.seed for p in second} == {2}


def test_the_global_random_state_is_neither_used_nor_disturbed(shipped: Vocabulary) -> None:
    random.seed(5)
    state = random.getstate()
    generate_prompts(shipped, 10, SEED)
    assert random.getstate() == state


def test_a_longer_list_begins_with_the_shorter(shipped: Vocabulary) -> None:
    assert generate_prompts(shipped, 1000, SEED)[:50] == generate_prompts(shipped, 50, SEED)


@pytest.mark.parametrize("count", [1, 50, 1000])
def test_prompts_are_unique_numbered_and_counted(shipped: Vocabulary, count: int) -> None:
    prompts = generate_prompts(shipped, count, SEED)
    assert len({p.text for p in prompts}) == count
    assert [p.id for p in prompts] == [f"p{i:03d}" for i in range(count)]
    assert all(p.words == len(p.text.split(" ")) and 10 <= p.words <= 60 for p in prompts)
    assert all(p.text[0].isupper() and p.text.endswith(".") and "{" not in p.text for p in prompts)


@pytest.mark.parametrize("seed", [SEED, 1, 2, 3])
def test_fifty_prompts_are_diverse(shipped: Vocabulary, seed: int) -> None:
    prompts = generate_prompts(shipped, 50, seed)
    assert len({subject_of(p, shipped) for p in prompts}) == 50
    kinds = Counter(
        name
        for p in prompts
        for name, kind in shipped.kinds.items()
        if subject_of(p, shipped) in kind.subject
    )
    assert len(kinds) == len(shipped.kinds)
    assert max(kinds.values()) - min(kinds.values()) <= 1
    for entries in (shipped.light, shipped.camera, shipped.style):
        assert all(any(entry in p.text.lower() for p in prompts) for entry in entries)
    overlaps = [len(a & b) / len(a | b) for a, b in itertools.combinations([words_of(p) for p in prompts], 2)]
    assert max(overlaps) < 0.6
    assert sum(overlaps) / len(overlaps) < 0.2


def test_no_subject_comes_again_before_all_have_come(shipped: Vocabulary) -> None:
    prompts = generate_prompts(shipped, 2 * shipped.subjects, SEED)
    subjects = [subject_of(p, shipped) for p in prompts]
    assert len(set(subjects[: shipped.subjects])) == shipped.subjects
    assert set(Counter(subjects).values()) == {2}


def test_actions_and_settings_are_those_of_the_subjects_kind(shipped: Vocabulary) -> None:
    for prompt in generate_prompts(shipped, 200, SEED):
        subject = subject_of(prompt, shipped)
        (kind,) = (kind for kind in shipped.kinds.values() if subject in kind.subject)
        text = prompt.text.lower()
        assert any(action.lower() in text for action in kind.action), prompt.text
        assert any(setting.lower() in text for setting in kind.setting), prompt.text


def test_every_combination_is_reached_and_not_one_more() -> None:
    vocabulary = Vocabulary.model_validate(TINY)
    assert vocabulary.available == 8
    expected = {
        f"A wide shot of {subject} {action} {setting} {light}, like a cartoon."
        for subject, actions, setting in (
            ("a fox", ["running"], "in snow"),
            ("a hare", ["running"], "in snow"),
            ("a cook", ["running", "singing"], "at home"),
        )
        for action in actions
        for light in ("at dawn", "at noon")
    }
    assert {p.text for p in generate_prompts(vocabulary, 8, 3)} == expected
    with pytest.raises(UserError, match=r"9 prompts asked for, but .* only 8 different") as error:
        generate_prompts(vocabulary, 9, 3)
    assert "at most 8" in error.value.remedy


def test_combinations_that_read_the_same_count_once() -> None:
    content = copy.deepcopy(TINY)
    del content["kinds"]["people"]
    content["kinds"]["animals"] = {
        "subject": ["a fox"],
        "action": ["running", "running home"],
        "setting": ["home at night", "at night"],
    }
    vocabulary = Vocabulary.model_validate(content)
    assert vocabulary.available == 8  # 'running' + 'home at night' = 'running home' + 'at night'
    assert len(generate_prompts(vocabulary, 6, 1)) == 6
    with pytest.raises(UserError, match="only 6 different"):
        generate_prompts(vocabulary, 7, 1)


def test_sentences_begin_with_a_capital_and_articles_elsewhere_do_not() -> None:
    content = TINY | {"templates": ["{subject} {action} {setting}. {camera} {light}! {style}."]}
    (prompt, *_) = generate_prompts(Vocabulary.model_validate(content), 1, 1)
    assert re.fullmatch(r"A \w+ \w+ (in snow|at home)\. A wide shot at \w+! A cartoon\.", prompt.text)


@pytest.mark.parametrize(("count", "seed", "where"), [(0, 1, "count"), (-3, 1, "count"), (1, -1, "seed")])
def test_count_starts_at_one_and_seed_at_zero(count: int, seed: int, where: str) -> None:
    with pytest.raises(UserError) as error:
        generate_prompts(Vocabulary.model_validate(TINY), count, seed)
    assert where in error.value.where
    assert error.value.remedy


entries = st.lists(st.sampled_from(["a", "b", "c", "a b", "b c"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=60, deadline=None)
@given(entries, entries, entries, entries, st.integers(0, 2**40))
def test_property_unique_spread_and_stable(
    subject: list[str], action: list[str], setting: list[str], light: list[str], seed: int
) -> None:
    vocabulary = Vocabulary.model_validate(
        TINY
        | {
            "kinds": {"any": {"subject": subject, "action": action, "setting": setting}},
            "light": light,
            "templates": ["{subject}, {action}, {setting}, {light}, {camera}, {style}"],
        }
    )
    prompts = generate_prompts(vocabulary, vocabulary.available, seed)
    assert len({p.text for p in prompts}) == vocabulary.available
    for turn in range(0, len(prompts), len(subject)):  # each turn holds every subject once
        turn_subjects = [p.text.split(",")[0].lower() for p in prompts[turn : turn + len(subject)]]
        assert sorted(turn_subjects) == sorted(subject)
    half = len(prompts) // 2 + 1
    assert generate_prompts(vocabulary, half, seed) == prompts[:half]


# --- the vocabulary file ------------------------------------------------------------------------------------


def vocabulary_file(folder: Path, change: Any = None) -> Path:
    content = copy.deepcopy(TINY)
    if change:
        change(content)
    path = folder / "words.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_a_vocabulary_file_is_read(tmp_path: Path) -> None:
    assert load_vocabulary(vocabulary_file(tmp_path)) == Vocabulary.model_validate(TINY)


def set_at(*keys: Any, value: Any) -> Any:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def remove(*keys: Any) -> Any:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


TEMPLATE = TINY["templates"][0]


@pytest.mark.parametrize(
    ("change", "key", "message"),
    [
        (
            set_at("lights", value=["at dusk"]),
            "lights",
            r"unknown key 'lights' \(value \['at dusk'\]\)\n.*mean 'light'",
        ),
        (
            set_at("sound", value=1),
            "sound",
            r"unknown key 'sound' \(value 1\)\n.*known keys are kinds, light",
        ),
        (
            set_at("kinds", "people", "subjects", value=["x"]),
            "kinds.people.subjects",
            r"unknown key 'subjects'.*\n.*mean 'subject'",
        ),
        (remove("camera"), "camera", r"the key 'camera' is missing\n.*needed are kinds, light"),
        (remove("kinds"), "kinds", r"the key 'kinds' is missing\n.*needed are kinds, light"),
        (
            remove("kinds", "people", "action"),
            "kinds.people.action",
            r"the key 'action' is missing\n.*subject, action, setting",
        ),
        (set_at("style", value=[]), "style", r"\[\] is empty\n.*at least one"),
        (set_at("kinds", value={}), "kinds", r"\{\} is empty"),
        (
            set_at("kinds", "people", value=3),
            "kinds.people",
            r"3 is not a set of keys\n.*subject, action, setting",
        ),
        (set_at("kinds", value=["a fox"]), "kinds", r"\['a fox'\] is not a set of kinds\n.*name each kind"),
        (set_at("light", value="at dawn"), "light", r"'at dawn': input should be a valid list"),
        (set_at("light", 1, value=True), "light.1", r"True: input should be a valid string\n.*in quotes"),
        (set_at("light", 1, value=""), "light.1", r"'': needs one line of words"),
        (set_at("light", 1, value=" at noon"), "light.1", r"' at noon': needs one line of words"),
        (set_at("light", 1, value="at\nnoon"), "light.1", r"needs one line of words"),
        (set_at("light", 1, value="cafe\u0301"), "light.1", r"in Unicode NFC"),
        (set_at("light", 1, value="a\x1bb"), "light.1", r"unprintable character U\+001B"),
        (set_at("light", 1, value="dark. Rain"), "light.1", r"'dark. Rain': contains '\.'"),
        (set_at("light", 1, value="{subject}"), "light.1", r"contains '\{'"),
        (set_at("light", 1, value="so " * 40 + "dark"), "light.1", r"has 41 words; at most 40"),
        (set_at("light", 1, value="At dawn"), "light", r"holds 'At dawn' twice, as entries 0 and 1"),
        (
            set_at("kinds", "people", "subject", value=["a fox"]),
            "the whole file",
            r"the subject 'a fox' is of two kinds, animals and people",
        ),
        (set_at("templates", 0, value=TEMPLATE + "{light}"), "templates.0", r"\{style\} exactly once"),
        (set_at("templates", 0, value="{subject} {action}"), "templates.0", r"\{setting\}, .* exactly once"),
        (set_at("templates", 0, value=TEMPLATE + "{"), "templates.0", r"unbalanced braces"),
        (set_at("templates", 0, value=TEMPLATE + "{{x}}"), "templates.0", r"exactly once"),
        (set_at("templates", 0, value=TEMPLATE.replace("t}", "t!r}")), "templates.0", r"exactly once"),
        (set_at("templates", 0, value=TEMPLATE.replace("t}", "t:>9}")), "templates.0", r"exactly once"),
        (set_at("templates", 0, value=TEMPLATE + " so" * 40), "templates.0", r"words; at most 40"),
        (set_at("templates", 0, value=" " + TEMPLATE), "templates.0", r"single spaces"),
    ],
)
def test_a_wrong_vocabulary_is_named(tmp_path: Path, change: Any, key: str, message: str) -> None:
    path = vocabulary_file(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        load_vocabulary(path)
    assert error.value.where == f"{path}: {key}"
    assert error.value.remedy


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path, lambda content: content.update(ligth=content.pop("light")))
    with pytest.raises(UserError, match=r"unknown key 'ligth' .*and 1 more.*\n.*did you mean 'light'"):
        load_vocabulary(path)


def test_further_problems_are_counted(tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path, set_at("light", value=[1, 2, 3]))
    with pytest.raises(UserError, match=r"light\.0: 1: .*and 2 more"):
        load_vocabulary(path)


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (b"light: [at dawn\n", ", line 2", "not readable as YAML"),
        (b"light: [at dawn]\nlight: [at noon]\n", ", line 2, column 1", "the key 'light' is given twice"),
        (b"light: 2025-13-45\n", "", "not readable as YAML: month"),
        (b"light: \x00\n", "", "not readable as YAML"),
        (b"", ": the whole file", "None is not a set of keys"),
        (
            b"light:\n- caf\xe9\n",
            ", line 2",
            r"byte 6 of the line \(0xE9, byte 13 of the file\) is not UTF-8",
        ),
    ],
)
def test_a_file_that_is_no_yaml_is_named(tmp_path: Path, content: bytes, where: str, message: str) -> None:
    path = tmp_path / "words.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_vocabulary(path)
    assert error.value.where.startswith(f"{path}{where}")
    assert error.value.remedy


@pytest.mark.parametrize("reader", [load_vocabulary, read_prompts, load_prompts])
def test_a_missing_file_is_named(tmp_path: Path, reader: Any) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read: No such file"):
        reader(tmp_path / "nowhere.txt")


# --- the user's own prompts ---------------------------------------------------------------------------------


def own(folder: Path, content: str | bytes, name: str = "own.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_text_file(tmp_path: Path) -> None:
    path = own(tmp_path, "\ufeff# mine\r\n\r\n  A fox\truns.  \r\n  # later\nUne fée # dort\rlast")
    assert read_prompts(path) == [
        Prompt("p000", "A fox runs.", 3, 0),
        Prompt("p001", "Une fée # dort", 4, 0),
        Prompt("p002", "last", 1, 0),
    ]


def test_jsonl_file(tmp_path: Path) -> None:
    path = own(
        tmp_path, '{"text": "A fox runs"}\n\n{"id": "my-7", "text": "# a\\nhare"}\n{"text": "x"}', "own.jsonl"
    )
    assert read_prompts(path) == [
        Prompt("p000", "A fox runs", 3, 0),
        Prompt("my-7", "# a hare", 3, 0),
        Prompt("p002", "x", 1, 0),
    ]


def test_a_line_separator_inside_a_text_is_white_space_and_no_new_line(tmp_path: Path) -> None:
    assert [p.text for p in read_prompts(own(tmp_path, "one\u2028two\x0cthree\n"))] == ["one two three"]


def test_the_longest_prompt_is_accepted_and_one_word_more_is_not(tmp_path: Path) -> None:
    assert read_prompts(own(tmp_path, "so " * 400))[0].words == 400
    with pytest.raises(
        UserError, match=r"own\.txt, line 2: .*has 401 words; a prompt has 1 to 400\n.*shorten"
    ):
        read_prompts(own(tmp_path, "# long\n" + "so " * 401))


LONG_ID = "x" * 41


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", "", r"own\.txt: holds no prompt"),
        ("own.txt", "# nothing\n\n", r"own\.txt: holds no prompt"),
        ("own.txt", "a fox\n\nb\n a  fox \n", r"lines 1 and 4 hold the same prompt, 'a fox'\n.*remove"),
        ("own.txt", "caf\u00e9\ncafe\u0301\n", r"lines 1 and 2 hold the same prompt"),
        ("own.txt", "ok\na\x1b[0m fox\n", r"line 2: .*unprintable character U\+001B\n.*remove"),
        (
            "own.txt",
            b"ok\r\nx\rca\xe9\n",
            r"line 3: byte 3 of the line \(0xE9, byte 9 of .*\n.*iconv.* own\.txt",
        ),
        ("own.txt", "ok\n".encode("utf-16"), r"line 1: byte 1 of the line \(0xFF"),
        ("own.md", "a fox", r"ends in '\.md'\n.*\.txt .*\.jsonl"),
        ("own.jsonl", "\n", r"own\.jsonl: holds no prompt"),
        ("own.jsonl", '{"text": "a"}\n{"text": "b"\n', r"line 2: not JSON: .* at column 13\n.*one object"),
        ("own.jsonl", "# a comment\n", r"line 1: not JSON"),
        ("own.jsonl", "[" * 100_000, r"line 1: not JSON"),
        ("own.jsonl", '{"text": ' + "1" * 5000 + "}", r"line 1: not JSON"),
        ("own.jsonl", '["a fox"]', r'line 1: \["a fox"\] is not an object'),
        ("own.jsonl", '{"id": "a"}', r"line 1: the field 'text' is missing\n.*text, id \(optional\)"),
        ("own.jsonl", '{"text": 3}', r"line 1, field 'text': 3 is not a text"),
        ("own.jsonl", '{"text": null}', r"line 1, field 'text': None is not a text"),
        ("own.jsonl", '{"text": "a", "id": 3}', r"line 1, field 'id': 3 is not a text"),
        ("own.jsonl", '{"text": "a", "seeds": 3}', r"line 1: unknown field 'seeds' \(value 3\)\n.*remove it"),
        ("own.jsonl", '{"text": "a", "text": "b"}', r"line 1: the field 'text' is given twice"),
        ("own.jsonl", '{"text": " \\n "}', r"line 1, field 'text': '' has 0 words; a prompt has 1 to 400"),
        ("own.jsonl", '{"text": "' + "so " * 401 + '"}', r"line 1, field 'text': .* has 401 words"),
        ("own.jsonl", '{"text": "a \\ud800"}', r"line 1, field 'text': .*U\+D800"),
        ("own.jsonl", '{"text": "a"}\n{"text": " a"}', r"lines 1 and 2 hold the same prompt"),
        ("own.jsonl", '{"text": "a", "id": "P1"}', r"line 1, field 'id': 'P1' is not a usable id"),
        ("own.jsonl", '{"text": "a", "id": ""}', r"line 1, field 'id': '' is not a usable id"),
        ("own.jsonl", '{"text": "a", "id": "a/b"}', r"'a/b' is not a usable id"),
        ("own.jsonl", '{"text": "a", "id": "a\\n"}', r"'a\\n' is not a usable id"),
        ("own.jsonl", f'{{"text": "a", "id": "{LONG_ID}"}}', r"use 1 to 40"),
        (
            "own.jsonl",
            '{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}',
            r"lines 1 and 2 have the same id, 'x'",
        ),
        (
            "own.jsonl",
            '{"text": "a", "id": "p001"}\n{"text": "b"}',
            r"lines 1 and 2 .*id, 'p001'\n.*by its place",
        ),
        ("own.jsonl", b'{"text": "\xff"}', r"line 1: byte 11 of the line \(0xFF"),
    ],
)
def test_wrong_prompts_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = own(tmp_path, content, name)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(path)
    assert error.value.where.startswith(str(path))
    assert error.value.remedy


# --- the file between the stages ----------------------------------------------------------------------------


def test_the_file_holds_the_contracts_fields_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "h200.jsonl"
    write_prompts([Prompt("p000", "Une fée dort", 3, 7)], path)
    assert path.read_bytes() == '{"id": "p000", "text": "Une fée dort", "words": 3, "seed": 7}\n'.encode()


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(
    shipped: Vocabulary, tmp_path: Path
) -> None:
    prompts = generate_prompts(shipped, 50, SEED)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_prompts(prompts, first)
    write_prompts(prompts[:3], second)
    write_prompts(prompts, second)
    assert first.read_bytes() == second.read_bytes()
    assert load_prompts(second) == prompts
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    write_prompts([Prompt("p000", "old", 1, 0)], path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t2v_energy.prompts.os.fsync", full)
    with pytest.raises(
        UserError, match=r"a\.jsonl: cannot be written: No space left on device\n.*free space"
    ):
        write_prompts([Prompt("p000", "new", 1, 0)], path)
    assert load_prompts(path)[0].text == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": 4}, r"line 1, field 'words': 4 given, but the text has 2 words"),
        ({"words": "2"}, r"field 'words': '2' is not a whole number"),
        ({"words": True}, r"field 'words': True is not a whole number"),
        ({"seed": -1}, r"field 'seed': -1 is negative"),
        ({"id": "P"}, r"field 'id': 'P' is not a usable id"),
        ({"text": "a  fox"}, r"field 'text': 'a  fox' has white space to collapse"),
        ({"text": "", "words": 0}, r"field 'text': '' has 0 words"),
        ({"extra": 1}, r"unknown field 'extra'"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"id": "p000", "text": "a fox", "words": 2, "seed": 0} | change
    path = own(tmp_path, json.dumps(row), "a.jsonl")
    with pytest.raises(UserError, match=message) as error:
        load_prompts(path)
    assert error.value.where.startswith(f"{path}, line 1")
    assert error.value.remedy


@pytest.mark.parametrize("field", ["id", "text", "words", "seed"])
def test_every_field_is_needed(tmp_path: Path, field: str) -> None:
    row = {"id": "p000", "text": "a fox", "words": 2, "seed": 0}
    del row[field]
    with pytest.raises(UserError, match=f"the field '{field}' is missing"):
        load_prompts(own(tmp_path, json.dumps(row), "a.jsonl"))


def test_repeated_and_absent_prompts_are_named(tmp_path: Path) -> None:
    row = json.dumps({"id": "p000", "text": "a fox", "words": 2, "seed": 0})
    with pytest.raises(UserError, match=r"lines 1 and 3 hold the same prompt"):
        load_prompts(own(tmp_path, f"{row}\n\n{row}\n", "a.jsonl"))
    with pytest.raises(UserError, match=r"holds no prompt"):
        load_prompts(own(tmp_path, "", "a.jsonl"))


printable = st.characters(exclude_categories=("Cc", "Cs"))


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(printable, min_size=1, max_size=30), min_size=1, max_size=5))
def test_property_any_text_survives_the_way_through(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = [" ".join(unicodedata.normalize("NFC", text).split()) for text in texts]
    expected = list(dict.fromkeys(text for text in expected if text))
    if not expected:
        expected = ["only white space was drawn"]
    folder = tmp_path_factory.mktemp("way")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in expected)
    prompts = read_prompts(own(folder, lines, "own.jsonl"))
    assert [p.text for p in prompts] == expected
    write_prompts(prompts, folder / "out.jsonl")
    assert load_prompts(folder / "out.jsonl") == prompts
