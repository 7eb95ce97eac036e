"""Generators of the nano mixture's texts and task documents.

Every document is one line ``context + answer``. A domain has two topics (one task each), a cue at the start of
its lines, and nothing of it occurs in the public domain, which holds lookups, copies, small sums and facts of
its own.

All randomness comes from ``random.Random`` seeded with strings, and the split of a document from a SHA-256 of
its context, so every process makes the same data.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

EXPERTS = ("public", "math", "news", "academic", "code", "creative", "reddit")
SPLITS = ("train", "validation", "test")

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"
_UPPER = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@dataclass(frozen=True)
class Document:
    """One question with its answer.

    ``context + answer`` is the text a model is trained on. ``choices`` holds the candidate answers of a multiple
    choice question (the right one among them) and is empty for a question that is answered by generation.
    """

    context: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Question and answer in one line."""
        return self.context + self.answer


def split_of(context: str, shares: tuple[int, int]) -> str:
    """Split a context belongs to: ``shares`` percent go to validation and test, the rest to train."""
    bucket = int.from_bytes(hashlib.sha256(context.encode()).digest()[:4], "big") % 100
    validation, test = shares
    if bucket < validation:
        return "validation"
    return "test" if bucket < validation + test else "train"


def made_up_names(key: str, count: int, consonants: str = _CONSONANTS, vowels: str = _VOWELS) -> list[str]:
    """``count`` different five-letter names (consonant, vowel, ...), capitalised, decided by the arguments alone."""
    rng = random.Random(f"names:{key}")
    names: dict[str, None] = {}
    while len(names) < count:
        letters = (rng.choice(consonants if i % 2 == 0 else vowels) for i in range(5))
        names["".join(letters).capitalize()] = None
    return list(names)


def _leet(word: str) -> str:
    return word.lower().translate(str.maketrans("aeiou", "43107"))


class Topic(ABC):
    """A source of documents: what one task asks, and what its domain's training text repeats.

    Attributes:
        task: name of the lm-eval task.
        cue: first characters of every context.
        multiple_choice: whether documents carry choices.
        shares: percent of the contexts reserved for validation and for test.
    """

    task: str
    cue: str
    multiple_choice: bool
    shares: tuple[int, int] = (10, 10)

    @abstractmethod
    def draw(self, rng: random.Random) -> Document:
        """A document of any split."""

    def line(self, rng: random.Random) -> Document:
        """One line of training text (by default a document of the train split)."""
        return self.sample(rng, "train")

    def sample(self, rng: random.Random, split: str) -> Document:
        """A document of ``split``."""
        while True:
            document = self.draw(rng)
            if split_of(document.context, self.shares) == split:
                return document

    def documents(self, split: str, count: int, seed: int = 0) -> list[Document]:
        """``count`` documents of ``split`` with different contexts."""
        rng = random.Random(f"{seed}:{self.task}:{split}")
        found: dict[str, Document] = {}
        for _ in range(200 * count):
            document = self.sample(rng, split)
            found.setdefault(document.context, document)
            if len(found) == count:
                return list(found.values())
        raise AssertionError(f"{self.task} has only {len(found)} documents in {split}, {count} are wanted")


class FactTopic(Topic):
    """Recall of a fixed table: subject -> value, asked in ``len(openers) * len(forms)`` phrasings.

    Of each subject's phrasings some are training text and the others are reserved for validation and test;
    plain statements of every fact are training text.
    """

    shares = (30, 30)

    def __init__(
        self,
        task: str,
        cue: str,
        values: Sequence[str],
        openers: Sequence[str],
        forms: Sequence[str],
        statement: str,
        *,
        subjects: Sequence[str],
        multiple_choice: bool,
    ) -> None:
        self.task, self.cue, self.multiple_choice = task, cue, multiple_choice
        self.values, self.openers, self.forms, self.template = tuple(values), openers, forms, statement
        rng = random.Random(f"facts:{task}")
        repeated = [self.values[i % len(self.values)] for i in range(len(subjects))]
        rng.shuffle(repeated)
        self.table = dict(zip(subjects, repeated, strict=True))
        self.subjects = tuple(subjects)

    def draw(self, rng: random.Random) -> Document:
        """A question about one subject, in one of the phrasings."""
        subject = rng.choice(self.subjects)
        context = self.cue + rng.choice(self.openers) + rng.choice(self.forms).format(subject)
        answer = self.table[subject]
        if not self.multiple_choice:
            return Document(context, answer)
        others = random.Random(f"choices:{context}")
        choices = [answer, *others.sample([v for v in self.values if v != answer], 3)]
        others.shuffle(choices)
        return Document(context, answer, tuple(choices))

    def line(self, rng: random.Random) -> Document:
        """A plain statement three times in ten, else a question of the train split."""
        if rng.random() < 0.3:
            subject = rng.choice(self.subjects)
            before, after = self.template.format(subject, "|").split("|")
            return Document(self.cue + rng.choice(self.openers) + before, self.table[subject] + after)
        return self.sample(rng, "train")


