"""Instructions and questions with their answers, each as a conversation written by hand."""

import pytest

from rlhfjax.data.layouts import recognise
from rlhfjax.errors import DataError
from tests.data.layouts.cases import ASKED, BAD, BRIEF, GOOD, USER, bare, read, said

SAID = [USER, said(GOOD)]
HISTORY = [{"role": "user", "content": "Hello?"}, said("Yes?")]
CHOICES = "Which one is blue?\nA. The sky\nB. Grass"
LETTERED = [{"role": "user", "content": CHOICES}, said("A. The sky")]

DEMONSTRATIONS = [
    ("alpaca", {"instruction": ASKED, "input": "", "output": GOOD}, SAID),
    ("alpaca", {"instruction": ASKED, "output": GOOD, "input": None, "history": None, "system": ""}, SAID),
    (
        "alpaca",
        {"instruction": "Say it in one word.", "input": GOOD, "output": "Blue."},
        [{"role": "user", "content": f"Say it in one word.\n{GOOD}"}, said("Blue.")],
    ),
    (
        "alpaca",
        {"instruction": ASKED, "output": GOOD, "system": "Be brief.", "history": [["Hello?", "Yes?"]]},
        [BRIEF, *HISTORY, *SAID],
    ),
    ("dolly", {"instruction": ASKED, "context": "", "response": GOOD, "category": "open_qa"}, SAID),
    (
        "dolly",
        {"instruction": ASKED, "context": "It is summer.", "response": GOOD},
        [{"role": "user", "content": f"{ASKED}\nIt is summer."}, said(GOOD)],
    ),
    ("question_answer", {"question": ASKED, "answer": GOOD}, SAID),
    ("question_answer", {"problem": ASKED, "solution": GOOD, "answer": "Blue"}, SAID),
    ("question_answer", {"prompt": ASKED, "response": GOOD}, SAID),
    ("question_answer", {"system_prompt": "Be brief.", "question": ASKED, "response": GOOD}, [BRIEF, *SAID]),
    ("multiple_choice", {"question": "Which one is blue?", "choices": ["The sky", "Grass"], "answer": 0}, LETTERED),
    (
        "multiple_choice",
        {
            "question": "Which one is blue?",
            "choices": {"text": ["The sky", "Grass"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        LETTERED,
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), DEMONSTRATIONS)
def test_demonstrations_and_the_prompts_in_them(name, row, messages):
    assert recognise([row], "demonstration").name == recognise([row], None).name == name
    assert bare(read([row], "demonstration")) == [{"messages": messages}]
    assert bare(read([row], "prompt")) == [{"messages": messages[:-1]}]


def test_every_instance_of_a_seed_task_is_a_demonstration():
    row = {
        "id": "seed_1",
        "instruction": "Name the colour.",
        "instances": [{"input": "", "output": "Blue."}, {"input": "Grass", "output": "Green."}],
    }
    assert recognise([row], None).name == "self_instruct"
    assert read([row], "demonstration") == [
        {"messages": [{"role": "user", "content": "Name the colour."}, said("Blue.")], "extra": {"id": "seed_1"}},
        {
            "messages": [{"role": "user", "content": "Name the colour.\nGrass"}, said("Green.")],
            "extra": {"id": "seed_1"},
        },
    ]


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("alpaca_preference", {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD}, [USER]),
        (
            "question_preference",
            {"system": "Be brief.", "question": ASKED, "chosen": GOOD, "rejected": BAD},
            [BRIEF, USER],
        ),
    ],
)
def test_two_answers_to_an_instruction(name, row, messages):
    assert recognise([row], None).name == name
    assert read([row], "comparison") == [{"messages": messages, "responses": [GOOD, BAD], "ranks": [1, 2]}]
    assert read([row], "demonstration") == [{"messages": [*messages, said(GOOD)]}]


def test_a_labelled_answer_is_unpaired_and_a_demonstration_only_where_it_is_good():
    rows = [
        {"instruction": ASKED, "input": "", "output": GOOD, "kto_tag": True},
        {"instruction": ASKED, "input": "", "output": BAD, "kto_tag": False},
    ]
    layout = recognise(rows, "demonstration")
    assert layout.name == recognise(rows, None).name == "alpaca_kto"
    assert read(rows, "unpaired") == [
        {"messages": [USER], "completion": GOOD, "label": True},
        {"messages": [USER], "completion": BAD, "label": False},
    ]
    assert read(rows, "demonstration") == [{"messages": SAID}]
    assert "label is false" in layout.omits("demonstration")
    assert layout.omits("unpaired") == ""


def test_questions_of_benchmarks_are_prompts():
    bench = {"question_id": 81, "category": "writing", "turns": [ASKED, "Why?"]}
    assert recognise([bench], None).name == "mt_bench"
    assert read([bench], "prompt") == [
        {"messages": [USER], "prompt_id": "81", "extra": {"category": "writing", "turns": [ASKED, "Why?"]}}
    ]
    vicuna = {"question_id": 1, "text": ASKED, "category": "generic"}
    assert read([vicuna], "prompt") == [{"messages": [USER], "prompt_id": "1", "extra": {"category": "generic"}}]
    assert recognise([vicuna], None).name == "vicuna"
    assert recognise([vicuna], "document").name == "rlhfjax"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": ASKED, "outptu": GOOD}, "output: expected this field in a row of the layout alpaca, got the"),
        ({"instruction": ASKED, "output": 3}, "output: expected a string, got a whole number"),
        ({"instruction": ASKED, "output": GOOD, "input": ["x"]}, "input: expected a string, got a list"),
        ({"instruction": ASKED, "output": GOOD, "history": [["a"]]}, "history[0]: expected a pair of texts"),
        ({"instruction": ASKED, "output": GOOD, "history": 3}, "history: expected a list of pairs"),
        ({"output": GOOD}, "instruction: expected this field in a row of the layout alpaca, got the fields output"),
    ],
)
def test_a_row_that_does_not_fit_says_which_field(row, message):
    layout = recognise([{"instruction": ASKED, "output": GOOD}], "demonstration")
    with pytest.raises(DataError) as error:
        layout.rows("demonstration", row, "file:7")
    assert str(error.value).startswith("file:7: ")
    assert message in str(error.value)


def test_choices_without_the_right_one():
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 2}
    with pytest.raises(DataError, match=r"answer: expected one of the choices A, B"):
        read([row], "demonstration")
