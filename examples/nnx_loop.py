"""Prunes a network of Flax NNX in a plain loop: scikit-learn's digits, half of the MACs.

    python examples/nnx_loop.py

The lines added for pruning are marked "# +". Expect about 95 % for the dense network and for the small one, within half
a minute on one CPU core; `pip install 'sapr_jax[demo]'` brings the digits.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sapr_jax as sapr

EPOCHS, START, BATCH = 10, 4, 64


class Net(nnx.Module):
  def __init__(self, rngs):
    widths = (1, 16, 32, 64)
    self.convs = nnx.List(
      [nnx.Conv(i, o, (3, 3), strides=s, rngs=rngs) for i, o, s in zip(widths, widths[1:], (1, 2, 2), strict=False)]
    )
    self.norms = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs) for width in widths[1:]])
    self.head = nnx.Linear(64, 10, rngs=rngs)

  def __call__(self, x):
    for conv, norm in zip(self.convs, self.norms, strict=True):
      x = nnx.relu(norm(conv(x)))
    return self.head(x.mean(axis=(1, 2)))


@nnx.jit
def train_step(model, optimizer, image, label):
  def loss_fn(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(image), label).mean()

  optimizer.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def logits_of(model, image):
  return model(image)


def accuracy(model, image, label):
  model.eval()
  share = float(jnp.mean(jnp.argmax(logits_of(model, image), axis=-1) == label))
  model.train()
  return share


def main():
  digits = load_digits()
  x = digits.images[..., None].astype(np.float32) / 8 - 1
  train_x, train_y, test_x, test_y = x[:1200], digits.target[:1200], x[1200:], digits.target[1200:]
  steps_per_epoch = len(train_y) // BATCH
  schedule = optax.cosine_decay_schedule(0.1, EPOCHS * steps_per_epoch)

  model = Net(nnx.Rngs(0))
  steps = range(START * steps_per_epoch, EPOCHS * steps_per_epoch)  # +
  gamma = sapr.gamma_for(4, schedule, steps, momentum=0.9)  # +
  options = {"gamma": gamma, "search": sapr.Search(start=START), "select": "unjoined"}  # + (the network is flat)
  pruner = sapr.Pruner(model, train_x[:1], budget=0.5, **options)  # +
  tx = optax.sgd(schedule, momentum=0.9, nesterov=True)
  optimizer = nnx.Optimizer(model, pruner.regularize(tx), wrt=nnx.Param)  # +

  rng = np.random.default_rng(0)
  for _ in range(EPOCHS):
    pruner.update(optimizer, model)  # +
    for rows in rng.permutation(len(train_y))[: steps_per_epoch * BATCH].reshape(-1, BATCH):
      train_step(model, optimizer, train_x[rows], train_y[rows])
  small = pruner.prune(model, optimizer)  # +

  dense_share, small_share = (accuracy(network, test_x, test_y) for network in (model, small))
  print(pruner.report(optimizer))
  print(f"dense  {pruner.graph.macs():>9,} MACs  {dense_share:.2%}")
  print(f"pruned {sapr.count_macs(small, test_x[:1]):>9,} MACs  {small_share:.2%}, as cut")
  assert small_share > dense_share - 0.03, "the cut costs more than three points"


if __name__ == "__main__":
  main()
