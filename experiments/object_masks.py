"""Where the object of an image is, patch by patch, for SRSS: from PNGs that are black on the background."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from experiments.token_sources import GRID
from fid import center_crop


def open_mask(file, side=None):
    """-> bool [H, W], what is not black; with `side`, of the file resized to side x side, however wide it is."""
    try:
        image = Image.open(file)
        image = image.resize((side, side)) if side else image
        return np.atleast_3d(image)[..., [band != "A" for band in image.getbands()]].any(2)
    except Exception as e:  # PIL's readers raise anything
        raise ValueError(f"{file} cannot be read ({type(e).__name__}: {e})") from e


def to_patches(mask):
    """bool [S, S] -> bool [T]: which patches touch the object."""
    p = len(mask) // GRID
    return torch.from_numpy(mask.reshape(GRID, p, GRID, p).any((1, 3)).flatten())


def usable(mask):
    """Whether object and background have a quarter of the patches each, as the released code wants."""
    return 0.25 <= mask.float().mean() <= 0.75


def read_masks(folder, files, size):
    """-> bool [N, T]. All False, so that SRSS leaves the image out, where there is no mask, or none that is usable."""
    masks = torch.zeros(len(files), GRID**2, dtype=torch.bool)
    for i, name in enumerate(files):
        file = Path(folder, name).with_suffix(".png")
        if file.exists():
            whole = Image.fromarray(open_mask(file).astype(np.uint8) * 255)
            mask = to_patches(np.asarray(center_crop(whole, size)) > 127)
            masks[i] = mask if usable(mask) else masks[i]
    return masks


def read_masks_in_order(folder, count):
    """The masks of `count` images without names, as the release pairs them -> bool [count, T].

    The release sorts the files by name, keeps the usable ones, and cuts masks or features, whichever are more, to an
    equal number: right only where the features are of the kept images. Here they have to be as many as the kept masks,
    or as all of them. ValueError otherwise, as every SRSS might be of another image's object.
    """
    files = sorted(file for file in Path(folder).glob("*.png") if not file.name.startswith("."))
    masks = [to_patches(open_mask(file, 256)) for file in tqdm(files, "masks", leave=False)]
    kept = [mask for mask in masks if usable(mask)]
    if len(kept) == count:
        return torch.stack(kept)
    if len(masks) == count:
        return torch.stack([mask if usable(mask) else torch.zeros_like(mask) for mask in masks])
    raise ValueError(
        f"--masks {folder}: of its {len(masks)} PNGs {len(kept)} have a quarter of the patches on the object and a"
        f" quarter off it, and --features {count} images: which mask is of which cannot be told; without --masks the"
        " other metrics are measured"
    )
