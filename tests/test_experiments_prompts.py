"""experiments/prompts.py: what a model is asked, and what of its answer is the definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lexicon.data.entry import Entry
from lora_lexicon.experiments.prompts import INSTRUCTION, clean, messages, text

KERNEL = Entry("kernel", "the kernel of an idea", "the central part", "test")
SHOTS = [Entry("apple", "", "a round fruit", "test"), Entry("run", "run a mile", "move fast on foot", "test")]


def test_a_chat_and_a_text_say_the_same() -> None:
    questions = [
        'What is the definition of "apple"?',
        '"run a mile" What is the definition of "run"?',
        '"the kernel of an idea" What is the definition of "kernel"?',
    ]
    assert [(m["role"], m["content"]) for m in messages(SHOTS, KERNEL)] == [
        ("system", INSTRUCTION),
        ("user", questions[0]),
        ("assistant", "a round fruit"),
        ("user", questions[1]),
        ("assistant", "move fast on foot"),
        ("user", questions[2]),
    ]
    assert text(SHOTS, KERNEL) == (
        f"{INSTRUCTION}\n\n{questions[0]}\nDefinition: a round fruit\n\n{questions[1]}\nDefinition: move fast on foot"
        f"\n\n{questions[2]}\nDefinition:"
    )
    assert KERNEL.definition not in text(SHOTS, KERNEL) + str(messages(SHOTS, KERNEL))


@pytest.mark.parametrize(
    ("answer", "definition"),
    [
        ("the central part", "the central part"),
        ("  the central part \n\nWhat is the definition of", "the central part"),
        ("Definition: the central part", "the central part"),
        ("**Definition:** the central part", "the central part"),
        ("**Definition**: the central part", "the central part"),
        ("Answer: Definition: 'the central part'", "the central part"),
        ("Here is the definition:\n\n> The central part.\n", "The central part."),
        ("**Kernel**\n\n1. The central part.\n2. A seed.", "The central part."),
        ("“the central part”", "the central part"),
        ("***the central part***", "the central part"),
        ("`the central part`", "the central part"),
        ("```\nthe central part\n```", "the central part"),
        ('"the" or "that" part', '"the" or "that" part'),
        ("Kernel: the central part", "the central part"),
        ('**"kernel"** (noun): the central part', "the central part"),
        ("kernel — the central part", "the central part"),
        ("A kernel is the central part", "A kernel is the central part"),
        ('In this context, the term "kernel" refers to the central part.', "the central part."),
        ('The definition of "kernel" is: the central part', "the central part"),
        ("kernels are seeds", "kernels are seeds"),
        ("the meaning of something", "the meaning of something"),
        ("<think>\nA kernel is…\n</think>\n\nthe central part", "the central part"),
        ("<think>\nA kernel is", ""),
        ("the central\x1b[31m part\ud800", "the central [31m part"),
        ("Definition:", "Definition:"),
        ("kernel", "kernel"),
        ('""', '""'),
        (" \n\t", ""),
    ],
)
def test_the_definition_in_an_answer(answer: str, definition: str) -> None:
    assert clean(answer, "kernel") == definition


PARTS = st.sampled_from(
    ['"', "'", "**", "`", "Definition:", "kernel", "is", ":", " ", "\n", "a part", "-", "1.", "“", "”"]
)


@given(st.text(max_size=60) | st.lists(PARTS, max_size=12).map("".join), st.sampled_from(["kernel", "a", "(", "*"]))
def test_cleaning_twice_is_cleaning_once(answer: str, term: str) -> None:
    found = clean(answer, term)
    assert clean(found, term) == found
    assert len(found) <= len(answer)
    assert found.isprintable() or not found.isascii()
    found.encode()


@given(st.lists(st.sampled_from(["central", "part", "of", "the", "kernel", "'s", "(law)", "10", "e.g."]), min_size=1))
def test_a_plain_definition_stays(words: list[str]) -> None:
    assert clean(" ".join(["something", *words]), "kernel") == " ".join(["something", *words])
