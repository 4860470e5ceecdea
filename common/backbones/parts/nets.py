"""The networks whose architecture the project writes itself, each with the kind that it belongs to.

Names of submodules are those of the weights' files: a digest covers them.

# Shapes: B examples, L samples, F frames of 10 ms, W windows, M mel bands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

# --- small_cnn and series_cnn ----------------------------------------------------------------------------------------


def build_small_cnn(channels: Sequence[int], pool: int) -> nn.Sequential:
    """Returns a net for grey images: blocks of 3x3 convolution, BatchNorm and ReLU, halved between blocks, averaged.

    Args:
        channels: number of output channels of each block.
        pool: side of the map that the last block is averaged to and that is flattened.
    """
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
        if index > 0:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(inner, outer, kernel_size=3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten())


def build_series_cnn(channels: Sequence[int], pool: int) -> nn.Sequential:
    """Returns a net for series: blocks of convolution, BatchNorm, ReLU and halving, averaged over parts of the time.

    Args:
        channels: number of output channels of each block.
        pool: number of parts of the time that the last block is averaged over.
    """
    layers: list[nn.Module] = []
    for index, (inner, outer) in enumerate(zip((1, *channels[:-1]), channels, strict=True)):
        kernel = 7 if index == 0 else 5
        layers += [nn.Conv1d(inner, outer, kernel, padding=kernel // 2), nn.BatchNorm1d(outer), nn.ReLU()]
        layers.append(nn.MaxPool1d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(pool), nn.Flatten())


# --- cifar_resnet ----------------------------------------------------------------------------------------------------


class _BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.added = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut without parameters (option A): every other pixel, and channels of zeros on both sides.
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        inside = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inside)) + shortcut)


class CifarNet(nn.Module):
    """Pictures B x 3 x 32 x 32 -> features B x 64 of a CIFAR ResNet."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, 1, num_blocks)
        self.layer2 = _stage(16, 32, 2, num_blocks)
        self.layer3 = _stage(32, 64, 2, num_blocks)

    def forward(self, pixels_B: Tensor) -> Tensor:
        """Returns features B x 64."""
        x = self.relu(self.bn1(self.conv1(pixels_B)))
        pooled_B64: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return pooled_B64


def _stage(inner: int, outer: int, stride: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _BasicBlock(inner, outer, stride), *(_BasicBlock(outer, outer, 1) for _ in range(num_blocks - 1))
    )


# --- speaker_encoder -------------------------------------------------------------------------------------------------


class SpeakerNet(nn.Module):
    """Mel spectra B x F x M -> features B x width: LSTM layers on windows of the frames, averaged over windows."""

    def __init__(self, num_mels: int, width: int, window: int, step: int) -> None:
        super().__init__()
        self.width, self.window, self.step = width, window, step
        self.lstm = nn.LSTM(num_mels, width, num_layers=3, batch_first=True)
        self.linear = nn.Linear(width, width)

    def forward(self, spectra_BFM: Tensor) -> Tensor:
        """Returns features B x width of length 1."""
        windows_BWFM = spectra_BFM.unfold(1, self.window, self.step).transpose(2, 3)
        _, (last, _) = self.lstm(windows_BWFM.flatten(0, 1))
        directions = normalize(torch.relu(self.linear(last[-1])), dim=1)
        return normalize(directions.reshape(*windows_BWFM.shape[:2], self.width).mean(1), dim=1)


def initialise_speaker_net(network: SpeakerNet, num_mels: int) -> SpeakerNet:
    """Draws layers that pass differences between recordings on, in place; returns the net."""
    for values in network.parameters():
        if values.dim() == 1:
            # Spectra are small numbers: torch's own initialisation hears little but its biases.
            nn.init.zeros_(values)
        else:
            nn.init.normal_(values, std=1.0 if values.shape[1] == num_mels else 2.0 / network.width**0.5)
    return network


# --- speech_embedding ------------------------------------------------------------------------------------------------

# Of each stage: channels, the pooling (time, mel bands) that ends it, and how many convolutions it has.
_STAGES = ((24, (2, 2), 3), (48, (1, 2), 4), (72, (2, 2), 4), (96, (1, 2), 4), (96, (2, 2), 4))


class _Mel(nn.Module):
    def __init__(self, num_bins: int, num_mels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(num_bins, num_mels))


