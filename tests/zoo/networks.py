"""Small configurations of networks that others wrote: Hugging Face's transformers 4 and diffusers, in Flax linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

TOKENS = 9
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 50, "max_position_embeddings": 16}
IMAGE = {"image_size": 16, "patch_size": 4}
BOTH = {
  "d_model": 32,
  **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
  **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
}
IDS = np.arange(TOKENS)[None]
ONES = np.ones((1, TOKENS), int)
PIXELS = np.random.default_rng(5).normal(size=(1, 16, 16, 3))

_TEXT = {"input_ids": IDS, "attention_mask": ONES}
_PLACES = {**_TEXT, "position_ids": IDS}
_BERT = {**_PLACES, "token_type_ids": 0 * ONES, "head_mask": None}
_TWO = {**_TEXT, "decoder_input_ids": IDS, "decoder_attention_mask": ONES}


@dataclasses.dataclass(frozen=True)
class Transformer:
  """A network of the package transformers.

  Attributes:
    family: Its classes are `Flax{family}Model` and `{config}Config`.
    fields: Of its configuration.
    inputs: What it is applied to.
    config: Name of its configuration, where that differs.
  """

  family: str
  fields: Mapping[str, Any]
  inputs: Mapping[str, Any]
  config: str | None = None
  package: ClassVar[str] = "transformers"

  def load(self) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Returns (module, shapes of its variables, inputs)."""
    import transformers

    config = getattr(transformers, f"{self.config or self.family}Config")(**self.fields)
    model = getattr(transformers, f"Flax{self.family}Model")(config, dtype=jnp.float64, _do_init=False)
    shapes: Any = dict(model.params_shape_tree)
    tree = shapes if "params" in shapes else {"params": shapes}
    return model.module, tree, {**_arrays(self.inputs), "deterministic": True}


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """A network of the package diffusers: the class `Flax{family}`, its fields, and what it is applied to."""

  family: str
  fields: Mapping[str, Any]
  inputs: Mapping[str, Any]
  package: ClassVar[str] = "diffusers"

  def load(self) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Returns (module, shapes of its variables, inputs)."""
    import diffusers

    module = getattr(diffusers, f"Flax{self.family}")(**self.fields, dtype=jnp.float64)
    inputs = _arrays(self.inputs)
    return module, jax.eval_shape(module.init, jax.random.key(0), **inputs), inputs


Entry = Transformer | Diffusion


def _arrays(inputs: Mapping[str, Any]) -> dict[str, Any]:
  return {name: None if value is None else jnp.asarray(value) for name, value in inputs.items()}


_PIXELS = {"pixel_values": PIXELS}
_UNET = {
  "sample_size": 8,
  "block_out_channels": (32, 64),
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
  "layers_per_block": 1,
  "cross_attention_dim": 16,
  "attention_head_dim": 2,
}
_NOISY = {
  "sample": np.random.default_rng(7).normal(size=(1, 4, 8, 8)),
  "timesteps": np.asarray([3]),
  "encoder_hidden_states": np.random.default_rng(9).normal(size=(1, TOKENS, 16)),
}
_CLIP = {"text_config": {**TEXT, **SIZES}, "vision_config": {**IMAGE, **SIZES}, "projection_dim": 16}
_OPT = {name: n for name, n in SIZES.items() if name != "intermediate_size"}

ENTRIES: Mapping[str, Entry] = {
  "BERT": Transformer("Bert", {**TEXT, **SIZES}, _BERT),
  "RoBERTa": Transformer("Roberta", {**TEXT, **SIZES}, _BERT),
  "ELECTRA": Transformer("Electra", {**TEXT, **SIZES, "embedding_size": 16}, _BERT),
  "DistilBERT": Transformer("DistilBert", {**TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, _TEXT),
  "GPT-2": Transformer("GPT2", {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}, _PLACES),
  "OPT": Transformer("OPT", {**TEXT, **_OPT, "ffn_dim": 64, "word_embed_proj_dim": 32}, _PLACES),
  "BLOOM": Transformer("Bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _TEXT),
  "LLaMA": Transformer("Llama", {**TEXT, **SIZES}, _PLACES),
  "LLaMA, grouped queries": Transformer("Llama", {**TEXT, **SIZES, "num_key_value_heads": 2}, _PLACES),
  "Mistral": Transformer("Mistral", {**TEXT, **SIZES, "num_key_value_heads": 2}, _PLACES),
  "Gemma": Transformer("Gemma", {**TEXT, **SIZES, "num_key_value_heads": 2, "head_dim": 8}, _PLACES),
  "BART": Transformer("Bart", {**TEXT, **BOTH}, {**_TWO, "position_ids": IDS, "decoder_position_ids": IDS}),
  "Whisper": Transformer(
    "Whisper",
    {
      **BOTH,
      "vocab_size": 50,
      "num_mel_bins": 8,
      "max_source_positions": 16,
      "max_target_positions": 16,
      "pad_token_id": 0,
      "bos_token_id": 1,
      "eos_token_id": 2,
      "decoder_start_token_id": 1,
    },
    {
      "input_features": np.random.default_rng(6).normal(size=(1, 8, 32)),
      "decoder_input_ids": IDS,
      "decoder_attention_mask": ONES,
      "decoder_position_ids": IDS,
    },
  ),
  "ViT": Transformer("ViT", {**IMAGE, **SIZES}, _PIXELS),
  "BEiT": Transformer("Beit", {**IMAGE, **SIZES, "vocab_size": 50}, _PIXELS),
  "CLIP": Transformer("CLIP", _CLIP, {**_PLACES, **_PIXELS}),
  "ResNet": Transformer("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}, _PIXELS),
  "Diffusion UNet": Diffusion("UNet2DConditionModel", _UNET, _NOISY),
  "Diffusion VAE": Diffusion(
    "AutoencoderKL",
    {
      "block_out_channels": (32, 64),
      "down_block_types": ("DownEncoderBlock2D",) * 2,
      "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    {"sample": np.random.default_rng(7).normal(size=(1, 3, 16, 16))},
  ),
}
"""Name -> network. T5 is not among them: its code calls what JAX 0.6 removed."""


def network(entry: Entry) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """Returns (module, random variables in float64, inputs) of an entry."""
  module, shapes, inputs = entry.load()
  rng = np.random.default_rng(0)

  def draw(path: tuple[str, ...], leaf: Any) -> jax.Array:
    if path[-1] == "var":
      values = rng.uniform(0.5, 2.0, leaf.shape)
    elif path[-1] in ("scale", "weight"):  # of normalizations
      values = 1 + 0.1 * rng.normal(size=leaf.shape)
    else:
      values = rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) < 2 else (leaf.size / leaf.shape[-1]) ** -0.5)
    return jnp.asarray(values, jnp.float64)

  flat = {path: draw(path, leaf) for path, leaf in traverse_util.flatten_dict(shapes).items()}
  return module, traverse_util.unflatten_dict(flat), inputs
