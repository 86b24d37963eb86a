"""The networks in PyTorch, to compare with: in torchvision's form, with its names, of any width. Needs torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, size, stride=1, groups=1):
  return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class Block(nn.Module):
  def __init__(self, convolutions, downsample):
    super().__init__()
    self.depth, self.downsample = len(convolutions), downsample
    for number, layer in enumerate(convolutions, 1):
      setattr(self, f"conv{number}", layer)
      setattr(self, f"bn{number}", nn.BatchNorm2d(layer.out_channels))

  def forward(self, x):
    y = x
    for number in range(1, self.depth + 1):
      y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
      y = F.relu(y) if number < self.depth else y
    return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(Block):
  expansion = 1

  def __init__(self, inputs, width, stride, downsample):
    super().__init__((conv(inputs, width, 3, stride), conv(width, width, 3)), downsample)


class Bottleneck(Block):
  expansion = 4

  def __init__(self, inputs, width, stride, downsample):
    layers = (conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, 4 * width, 1))
    super().__init__(layers, downsample)


class ResNet(nn.Module):
  def __init__(self, block, layers, num_classes=1000, width=64):
    super().__init__()
    self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
    inputs = width
    for stage, blocks in enumerate(layers):
      features, made = width * 2**stage, []
      for index in range(blocks):
        stride = 2 if index == 0 and stage > 0 else 1
        outputs = features * block.expansion
        downsample = None
        if stride != 1 or inputs != outputs:
          downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        made.append(block(inputs, features, stride, downsample))
        inputs = outputs
      setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
    self.fc = nn.Linear(inputs, num_classes)

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
    for stage in range(1, 5):
      x = getattr(self, f"layer{stage}")(x)
    return self.fc(x.mean((2, 3)))


def resnet18(num_classes=1000, width=64):
  return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, width)


def resnet50(num_classes=1000, width=64):
  return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width)


class OptionABlock(BasicBlock):
  def __init__(self, inputs, width, stride):
    super().__init__(inputs, width, stride, None)
    if stride != 1:
      added = width - inputs
      self.downsample = lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, added // 2, added - added // 2))


class CifarResNet(nn.Module):
  """With the names of most repositories: torchvision's, but `linear`."""

  def __init__(self, depth, num_classes=10, widths=(16, 32, 64)):
    super().__init__()
    self.conv1, self.bn1 = conv(3, widths[0], 3), nn.BatchNorm2d(widths[0])
    inputs = widths[0]
    for stage, width in enumerate(widths):
      made = []
      for index in range((depth - 2) // 6):
        made.append(OptionABlock(inputs, width, 2 if index == 0 and stage > 0 else 1))
        inputs = width
      setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
    self.linear = nn.Linear(inputs, num_classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    for stage in range(1, 4):
      x = getattr(self, f"layer{stage}")(x)
    return self.linear(x.mean((2, 3)))


def conv_norm_activation(inputs, outputs, size, stride=1, groups=1):
  return nn.Sequential(conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
  def __init__(self, inputs, outputs, stride, expansion):
    super().__init__()
    hidden = inputs * expansion
    self.residual = stride == 1 and inputs == outputs
    layers = [conv_norm_activation(inputs, hidden, 1)] if expansion != 1 else []
    layers += [conv_norm_activation(hidden, hidden, 3, stride, hidden), conv(hidden, outputs, 1)]
    self.conv = nn.Sequential(*layers, nn.BatchNorm2d(outputs))

  def forward(self, x):
    return x + self.conv(x) if self.residual else self.conv(x)


def make_divisible(value):
  rounded = max(8, int(value + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * value else rounded + 8


class MobileNetV2(nn.Module):
  stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

  def __init__(self, num_classes=1000, width_mult=1.0, small_images=False):
    super().__init__()
    inputs, last = make_divisible(32 * width_mult), make_divisible(1280 * max(1.0, width_mult))
    features = [conv_norm_activation(3, inputs, 3, 1 if small_images else 2)]
    for stage, (expansion, width, blocks, stride) in enumerate(self.stages):
      width = make_divisible(width * width_mult)
      for index in range(blocks):
        step = stride if index == 0 and not (small_images and stage == 1) else 1
        features.append(InvertedResidual(inputs, width, step, expansion))
        inputs = width
    self.features = nn.Sequential(*features, conv_norm_activation(inputs, last, 1))
    self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, num_classes))

  def forward(self, x):
    return self.classifier(self.features(x).mean((2, 3)))


def count_macs(model, shape):
  """Counts the multiply-accumulates of convolutions and linear layers for an image `[channels, height, width]`."""
  total = 0

  def add(layer, inputs, output):
    nonlocal total
    total += layer.weight[0].numel() * output[0].numel()

  hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
  with torch.no_grad():
    model.eval()(next(model.parameters()).new_zeros(1, *shape))
  for hook in hooks:
    hook.remove()
  return total


def randomize(model, seed=0):
  """Draws weights that keep the size of activations, and statistics and scales far from their defaults."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, nn.Conv2d | nn.Linear):
        fan_in = module.weight[0].numel()
        module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5)
      if isinstance(module, nn.Linear):
        module.bias.copy_(0.1 * torch.randn(module.bias.shape, generator=generator))
      if isinstance(module, nn.BatchNorm2d):
        statistics = dict(module.named_buffers())
        for tensor, low, high in (
          (module.weight, 0.6, 1.2),
          (module.bias, -0.3, 0.3),
          (statistics["running_mean"], -0.3, 0.3),
          (statistics["running_var"], 0.5, 1.5),
        ):
          tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
        statistics["num_batches_tracked"].fill_(7)
  return model.eval()
