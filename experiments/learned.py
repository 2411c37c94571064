"""What the comparisons learn here, from the images at hand: the classifier whose features a distance is taken in, and
small teachers."""

import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from inputs.teachers import find_encoder, load_encoder
from plumbing.checkpoints import read_checkpoint
from plumbing.files import write_whole
from plumbing.processes import fast_bf16
from train import split


def convolution(a, b):
    return nn.Sequential(nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Classifier(nn.Module):
    """uint8 [B, 3, H, W] -> logits [B, classes]; .features(images) -> [B, 256]. A residual network for 32 px.

    Larger images are averaged down to 32 px first: the distance does not see what is finer.
    """

    def __init__(self, classes, width=32):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = convolution(3, width)
        self.widen = nn.ModuleList(convolution(a, b) for a, b in zip(widths, widths[1:]))
        self.residual = nn.ModuleList(nn.Sequential(convolution(b, b), convolution(b, b)) for b in widths[1:])
        self.head = nn.Linear(widths[-1], classes)
        self.to(memory_format=torch.channels_last)  # a fifth less time on a CPU

    def features(self, images):
        x = images.float() / 127.5 - 1
        if x.shape[-1] > 32:
            x = F.adaptive_avg_pool2d(x, 32)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # (B, 32, 32, 32)
        for widen, residual in zip(self.widen, self.residual):
            x = F.max_pool2d(widen(x), 2)
            x = x + residual(x)  # (B, 64, 16, 16), (B, 128, 8, 8), (B, 256, 4, 4)
        return x.mean((2, 3))  # (B, 256)

    def forward(self, images):
        return self.head(self.features(images))  # (B, classes)


def fit(network, logits, opt, data, steps, device, desc):
    """Train `network` in place, logits(images uint8) being its answer -> accuracy on images that it does not see.

    Cross-entropy, one cycle of opt's learning rate, batches of 128, flips, shifts of up to a sixteenth.
    """
    seen, unseen = parts_of(data)
    rng, top = np.random.default_rng(0), opt.defaults["lr"]
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, top, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device))
    network.to(device).train()
    for _ in tqdm(range(steps), desc, unit="step", mininterval=0.5 if sys.stderr.isatty() else 30):
        images, labels = (a.to(device) for a in data[np.sort(rng.choice(seen, 128))][:2])
        flips = torch.from_numpy(rng.random(128) < 0.5).to(device)
        images = torch.where(flips[:, None, None, None], images.flip(3), images)
        images = shifted(
            images, torch.from_numpy(rng.integers(0, 2 * (images.shape[-1] // 16) + 1, (2, 128))).to(device)
        )
        with autocast:
            loss = F.cross_entropy(logits(images), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        cycle.step()
    network.eval()
    right = 0
    with torch.no_grad():
        for part in np.array_split(unseen, -(-len(unseen) // 256)):
            images, labels = data[part][:2]
            right += (logits(images.to(device)).argmax(1).cpu() == labels).sum().item()
    return right / len(unseen)


def shifted(images, places):
    """images [B, 3, S, S] in a frame of S / 16 of mirrored edges, cut out from places [2, B], rows and columns."""
    side = images.shape[-1]
    wide = F.pad(images.float(), [side // 16] * 4, "reflect").permute(0, 2, 3, 1)
    rows, columns = places[..., None] + torch.arange(side, device=images.device)  # (B, S) each
    one = torch.arange(len(images), device=images.device)[:, None, None]
    return wide[one, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def parts_of(data):
    """(indices that are learned from, up to 5,000 others for the accuracy), both of train.py's training images."""
    training, _ = split(len(data))
    order = np.random.default_rng(1).permutation(training)
    few = min(5000, len(order) // 10)
    return np.sort(order[few:]), order[:few]  # not sorted: the first of them are of all classes


def classifier_for(path, data, steps, device):
    """The classifier in `path`, which is trained and written there if it is absent -> (network, its accuracy)."""
    torch.manual_seed(0)
    network = Classifier(len(data.classes))
    path.parent.mkdir(parents=True, exist_ok=True)  # not only found impossible after the training
    if not path.exists():
        opt = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        accuracy = fit(network, network, opt, data, steps, device, "classifier")
        state = dict(state_dict=network.state_dict(), accuracy=accuracy, classes=data.classes, steps=steps)
        write_whole(path, lambda f: torch.save(state, f))
    state = read_checkpoint(path)
    try:
        network.load_state_dict(state["state_dict"])
        known = state["classes"] == data.classes and state["accuracy"] >= 0
    except (KeyError, TypeError, RuntimeError):
        known = False
    if not known:
        raise ValueError(f"{path} is no classifier of these classes: name another file, or delete it")
    return network.eval().requires_grad_(False).to(device), state["accuracy"]


def learns(name):
    """Whether learn_teacher can make an encoder's weights: it is a ViT of timm, by any name."""
    return name.startswith("timm:") and find_encoder(name, "random").stage is None


def learn_teacher(name, path, data, steps, grid, device):
    """A timm ViT trained to classify `data`, written to `path` as --encoder-weights reads it -> its accuracy.

    It learns from what it will be shown as a teacher. ValueError where the file there is of another network, or of
    other classes or steps.
    """
    import timm  # late: 1.5 s that nothing else here waits for

    known = dict(encoder=name, steps=steps, classes=data.classes)
    if path.exists():
        state = read_checkpoint(path)
        if "accuracy" not in state or any(state.get(key) != value for key, value in known.items()):
            raise ValueError(f"{path} is not {name} after {steps} steps on these classes: name another file")
        return state["accuracy"]
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = load_encoder(name, grid, "random", device)  # it knows size, mean and std
    torch.manual_seed(0)
    model = timm.create_model(shown.entry.timm_id, img_size=shown.side)  # of as many classes: its weights are drawn so

    def logits(images):
        x = (images.float() / 255 - shown.mean) / shown.std
        x = F.interpolate(x, (shown.side, shown.side), mode=shown.entry.resize, align_corners=False)
        return model(x)[:, : len(data.classes)]

    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    accuracy = fit(model, logits, opt, data, steps, device, "teacher")
    state = dict(state_dict=model.cpu().state_dict(), accuracy=accuracy, **known)
    write_whole(path, lambda f: torch.save(state, f))
    return accuracy
