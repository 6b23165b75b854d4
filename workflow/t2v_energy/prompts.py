"""Stage 1: the texts that videos are generated from.

Prompts come from a seeded grammar (`generate_prompts` over `config/prompts.yaml`) or from a file of the
user's own (`read_prompts`).  Either way they pass through one JSONL file, `write_prompts` → `load_prompts`.

Wherever text enters, it is brought to Unicode NFC, runs of white space become one space, and `words` is the
number of words between spaces, 1 to 400 (Wan's encoder reads 512 tokens).
"""

from __future__ import annotations

import difflib
import json
import os
import random
import re
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from t2v_energy.errors import UserError

MIN_WORDS, MAX_WORDS = 1, 400
MAX_ENTRY_WORDS = 40  # six entries and a template at most: a generated prompt stays below MAX_WORDS
MAX_ID_CHARACTERS = 40  # ids become part of file names
SLOTS = ("subject", "action", "setting", "light", "camera", "style")
_ID = re.compile(r"[a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to generate a video from.

    id: lower-case letters, digits and hyphens, unique in its file.
    text: one line, NFC, single spaces.
    words: words in `text`, separated by spaces (not tokens).
    seed: the seed of the grammar that made it, 0 or more; 0 also for a prompt of the user's own.
    """

    id: str
    text: str
    words: int
    seed: int


# --- vocabulary ---------------------------------------------------------------------------------------------


def _entry(text: str) -> str:
    if _line(text) != text or not text:
        raise ValueError("needs one line of words with single spaces, in Unicode NFC")
    if found := re.search(r"[.!?{}]", text):
        raise ValueError(f"contains {found.group()!r}, which templates alone may hold")
    return _short(text)


def _template(text: str) -> str:
    if _line(text) != text or not text:
        raise ValueError("needs one line of words with single spaces, in Unicode NFC")
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"has unbalanced braces ({error})") from None
    fields = [
        field for _, field, spec, conversion in parts if field is not None and not spec and not conversion
    ]
    if sorted(fields) != sorted(SLOTS) or re.search(r"\{\{|\}\}", text):
        raise ValueError("needs each of " + ", ".join(f"{{{slot}}}" for slot in SLOTS) + " exactly once")
    return _short(text)


def _short(text: str) -> str:
    if (words := len(text.split())) > MAX_ENTRY_WORDS:
        raise ValueError(f"has {words} words; at most {MAX_ENTRY_WORDS} are allowed")
    return text


def _distinct(entries: list[str]) -> list[str]:
    first: dict[str, int] = {}
    for position, entry in enumerate(entries):
        if (earlier := first.setdefault(entry.casefold(), position)) != position:
            raise ValueError(f"holds {entry!r} twice, as entries {earlier} and {position}")
    return entries


Entries = Annotated[
    list[Annotated[str, AfterValidator(_entry)]], Field(min_length=1), AfterValidator(_distinct)
]
Templates = Annotated[
    list[Annotated[str, AfterValidator(_template)]], Field(min_length=1), AfterValidator(_distinct)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Kind(_Strict):
    """Subjects of one kind, and the actions and settings that suit every one of them."""

    subject: Entries
    action: Entries
    setting: Entries


class Vocabulary(_Strict):
    """The words of the grammar; `config/prompts.yaml` explains each list."""

    kinds: Annotated[dict[str, Kind], Field(min_length=1)]
    light: Entries
    camera: Entries
    style: Entries
    templates: Templates

    @model_validator(mode="after")
    def _subjects_of_one_kind(self) -> Vocabulary:
        home: dict[str, str] = {}
        for name, kind in self.kinds.items():
            for subject in kind.subject:
                if (other := home.setdefault(subject.casefold(), name)) != name:
                    raise ValueError(f"the subject {subject!r} is of two kinds, {other} and {name}")
        return self

    @property
    def subjects(self) -> int:
        """Number of subjects of all kinds."""
        return sum(len(kind.subject) for kind in self.kinds.values())

    @property
    def available(self) -> int:
        """Number of combinations, the most prompts that can be made."""
        return sum(len(kind.subject) * _product(self.sizes(kind)) for kind in self.kinds.values())

    def sizes(self, kind: Kind) -> list[int]:
        """Number of actions, settings, lights, cameras, styles and templates for a subject of `kind`."""
        lists = (kind.action, kind.setting, self.light, self.camera, self.style, self.templates)
        return [len(entries) for entries in lists]


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as usual, but a key given twice is an error rather than a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a vocabulary file.

    Raises UserError, naming file, key, value and remedy, if the file is missing, is no UTF-8 or YAML, has an
    unknown, repeated or missing key, or an entry or template that the grammar cannot use.
    """
    path = Path(path)
    text = "\n".join(line for _, line in _lines(path))
    try:
        content = _UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(
            f"not readable as YAML: {problem}",
            where=f"{path}{line}",
            remedy="correct the line; text with a colon or a brace needs quotes",
        ) from None
    try:
        return Vocabulary.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from None


def _explain(error: ValidationError, path: Path) -> UserError:
    """What pydantic found, for a reader of the YAML file; a misspelt key before the one it leaves missing."""
    problems = error.errors(include_url=False)
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    location = problem["loc"]
    key = ".".join(str(part) for part in location) or "the whole file"
    value = repr(problem["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    in_a_kind = len(location) > 1 and location[0] == "kinds"
    expected = tuple((Kind if in_a_kind else Vocabulary).model_fields)
    kind, name = problem["type"], str(location[-1]) if location else ""
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(name, expected, n=1)
        what = f"unknown key {name!r} (value {value})"
        remedy = (
            f"did you mean {close[0]!r}?" if close else f"remove it; known keys are {', '.join(expected)}"
        )
    elif kind == "missing":
        what, remedy = f"the key {name!r} is missing", f"add it; needed are {', '.join(expected)}"
    elif kind == "too_short":
        what, remedy = f"{value} is empty", "give at least one entry"
    elif kind == "model_type":
        what, remedy = f"{value} is not a set of keys", f"give it the keys {', '.join(expected)}"
    elif kind == "dict_type":
        what, remedy = f"{value} is not a set of kinds", "name each kind and give it subject, action, setting"
    elif kind == "value_error":
        what = f"{value}: {problem['ctx']['error']}" if location else str(problem["ctx"]["error"])
        remedy = "correct or remove it"
    else:
        what = f"{value}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
        remedy = "see the comments at the top of config/prompts.yaml; put a text that YAML misreads in quotes"
    if len(problems) > 1:
        what += f" (and {len(problems) - 1} more of the file's values are wrong)"
    return UserError(what, where=f"{path}: {key}", remedy=remedy)


# --- the grammar --------------------------------------------------------------------------------------------


class _Shuffler:
    """Shuffles and draws with `random()` alone, the one method that Python keeps the same for ever."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def shuffled(self, size: int) -> list[int]:
        """The numbers 0 … size - 1 in a random order."""
        order = list(range(size))
        for last in range(size - 1, 0, -1):
            other = int(self._random() * (last + 1))
            order[last], order[other] = order[other], order[last]
        return order

    def deck(self, size: int) -> Iterator[int]:
        """Numbers below `size` for ever; each comes once before any comes again."""
        while True:
            yield from self.shuffled(size)


def generate_prompts(vocabulary: Vocabulary, count: int, seed: int) -> list[Prompt]:
    """Make `count` prompts that differ from each other, the same for the same vocabulary and seed.

    Kinds take turns; no subject comes twice before every subject has come (unless its combinations are used
    up), and the other lists are dealt like cards, so that all of an author's words are used evenly.  A longer
    list begins with the shorter one of the same seed.

    Raises UserError if `count` is below 1 or more than the vocabulary allows, or if `seed` is negative.
    """
    if count < 1:
        raise UserError(f"{count} prompts asked for", where="prompts.count", remedy="ask for at least 1")
    if seed < 0:
        raise UserError(
            f"the seed {seed} is negative",
            where="prompts.seed",
            remedy="choose a whole number from 0 on",
        )
    if count > vocabulary.available:
        raise _too_many(count, vocabulary.available)

    shuffler = _Shuffler(seed)
    shared = [
        shuffler.deck(len(entries))
        for entries in (vocabulary.light, vocabulary.camera, vocabulary.style, vocabulary.templates)
    ]
    decks: dict[str, list[Iterator[int]]] = {
        name: [shuffler.deck(len(kind.action)), shuffler.deck(len(kind.setting)), *shared]
        for name, kind in vocabulary.kinds.items()
    }
    turns = _subjects_in_turn(vocabulary, shuffler)
    texts: dict[str, None] = {}
    while len(texts) < count:
        exhausted = set()
        for turn in turns[: count - len(texts)]:
            name, subject = turn
            kind = vocabulary.kinds[name]
            sizes = vocabulary.sizes(kind)
            first = _rank([next(deck) for deck in decks[name]], sizes)
            combinations = _product(sizes)
            for step in range(combinations):
                text = _sentence(vocabulary, kind, subject, _unrank((first + step) % combinations, sizes))
                if text not in texts:
                    texts[text] = None
                    break
            else:
                exhausted.add(turn)
        turns = [turn for turn in turns if turn not in exhausted]
        if not turns and len(texts) < count:
            raise _too_many(count, len(texts))
    return [
        Prompt(id=f"p{number:03d}", text=text, words=len(text.split()), seed=seed)
        for number, text in enumerate(texts)
    ]


def _too_many(count: int, available: int) -> UserError:
    return UserError(
        f"{count} prompts asked for, but the vocabulary makes only {available} different ones",
        where="prompts.count",
        remedy=f"ask for at most {available}, or add words to config/prompts.yaml",
    )


def _subjects_in_turn(vocabulary: Vocabulary, shuffler: _Shuffler) -> list[tuple[str, str]]:
    """Every (kind, subject) once, the kinds taking turns."""
    names = list(vocabulary.kinds)
    hands = []
    for index in shuffler.shuffled(len(names)):
        subjects = vocabulary.kinds[names[index]].subject
        hands.append([(names[index], subjects[i]) for i in shuffler.shuffled(len(subjects))])
    longest = max(len(hand) for hand in hands)
    return [hand[place] for place in range(longest) for hand in hands if place < len(hand)]


def _rank(digits: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for digit, size in zip(digits, sizes, strict=True):
        number = number * size + digit
    return number


def _unrank(number: int, sizes: Sequence[int]) -> list[int]:
    digits = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits[::-1]


def _sentence(vocabulary: Vocabulary, kind: Kind, subject: str, choice: Sequence[int]) -> str:
    action, setting, light, camera, style, template = choice
    text = vocabulary.templates[template].format(
        subject=subject,
        action=kind.action[action],
        setting=kind.setting[setting],
        light=vocabulary.light[light],
        camera=vocabulary.camera[camera],
        style=vocabulary.style[style],
    )
    return re.sub(r"(?:^|(?<=[.!?] ))\w", lambda start: start.group().upper(), text)


# --- the user's own prompts ---------------------------------------------------------------------------------


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read the user's own prompts, in the order of the file.

    `.txt`: one prompt a line.  Blank lines, and lines whose first character is `#`, are skipped.
    `.jsonl`: one object a line, `{"text": …}` with an optional `"id"`; blank lines are skipped.
    A prompt without an id is named by its place among the prompts, `p000` first.

    Raises UserError, naming file, line, value and remedy, if the file is missing, has another suffix, is not
    UTF-8, holds no prompt, or if a prompt is empty, repeated (also when only white space or the Unicode form
    differs), shorter than 1 or longer than 400 words, or has an unusable id.
    """
    path = Path(path)
    rows: list[tuple[int, str, str]] = []
    if path.suffix.lower() == ".txt":
        for number, line in _lines(path):
            if line.strip() and not line.lstrip().startswith("#"):
                rows.append((number, f"p{len(rows):03d}", _checked_text(line, f"{path}, line {number}")))
    elif path.suffix.lower() == ".jsonl":
        for number, item in _objects(path, required={"text": str}, optional={"id": str}):
            where = f"{path}, line {number}"
            rows.append(
                (
                    number,
                    _checked_id(item.get("id", f"p{len(rows):03d}"), where),
                    _checked_text(item["text"], f"{where}, field 'text'"),
                )
            )
    else:
        raise UserError(
            f"prompts cannot be read from a file that ends in {path.suffix!r}",
            where=str(path),
            remedy='name it .txt (one prompt a line) or .jsonl (one {"text": …} a line)',
        )
    _check_set(path, rows)
    return [Prompt(id=name, text=text, words=len(text.split()), seed=0) for _, name, text in rows]


def _line(text: str) -> str:
    """`text` in NFC with white space collapsed.

    Raises ValueError on a control character or half a surrogate pair.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise ValueError(f"contains the unprintable character U+{ord(character):04X}")
    return text


def _checked_text(text: str, where: str) -> str:
    try:
        text = _line(text)
    except ValueError as error:
        raise UserError(f"{text[:60]!r} {error}", where=where, remedy="remove the character") from None
    words = len(text.split())
    if not MIN_WORDS <= words <= MAX_WORDS:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(
            f"{shown!r} has {words} words; a prompt has {MIN_WORDS} to {MAX_WORDS}",
            where=where,
            remedy="shorten it" if words else "write a prompt or remove the line",
        )
    return text


def _checked_id(name: str, where: str) -> str:
    if not _ID.fullmatch(name) or len(name) > MAX_ID_CHARACTERS:
        raise UserError(
            f"{name!r} is not a usable id",
            where=f"{where}, field 'id'",
            remedy=f"use 1 to {MAX_ID_CHARACTERS} of a to z, 0 to 9 and '-', or leave the id out",
        )
    return name


def _check_set(path: Path, rows: Sequence[tuple[int, str, str]]) -> None:
    """Raise UserError if there is no row, or if two rows (line, id, text) share an id or a text."""
    if not rows:
        raise UserError("holds no prompt", where=str(path), remedy="write at least one")
    ids: dict[str, int] = {}
    texts: dict[str, int] = {}
    for number, name, text in rows:
        if (first := texts.setdefault(text, number)) != number:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise UserError(
                f"lines {first} and {number} hold the same prompt, {shown!r}",
                where=str(path),
                remedy="remove one of them",
            )
        if (first := ids.setdefault(name, number)) != number:
            raise UserError(
                f"lines {first} and {number} have the same id, {name!r}",
                where=str(path),
                remedy="give each its own; a line without an id is named by its place, p000 first",
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a UTF-8 file with its number, from 1; a byte order mark and any line ending will do."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="check the path and its permissions",
        ) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line = len(re.findall(rb"\r\n|\r|\n", before)) + 1
        column = len(re.split(rb"\r\n|\r|\n", before)[-1]) + 1
        raise UserError(
            f"byte {column} of the line (0x{content[error.start]:02X}, byte {error.start + 1} of the file) "
            "is not UTF-8",
            where=f"{path}, line {line}",
            remedy=f"save the file as UTF-8, for example: iconv -f LATIN1 -t UTF-8 {path.name}",
        ) from None
    yield from enumerate(re.split(r"\r\n|\r|\n", text.removeprefix("\ufeff")), start=1)


class _RepeatedKey(ValueError):
    """An object names one field twice."""


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(key)
        result[key] = value
    return result


def _objects(
    path: Path, required: dict[str, type], optional: dict[str, type]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each object of a JSONL file with its line, all fields known, present and of their type."""
    fields = required | optional
    known = ", ".join([*required, *(f"{name} (optional)" for name in optional)])
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line, object_pairs_hook=_unique_pairs)
        except _RepeatedKey as error:
            raise UserError(
                f"the field {error.args[0]!r} is given twice", where=where, remedy="remove one of them"
            ) from None
        except (ValueError, RecursionError) as error:
            column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(
                f"not JSON: {getattr(error, 'msg', error)}{column}",
                where=where,
                remedy='write one object a line, such as {"text": "a fox runs"}',
            ) from None
        if not isinstance(item, dict):
            raise UserError(
                f"{line.strip()[:60]} is not an object", where=where, remedy='write {"text": …} on each line'
            )
        for name, value in item.items():
            if name not in fields:
                raise UserError(
                    f"unknown field {name!r} (value {value!r})",
                    where=where,
                    remedy=f"remove it; the fields of a line are {known}",
                )
            if type(value) is not fields[name]:
                kind = {str: "a text", int: "a whole number"}[fields[name]]
                raise UserError(
                    f"{value!r} is not {kind}", where=f"{where}, field {name!r}", remedy=f"give {kind}"
                )
        for name in required:
            if name not in item:
                raise UserError(
                    f"the field {name!r} is missing", where=where, remedy=f"add it; the fields are {known}"
                )
        yield number, item


# --- the file between the stages ----------------------------------------------------------------------------


def write_prompts(prompts: Sequence[Prompt], path: str | os.PathLike[str]) -> None:
    """Write one prompt a line as JSON with `id, text, words, seed`, in UTF-8; the same input, the same bytes.

    The file appears whole or not at all: it is written beside `path` and renamed.  Missing folders are made.
    Raises UserError if it cannot be written.
    """
    path = Path(path)
    content = "".join(json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(content.encode("utf-8"))
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="check the folder's permissions and the free space",
        ) from None


def load_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a file that `write_prompts` wrote.

    Raises UserError, naming file, line, field and remedy, if it is not one: see `read_prompts`; besides,
    every field is required, `words` must be the number of words of `text`, and `seed` 0 or more.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    rows: list[tuple[int, str, str]] = []
    for number, item in _objects(path, {"id": str, "text": str, "words": int, "seed": int}, {}):
        where = f"{path}, line {number}"
        prompt = Prompt(**item)
        _checked_id(prompt.id, where)
        if prompt.text != _checked_text(prompt.text, f"{where}, field 'text'"):
            raise UserError(
                f"{prompt.text[:60]!r} has white space to collapse or is not in Unicode NFC",
                where=f"{where}, field 'text'",
                remedy="let stage 1 write this file; read_prompts takes texts of any form",
            )
        if prompt.words != len(prompt.text.split()):
            raise UserError(
                f"{prompt.words} given, but the text has {len(prompt.text.split())} words",
                where=f"{where}, field 'words'",
                remedy="delete the file and let stage 1 write it again",
            )
        if prompt.seed < 0:
            raise UserError(
                f"{prompt.seed} is negative",
                where=f"{where}, field 'seed'",
                remedy="delete the file and let stage 1 write it again",
            )
        prompts.append(prompt)
        rows.append((number, prompt.id, prompt.text))
    _check_set(path, rows)
    return prompts
