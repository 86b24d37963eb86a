"""Prunes a ResNet in the idiom of Flax's ImageNet example: a `TrainState` with batch statistics, one jitted step.

    python examples/train_state.py                       # scikit-learn's digits: about a minute on one CPU core
    python examples/train_state.py --data DIR --epochs 5 # a folder of images: DIR/train/<class>/*, DIR/test/<class>/*

The lines added for pruning are marked "# +"; `apply_gradients` is Flax's own, and whatever saves the `TrainState` saves
the pruning with it. With --weights the network begins with those of a saved model or of PyTorch, and is regularized
from the first step on; else it is trained from scratch, and regularized from a fifth of the epochs on. After the cut
it is fine-tuned.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import sapr_jax as sapr
from sapr_jax import data


class TrainState(train_state.TrainState):
  batch_stats: dict

  @property
  def variables(self):
    return {"params": self.params, "batch_stats": self.batch_stats}


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def train_step(state, batch):
  def loss_fn(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits, updated = state.apply_fn(variables, batch["image"], train=True, mutable=["batch_stats"])
    return cross_entropy(logits, batch["label"]), updated

  grads, updated = jax.grad(loss_fn, has_aux=True)(state.params)
  return state.apply_gradients(grads=grads, batch_stats=updated["batch_stats"])


@jax.jit
def count_correct(state, batch):
  return jnp.sum(jnp.argmax(state.apply_fn(state.variables, batch["image"], train=False), axis=-1) == batch["label"])


def accuracy(state, split, normalize, size=300):
  starts = range(0, len(split), size)
  parts = ({"image": normalize(split.images[i : i + size]), "label": split.labels[i : i + size]} for i in starts)
  return sum(int(count_correct(state, part)) for part in parts) / len(split)


def batches_of(split, normalize, rng, size, crop, flip):
  """Yields an epoch of random batches, augmented: shifted by up to `crop` pixels, and mirrored."""
  height, width = split.images.shape[1:3]
  for rows in rng.permutation(len(split))[: len(split) // size * size].reshape(-1, size):
    x = np.pad(split.images[rows], ((0, 0), (crop, crop), (crop, crop), (0, 0)))
    top, left = rng.integers(0, 2 * crop + 1, (2, size))
    x = np.stack([image[t : t + height, u : u + width] for image, t, u in zip(x, top, left, strict=True)])
    if flip:
      x = np.where(rng.integers(0, 2, (size, 1, 1, 1)) > 0, x[:, :, ::-1], x)
    yield {"image": normalize(x), "label": split.labels[rows]}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data", help="folder of images train/<class>/*, test/<class>/*; without: the digits")
  parser.add_argument("--train_images", type=int, help="use so many of them")
  parser.add_argument("--test_images", type=int)
  parser.add_argument("--model", default=None, help="a name in sapr_jax.models.MODELS")
  parser.add_argument("--weights", help="first weights: a saved model (directory) or PyTorch weights (file)")
  parser.add_argument("--epochs", type=int, default=10)
  parser.add_argument("--finetune_epochs", type=int, default=2)
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--learning_rate", type=float)
  parser.add_argument("--weight_decay", type=float, default=1e-4)
  parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs to keep, of those that can be cut")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)

  source = "digits" if args.data is None else "folder"
  dataset = data.load_dataset(
    data.DataSpec(source, path=args.data, train_images=args.train_images, test_images=args.test_images, seed=args.seed)
  )
  mean, std = (np.asarray(statistic, np.float32) for statistic in dataset.channel_statistics())
  normalize = lambda images: (images.astype(np.float32) / 255 - mean) / std  # noqa: E731
  rng = np.random.default_rng(args.seed)
  crop, flip = (1, False) if args.data is None else (4, True)
  epoch_of_batches = lambda: batches_of(dataset.train, normalize, rng, args.batch_size, crop, flip)  # noqa: E731
  name = args.model or ("resnet8" if args.data is None else "resnet20")
  narrow = {"width_multiplier": 0.5} if args.data is None else {}
  model = sapr.models.create(name, num_classes=len(dataset.class_names), **narrow)
  image = normalize(dataset.train.images[:1])
  if args.weights is None:
    variables = jax.jit(model.init)(jax.random.key(args.seed), image)
  elif args.weights.endswith((".safetensors", ".th", ".pth", ".pt")):
    variables = sapr.import_torch(args.weights, model, image.shape)
  else:
    model, variables = sapr.load(args.weights, base=model)

  steps_per_epoch = len(dataset.train) // args.batch_size
  rate = args.learning_rate or (0.1 if args.weights is None else 0.01)
  schedule = optax.cosine_decay_schedule(rate, args.epochs * steps_per_epoch)
  tx = optax.chain(optax.add_decayed_weights(args.weight_decay), optax.sgd(schedule, momentum=0.9))

  start = 0 if args.weights else args.epochs // 5  # +
  steps = range(start * steps_per_epoch, args.epochs * steps_per_epoch)  # +
  gamma = sapr.gamma_for(4, schedule, steps, momentum=0.9)  # +
  pruner = sapr.Pruner(model, variables, image, budget=args.keep, gamma=gamma, search=sapr.Search(start=start))  # +
  tx = pruner.regularize(tx)  # +

  state = TrainState.create(apply_fn=model.apply, tx=tx, **variables)
  for epoch in range(args.epochs):
    state = pruner.update(state, state.variables)  # +
    for batch in epoch_of_batches():
      state = train_step(state, batch)
    print(f"epoch {epoch + 1}: {accuracy(state, dataset.test, normalize):.2%}")

  renew = lambda model, v, batch: model.apply(v, batch["image"], train=True, mutable=["batch_stats"])[1]  # noqa: E731  +
  batches = itertools.islice(itertools.chain.from_iterable(epoch_of_batches() for _ in range(60)), 60)  # +
  small_model, small_variables = pruner.prune(state.variables, state, batches, renew)  # +

  decay = optax.cosine_decay_schedule(rate / 5, max(1, args.finetune_epochs * steps_per_epoch))
  tx = optax.chain(optax.add_decayed_weights(args.weight_decay), optax.sgd(decay, momentum=0.9))
  small = TrainState.create(apply_fn=small_model.apply, tx=tx, **small_variables)
  before = accuracy(small, dataset.test, normalize)
  for _ in range(args.finetune_epochs):
    for batch in epoch_of_batches():
      small = train_step(small, batch)

  dense, after = accuracy(state, dataset.test, normalize), accuracy(small, dataset.test, normalize)
  print(pruner.report(state))
  print(f"dense  {pruner.graph.macs():>11,} MACs  {dense:.2%}")
  print(f"pruned {pruner.graph.macs(pruner.masks(state)):>11,} MACs  {after:.2%}, {before:.2%} before fine-tuning")
  if args.data is None:
    assert after > dense - 0.03, "pruning costs more than three points"


if __name__ == "__main__":
  main()
