"""GSM8K, MATH-500, AIME and MGSM: problems with a number or an expression as answer."""

from megatron_dlm.evaluation.scoring import final_answer
from megatron_dlm.evaluation.tasks.base import REASON, Record, Task, ask, text_of


def _problem(record: Record) -> Record:
    question = text_of(record, "question", "problem", "Problem")
    answer = text_of(record, "answer", "Answer", "answer_number")
    if "####" in answer:
        answer = final_answer(answer) or ""
    return ask(f"{question}\n{REASON}", answer=answer)


TASKS = (
    Task("gsm8k", "math_verify", _problem, "openai/gsm8k main test"),
    Task("math_500", "math_verify", _problem, "HuggingFaceH4/MATH-500 test"),
    Task("aime_2024", "math_verify", _problem, "HuggingFaceH4/aime_2024 train"),
    Task("aime_2025", "math_verify", _problem, "math-ai/aime25 test"),
    # `answer` is the solution in the language of the examples, or null; the number is apart.
    Task(
        "mgsm",
        "math_verify",
        lambda record: _problem({**record, "answer": record["answer_number"]}),
        "juletxara/mgsm de test",
    ),
)
