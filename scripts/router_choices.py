"""How often experts are chosen otherwise when routers, or everything else, or all are in 8 bits.

    python scripts/router_choices.py

Random models (a trained router's scores lie further apart, so these are upper bounds): 4 layers, 32 experts, 4 of them a token,
512 tokens. For each, the share of tokens whose set of experts changes against the float model, all layers together.
`KEEP_IN_FLOAT` of octavo/model.py rests on what this prints; docs/MODELS.md holds a table of it.
"""

import copy
from fnmatch import fnmatch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

import octavo

COMMON = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}
KINDS = {
    "mixtral": {"num_local_experts": 32, "intermediate_size": 128},
    "qwen3_moe": {"num_experts": 32},
    "olmoe": {"num_experts": 32, "intermediate_size": 128},
    "gpt_oss": {"num_local_experts": 32, "intermediate_size": 128},
    "deepseek_v3": {
        "head_dim": 32,
        "n_routed_experts": 32,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    },
}
ROUTERS = ("router.weight", "mlp.gate.weight")


def routers(model) -> list[str]:
    """Names of the routers' weights."""
    return [
        name for name, _ in model.named_parameters() if any(fnmatch(name, f"*.{each}") for each in ROUTERS)
    ]


def choices(model, ids: torch.Tensor) -> torch.Tensor:
    """The experts of each token in each layer, in ascending order: [layers, tokens, experts a token]."""
    chosen = []

    def keep(module, inputs):
        index = next(part for part in inputs if not part.is_floating_point())
        chosen.append(index.reshape(-1, index.shape[-1]).sort(-1).values)

    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    hooks = [module.register_forward_pre_hook(keep) for module in experts]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen)


def changed(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found != expected).any(-1).float().mean())


def measure(kind: str) -> list[float]:
    """Shares for: routers in 8 bits, everything else, all."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**COMMON, **KINDS[kind]})).eval()
    ids = torch.randint(0, 512, (1, 512))
    expected = choices(plain, ids)
    names = routers(plain)
    assert len(names) == COMMON["num_hidden_layers"]
    eight = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in eight.parameters():
            if parameter.dim() > 1:
                parameter.copy_(octavo.OctavoTensor.from_float(parameter).dequantize())
    shares = []
    for of_routers, of_others in ((True, False), (False, True), (True, True)):
        mixed = copy.deepcopy(plain)
        others = dict(eight.named_parameters())
        with torch.no_grad():
            for name, parameter in mixed.named_parameters():
                if of_routers if name in names else of_others:
                    parameter.copy_(others[name])
        shares.append(changed(choices(mixed, ids), expected))
    return shares


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(f"{'model':14}{'routers':>10}{'the rest':>10}{'all':>10}")
    for kind in KINDS:
        print(f"{kind:14}" + "".join(f"{share:10.2%}" for share in measure(kind)), flush=True)
