"""The peers' sides of the benchmarks, for `worker`: each does what `ours` does, with its own means."""

import numpy as np

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _tokens(spec):
    return np.random.RandomState(0).randint(0, spec["sizes"]["vocab_size"], (spec["batch"], spec["length"])).astype(np.int32)


def _torch_model(spec):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=torch.float32)
    return torch, model.to("cuda" if torch.cuda.is_available() else "cpu")


def torch_step(spec):
    """transformers' model, PEFT's LoRA, torch's fused AdamW."""
    torch, model = _torch_model(spec)
    if spec["method"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    model.train()
    trains = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trains, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(_tokens(spec)).long().to(model.device)
    cuda, bfloat16 = model.device.type == "cuda", spec.get("dtype") == "bfloat16"

    def step():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
        loss.backward()
        tx.step()
        tx.zero_grad(set_to_none=True)
        return {"loss": loss.item()} | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})

    return {"parameters": sum(p.numel() for p in model.parameters()), "trainable": sum(p.numel() for p in trains)}, step


def torch_generate(spec):
    """transformers' generate, greedy, never ending before ``spec["new"]`` tokens."""
    torch, model = _torch_model(spec)
    ids = torch.from_numpy(_tokens(spec)).long().to(model.device)
    model.eval()
    model.generation_config.eos_token_id = None

    def step():
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=spec["new"], do_sample=False, pad_token_id=0)
        return {"tokens": out[:, ids.shape[1] :].tolist()}

    return {}, step


def tunix_step(spec):
    """Tunix' Llama with its qwix LoRA, and the jitted step that its trainer's loop calls."""
    import jax
    import jax.numpy as jnp
    import optax
    import qwix
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.sft import peft_trainer, utils

    s = spec["sizes"]
    head_dim = s.get("head_dim") or s["hidden_size"] // s["num_attention_heads"]
    config = llama.ModelConfig(
        num_layers=s["num_hidden_layers"], vocab_size=s["vocab_size"], embed_dim=s["hidden_size"], hidden_dim=s["intermediate_size"],
        num_heads=s["num_attention_heads"], head_dim=head_dim, num_kv_heads=s["num_key_value_heads"], rope_theta=int(s["rope_theta"]),
        norm_eps=s["rms_norm_eps"], weight_tying=bool(s.get("tie_word_embeddings")))  # fmt: skip
    model = llama_params.create_model_from_safe_tensors(spec["folder"], config, dtype=jnp.float32)
    if spec["method"] == "lora":
        provider = qwix.LoraProvider(module_path=f".*({'|'.join(TARGETS)})", rank=8, alpha=16.0)
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(1e-4, weight_decay=0.0), peft_trainer.TrainingConfig(eval_every_n_steps=10**9))
    trainer = trainer.with_gen_model_input_fn(lambda x: {
        "input_tokens": x.input_tokens, "input_mask": x.input_mask, "positions": utils.build_positions_from_mask(x.input_mask),
        "attention_mask": utils.make_causal_attn_mask(x.input_mask)})  # fmt: skip
    run, _ = trainer.jit_train_and_eval_step(False, True)
    ids = jnp.asarray(_tokens(spec))
    batch = peft_trainer.TrainingInput(input_tokens=ids, input_mask=jnp.ones_like(ids, bool))
    kinds = {"parameters": nnx.Param, "trainable": nnx.LoRAParam if spec["method"] == "lora" else nnx.Param}
    facts = {name: sum(x.size for x in jax.tree.leaves(nnx.state(model, kind))) for name, kind in kinds.items()}

    def step():
        loss, _, _ = run(batch)
        jax.block_until_ready((loss, nnx.state(trainer.optimizer), nnx.state(trainer.model)))
        return {"loss": float(loss)}

    return facts, step
