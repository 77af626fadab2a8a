"""transformers' generate, which is how TRL's trainers sample.

python transformers_generation.py WORKLOAD_AS_JSON
"""

import itertools

import torch
from transformers import GenerationConfig
from transformers_models import PAD, policy_of, rows_of
from worker import Worker


def main() -> None:
    """Batches of `slots` prompts, each to its longest response: transformers cannot refill a finished row."""
    worker = Worker()
    work = worker.work
    torch.manual_seed(work["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = policy_of(work).eval().to(device, getattr(torch, work["dtype"]))
    model.generation_config.eos_token_id = None  # nothing ends a row but its length
    for step in itertools.count():
        lengths = worker.lengths()
        prompts = torch.tensor(rows_of(work | {"seed": step}, work["rows"], work["prompt"]), device=device)
        for first in range(0, work["rows"], work["slots"]):
            some = prompts[first : first + work["slots"]]
            longest = max(lengths[first : first + work["slots"]])
            config = GenerationConfig(max_new_tokens=longest, do_sample=True, top_k=0, pad_token_id=PAD)
            with torch.no_grad():
                model.generate(some, attention_mask=torch.ones_like(some), generation_config=config)
        if device == "cuda":
            torch.cuda.synchronize()
        worker.lap(tokens=sum(lengths))


if __name__ == "__main__":
    main()