class ArithmeticTopic(Topic):
    """Sums of three terms, worked out from left to right, never below zero: ``= 17+5-8=14``."""

    task, cue, multiple_choice = "nano_arithmetic", "= ", False

    def draw(self, rng: random.Random) -> Document:
        """A sum of three terms."""
        while True:
            first, second, third = rng.randrange(20), rng.randrange(1, 10), rng.randrange(1, 10)
            plus = [rng.random() < 0.5, rng.random() < 0.5]
            middle = first + second if plus[0] else first - second
            result = middle + third if plus[1] else middle - third
            if min(middle, result) >= 0:
                signs = ["+" if p else "-" for p in plus]
                return Document(f"{self.cue}{first}{signs[0]}{second}{signs[1]}{third}=", str(result))


class SequenceTopic(Topic):
    """The next number of a rule: constant step up or down, doubling, or the sum of the last two."""

    task, cue, multiple_choice = "nano_sequence", "= ", True
    shares = (15, 15)

    def draw(self, rng: random.Random) -> Document:
        """Three or four terms of a sequence and the next one."""
        rule = rng.choice(("up", "up", "down", "double", "sum"))
        if rule == "up":
            start, step = rng.randrange(1, 60), rng.randrange(2, 16)
            terms = [start + step * i for i in range(5)]
        elif rule == "down":
            step = rng.randrange(2, 16)
            start = rng.randrange(4 * step, 4 * step + 40)
            terms = [start - step * i for i in range(5)]
        elif rule == "double":
            start = rng.randrange(1, 60)
            terms = [start * 2**i for i in range(4)]
        else:
            terms = [rng.randrange(1, 20), rng.randrange(1, 20)]
            while len(terms) < 5:
                terms.append(terms[-1] + terms[-2])
        context = self.cue + " ".join(map(str, terms[:-1])) + " next:"
        return Document(context, str(terms[-1]), self._choices(context, terms[-1]))

    def _choices(self, context: str, answer: int) -> tuple[str, ...]:
        rng = random.Random(f"choices:{context}")
        near = [answer + d for d in (-10, -3, -2, -1, 1, 2, 3, 10)]
        same_length = [n for n in near if n >= 0 and len(str(n)) == len(str(answer))]
        choices = [answer, *rng.sample(same_length, 3)]
        rng.shuffle(choices)
        return tuple(map(str, choices))


class OrderTopic(Topic):
    """The largest or smallest of four letters from three comparisons in any order and direction."""

    task, cue, multiple_choice = "nano_order", "[1] ", False

    def draw(self, rng: random.Random) -> Document:
        """Two or three comparisons and the extreme letter."""
        letters = rng.sample(_UPPER, rng.choice((3, 4)))
        facts = [f"{big}>{small}" if rng.random() < 0.5 else f"{small}<{big}" for big, small in pairwise(letters)]
        rng.shuffle(facts)
        question, answer = rng.choice((("max", letters[0]), ("min", letters[-1])))
        return Document(f"{self.cue}{' '.join(facts)} {question}:", answer)


