"""Prunes a convolutional network in a plain loop with optax: scikit-learn's digits, half of the MACs.

    python examples/optax_loop.py

The lines added for pruning are marked "# +". Expect about 93 % for the dense network and for the small one, within half
a minute on one CPU core; `pip install 'sapr_jax[demo]'` brings the digits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import sapr_jax as sapr

EPOCHS, START, BATCH = 10, 4, 64


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    for features, stride in ((16, 1), (32, 2), (64, 2)):
      x = nn.relu(nn.Conv(features, (3, 3), strides=stride)(x))
    return nn.Dense(10)(x.mean(axis=(1, 2)))


def main():
  digits = load_digits()
  images = digits.images[..., None].astype(np.float32) / 8 - 1
  train, test = ({"image": images[part], "label": digits.target[part]} for part in (slice(1200), slice(1200, None)))
  steps_per_epoch = len(train["label"]) // BATCH
  schedule = optax.cosine_decay_schedule(0.1, EPOCHS * steps_per_epoch)

  model = Net()
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  steps = range(START * steps_per_epoch, EPOCHS * steps_per_epoch)  # +
  gamma = sapr.gamma_for(4, schedule, steps, momentum=0.9)  # +
  search = sapr.Search(start=START)  # +
  options = {"gamma": gamma, "search": search, "select": "unjoined"}  # + (the network is flat, without blocks)
  pruner = sapr.Pruner(model, variables, images[:1], budget=0.5, **options)  # +
  tx = optax.sgd(schedule, momentum=0.9, nesterov=True)
  tx = pruner.regularize(tx)  # +
  opt_state = tx.init(variables["params"])

  @jax.jit
  def train_step(variables, opt_state, batch):
    def loss_fn(params):
      logits = model.apply({"params": params}, batch["image"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    updates, opt_state = tx.update(jax.grad(loss_fn)(variables["params"]), opt_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], updates)}, opt_state

  rng = np.random.default_rng(0)
  for _ in range(EPOCHS):
    opt_state = pruner.update(opt_state, variables)  # +
    for rows in rng.permutation(len(train["label"]))[: steps_per_epoch * BATCH].reshape(-1, BATCH):
      variables, opt_state = train_step(variables, opt_state, {name: values[rows] for name, values in train.items()})
  small_model, small_variables = pruner.prune(variables, opt_state)  # +

  dense, small = (
    float(jnp.mean(jnp.argmax(jax.jit(network.apply)(weights, test["image"]), axis=-1) == test["label"]))
    for network, weights in ((model, variables), (small_model, small_variables))
  )
  print(pruner.report(opt_state))
  print(f"dense  {pruner.graph.macs():>9,} MACs  {dense:.2%}")
  print(f"pruned {pruner.graph.macs(pruner.masks(opt_state)):>9,} MACs  {small:.2%}, as cut")
  assert small > dense - 0.03, "the cut costs more than three points"


if __name__ == "__main__":
  main()
