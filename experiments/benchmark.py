"""How fast it is on the device at hand, side by side with what else there is, in one run.

    pip install pytorch-fid 'scipy<1.18'         in a scratch environment: its sqrtm call is gone from later scipy
    python experiments/benchmark.py --json fid.json

fid.py against pytorch-fid, on the same random weights and 256-px images: images/s of the network, milliseconds of a
2,048-dimensional Frechet distance, and images/s of fid.py as a whole, from an npz and from a folder of PNGs. Medians
over alternating windows after a warm-up, so that a noisy machine disturbs both alike.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import fid  # noqa: E402


def windows(rivals, count):
    """{name: callable} -> {name: median seconds of a call}, the callables taking turns."""
    seconds = {name: [] for name in rivals}
    for i in range(count + 1):  # the first is the warm-up
        for name, call in rivals.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def pytorch_fid_network(weights, device):
    """pytorch-fid's Inception with `weights` in place of its download."""
    try:
        from pytorch_fid import inception
    except ImportError as e:
        raise SystemExit("benchmark.py: pytorch-fid is not installed; see the top of this file") from e
    inception.load_state_dict_from_url = lambda *args, **kwargs: weights
    return inception.InceptionV3([3]).eval().to(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--images", type=int, default=128, help="for fid.py as a whole")
    parser.add_argument("--json", metavar="OUT")
    args = parser.parse_args()
    device, result = torch.device(args.device), {}
    rs = np.random.RandomState(0)
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)

    torch.manual_seed(0)
    weights = fid.InceptionV3().state_dict()
    torch.save(weights, root / "weights.pth")
    ours, _ = fid.load_inception(root / "weights.pth", device)
    fast, _ = fid.load_inception(root / "weights.pth", device, fast=True)
    theirs = pytorch_fid_network(weights, device)
    batch = torch.from_numpy(rs.randint(0, 256, (args.batch_size, 3, 256, 256)).astype(np.uint8)).to(device)

    @torch.no_grad()
    def run(network, images):
        out = network(images)[0]
        return out.sum().item()  # read, so that nothing is skipped

    rivals = {
        "pytorch-fid": lambda: run(theirs, batch.float() / 255),
        "fid.py": lambda: run(ours, batch),
        "fid.py --fast": lambda: run(fast, batch),
    }
    for name, seconds in windows(rivals, args.windows).items():
        result[f"network, {name}, images/s"] = args.batch_size / seconds

    from pytorch_fid.fid_score import calculate_frechet_distance

    sides = []
    for scale in (np.linspace(0.2, 1, 2048), np.linspace(1, 0.2, 2048)):
        features = rs.standard_normal((3000, 2048)) * scale
        sides += [features.mean(0), np.cov(features, rowvar=False)]
    values = calculate_frechet_distance(*sides), fid.frechet_distance(*sides)
    assert abs(values[0] / values[1] - 1) < 1e-6, values
    rivals = {
        "pytorch-fid": lambda: calculate_frechet_distance(*sides),
        "fid.py": lambda: fid.frechet_distance(*sides),
    }
    for name, seconds in windows(rivals, 3).items():
        result[f"Frechet distance, {name}, s"] = seconds

    pixels = rs.randint(0, 256, (args.images, 32, 32, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    np.savez(root / "images.npz", pixels)
    (root / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(root / "png" / f"{i}.png")
    sets = {"npz": fid.open_set(root / "images.npz")[0], "PNGs": fid.open_set(root / "png")[0]}
    rivals = {name: lambda s=s: fid.extract(s, ours, device, args.batch_size) for name, s in sets.items()}
    for name, seconds in windows(rivals, 2).items():
        result[f"whole, fid.py from {name}, images/s"] = args.images / seconds

    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result["torch"], result["threads"] = str(torch.__version__), torch.get_num_threads()
    for name, value in result.items():
        print(f"{name:<40} {value if not isinstance(value, float) else f'{value:.2f}'}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
