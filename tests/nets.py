"""Small classifiers that the tests put into the scripts the way a user would.

--backbone tests/nets.py:mlp
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision


def mlp() -> nn.Module:
    """Two layers on 8x8 averages of the image: a method's whole claim runs in a second or two."""
    return nn.Sequential(
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def smooth() -> nn.Module:
    """Softplus and average pooling: smooth enough for central differences."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.Softplus(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.LazyLinear(10),
    )


class Residual(nn.Module):
    """A residual branch that is dropped for half of the images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.depth = torchvision.ops.StochasticDepth(0.5, "row")

    def forward(self, x):
        return x + self.depth(self.conv(x).relu())


def dropout() -> nn.Module:
    """Every kind of random layer: Dropout, Dropout2d and stochastic depth."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.Dropout2d(0.3),
        Residual(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32, 10),
    )


class Stages(nn.Module):
    """Two stages of `features`, the 1x1 convolution that ends them, and a classifier."""

    def __init__(self):
        super().__init__()
        widths = [3, 6, 8]
        stages = [conv_bn(widths[i], widths[i + 1], 3, stride=2, padding=1) for i in range(2)]
        self.features = nn.Sequential(*stages, conv_bn(8, 12, 1))
        self.classifier = nn.Linear(12, 10)


def conv_bn(channels: int, width: int, size: int, **options) -> nn.Module:
    """A convolution, batch norm and EfficientNet's activation."""
    conv = nn.Conv2d(channels, width, size, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.SiLU(inplace=True))


def stages() -> nn.Module:
    return Stages()


def small_vit() -> nn.Module:
    """A ViT for 32x32 with dropout on tokens and on attention.

    Its class token and head start at values that are not 0.
    """
    net = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout=0.1,
        attention_dropout=0.1,
    )
    torch.nn.init.normal_(net.class_token, std=0.02)
    return net


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ScaledBlock(nn.Module):
    """A depthwise block with a learned scale a channel, dropped for a fifth of the images."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = LayerNorm2d(width)
        self.mlp = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.GELU())
        self.project = nn.Conv2d(2 * width, width, 1)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.1))

    def forward(self, x):
        branch = self.gamma * self.project(self.mlp(self.norm(self.conv_dw(x))))
        if self.training:
            kept = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8)
            branch = branch * kept / 0.8
        return x + branch


class Head(nn.Module):
    """Pool, norm and dropout in front of the classification layer, which lies deep in it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = LayerNorm2d(width)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(width, 10)

    def forward(self, x, pre_logits: bool = False):
        x = self.drop(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))
        return x if pre_logits else self.fc(x)


class LikeTimm(nn.Module):
    """Built as the networks of the timm library are: methods for features and for the head."""

    def __init__(self):
        super().__init__()
        self.num_classes = 10
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), LayerNorm2d(8))
        self.stages = nn.Sequential(ScaledBlock(8), ScaledBlock(8))
        self.head = Head(8)

    def get_classifier(self):
        return self.head.fc

    def forward_features(self, x):
        return self.stages(self.stem(x))

    def forward_head(self, x, pre_logits: bool = False):
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def like_timm() -> nn.Module:
    """A small ConvNeXt after timm's fashion."""
    return LikeTimm()


def no_linear() -> nn.Module:
    """Has no layer that could be taken off."""
    return nn.ReLU()


def no_parameters() -> nn.Module:
    """Has nothing to train but its last layer."""
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))


def for_64_pixels() -> nn.Module:
    """Takes images of 64x64 pixels and no others."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 8), nn.ReLU(), nn.Linear(8, 10))


class LinearFirst(nn.Module):
    """Registers its classification layer before the layer that feeds it."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(16, 10)
        self.features = nn.Linear(3 * 32 * 32, 16)

    def forward(self, x):
        return self.classifier(self.features(x.flatten(1)))


def linear_first() -> nn.Module:
    """A network that the wrapper has to refuse."""
    return LinearFirst()


class Twice(torch.autograd.Function):
    """A function as people write their own: it has a backward, and no forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, x):
        return Twice.apply(x)


def no_forward_mode() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), Doubled(), nn.Linear(8, 10))


def no_second_derivative() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Hardsigmoid(), nn.Linear(8, 10))
