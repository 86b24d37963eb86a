"""Prunes a small causal language model: its attention heads, the widths of their values, and its hidden units.

    python examples/language_model.py

It predicts the next character of Python's own documentation, which comes with Python. The lines added for pruning are
marked "# +". Two others are trained for as many steps as the pruned model with its fine-tuning: the dense one, and one
that has half of the heads and hidden units from the beginning. Expect about three minutes on one CPU core, and some
33 % of the characters for the pruned model, 36 % for the narrow one and 41 % for the dense one: after a few hundred
steps a model has hardly learned yet what it can do without, and the narrow one has had all of them.
"""

import pydoc_data.topics

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sapr_jax as sapr

STEPS, TUNING, EPOCH, START, BATCH, LENGTH, WIDTH = 400, 200, 50, 2, 16, 64, 64


class Block(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x, mask):
    attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=16 * self.heads, out_features=WIDTH)
    x = x + attention(nn.LayerNorm()(x), mask=mask)
    return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(self.hidden)(nn.LayerNorm()(x))))


class LanguageModel(nn.Module):
  heads: int = 4
  hidden: int = 256

  @nn.compact
  def __call__(self, tokens):
    places = self.param("places", nn.initializers.normal(0.02), (LENGTH, WIDTH))
    x = nn.Embed(128, WIDTH, name="embed")(tokens) + places
    for i in range(2):
      x = Block(self.heads, self.hidden, name=f"block{i}")(x, nn.make_causal_mask(tokens))
    return nn.Dense(128, name="logits")(nn.LayerNorm()(x))


def loss_fn(params, model, tokens):
  logits = model.apply({"params": params}, tokens[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def train(model, variables, tx, text, steps, pruner=None):
  """Returns the trained variables and the optimizer's state."""
  opt_state, rng = tx.init(variables["params"]), np.random.default_rng(steps)

  @jax.jit
  def train_step(params, opt_state, tokens):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, model, tokens), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  for step in range(steps):
    if pruner is not None and step % EPOCH == 0:  # +
      opt_state = pruner.update(opt_state, variables)  # +
    starts = rng.integers(len(text) - LENGTH, size=BATCH)
    params, opt_state = train_step(variables["params"], opt_state, text[starts[:, None] + np.arange(LENGTH + 1)])
    variables = {"params": params}
  return variables, opt_state


def main():
  text = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
  text = np.frombuffer(text, np.uint8).astype(np.int32)
  text, test = text[:-20_000], text[-20_000 : -20_000 + 100 * (LENGTH + 1)].reshape(100, -1)
  one = test[:1, 1:]
  model, narrow = LanguageModel(), LanguageModel(heads=2, hidden=128)
  rate, tuning_rate, long_rate = (
    optax.cosine_decay_schedule(peak, steps) for peak, steps in ((3e-3, STEPS), (1e-3, TUNING), (3e-3, STEPS + TUNING))
  )

  first = jax.jit(model.init)(jax.random.key(0), one)
  gamma = sapr.gamma_for(16, rate, range(START * EPOCH, STEPS))  # + (a head has a larger norm than a filter)
  search = sapr.Search(start=START, end=START + 2, min_width=2)  # +
  pruner = sapr.Pruner(model, first, one, budget=0.5, gamma=gamma, search=search)  # +
  tx = pruner.regularize(optax.adamw(rate), form="proximal", learning_rate=rate)  # +
  variables, opt_state = train(model, first, tx, text, STEPS, pruner)
  small_model, small_variables = pruner.prune(variables, opt_state)  # +
  small_variables, _ = train(small_model, small_variables, optax.adamw(tuning_rate), text, TUNING)
  print(pruner.report(opt_state))

  networks = {"pruned": (small_model, small_variables)}
  for name, network in (("dense", model), ("narrow", narrow)):
    variables = jax.jit(network.init)(jax.random.key(0), one)
    networks[name] = (network, train(network, variables, optax.adamw(long_rate), text, STEPS + TUNING)[0])
  for name in ("narrow", "dense", "pruned"):
    network, variables = networks[name]
    guess = jnp.argmax(jax.jit(network.apply)(variables, test[:, :-1]), axis=-1)
    right = float(jnp.mean(guess == test[:, 1:]))
    print(f"{name:<6} {sapr.count_macs(network, variables, one):>9,} MACs  {right:.2%} of the next characters")


if __name__ == "__main__":
  main()