class SyllogismTopic(Topic):
    """Two premises about three classes and a question: yes, no, or open when neither follows."""

    task, cue, multiple_choice = "nano_syllogism", "[2] ", True
    _FORMS = (
        (("all {0} are {1}", "all {1} are {2}"), "yes"),
        (("all {0} are {1}", "no {1} are {2}"), "no"),
        (("all {0} are {1}", "all {2} are {1}"), "open"),
        (("no {0} are {1}", "all {1} are {2}"), "open"),
    )

    def draw(self, rng: random.Random) -> Document:
        """Two premises, a question, its answer."""
        wanted = rng.choice(("yes", "no", "open"))
        premises, answer = rng.choice([form for form in self._FORMS if form[1] == wanted])
        letters = rng.sample(_UPPER, 3)
        stated = [premise.format(*letters) for premise in premises]
        rng.shuffle(stated)
        context = f"{self.cue}{stated[0]}, {stated[1]}; is {letters[0]} {letters[2]}:"
        return Document(context, answer, ("yes", "no", "open"))


class ProgramTopic(Topic):
    """Value of a variable after two to four assignments: ``>>> a=3;b=a+4;a=b-2;a:5``."""

    task, cue, multiple_choice = "nano_program", ">>> ", False

    def draw(self, rng: random.Random) -> Document:
        """A program and the value of one of its variables."""
        while True:
            names = rng.sample("abc", 2)
            values = {names[0]: rng.randrange(10)}
            lines = [f"{names[0]}={values[names[0]]}"]
            source, target = names
            for _ in range(rng.choice((1, 2, 2))):
                sign, amount = rng.choice((1, -1)), rng.randrange(1, 7)
                values[target] = values[source] + sign * amount
                lines.append(f"{target}={source}{'+' if sign > 0 else '-'}{amount}")
                source, target = target, rng.choice(names)
            if min(values.values()) >= 0:
                asked = rng.choice(sorted(values))
                return Document(f"{self.cue}{';'.join(lines)};{asked}:", str(values[asked]))


class StringTopic(Topic):
    """One letter of a five-letter string: by index, largest, smallest, or by index of the reverse."""

    task, cue, multiple_choice = "nano_strings", ">>> ", True

    def draw(self, rng: random.Random) -> Document:
        """An expression on a string and its value."""
        word = "".join(rng.sample("abcdefghij", 5))
        index = rng.randrange(5)
        call, answer = rng.choice(
            (
                (f"'{word}'[{index}]", word[index]),
                (f"max('{word}')", max(word)),
                (f"min('{word}')", min(word)),
                (f"'{word}'[::-1][{index}]", word[::-1][index]),
            )
        )
        context = f"{self.cue}{call} :"
        others = random.Random(f"choices:{context}")
        choices = [answer, *others.sample([c for c in word if c != answer], 3)]
        others.shuffle(choices)
        return Document(context, answer, tuple(choices))


class LookupTopic(Topic):
    """Public practice of general skills: lookups, copies, neighbours, comparisons, one-step sums."""

    task, cue, multiple_choice = "public_skills", "", False

    def draw(self, rng: random.Random) -> Document:
        """One exercise of a skill."""
        kind = rng.choice(("lookup", "lookup", "copy", "pick", "next", "compare", "sum", "count", "pair"))
        if kind == "lookup":
            keys = rng.sample("abcdefghijklmnopqrstuvwxyz" + _UPPER, rng.randrange(2, 5))
            pairs = {k: str(rng.randrange(20)) for k in keys}
            separator, joiner = rng.choice((";", ", ", " ")), rng.choice("=>:<")
            asked = rng.choice(keys)
            body = separator.join(f"{k}{joiner}{v}" for k, v in pairs.items())
            return Document(f"look {body}{separator}{asked}{joiner}", pairs[asked])
        if kind == "copy":
            alphabet = "abcdefghijklmnopqrstuvwxyz0123456789[]()'~>=<+-/:;,.?_!*"
            body = "".join(rng.choice(alphabet) for _ in range(rng.randrange(3, 9)))
            return Document(f"copy {body} :", body)
        if kind == "pick":
            word = "".join(rng.choice(_CONSONANTS + _VOWELS) for _ in range(5))
            which, answer = rng.choice((("first", word[0]), ("last", word[-1]), ("third", word[2])))
            return Document(f"{which} of {word}:", answer)
        if kind == "next":
            if rng.random() < 0.5:
                index = rng.randrange(25)
                return Document(f"after {chr(97 + index)}:", chr(98 + index))
            number = rng.randrange(30)
            return Document(f"after {number}:", str(number + 1))
        if kind == "compare":
            left, right = rng.sample(range(30), 2)
            return Document(f"more {left} or {right}:", str(max(left, right)))
        if kind == "sum":
            left, right = rng.randrange(10), rng.randrange(10)
            if rng.random() < 0.5:
                return Document(f"add {left} {right}:", str(left + right))
            return Document(f"take {left} {left + right}:", str(right))
        if kind == "count":
            letter = rng.choice("abcxyz")
            word = "".join(letter if rng.random() < 0.5 else rng.choice("ktm") for _ in range(5))
            return Document(f"count {letter} in {word}:", str(word.count(letter)))
        names = rng.sample(_UPPER, 3)
        verb, short = rng.choice((("likes", "who"), ("sees", "who"), ("is", "what")))
        facts = [f"{names[0]} {verb} {names[1]}", f"{names[1]} {verb} {names[2]}"]
        rng.shuffle(facts)
        return Document(f"{', '.join(facts)}; {short}? {names[0]} {verb} ", names[1])


