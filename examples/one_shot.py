"""Prunes a trained network at once, by the norms of its weights, and fine-tunes it: scikit-learn's digits.

    python examples/one_shot.py

The three lines of pruning are marked "# +". No regularization, no generator: what `optax_loop.py` has to beat.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapr_jax as sapr

BATCH = 64


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    for features, stride in ((16, 1), (32, 2), (64, 2)):
      x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
    return nn.Dense(10)(x.mean(axis=(1, 2)))


def train_network(model, variables, data, epochs, learning_rate):
  """Returns the variables after some epochs of SGD."""
  steps_per_epoch = len(data["label"]) // BATCH
  tx = optax.sgd(optax.cosine_decay_schedule(learning_rate, epochs * steps_per_epoch), momentum=0.9, nesterov=True)

  @jax.jit
  def step(variables, opt_state, batch):
    def loss_fn(params):
      logits = model.apply({"params": params}, batch["image"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    updates, opt_state = tx.update(jax.grad(loss_fn)(variables["params"]), opt_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], updates)}, opt_state

  rng, opt_state = np.random.default_rng(0), tx.init(variables["params"])
  for _ in range(epochs):
    for rows in rng.permutation(len(data["label"]))[: steps_per_epoch * BATCH].reshape(-1, BATCH):
      variables, opt_state = step(variables, opt_state, {name: values[rows] for name, values in data.items()})
  return variables


def main():
  digits = load_digits()
  images = digits.images[..., None].astype(np.float32) / 8 - 1
  train, test = ({"image": images[part], "label": digits.target[part]} for part in (slice(1200), slice(1200, None)))

  def accuracy(network, weights):
    return float(jnp.mean(jnp.argmax(jax.jit(network.apply)(weights, test["image"]), axis=-1) == test["label"]))

  model = Net()
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  variables = train_network(model, variables, train, epochs=8, learning_rate=0.1)

  graph = sapr.trace_channels(model, variables, images[:1].shape, select="unjoined")  # +
  scores = sapr.rank_within_groups(sapr.l2_norm(variables["params"], graph))  # + (equal shares of all layers)
  masks = sapr.project_to_budget(graph, scores, sapr.macs_budget(graph, 0.5))  # +
  small_model, small_variables = sapr.prune(model, variables, graph, masks)

  before = accuracy(small_model, small_variables)
  small_variables = train_network(small_model, small_variables, train, epochs=4, learning_rate=0.02)
  dense, after = accuracy(model, variables), accuracy(small_model, small_variables)
  print(f"dense  {graph.macs():>9,} MACs  {dense:.2%}")
  print(f"pruned {graph.macs(masks):>9,} MACs  {after:.2%}, {before:.2%} before fine-tuning")
  assert after > dense - 0.03, "pruning costs more than three points"


if __name__ == "__main__":
  main()
