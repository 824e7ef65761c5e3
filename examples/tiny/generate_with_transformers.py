"""Load an exported folder with plain transformers, without this framework, and answer a question.

python examples/tiny/generate_with_transformers.py runs/quickstart/hf
runs/quickstart/data/heldout.jsonl
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Answer the first question of a JSONL file."""
    folder, data = sys.argv[1:]
    record = json.loads(Path(data).read_text().splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = tokenizer.apply_chat_template(
        record["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=40)
    response = output[0, inputs["input_ids"].shape[1] :]
    print(f"Question: {record['messages'][-1]['content']}")
    print(f"Answer:\n{tokenizer.decode(response, skip_special_tokens=True)}")
    print(f"Expected: {record['answer']}")


if __name__ == "__main__":
    main()