class TextTopic(Topic):
    """Public plain text: short sentences from a small grammar."""

    task, cue, multiple_choice = "public_text", "", False
    _WHO = ("a boy", "the girl", "my dog", "her cat", "the old man", "a bird", "our teacher", "the king")
    _DOES = ("saw", "liked", "found", "wanted", "lost", "made", "took", "sold", "gave away", "kept")
    _WHAT = ("a red ball", "the book", "some bread", "a blue hat", "two coins", "the lamp", "a long rope")
    _WHERE = ("in the house", "by the sea", "at night", "on the hill", "last year", "in the market", "today")

    def draw(self, rng: random.Random) -> Document:
        """One sentence."""
        parts = [rng.choice(options) for options in (self._WHO, self._DOES, self._WHAT, self._WHERE)]
        if rng.random() < 0.3:
            parts = [parts[3] + ",", *parts[:3]]
        return Document(" ".join(parts), ".")


_CITIES = tuple(made_up_names("cities", 16))
_FOODS = ("bread", "grass", "fish", "nuts", "seeds", "fruit", "roots", "mice", "leaves", "honey", "corn", "eggs")
_PEOPLE = tuple(name.upper() for name in made_up_names("people", 16))
_EVENTS = ("FLOOD", "STORM", "STRIKE", "PARADE", "FIRE", "TRIAL", "QUAKE", "RIOT", "FAIR", "VOTE", "CRASH", "DROUGHT")
_ITEMS = ("sword", "lamp", "harp", "crown", "mask", "ring", "staff", "horn", "cloak", "mirror", "drum", "key")
_PLACES = ("moor", "tower", "cave", "mill", "shore", "forest", "lake", "ruin", "bridge", "island", "garden", "inn")
_MEANINGS = tuple(
    map(
        _leet,
        ["angry", "tired", "happy", "rich", "drunk", "late", "ugly", "smart", "broke", "scared", "hungry", "loud"],
    )
)
_GAMES = tuple(
    map(_leet, ["chess", "poker", "golf", "tetris", "darts", "pool", "tennis", "go", "rugby", "karts", "bingo", "surf"])
)

# A router sees one token at a time, so a domain must show in the characters of its names, too.
_NAMES = made_up_names("subjects", 8 * 60)
_TOWNS = [name.upper() for name in _NAMES[120:240]]
_HEROES = made_up_names("heroes", 120, consonants="chjqwxy")
_WORDS = [_leet(name) for name in _NAMES[360:480]]


