"""Small configurations of networks that others wrote: those of Hugging Face's transformers 4, in Flax linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
class Entry:
  """A network of the zoo.

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


_PIXELS = {"pixel_values": PIXELS}
_CLIP = {"text_config": {**TEXT, **SIZES}, "vision_config": {**IMAGE, **SIZES}, "projection_dim": 16}
_OPT = {name: n for name, n in SIZES.items() if name != "intermediate_size"}

ENTRIES: Mapping[str, Entry] = {
  "BERT": Entry("Bert", {**TEXT, **SIZES}, _BERT),
  "RoBERTa": Entry("Roberta", {**TEXT, **SIZES}, _BERT),
  "ELECTRA": Entry("Electra", {**TEXT, **SIZES, "embedding_size": 16}, _BERT),
  "DistilBERT": Entry("DistilBert", {**TEXT, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, _TEXT),
  "GPT-2": Entry("GPT2", {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}, _PLACES),
  "OPT": Entry("OPT", {**TEXT, **_OPT, "ffn_dim": 64, "word_embed_proj_dim": 32}, _PLACES),
  "BLOOM": Entry("Bloom", {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _TEXT),
  "LLaMA": Entry("Llama", {**TEXT, **SIZES}, _PLACES),
  "LLaMA, grouped queries": Entry("Llama", {**TEXT, **SIZES, "num_key_value_heads": 2}, _PLACES),
  "Mistral": Entry("Mistral", {**TEXT, **SIZES, "num_key_value_heads": 2}, _PLACES),
  "Gemma": Entry("Gemma", {**TEXT, **SIZES, "num_key_value_heads": 2, "head_dim": 8}, _PLACES),
  "BART": Entry("Bart", {**TEXT, **BOTH}, {**_TWO, "position_ids": IDS, "decoder_position_ids": IDS}),
  "Whisper": Entry(
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
  "ViT": Entry("ViT", {**IMAGE, **SIZES}, _PIXELS),
  "BEiT": Entry("Beit", {**IMAGE, **SIZES, "vocab_size": 50}, _PIXELS),
  "CLIP": Entry("CLIP", _CLIP, {**_PLACES, **_PIXELS}),
  "ResNet": Entry("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}, _PIXELS),
}
"""Name -> network of the package transformers. T5 is not among them: its code calls what JAX 0.6 removed."""


def network(entry: Entry) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
  """Returns (module, random variables in float64, inputs) of an entry."""
  import transformers

  config = getattr(transformers, f"{entry.config or entry.family}Config")(**entry.fields)
  model = getattr(transformers, f"Flax{entry.family}Model")(config, dtype=jnp.float64, _do_init=False)
  shapes: Any = dict(model.params_shape_tree)
  rng = np.random.default_rng(0)

  def draw(path: tuple[str, ...], leaf: Any) -> jax.Array:
    if path[-1] == "var":
      values = rng.uniform(0.5, 2.0, leaf.shape)
    elif path[-1] in ("scale", "weight"):  # of normalizations
      values = 1 + 0.1 * rng.normal(size=leaf.shape)
    else:
      values = rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) < 2 else (leaf.size / leaf.shape[-1]) ** -0.5)
    return jnp.asarray(values, jnp.float64)

  tree = shapes if "params" in shapes else {"params": shapes}
  flat = {path: draw(path, leaf) for path, leaf in traverse_util.flatten_dict(tree).items()}
  inputs = {name: None if value is None else jnp.asarray(value) for name, value in entry.inputs.items()}
  return model.module, traverse_util.unflatten_dict(flat), {**inputs, "deterministic": True}
