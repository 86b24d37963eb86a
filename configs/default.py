"""Every field of an experiment, with the values that most experiments share. The others override a few.

Any field can be given on the command line: `--config.train.epochs=10`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sapr_jax.configs import Experiment


def get_config() -> ConfigDict:
  """Returns the default configuration."""
  config = Experiment()
  config.seed = 0
  config.steps_per_call = placeholder(int)  # steps in one compiled call; unset: 1 on CPU, else many
  config.eval_batch_size = 512
  config.fast_cpu = True  # on CPUs: layers, compiler options and memory as in sapr_jax/runtime/cpu.py

  config.model = ConfigDict()
  config.model.name = "resnet56"  # a name in sapr_jax.models.MODELS
  config.model.width_multiplier = 1.0
  config.model.dtype = "float32"  # of the computation: float32 or bfloat16
  config.model.remat = False  # compute activations again in the backward pass, to need less memory

  config.init = ConfigDict()
  config.init.weights = placeholder(str)  # start from a saved model (directory) or from PyTorch weights (file)

  config.data = ConfigDict()
  config.data.source = "tfds"  # tfds, folder or digits
  config.data.name = "cifar10"  # of the data set in tensorflow-datasets
  config.data.path = placeholder(str)  # folder: train/<class>/*, test/<class>/* (or val/); tfds: its data directory
  config.data.train_images = placeholder(int)  # use a part only, balanced if labels are known; unset: all
  config.data.test_images = placeholder(int)
  config.data.validation_images = placeholder(int)  # so many training images are held out and evaluated, not the test's
  # Mean and deviation of each channel, of pixels in [0, 1]; unset: those of the saved model in init.weights, or else of
  # the training images.
  config.data.mean = placeholder(tuple)
  config.data.std = placeholder(tuple)
  config.data.flip = True
  config.data.skip_broken = 0  # go on without so many broken images; streamed ones are replaced by the next whole one
  config.data.changed_ok = False  # True: a run that is resumed may have other images than it began with
  config.data.stream = False  # False: all images lie on the devices; True: they are read from disk as they are needed
  # Images on the devices, of one size:
  config.data.crop_padding = 4  # pixels
  # Streamed images, of any size:
  config.data.image_size = placeholder(
    int
  )  # pixels; random-resized crops in training, the centre in evaluation; unset:
  # those of the network in init.weights, or 224
  config.data.eval_resize = placeholder(
    int
  )  # shorter side, before the centre is cropped; unset: likewise, or 8/7 of it
  config.data.workers = placeholder(int)  # processes that decode; 0: threads; unset: threads if up to 4 cores

  # Training of the dense network, the method included (supplement A).
  config.train = phase()
  config.train.epochs = 200
  config.train.decay_epochs = (100, 150)

  # Fine-tuning of the pruned network (supplement A).
  config.finetune = phase()
  config.finetune.epochs = 160
  config.finetune.decay_epochs = (80, 120)

  config.prune = ConfigDict()
  config.prune.proposer = "generator"  # ranks the channels; or l1_norm, l2_norm, batch_norm_scale, taylor, random
  config.prune.cost = "prunable_macs"  # of layers that can be cut; or macs, params, latency: of the whole network
  config.prune.latency_table = placeholder(str)  # file of `sapr latency`; unset: times are measured here, at the start
  config.prune.latency_batch_size = placeholder(int)  # images in a call; unset: those of the table, or 1
  config.prune.p = 0.48  # share of that cost to keep
  config.prune.limit = placeholder(float)  # the cost to keep at most: 30e6, or milliseconds; unset: the share p
  config.prune.start_epoch = 40  # E_start: epochs of plain training before masks are in force and regularize
  config.prune.gamma = 5e-4  # strength of the partial regularization
  config.prune.shrinkage = placeholder(float)  # or: the norm that a dropped channel can lose in all; unset: gamma
  config.prune.form = "penalty"  # penalty: a term of the loss; proximal: a step after the optimizer's, exact zeros
  config.prune.select = "blocks"  # which channel groups: blocks, unjoined or exact
  config.prune.include = ()  # of these, only groups in modules that a glob matches: ("stage1*", "*/conv2"); (): all
  config.prune.exclude = ()  # and none that one of these matches
  config.prune.min_width = 1  # channels that every group keeps
  config.prune.statistics_batches = (
    100  # on which running statistics are measured again after the cut; 0: they are kept
  )
  config.prune.compensation_batches = 0  # on which kept weights are fitted to make up for the cut; 0: they are not
  config.prune.round_to = placeholder(int)  # widths are multiples of this; unset: suits backend and network

  config.importance = ConfigDict()  # where prune.proposer, generator.prior or generator.order name one
  config.importance.compare = "equal_shares"  # of the channels of each group; or group_mean: channels compete
  config.importance.cost_exponent = 0.375  # shares are divided by this power of what a parameter of the group costs

  config.search = ConfigDict()
  config.search.start_epoch = placeholder(int)  # from when on the channels are ranked; unset: prune.start_epoch
  config.search.end_epoch = placeholder(int)  # from when on the masks stay as they are; unset: they never do

  config.generator = ConfigDict()
  config.generator.data_share = 0.1  # of the training images
  config.generator.batch_size = 128
  config.generator.learning_rate = 1e-3  # of AdamW
  config.generator.weight_decay = 1e-2
  config.generator.budget_weight = 4.0  # lambda of the budget penalty
  config.generator.bias = 3.0  # b of Eq. 1
  config.generator.temperature = 0.4  # tau of Eq. 1
  config.generator.prior = placeholder(str)  # an importance such as l2_norm, with which it begins; unset: noise
  config.generator.prior_strength = 4.0  # how firmly it holds to that
  config.generator.order = placeholder(str)  # an importance that ranks within a group; unset: the generator itself

  config.evaluate = ConfigDict()
  config.evaluate.every_epochs = 1  # and after the last epoch of a stage

  config.checkpoint = ConfigDict()
  config.checkpoint.every_epochs = 1
  config.checkpoint.every_steps = placeholder(int)  # also within an epoch; unset: not
  config.checkpoint.keep = 2  # the newest
  config.checkpoint.keep_every_epochs = placeholder(int)  # and those of every n-th epoch; unset: none

  config.report = ConfigDict()
  config.report.latency_batch_sizes = (1, 128)
  config.report.latency_repeats = 15
  config.report.page = True  # report.html at the end, if pip install 'sapr_jax[report]' was done
  config.report.wandb_project = placeholder(str)  # send records to Weights & Biases too; needs 'sapr_jax[wandb]'
  return config.lock()  # a misspelt field is an error, in the files that override it too


def phase() -> ConfigDict:
  """Returns the fields of training or fine-tuning."""
  config = ConfigDict()
  config.optimizer = "sgd"  # sgd or adamw
  config.batch_size = 128  # of all devices together
  config.accumulate = 1  # pieces in which a device takes its part of the batch, to need less memory
  config.learning_rate = 0.1
  config.base_batch_size = placeholder(int)  # learning_rate is meant for this many images; unset: for batch_size
  config.warmup_epochs = 0.0  # the learning rate first rises linearly for so long
  config.schedule = "step"  # step: multiply by decay_factor after each of decay_epochs; cosine: to zero
  config.decay_factor = 0.1
  config.momentum = 0.9  # for adamw: beta_1
  config.nesterov = False
  config.weight_decay = 1e-4
  config.distillation = ConfigDict()
  config.distillation.weight = 0.0  # share of the loss that compares with the dense network as it was at E_start
  config.distillation.temperature = 2.0
  config.weight_decay_of = "all"  # all: every parameter; kernels: of two axes or more; convolutions: three or more
  return config
