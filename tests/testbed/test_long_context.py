"""Long-context tasks fill their length, are the same for the same seed, and can be answered."""

import re

import pytest
import torch

from gossamer.core.errors import UsageError
from gossamer.testbed.long_context import (
    FAMILIES,
    CommonWords,
    HeldOutText,
    Needles,
    StoryFiltering,
    StoryMultiHop,
    StoryRetrieval,
    TextTask,
    VariableTracking,
    family,
)
from gossamer.testbed.long_context.base import (
    Question,
    Sample,
    exact_match,
    f1,
    filled,
    intersection_over_union,
)
from gossamer.testbed.long_context.words import documented


def count(text):
    return len(text.split())


@pytest.mark.parametrize("one", FAMILIES, ids=lambda one: one.name)
def test_prompts_fill_their_length_and_follow_their_seed(one):
    for length in (1600, 3000):
        sample = one.sample(length, 3, count)
        assert 0.95 * length <= count(sample.prompt) <= length
        assert sample == one.sample(length, 3, count) != one.sample(length, 4, count)
    assert family(one.name) is one


def test_needles_lie_in_the_text():
    sample = Needles(6, 4).sample(900, 1, count)
    said = dict(re.findall(r"magic number for (\w+) is: (\d+)\.", sample.text))
    assert len(said) == 6 and len(sample.questions) == 4
    for question in sample.questions:
        assert question.answers == (said[re.search(r"for (\w+) is", question.lead)[1]],)


def test_chains_can_be_followed_and_keep_their_order():
    sample = VariableTracking(5, 3).sample(1200, 2, count)
    values = {}
    for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", sample.text):
        values[name] = values.get(source, source)  # what comes later is not known yet
    assert len(values) == 20 and all(value.isdigit() for value in values.values())
    wanted = re.search(r"the value (\d+) are", sample.prompt)[1]
    (question,) = sample.questions
    assert {name for name, value in values.items() if value == wanted} == set(question.answers)
    assert len(question.answers) == 4


def test_common_words_are_the_most_common():
    sample = CommonWords(10, 30, 3).sample(1500, 0, count)
    listed = re.findall(r"\d+\. (\w+)", sample.text)
    often = {word for word in listed if listed.count(word) == 30}
    assert often == set(sample.questions[0].answers)
    assert max(listed.count(word) for word in set(listed) - often) == 3


def chapters(text):
    return {
        int(number): (place, person, item)
        for number, place, person, item in re.findall(
            r"Chapter (\d+)\. Ada came to (\w+)\..*?met (\w+),.*?(?:bought a ([\w ]+)|nothing that day)",
            text,
        )
    }


def test_stories_can_be_answered_from_their_chapters():
    told = StoryRetrieval().sample(1500, 0, count)
    story = chapters(told.text)
    assert len(told.questions) == 16 and len(story) > 30
    for question in told.questions:
        number, what = re.search(r"chapter (\d+) Ada (came to|met|bought)", question.lead).groups()
        place = ("came to", "met", "bought").index(what)
        assert question.answers == (story[int(number)][place],)
    hop = StoryMultiHop().sample(1500, 5, count)
    items = [item for *_, item in chapters(hop.text).values() if item]
    asked = re.search(r"before the ([\w ]+) was", hop.questions[0].lead)[1]
    assert hop.questions[0].answers == (items[items.index(asked) - 1],)
    bare = StoryFiltering().sample(1500, 1, count)
    missing = [str(n) for n, (_, _, item) in chapters(bare.text).items() if not item]
    assert bare.questions[0].answers == tuple(missing) and len(missing) == 3


def test_documents_answer_with_the_name_that_is_described():
    names = {sentence: name for name, sentence in documented()}
    found = {}
    for kind in ("document answer", "document choice"):
        sample = family(kind).sample(900, 2, count)
        asked = re.search(r'described as "(.*)"\?', sample.prompt)[1]
        assert f"{names[asked]}: {asked}" in sample.text
        found[kind] = (sample, names[asked])
    sample, name = found["document answer"]
    assert sample.questions[0].answers == (name,)
    sample, name = found["document choice"]
    options = dict(re.findall(r"^([A-D])\. ([\w.]+)$", sample.prompt, re.M))
    assert options[sample.questions[0].answers[0]] == name and len(options) == 4


def test_scores():
    assert exact_match(" 123.\nand so on", "123") == 1 and exact_match("1234", "123") == 0
    assert intersection_over_union("A, b and d", ["a", "b", "c"]) == pytest.approx(2 / 4)
    assert intersection_over_union("1. a 2. b", ["a", "b"]) == 1
    assert intersection_over_union("8, 17, and 21.", ["8", "17", "21"]) == 1
    assert f1("the old house", "old house") == pytest.approx(0.8) and f1("no", "old") == 0
    assert Question("", ("x",), "exact match").marked("x\ny") == 1
    assert Question("", ("x", "y"), "IoU").marked("x\ny") == 0.5


def test_what_cannot_be_filled_is_refused():
    with pytest.raises(UsageError, match="without any filler"):
        CommonWords().sample(500, 0, count)
    with pytest.raises(UsageError, match="no more filler"):
        StoryFiltering().sample(10**6, 0, count)
    coarse = lambda amount: Sample("word " * (100 * amount), (Question("?", ("x",), "F1"),))  # noqa: E731
    with pytest.raises(UsageError, match="unit of its filler"):
        filled(coarse, 190, count)
    with pytest.raises(UsageError, match="families are"):
        family("poems")


class Bytes:
    """A tokenizer of bytes."""

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode("utf-8", "replace")


class Oracle:
    """A reader that writes what it was told, one byte at a time."""

    def __init__(self, said):
        self.said, self.given = said, []

    def read(self, ids, every=False):
        self.given.append(ids)
        return self._next(ids.shape[1] if every else 1)

    def go_on(self, ids):
        self.given.append(ids)
        return self._next(1)

    def _next(self, places):
        logits = torch.zeros(1, places, 256)
        if self.said:
            logits[:, -1, self.said.pop(0)] = 1
        return logits


def test_a_task_scores_what_is_written_behind_each_lead():
    text = TextTask(Needles(3, 2), 2000, Bytes())
    questions = text.family.sample(2000, 0, lambda t: len(t.encode())).questions
    right, wrong = (list(f" {q.answers[0]}.\n".encode()) for q in questions)
    wrong[1] = ord("x")
    reader = Oracle(right + wrong)
    assert text.score(reader, 0) == 0.5
    assert bytes(reader.given[0][0].tolist()).decode().endswith(questions[0].lead)
    assert questions[1].lead in [bytes(ids[0].tolist()).decode() for ids in reader.given]


def test_held_out_text_of_a_uniform_model_is_eight_bits():
    task = HeldOutText(256, Bytes())
    assert task.score(Oracle([]), 0) == pytest.approx(8, abs=0.01)
    with pytest.raises(UsageError, match="below"):
        HeldOutText(10**6, Bytes()).score(Oracle([]), 0)
