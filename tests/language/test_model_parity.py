"""The language model's modules and first layer against the reference's, on positions of a multimodal prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from tests.hosts.qwen25vl_reference import TINY, error, numpy_of, params_of, reference_model
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.model import DecoderLayer, SelfAttention
from tracevision_jax.layers.basic import GatedMLP, RMSNorm
from tracevision_jax.ops.rotary import apply_rotary, axial_angles, multimodal_frequencies

MODULE = 1e-5
"""Largest relative error of a module, Frobenius, float32."""
TOKENS = 40


def test_modules_and_layer_0_equal_the_reference(rng):
    config = Qwen25VLConfig.from_hf(TINY)
    c = config.language
    narrow, wide = (reference_model(TINY, seed=2, dtype=kind) for kind in (torch.float32, torch.float64))
    layer = jax.tree.map(lambda x: x[0], params_of(narrow, config)["language"]["layers"])
    values = rng.standard_normal((1, TOKENS, c.width)).astype(np.float32)
    places = np.sort(rng.integers(0, 700, (1, TOKENS, 3)), axis=1)
    x, ones = jnp.asarray(values), jnp.ones((1, TOKENS), jnp.int32)
    angles = axial_angles(jnp.asarray(places), multimodal_frequencies(c.head_dim, c.rope_theta, c.mrope_sections))
    heads = x.reshape(1, TOKENS, c.heads, c.head_dim)
    full = (jnp.float32, jnp.float32)

    def first(model):
        """Layer 0, the input in its number type, rotation tables, and the causal mask."""
        text = model.model.language_model
        inputs = torch.tensor(values, dtype=next(text.parameters()).dtype)
        tables = text.rotary_emb(inputs, torch.tensor(places).permute(2, 0, 1))
        mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)[None, None].to(inputs.dtype)
        return text.layers[0], inputs, {"position_embeddings": tables, "attention_mask": mask}

    def rotated(model):
        _, inputs, others = first(model)
        q = inputs.reshape(1, TOKENS, c.heads, c.head_dim).transpose(1, 2)
        return apply_rotary_pos_emb(q, q, *others["position_embeddings"])[0].transpose(1, 2)

    def attended(model):
        module, inputs, others = first(model)
        return module.self_attn(inputs, **others)[0]

    def whole(model):
        module, inputs, others = first(model)
        out = module(inputs, **others)
        return out[0] if isinstance(out, tuple) else out

    cases = {
        "norm": (
            RMSNorm(c.norm_eps, *full).apply({"params": layer["attn_norm"]}, x),
            lambda model: first(model)[0].input_layernorm(first(model)[1]),
        ),
        "rotary": (apply_rotary(heads, angles), rotated),
        "attention": (
            SelfAttention(c).apply({"params": layer["attn"]}, x, angles, ones, None, jnp.int32(0), False)[0],
            attended,
        ),
        "mlp": (
            GatedMLP(c.mlp_width, False, ("batch", "tokens"), *full).apply({"params": layer["mlp"]}, x),
            lambda model: first(model)[0].mlp(first(model)[1]),
        ),
        "layer 0": (
            DecoderLayer(c).apply({"params": layer}, (x, None), jnp.int32(0), angles, ones, False)[0][0],
            whole,
        ),
    }
    for name, (ours, theirs) in cases.items():
        with torch.no_grad():
            found, exact = numpy_of(theirs(narrow)), numpy_of(theirs(wide))
        print(f"{name}: error {error(ours, exact):.1e}, floor {error(found, exact):.1e}")
        assert error(ours, exact) <= MODULE
