"""Run in a process of its own: vLLM's answers to prompts of token numbers, as one line of JSON on stdout, among what vLLM logs.

    python answer.py '{"model": DIR, "prompts": [[1, 2]], "tokens": 8, "options": {...}, "adapter": DIR or null}'

Gives for each prompt the new tokens, the log-probability of every token after the first (with an adapter: of the new ones), and
the names of the matrices that the model holds, by type.
"""

import json
import os
import sys

# The model in this process, so that it can be looked into; ranks are processes of their own all the same.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"


def held(model) -> dict[str, list[str]]:
    """Names of the model's stored matrices: in 8 bits, in floats."""
    kinds: dict[str, list[str]] = {"8 bits": [], "floats": []}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "absmax" not in name and "code" not in name:
            kinds["8 bits" if parameter.element_size() == 1 else "floats"].append(name)
    return kinds


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(sys.argv[1])
    options = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "enforce_eager": True,
        **asked["options"],
    }
    llm = LLM(asked["model"], skip_tokenizer_init=True, **options)
    greedy = SamplingParams(
        temperature=0,
        max_tokens=asked["tokens"],
        logprobs=0,
        # With LoRA, vLLM 0.32 on a CPU cannot give them: it uses the sampled rows' adapters for the prompt's rows.
        prompt_logprobs=None if asked["adapter"] else 0,
        ignore_eos=True,
        detokenize=False,
    )
    adapter = LoRARequest("adapter", 1, asked["adapter"]) if asked["adapter"] else None
    answers = []
    for done in llm.generate(
        [{"prompt_token_ids": prompt} for prompt in asked["prompts"]],
        greedy,
        lora_request=adapter,
        use_tqdm=False,
    ):
        output = done.outputs[0]
        steps = []
        if done.prompt_logprobs:
            steps += list(zip(done.prompt_token_ids[1:], done.prompt_logprobs[1:], strict=True))
        steps += list(zip(output.token_ids, output.logprobs, strict=True))
        logprobs = [at[token].logprob for token, at in steps]
        answers.append({"tokens": list(output.token_ids), "logprobs": logprobs})
    print("\n" + json.dumps({"answers": answers, "held": llm.apply_model(held)}))


if __name__ == "__main__":
    main()