class _Frontend(nn.Module):
    """Log-mel frames of a recording, at most 80 dB below its loudest."""

    def __init__(self, num_mels: int, fft_size: int, hop: int) -> None:
        super().__init__()
        self.stft_real = nn.Conv1d(1, fft_size // 2 + 1, fft_size, hop, bias=False)
        self.stft_imag = nn.Conv1d(1, fft_size // 2 + 1, fft_size, hop, bias=False)
        self.mel = _Mel(fft_size // 2 + 1, num_mels)

    def forward(self, samples_BL: Tensor) -> Tensor:
        wave_B1L = samples_BL.unsqueeze(1)
        power = self.stft_real(wave_B1L) ** 2 + self.stft_imag(wave_B1L) ** 2
        decibel_BFM = 10.0 * torch.log10((power.transpose(1, 2) @ self.mel.weight).clamp(min=1e-10))
        loudest_B11 = decibel_BFM.amax((1, 2), keepdim=True)
        return torch.maximum(decibel_BFM, loudest_B11 - 80.0) / 10.0 + 2.0


class SpeechNet(nn.Module):
    """Samples B x L in the range of 16-bit integers -> features B x 96, averaged over windows.

    Args:
        num_mels: number of mel bands M.
        fft_size: samples of one Fourier transform.
        hop: samples from one frame to the next.
        window: frames of one window.
        step: frames from one window to the next.
    """

    def __init__(self, *, num_mels: int, fft_size: int, hop: int, window: int, step: int) -> None:
        super().__init__()
        self.window, self.step = window, step
        self.frontend = _Frontend(num_mels, fft_size, hop)
        self.layers: list[str | tuple[int, int]] = []
        inner, number = 1, 0
        for width, pool, count in _STAGES:
            for index in range(count):
                first = number == 0
                across = first or (index % 2 == 1 if width == 24 else index % 2 == 0)
                kernel = (3, 3) if first else (1, 3) if across else (3, 1)
                name = f"conv{number}"
                self.add_module(name, nn.Conv2d(inner, width, kernel, padding=(0, 1) if across else 0))
                self.layers.append(name)
                inner, number = width, number + 1
            self.layers.append(pool)
        self.conv19 = nn.Conv2d(inner, 96, (3, 1), bias=False)

    def open_windows(self, samples_BL: Tensor) -> Tensor:
        """Returns windows B x W x 1 x F x M of log-mel frames."""
        frames_BFM: Tensor = self.frontend(samples_BL)
        windows_BWFM: Tensor = frames_BFM.unfold(1, self.window, self.step).transpose(2, 3)
        return windows_BWFM.unsqueeze(2)

    def forward(self, samples_BL: Tensor) -> Tensor:
        """Returns features B x 96."""
        windows_BW1FM = self.open_windows(samples_BL)
        x = self.apply_layers(windows_BW1FM.flatten(0, 1), self.layers)
        averaged_B96: Tensor = self.conv19(x).reshape(windows_BW1FM.shape[0], -1, 96).mean(1)
        return averaged_B96

    def apply_layers(self, maps: Tensor, layers: Sequence[str | tuple[int, int]]) -> Tensor:
        """Returns what some of the net's layers make of maps N x channels x time x mel bands."""
        for layer in layers:
            if isinstance(layer, str):
                maps = nn.functional.leaky_relu(self.get_submodule(layer)(maps), 0.2).clamp(min=-0.4)
            else:
                maps = nn.functional.max_pool2d(maps, layer, layer)
        return maps


class LowerSpeechNet(nn.Module):
    """The net up to one of its convolutions: samples B x L -> maps B x channels x W x time x mel bands.

    Args:
        network: the whole net.
        block: name of the convolution.
    """

    def __init__(self, network: SpeechNet, block: str) -> None:
        super().__init__()
        self.network = network
        self.before = network.layers[: network.layers.index(block)] if block in network.layers else network.layers

    def forward(self, samples_BL: Tensor) -> Tensor:
        """Returns the maps; windows are a dimension of their own."""
        windows_BW1FM = self.network.open_windows(samples_BL)
        maps = self.network.apply_layers(windows_BW1FM.flatten(0, 1), self.before)
        by_window = maps.reshape(*windows_BW1FM.shape[:2], *maps.shape[1:])
        return by_window.transpose(1, 2).contiguous()


class UpperSpeechNet(nn.Module):
    """The net from one of its convolutions on: maps B x channels x W x time x mel bands -> features B x 96.

    Convolutions have three dimensions, with a kernel of 1 over windows: so a record stays one row, whose gradient
    Opacus can tell from those of others.

    Args:
        network: the whole net.
        block: name of the convolution.
    """

    def __init__(self, network: SpeechNet, block: str) -> None:
        super().__init__()
        whole = [*network.layers, "conv19"]
        self.layers: list[str | tuple[int, int]] = whole[whole.index(block) : -1]
        for name in (*self.layers, "conv19"):
            if isinstance(name, str):
                self.add_module(name, _add_dimension(network.get_submodule(name)))

    def forward(self, maps: Tensor) -> Tensor:
        """Returns features B x 96."""
        for layer in self.layers:
            if isinstance(layer, str):
                maps = nn.functional.leaky_relu(self.get_submodule(layer)(maps), 0.2).clamp(min=-0.4)
            else:
                maps = nn.functional.max_pool3d(maps, (1, *layer), (1, *layer))
        features_BDN: Tensor = self.get_submodule("conv19")(maps).flatten(2)
        return features_BDN.mean(2)


def _add_dimension(flat: nn.Module) -> nn.Conv3d:
    """Returns a convolution in two dimensions as one in three."""
    assert isinstance(flat, nn.Conv2d)
    height, width = flat.kernel_size
    above, beside = (int(each) for each in flat.padding)
    layer = nn.Conv3d(
        flat.in_channels,
        flat.out_channels,
        (1, height, width),
        padding=(0, above, beside),
        bias=flat.bias is not None,
        device=flat.weight.device,
    )
    with torch.no_grad():
        layer.weight.copy_(flat.weight.unsqueeze(2))
        if layer.bias is not None and flat.bias is not None:
            layer.bias.copy_(flat.bias)
    return layer
