"""Appendix D.3: how judges' answers become the numbers of Tables 1-3."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import openve

GOOD = """Brief reasoning: the circle is gone.
Instruction Compliance: 85
Consistency & Detail Fidelity: 70
Visual Quality & Stability: 80"""
NO_VQ = "Instruction Compliance: 85\nConsistency & Detail Fidelity: 70"
OUT_OF_SCALE = GOOD.replace("85", "101")


@pytest.fixture
def judge(monkeypatch):
    """Asks a judge that answers from a list about two clips of 81 frames; records its questions."""
    clip = SimpleNamespace(frames=torch.zeros(81, 16, 16, 3, dtype=torch.uint8))
    questions = []

    def ask(answers):
        answers = iter(answers)

        async def reply(url, model, content, *_):
            questions.append(content)
            return openve.chat.Answer(next(answers))

        monkeypatch.setattr(openve.chat, "ask", reply)
        monkeypatch.setattr(openve.video, "read_video", lambda *_: clip)
        asked = openve.ask_judge("a rubric", "source.mp4", "edit.mp4", "url", "model", "key")
        return asyncio.run(asked)

    return SimpleNamespace(ask=ask, questions=questions)


@pytest.mark.parametrize("unusable", ["I cannot compare them.", NO_VQ, OUT_OF_SCALE])
def test_a_request_is_retried_up_to_three_times(unusable, judge):
    """ "Accepted only if all three requested score lines are present and parseable", 1 to 100."""
    assert judge.ask([unusable, unusable, GOOD])["scores"] == [85, 70, 80]
    assert len(judge.questions) == 3


def test_an_answer_that_can_be_read_is_not_asked_for_again(judge):
    assert judge.ask([GOOD])["scores"] == [85, 70, 80]
    assert len(judge.questions) == 1


def test_after_three_unusable_answers_the_sample_is_dropped(judge):
    assert judge.ask([NO_VQ, NO_VQ, NO_VQ, GOOD])["scores"] is None
    assert len(judge.questions) == 3


def test_a_judge_sees_five_frames_of_each_clip_source_first(judge):
    """Each clip behind a header, the request to compare them at the end."""
    judge.ask([GOOD])
    [content] = judge.questions
    assert [part["type"] for part in content] == (
        ["text"] + ["image_url"] * 5 + ["text"] + ["image_url"] * 5 + ["text"]
    )
    assert "Source" in content[0]["text"] and "Edited" in content[6]["text"]
    assert "compare these two videos based on the sampled frames" in content[-1]["text"].lower()


def test_scores_are_rounded_to_the_nearest_integer():
    """ "Coerces floating-point scores to the nearest integer"."""
    assert openve.parse_scores(GOOD.replace("85", "84.6").replace("70", "70.4")) == [85, 70, 80]


def rows(category, *triples):
    return [{"category": category, "scores": triple} for triple in triples]


def test_overall_is_the_mean_of_the_category_means():
    """ "No category is weighted more heavily": one clip of a category counts as much as three."""
    scored = rows("Local Change", [10, 10, 10], [20, 20, 20], [30, 30, 30])
    scored += rows("Local Remove", [40, 50, 60])
    scored += rows("Local Add", [60, 60, 60])
    scored += rows("Global Style", [80, 80, 80])
    overall = openve.summarize(scored)[0]
    assert overall == pytest.approx((20 + 50 + 60 + 80) / 4)


def test_dropped_samples_are_not_imputed():
    """They change no mean."""
    scored = []
    for category in ("Local Change", "Local Remove", "Local Add", "Global Style"):
        scored += rows(category, [10, 20, 30])
    with_dropped = scored + rows("Local Add", None)
    means = zip(openve.summarize(with_dropped)[:4], openve.summarize(scored)[:4], strict=True)
    for kept, before in means:  # overall, pooled, by axis and by category
        np.testing.assert_array_equal(kept, before)