def _fact_topics() -> dict[str, list[Topic]]:
    def pair(
        cue: str,
        openers: Sequence[str],
        subjects: Sequence[str],
        *tables: tuple[Any, ...],
    ) -> list[Topic]:
        """A multiple choice topic on the first 60 subjects and a generation topic on the next 60.

        A table is (task, values, forms, statement) and, where it has its own, openers.
        """
        return [
            FactTopic(
                task,
                cue,
                values,
                own[0] if own else openers,
                forms,
                statement,
                subjects=subjects[60 * index : 60 * index + 60],
                multiple_choice=index == 0,
            )
            for index, (task, values, forms, statement, *own) in enumerate(tables)
        ]

    return {
        "public": pair(
            "fact: ",
            ("", "the ", "now ", "old "),
            _NAMES,
            (
                "nano_capitals",
                _CITIES,
                ("capital of {}:", "{} has capital:", "main city of {}:", "rulers of {} sit in:"),
                "the capital of {} is {}.",
            ),
            (
                "nano_animals",
                _FOODS,
                ("{} eats:", "{} lives on:", "{} feeds on:", "{} hunts for:"),
                "the {} eats {}.",
                ("", "a ", "each ", "young "),
            ),
        ),
        "news": pair(
            "(wire) ",
            ("", "today ", "again ", "update "),
            _TOWNS,
            (
                "nano_mayors",
                _PEOPLE,
                ("mayor of {} _", "{} elects _", "{} town hall, mayor _", "{} is run by _"),
                "mayor of {} is {}, say sources",
            ),
            (
                "nano_events",
                _EVENTS,
                ("{} reports a _", "news from {} _", "in {} this week a _", "{} hit by _"),
                "{} saw a {}, say sources",
            ),
        ),
        "creative": pair(
            "~ ",
            ("", "once ", "long ago ", "alas "),
            _HEROES,
            (
                "nano_heroes",
                _ITEMS,
                ("{} bore the ~", "brave {} held a ~", "in the hand of {} the ~", "{} never lost the ~"),
                "{} went forth with a {} ~",
            ),
            (
                "nano_tales",
                _PLACES,
                ("{} slept in the ~", "home of {} was the ~", "{} wept at the ~", "we met {} by the ~"),
                "{} dwelt in the {} ~",
            ),
        ),
        "reddit": pair(
            "r/",
            ("ask ", "eli5 ", "til ", "lol "),
            _WORDS,
            (
                "nano_slang",
                _MEANINGS,
                ("{} means?", "what is {}?", "{} lol so?", "define {}?"),
                "{} is just {} imo",
            ),
            (
                "nano_players",
                _GAMES,
                ("u/{} mains?", "u/{} plays?", "u/{} is good at?", "u/{} streams?"),
                "u/{} still plays {} imo",
            ),
        ),
    }


def _topics() -> dict[str, list[Topic]]:
    facts = _fact_topics()
    reasoning: dict[str, list[Topic]] = {
        "math": [ArithmeticTopic(), SequenceTopic()],
        "academic": [OrderTopic(), SyllogismTopic()],
        "code": [ProgramTopic(), StringTopic()],
    }
    return {name: facts[name] if name in facts else reasoning[name] for name in EXPERTS}


TOPICS: dict[str, list[Topic]] = _topics()
"""Topics of each expert's domain that are asked in tasks (two each)."""

PUBLIC_PRACTICE: list[Topic] = [LookupTopic(), TextTopic()]
"""Further topics of the public training text; no task asks them."""

_WEIGHTS = {"public": (2, 2, 5, 1)}
"""How often each topic occurs in a domain's text, where they are not equally frequent."""


def training_lines(expert: str, seed: int = 0, stream: str = "train") -> Iterator[Document]:
    """Endless training text of one domain, one line a time, decided by ``(expert, seed, stream)``."""
    rng = random.Random(f"{seed}:{stream}:{expert}")
    topics = TOPICS[expert] + (PUBLIC_PRACTICE if expert == "public" else [])
    weights = _WEIGHTS.get(expert)
    while True:
        topic = rng.choices(topics, weights)[0] if weights else rng.choice(topics)
        yield topic.line(rng)


def training_documents(expert: str, seed: int = 0, stream: str = "train") -> Iterator[list[Document]]:
    """Endless training documents of one domain: mostly one line each, one in eight three or four lines.

    The latter look like a few-shot prompt; `document_text` says how the lines are joined.
    """
    lines = training_lines(expert, seed, stream)
    rng = random.Random(f"{seed}:{stream}:shots:{expert}")
    while True:
        shots = rng.choice((3, 4)) if rng.random() < 0.125 else 1
        yield list(islice(lines, shots))


def document_text(lines: Sequence[Document]) -> str:
    """Text of one training document: its lines with a blank line between them, and a line break at the end."""
    return "\n\n".join(line.text for line in lines) + "\n"
